"""LoRA adapters of a pipeline: split out when it is saved, put back when it is loaded.

A model that is saved with adapters attached holds `to_q.base_layer.weight` where its class expects `to_q.weight`, and
is reloaded with random weights there. So each adapter becomes a standard LoRA file, which stock `load_lora_weights`
reads, the recipe lists it, and the models are saved as they are without adapters:

    "loras": [{"adapter_name": "style", "weight": 0.8, "file": "lora/style/pytorch_lora_weights.safetensors"}]

A weight is a number, an object with one number a component where they differ, or null for an adapter that is not
active.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from . import _compat

KEY = "loras"
FOLDER = "lora"
FILE_NAME = "pytorch_lora_weights.safetensors"
_FILE = re.compile(rf"{FOLDER}/[A-Za-z0-9_-]+/{re.escape(FILE_NAME)}")

# Settings of a LoRA that need more than the matrices in its file, and the value that means "not used".
_BEYOND_THE_FILE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# Ways to start a LoRA that change the base weights as well.
_CHANGES_THE_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


def check(pipe: Any) -> None:
    """Refuse adapters that cannot be split out.

    Raises:
        ValueError: an adapter is fused, is not a LoRA, or is on a component for which the pipeline loads no LoRA files.
    """
    for component, model in _adapted(pipe).items():
        _check_component(pipe, component, model)


def rows(pipe: Any) -> list[dict[str, Any]]:
    """The recipe's list of the adapters of `pipe`, active ones first, in order of use.

    Raises:
        ValueError: an adapter has several weights on one component.
    """
    models = _adapted(pipe)
    weights = {component: _weights(component, model) for component, model in models.items()}
    active = sorted((_active(model) for model in models.values()), key=len, reverse=True)
    present = {name: None for parts in weights.values() for name in parts}
    names = [name for name in dict.fromkeys([*(name for part in active for name in part), *present]) if name in present]
    files = {name: f"{FOLDER}/{folder}/{FILE_NAME}" for name, folder in _folder_names(names).items()}
    return [{"adapter_name": name, "weight": _one_weight(name, weights), "file": files[name]} for name in names]


def save(pipe: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write each adapter of the list `rows(pipe)` as a LoRA file under `folder`, after `check`."""
    for row in rows:
        name, arguments = row["adapter_name"], {}
        for component, model in _adapted(pipe).items():
            if any(name in layer.scaling for layer in _layers(model)):
                part = pipe.components[component]
                arguments[f"{component}_lora_layers"] = _state_dict(part, name)
                arguments[f"{component}_lora_adapter_metadata"] = _metadata(_configs(part)[name])
        pipe.save_lora_weights((folder / row["file"]).parent, weight_name=FILE_NAME, **arguments)
        sort_metadata(folder / row["file"])


@contextmanager
def base_models(pipe: Any) -> Iterator[None]:
    """While this is open, the models of `pipe` are what they are without adapters and without compiled parts.

    Modules are taken out of the tree and put back; no weight is copied or changed.
    """
    undo: list[Callable[[], Any]] = []

    def put(mapping: dict[str, Any], key: str, value: Any) -> None:
        before = mapping[key]
        mapping[key] = value
        undo.append(lambda: mapping.__setitem__(key, before))

    try:
        for component, part in pipe.components.items():
            if not isinstance(part, nn.Module):
                continue
            model = _model(part)
            if model is not part:
                put(pipe.__dict__, component, model)
            for parent in list(model.modules()):
                for name, child in list(parent._modules.items()):
                    if child is not None and (inner := _base(child)) is not child:
                        put(parent._modules, name, inner)
            if vars(model).get("_hf_peft_config_loaded"):  # transformers would save the adapter instead of the model
                put(vars(model), "_hf_peft_config_loaded", False)
        yield
    finally:
        for step in reversed(undo):
            step()


