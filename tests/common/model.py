"""What every network must do that a paper brings.

`COMMON` of a model: `inputs`, `(model, seed) -> keyword arguments` of one call, with tensors; `settings` of its class, the
first of them tiny (left out where the defaults are tiny: at most `LARGEST` weights).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import load_file

from diffusers_ext import registry
from diffusers_ext._export import export_class
from tests.unets import fill

from . import arguments
from .journey import SIDES, Parcel
from .models import World, offload
from .scheduler import in_threads
from .suite import Broken, Case, Suite, require
from .traces import require_unchanged, trace

LARGEST = 2_000_000

SUITE = Suite(
    "model",
    "a class derived from ModelMixin and ConfigMixin",
    lambda entry: isinstance(entry, type) and issubclass(entry, ModelMixin) and issubclass(entry, ConfigMixin),
)


def build(case: Case, **changes: Any) -> Any:
    """The model with weights that are the same everywhere."""
    model = case.cls(**{**case.settings[0], **changes})
    size = sum(parameter.numel() for parameter in model.parameters())
    require(size <= LARGEST, f"its first settings give {size:,} weights: let `COMMON.settings[0]` be tiny")
    return fill(model)


def call(case: Case, model: Any, seed: int = 0) -> dict[str, Any]:
    if case.common.inputs is None:
        raise Broken("give `COMMON` `inputs`, (model, seed) -> keyword arguments of one call")
    dtype = next(model.parameters()).dtype
    given = case.common.inputs(model, seed)
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}


@torch.no_grad()
def output(case: Case, model: Any, seed: int = 0) -> torch.Tensor:
    return model(**call(case, model, seed), return_dict=False)[0]


@SUITE.rule()
def loadable_name(case: Case, world: World) -> None:
    """diffusers' loader and `AutoModel` find its class by name."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    name, library = case.cls.__name__, case.cls.__module__.partition(".")[0]
    found = _fetch_class_library_tuple(case.cls)
    require(found == (library, name), f"diffusers writes {found}; name no folder like one of diffusers.pipelines")
    if library == "diffusers_ext":
        require(name in registry.PIPELINES_AND_MODELS, f"{name} is missing in `registry.PIPELINES_AND_MODELS`")


@SUITE.rule()
def config_round_trip(case: Case, world: World) -> None:
    """Constructor, from_config, save_pretrained and from_pretrained keep every argument."""
    cls = case.cls
    for settings in case.settings:
        for changes in [{}, *({name: value} for name, value in arguments.variations(cls, settings))]:
            model = cls(**{**settings, **changes})
            folder = world.folder()
            model.save_config(folder)
            loaded = cls.from_config(json.loads((folder / "config.json").read_text()))
            for when, copied in (("from_config", cls.from_config(model.config)), ("saving and loading", loaded)):
                for name, value in {**arguments.public_config(model), **settings, **changes}.items():
                    found = copied.config.get(name)
                    require(
                        arguments.same(found, value),
                        f"with {changes}: after {when} `{name}` is {found!r}, not {value!r}",
                    )
                shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, copied)]
                require(shapes[0] == shapes[1], f"with {changes}: after {when} the weights have other shapes")


@SUITE.rule()
def positional_arguments(case: Case, world: World) -> None:
    """Arguments given by position are refused or survive from_config."""
    for settings in case.settings:
        again = lambda model: case.cls.from_config(model.config)  # noqa: E731
        arguments.check_positional(case.cls, settings, arguments.public_config, again)


@SUITE.rule()
def wrong_arguments(case: Case, world: World) -> None:
    """A wrong value of a constructor argument is a ValueError that names it."""
    arguments.check_wrong_values(case, case.common.free_text)


@SUITE.rule()
def calls(case: Case, world: World) -> None:
    """A call is finite, the same twice, the same as object and tuple, depends on its inputs and changes nothing."""
    model = build(case)
    expected = output(case, model)
    before = trace(model)
    require(expected.isfinite().all(), "not finite")
    require(not torch.equal(output(case, model, seed=1), expected), "other inputs give the same output")
    require(torch.equal(output(case, model), expected), "the second call differs")
    with torch.no_grad():
        result = model(**call(case, model))
    require(not isinstance(result, tuple), "by default it should return an object")
    require(torch.equal(result[0], expected), "the object holds something else than the tuple")
    require_unchanged(model, before, "after calls")


