"""A LoRA as what a `Task` trains: attached to a frozen denoiser, saved as the standard file, loaded by stock pipelines.

lora = TrainableLora(pipeline, rank=16)
task.trained = {"lora": lora}           # checkpoints, resume and averaged weights are those of the LoRA alone
with lora.disabled():                   # the base model, bit for bit: a teacher without a second copy
    ...
lora.save_pretrained(folder)            # pipe.load_lora_weights(folder)
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .. import _compat, _loras
from ._card import training_card

# Queries, keys, values and outputs of every attention layer: what diffusers' own LoRA scripts adapt.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "trained"
_OF_ADAPTER = re.compile(rf"\.(lora_[AB])\.{NAME}\.")


class TrainableLora(nn.Module):
    r"""A LoRA on the denoiser of a pipeline. It begins with B = 0, so that the model is bit-equal to the base.

    A layer W becomes :math:`W + \frac{\alpha}{r} B A` (Hu et al. 2021, equation 3). The module has the trained matrices
    alone, in float32, under the names that they have in the file; the denoiser uses the same tensors, and everything else
    in it is frozen. A is drawn from torch's global generator: seed it before.

    Args:
        pipeline: one whose class loads LoRA files for its denoiser (`unet` or `transformer`).
        rank: r.
        alpha: the numerator of the scale; None: the rank, so that the scale is 1.
        targets: the layers to adapt, by the end of their names, or a regular expression for whole names.

    Raises:
        ValueError: `rank` or `alpha` is not positive, the pipeline has no such denoiser or loads no LoRA files for it, no
            layer is a target, or it has an adapter already.
    """

    def __init__(
        self, pipeline: Any, rank: int, alpha: float | None = None, targets: Sequence[str] | str = ATTENTION
    ) -> None:
        from peft import LoraConfig

        super().__init__()
        check_lora(rank, alpha)
        loadable = _compat.lora_components(pipeline) if hasattr(type(pipeline), "save_lora_weights") else ()
        found = [name for name in ("unet", "transformer") if name in loadable and _is_model(pipeline, name)]
        if not found:
            raise ValueError(f"`pipeline` is a {type(pipeline).__name__}, which loads no LoRA files for a denoiser.")
        self._pipeline, self._component = pipeline, found[0]
        model = self._model
        if getattr(model, "peft_config", None):
            names = ", ".join(map(repr, model.peft_config))
            raise ValueError(
                f"The {found[0]} of `pipeline` has LoRA {names}; fuse or unload it before training another."
            )
        if not any(_is_target(name, targets) for name, _ in model.named_modules()):
            raise ValueError(f"`targets` is {targets!r}, and the {found[0]} of `pipeline` has no layer of such a name.")
        config = LoraConfig(
            r=rank, lora_alpha=rank if alpha is None else alpha, init_lora_weights=True,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )  # fmt: skip
        model.requires_grad_(False)
        model.add_adapter(config, NAME)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                _put(self, self._component + "." + _OF_ADAPTER.sub(r".\1.", name), parameter)

    @property
    def _model(self) -> Any:
        return getattr(self._pipeline, self._component)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While this is open, the denoiser is the base model, bit for bit."""
        self._model.disable_adapters()
        try:
            yield
        finally:
            self._model.enable_adapters()

    def enable_gradient_checkpointing(self) -> None:
        """Of the denoiser."""
        self._model.enable_gradient_checkpointing()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors` with rank and alpha in it, for `pipe.load_lora_weights(folder)`."""
        _loras.save(self._pipeline, Path(folder), [{"adapter_name": NAME, "file": _loras.FILE_NAME}])
        _loras.sort_metadata(Path(folder, _loras.FILE_NAME))

    def detach(self) -> None:
        """Take the LoRA off: the denoiser has the layers that it had before, all frozen."""
        self._model.unload_lora()


def _is_model(pipeline: Any, name: str) -> bool:
    return isinstance(getattr(pipeline, name, None), nn.Module)


def _is_target(name: str, targets: Sequence[str] | str) -> bool:
    """Whether peft adapts the layer of this name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, so that `state_dict` has it under that name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_parameter(last, parameter)


def check_lora(rank: int, alpha: float | None) -> None:
    """Raise `ValueError` where one of them is not positive."""
    if rank < 1:
        raise ValueError(f"`rank` is {rank}; it must be at least 1.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"`lora_alpha` is {alpha}; it must be positive.")


def add_lora_arguments(parser: argparse.ArgumentParser, rank: int) -> None:
    """`--rank` and `--lora_alpha`, as in the diffusers examples."""
    parser.add_argument("--rank", type=int, default=rank)
    parser.add_argument("--lora_alpha", type=float, help="The LoRA's scale is alpha / rank; not given: 1.")


def lora_card(args: argparse.Namespace, script: str, summary: dict[str, Any], tags: list[str], loading: str) -> str:
    """The card of a trained LoRA.

    Args:
        args: arguments of the script.
        script: name of its module.
        summary: what `train` returned.
        tags: for the Hub, besides `lora`.
        loading: Python code that loads and uses it, where `BASE` and `REPO` stand for the two repositories.
    """
    base, repo = args.pretrained_model_name_or_path, args.hub_model_id or "path/to/this/folder"
    base = "path/to/the/base/pipeline" if Path(base).exists() else base
    code = loading.replace("REPO", json.dumps(repo)).replace("BASE", json.dumps(base)).strip()
    return training_card(args, script, "LoRA", summary, ["lora", *tags], loading=code)