def sort_metadata(file: Path) -> None:
    """Give equal weights equal bytes: safetensors writes its metadata in an order that changes from file to file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def validate(rows: Any) -> list[dict[str, Any]]:
    """Check a recipe's list of adapters before anything is loaded, and return it.

    Raises:
        ValueError: it is malformed, names one adapter twice, or names a file outside the repository's `lora` folder.
    """
    if not isinstance(rows, list):
        raise ValueError(f"`{KEY}` of the recipe is {rows!r}; it must be a list.")
    names = []
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"adapter_name", "weight", "file"}:
            raise ValueError(f"`{KEY}` of the recipe holds {row!r}; each needs `adapter_name`, `weight` and `file`.")
        if not isinstance(row["adapter_name"], str) or not row["adapter_name"] or row["adapter_name"] in names:
            raise ValueError(
                f"`adapter_name` in the recipe is {row['adapter_name']!r}; it must be a text that stands once."
            )
        if not isinstance(row["file"], str) or not _FILE.fullmatch(row["file"]):
            raise ValueError(f"`file` in the recipe is {row['file']!r}; it must be `{FOLDER}/<name>/{FILE_NAME}`.")
        weights = row["weight"].values() if isinstance(row["weight"], dict) else [row["weight"]]
        for weight in weights:
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number and not (weight is None and not isinstance(row["weight"], dict)):
                raise ValueError(
                    f"`weight` in the recipe is {row['weight']!r}; it must be a number, one a component, or null."
                )
        names.append(row["adapter_name"])
    return rows


def load(pipe: Any, rows: list[dict[str, Any]], files: dict[str, Path]) -> None:
    """Load the adapters of a validated list into `pipe`, with their weights. `files`: local file of each `file`.

    Raises:
        ValueError: the pipeline's class loads no LoRA files, or a file fits none of its models.
    """
    if not rows:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"The recipe lists LoRA files, and {type(pipe).__name__} does not load any.")
    for row in rows:
        file = files[row["file"]]
        pipe.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=row["adapter_name"], use_safetensors=True
        )
        if not any(row["adapter_name"] in names for names in pipe.get_list_adapters().values()):
            raise ValueError(f"LoRA file {row['file']!r} of the recipe fits no model of this {type(pipe).__name__}.")
    active = [row for row in rows if row["weight"] is not None]
    if active:
        pipe.set_adapters([row["adapter_name"] for row in active], [row["weight"] for row in active])
    else:
        pipe.disable_lora()


# --- what is attached ------------------------------------------------------------------------------------------------


def _model(part: nn.Module) -> nn.Module:
    """The model inside a component: not compiled, not wrapped by peft."""
    from peft import PeftModel

    model = _compat.unwrap(part)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base(module: nn.Module) -> nn.Module:
    """The layer inside adapter layers and compiled modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = _compat.unwrap(module)
    return _base(inner.base_layer) if isinstance(inner, BaseTunerLayer) else inner


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _configs(part: nn.Module) -> dict[str, Any]:
    return getattr(_compat.unwrap(part), "peft_config", {})