@SUITE.rule()
def gradients(case: Case, world: World) -> None:
    """Every weight that is to be trained gets a gradient; checkpointing, where supported, gives the same."""
    model = build(case).train()

    def gradients_of() -> dict[str, torch.Tensor | None]:
        torch.manual_seed(0)
        model.zero_grad()
        model(**call(case, model), return_dict=False)[0].float().square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    found = gradients_of()
    missing = [name for name, gradient in found.items() if gradient is None]
    require(not missing, f"no gradient reaches {missing[:5]}")
    if case.cls._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
        for name, gradient in gradients_of().items():
            near = gradient is not None and torch.allclose(gradient, found[name], rtol=1e-4, atol=1e-6)
            require(near, f"with checkpointing another gradient of {name}")


@SUITE.rule()
def save_and_load(case: Case, world: World) -> None:
    """Saved and loaded, also in shards: safetensors with equal tensors, and equal output."""
    model = build(case)
    expected = output(case, model)
    for options in ({}, {"max_shard_size": "20KB"}):
        folder = world.folder()
        model.save_pretrained(folder, **options)
        files = {file.name for file in folder.iterdir()}
        require(
            not any(name.endswith((".bin", ".pt", ".pkl")) for name in files), f"it writes pickles: {sorted(files)}"
        )
        saved = [key for file in folder.glob("*.safetensors") for key in load_file(file)]
        require(sorted(saved) == sorted(model.state_dict()), "the file holds other tensors than the model")
        loaded = case.cls.from_pretrained(folder)
        for key, value in model.state_dict().items():
            require(arguments.same_tensor(loaded.state_dict()[key], value), f"after loading, {key} differs")
        error = (output(case, loaded) - expected).abs().max().item()
        require(error <= 1e-5 * max(expected.abs().max().item(), 1), f"after loading, the output is off by {error:.2g}")


@SUITE.rule()
def copies(case: Case, world: World) -> None:
    """A deep copy gives the same and shares no weights; two models in two threads give what each gives alone."""
    model = build(case)
    clone = copy.deepcopy(model)
    expected = [output(case, model, seed) for seed in (0, 1)]
    require(torch.equal(output(case, clone), expected[0]), "a deep copy gives another output")
    found = in_threads([lambda: output(case, model, 0), lambda: output(case, clone, 1)])
    require(
        all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "in two threads they disturb each other"
    )
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    require(torch.equal(output(case, model), expected[0]), "a deep copy shares weights")


@SUITE.rule()
def bfloat16(case: Case, world: World) -> None:
    """In bfloat16 the output is finite bfloat16."""
    found = output(case, build(case).to(torch.bfloat16))
    require(found.dtype == torch.bfloat16, f"bfloat16 became {found.dtype}")
    require(found.isfinite().all(), "not finite")


def _check_compiled(case: Case, backend: str) -> None:
    model = build(case)
    expected = output(case, model)
    torch._dynamo.reset()
    try:
        error = (output(case, torch.compile(model, backend=backend)) - expected).abs().max().item()
    finally:
        torch._dynamo.reset()
    require(error <= 1e-4 * max(expected.abs().max().item(), 1), f"compiled, the output is off by {error:.2g}")


@SUITE.rule()
def compiled_eagerly(case: Case, world: World) -> None:
    """`torch.compile` traces it (backend "eager") and the output is the same."""
    _check_compiled(case, "eager")


@SUITE.rule(slow=True)
def compiled(case: Case, world: World) -> None:
    """`torch.compile` with inductor gives the same output."""
    _check_compiled(case, "inductor")


@SUITE.rule()
def offloading(case: Case, world: World) -> None:
    """With model, sequential and group offloading the output is the same."""
    expected = output(case, build(case))
    for kind in ("model", "sequential", "group"):
        model = build(case)
        offload(model, kind)
        require(torch.equal(output(case, model), expected), f"with {kind} offloading another output")


@SUITE.rule()
def travels(case: Case, world: World) -> None:
    """Saved and pushed, it loads in a fresh process by its class and by `AutoModel`, and its file alone without this package."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    model = build(case)
    model.save_pretrained(folder)
    exported = export_class(case.cls)
    (folder / f"{exported.stem}.py").write_text(exported.source, encoding="utf-8")
    expected = dict.fromkeys(SIDES, output(case, model))
    return Parcel(
        "model", folder, call(case, model), expected, cls=case.cls.__name__, code=f"{exported.stem}.py", has_code=True
    )


SUITE.pack = pack