def _adapted(pipe: Any) -> dict[str, nn.Module]:
    """Models of `pipe` that have adapter layers, by component name."""
    parts = {name: _model(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    wrapped = {name for name, model in parts.items() if model is not _compat.unwrap(pipe.components[name])}  # by peft
    return {name: model for name, model in parts.items() if name in wrapped or _layers(model)}


def _check_component(pipe: Any, component: str, model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    layers, configs = _layers(model), _configs(pipe.components[component])
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"LoRA {', '.join(map(repr, merged))} is fused into `{component}`, which then is neither the base model "
            "nor an adapter. Call `pipe.unfuse_lora()` to share it as a LoRA file, or `pipe.unload_lora_weights()` to "
            "keep it in the weights for good."
        )
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    if kinds != {"LORA"} or not all(isinstance(layer, LoraLayer) for layer in layers):
        found = ", ".join(sorted(kinds - {"LORA"}) or sorted({type(layer).__name__ for layer in layers}))
        raise ValueError(
            f"`{component}` has an adapter of type {found}, which a LoRA file cannot hold. Merge it into the weights "
            "with peft's `merge_and_unload`, or remove it, then save."
        )
    for name, config in configs.items():
        for setting, unused in _BEYOND_THE_FILE.items():
            if getattr(config, setting, unused[0]) not in unused:
                raise ValueError(
                    f"LoRA {name!r} of `{component}` has {setting}={getattr(config, setting)!r}, which a LoRA file "
                    "cannot hold. Merge it into the weights (`pipe.fuse_lora()`, then `pipe.unload_lora_weights()`), "
                    "then save."
                )
        if _CHANGES_THE_BASE.match(str(config.init_lora_weights)):
            raise ValueError(
                f"LoRA {name!r} of `{component}` was started with init_lora_weights={config.init_lora_weights!r}, "
                "which changed the base weights too. Merge it into them (`pipe.fuse_lora()`, then "
                "`pipe.unload_lora_weights()`), then save."
            )
    # The pipeline class itself says which components its LoRA files may hold.
    loadable = _compat.lora_components(pipe)
    saver = getattr(type(pipe), "save_lora_weights", None)
    takes = inspect.signature(saver).parameters if saver is not None else {}
    if component not in loadable or f"{component}_lora_layers" not in takes:
        raise ValueError(
            f"`{component}` of {type(pipe).__name__} has LoRA {', '.join(map(repr, configs))}, and LoRA files of this "
            f"pipeline hold {', '.join(loadable) or 'nothing'}. Merge it into the weights or remove it, then save."
        )


def _active(model: nn.Module) -> list[str]:
    """Adapters that are active on a model, in the order in which their outputs are added."""
    layers = [layer for layer in _layers(model) if not layer.disable_adapters]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _weights(component: str, model: nn.Module) -> dict[str, float | None]:
    """Weight of each adapter on one model, None where it is not active."""
    layers = _layers(model)
    weights: dict[str, float | None] = {}
    for name in dict.fromkeys(name for layer in layers for name in layer.scaling):
        found = {_weight(layer, name) for layer in layers if name in layer.scaling}
        if len(found) != 1:
            raise ValueError(
                f"LoRA {name!r} has {len(found)} different weights on the blocks of `{component}`; a recipe keeps one "
                "weight a component. Call `pipe.set_adapters` with one number, or merge it into the weights."
            )
        weights[name] = found.pop()
    return weights


def _weight(layer: Any, name: str) -> float | None:
    """The factor on an adapter of one layer, beside its own alpha / r."""
    if layer.disable_adapters or name not in layer.active_adapters:
        return None
    rank = layer.r[name] ** 0.5 if layer.use_rslora.get(name) else layer.r[name]
    # Rounded, so that the user's 0.7 does not come back as 0.7000000000000001 and the same product is formed again.
    return float(f"{float(layer.scaling[name]) * rank / layer.lora_alpha[name]:.12g}")


def _one_weight(name: str, weights: dict[str, dict[str, float | None]]) -> float | dict[str, float] | None:
    """One weight for all components, one a component where they differ (0 where it is not active), or None."""
    found = {component: parts[name] for component, parts in weights.items() if name in parts}
    values = set(found.values())
    if len(values) == 1:
        return values.pop()
    return {component: value or 0.0 for component, value in found.items()}


def _state_dict(part: nn.Module, name: str) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(_compat.unwrap(part), adapter_name=name)
    prefix = "base_model.model."  # of models that peft itself wraps
    return {key.removeprefix(prefix).replace("_orig_mod.", ""): value.contiguous() for key, value in state.items()}


def _metadata(config: Any) -> dict[str, Any]:
    """What a LoRA file says of itself: rank, alpha and the like, without the path that it was trained from."""
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    # Its matrices are in the file: how they were started says nothing to who loads it.
    return {
        **metadata,
        "base_model_name_or_path": None,
        "revision": None,
        "auto_mapping": None,
        "init_lora_weights": True,
    }


def _folder_names(names: list[str]) -> dict[str, str]:
    """A folder name for each adapter, of letters, digits, `_` and `-`, all different."""
    folders: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        folder, number = plain, 1
        while folder.lower() in {taken.lower() for taken in folders.values()}:
            number += 1
            folder = f"{plain}_{number}"
        folders[name] = folder
    return folders
