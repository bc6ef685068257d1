"""What every pipeline must do.

`COMMON` of a pipeline: `make`, `() -> pipeline`, with tiny parts (left out where the parts of the zoo's `avatars-sd` are
all that it takes); `inputs`, `(steps) -> keyword arguments of a call` without generator (left out where a prompt, or
nothing, is enough).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ext import registry

from . import models
from .arguments import same, same_tensor
from .journey import Parcel, pack_pipeline
from .models import World
from .scheduler import in_threads
from .suite import Broken, Case, Suite, is_class_of, refused, require
from .traces import require_unchanged, trace

SUITE = Suite("pipeline", "a class derived from DiffusionPipeline", is_class_of(DiffusionPipeline))
STEPS = 3


def build(case: Case, world: World) -> Any:
    """A new pipeline."""
    if case.common.make is not None:
        return case.common.make()
    parts = world.pipe(models.STOCKS["avatars-sd"]).components
    wanted = inspect.signature(case.cls).parameters
    needed = {name for name, parameter in wanted.items() if parameter.default is parameter.empty}
    if not needed <= parts.keys():
        raise Broken(f"it takes {sorted(needed - parts.keys())}, which `avatars-sd` has not: give `COMMON` `make`")
    options = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    return case.cls(**{name: part for name, part in parts.items() if name in wanted}, **options)


def call(case: Case, pipe: Any, steps: int = STEPS) -> dict[str, Any]:
    """Keyword arguments of a call."""
    if case.common.inputs is not None:
        return case.common.inputs(steps)
    stock = models.STOCKS["avatars-sd"].call(steps)
    return {name: value for name, value in stock.items() if name in inspect.signature(pipe.__call__).parameters}


def draw(case: Case, pipe: Any, seed: int = 0, steps: int = STEPS) -> torch.Tensor:
    return models.draw(pipe, call(case, pipe, steps), seed)


@SUITE.rule()
def loadable_name(case: Case, world: World) -> None:
    """diffusers' loader finds its class by name, and `DiffusionPipeline.from_pretrained` does too."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    name, library = case.cls.__name__, case.cls.__module__.partition(".")[0]
    found = _fetch_class_library_tuple(case.cls)
    require(found == (library, name), f"diffusers writes {found}; name no folder like one of diffusers.pipelines")
    if library == "diffusers_ext":
        require(name in registry.PIPELINES_AND_MODELS, f"{name} is missing in `registry.PIPELINES_AND_MODELS`")


def _is_part(entry: Any) -> bool:
    """Whether an entry of a pipeline's config is a component's `(library, class)`, or that of None."""
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(x, str | None) for x in entry)


@SUITE.rule()
def components(case: Case, world: World) -> None:
    """Every constructor argument is a component or in the config; optional components are listed; offloading knows all."""
    pipe = build(case, world)
    for name, parameter in inspect.signature(case.cls).parameters.items():
        if name in pipe.components or _is_part(pipe.config.get(name)):
            required = parameter.default is parameter.empty
            listed = required or name in case.cls._optional_components
            require(listed, f"`{name}` has a default and is not in `_optional_components`: it is not saved")
        else:
            require(name in pipe.config, f"`{name}` is neither a component nor in the config: it is lost on saving")
    sequence = (case.cls.model_cpu_offload_seq or "").split("->") + list(case.cls._exclude_from_cpu_offload)
    missing = [name for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in sequence]
    require(not missing, f"`model_cpu_offload_seq` lacks {missing}: they are not offloaded")


@SUITE.rule()
def calls(case: Case, world: World) -> None:
    """A call is finite, the same for the same generator, also after other calls; with return_dict=False it is a tuple."""
    pipe = build(case, world)
    expected = draw(case, pipe)
    require(expected.isfinite().all() if expected.is_floating_point() else True, "not finite")
    draw(case, pipe, seed=5, steps=STEPS - 1)
    require(torch.equal(draw(case, pipe), expected), "after a call with another seed and fewer steps, another result")
    options = {"generator": torch.Generator()} if "generator" in inspect.signature(pipe.__call__).parameters else {}
    require(not isinstance(pipe(**call(case, pipe), **options), tuple), "by default it should return an object")


@SUITE.rule()
def calls_change_nothing(case: Case, world: World) -> None:
    """A call leaves weights, configs, hooks and forwards as they were."""
    pipe = build(case, world)
    draw(case, pipe)
    before = trace(pipe)
    draw(case, pipe, seed=1)
    require_unchanged(pipe, before, "after a call")


@SUITE.rule()
def callbacks(case: Case, world: World) -> None:
    """`callback_on_step_end` comes `num_timesteps` times, in order, with the tensors asked for; broken off there, no trace."""
    pipe = build(case, world)
    given = call(case, pipe)
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return
    expected, seen = draw(case, pipe), []

    def callback(_pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sorted(tensors)))
        return {}

    found = models.draw(pipe, {**given, "callback_on_step_end": callback})
    require(torch.equal(found, expected), "a callback that does nothing changes the result")
    numbers = [step for step, _ in seen]
    require(numbers and numbers == list(range(len(numbers))), f"callbacks came for the steps {numbers}")
    count = getattr(pipe, "num_timesteps", None)
    require(count == len(numbers), f"`num_timesteps` is {count}, and {len(numbers)} callbacks came")
    named = list(case.cls._callback_tensor_inputs)[:1]
    if "callback_on_step_end_tensor_inputs" in inspect.signature(pipe.__call__).parameters:
        models.draw(pipe, {**given, "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": named})
        require(seen[-1][1] == named, f"asked for the tensors {named}, a callback got {seen[-1][1]}")

    def abort(_pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise models.Abort

    with contextlib.suppress(models.Abort):
        models.draw(pipe, {**given, "callback_on_step_end": abort}, seed=9)
    require(torch.equal(draw(case, pipe), expected), "after a run broken off, another result")


@SUITE.rule()
def wrong_calls(case: Case, world: World) -> None:
    """A `__call__` of its own refuses a wrong number of steps or output type by a ValueError that names it."""
    if "__call__" not in vars(case.cls):
        return
    pipe = build(case, world)
    parameters, given = inspect.signature(pipe.__call__).parameters, call(case, pipe)
    if "num_inference_steps" in parameters:
        refused("0 steps", pipe, **{**given, "num_inference_steps": 0}, names=("num_inference_steps",))
    if "output_type" in parameters:
        refused("an unknown output type", pipe, **{**given, "output_type": "no such type"}, names=("output_type",))


@SUITE.rule()
def save_and_load(case: Case, world: World) -> None:
    """Saved by stock save_pretrained and loaded by its class: equal config, equal tensors, equal result."""
    pipe, folder = build(case, world), world.folder()
    expected = draw(case, pipe)
    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = case.cls.from_pretrained(folder, **absent)
    for name, value in pipe.config.items():
        right = name.startswith("_") or isinstance(value, tuple) or same(loaded.config.get(name), value)
        require(right, f"the config has `{name}` = {loaded.config.get(name)!r}, not {value!r}")
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            tensors, found = part.state_dict(), loaded.components[name].state_dict()
            wrong = [key for key in tensors if key not in found or not same_tensor(found[key], tensors[key])]
            require(not wrong and found.keys() == tensors.keys(), f"`{name}` has other tensors {wrong[:3]}")
    error = (draw(case, loaded).double() - expected.double()).abs().max().item()
    require(error < 1e-4, f"the loaded one gives another result (off by {error:.2g})")


@SUITE.rule()
def two_pipelines(case: Case, world: World) -> None:
    """Two in two threads give what each gives alone; a deep copy gives the same."""
    pipe = build(case, world)
    pipes = [pipe, copy.deepcopy(pipe)]
    expected = [draw(case, pipe, seed=seed) for seed in (0, 1)]
    require(torch.equal(draw(case, pipes[1]), expected[0]), "a deep copy gives another result")
    found = in_threads([functools.partial(draw, case, one, seed=seed) for seed, one in enumerate(pipes)])
    require(
        all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), "in two threads they disturb each other"
    )


@SUITE.rule()
def bfloat16(case: Case, world: World) -> None:
    """In bfloat16 it runs to a finite result."""
    pipe = build(case, world).to(torch.bfloat16)
    found = draw(case, pipe)
    require(found.isfinite().all() if found.is_floating_point() else True, "not finite")


@SUITE.rule()
def methods_notice_its_runs(case: Case, world: World) -> None:
    """It calls `self.progress_bar` around its denoising loop, by which the methods that are on notice a new run."""
    pipe = build(case, world)
    if not hasattr(pipe, "scheduler"):
        return
    pipe.progress_bar = updates = models.Updates()
    draw(case, pipe)
    require(updates.count >= 1, "its loop does not go through `self.progress_bar`")


@SUITE.rule()
def travels(case: Case, world: World) -> None:
    """Saved and pushed, it loads in a fresh process, with this package and without it, to the same result."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    pipe = build(case, world)
    absent = tuple(
        name for name, part in pipe.components.items() if part is None and name not in pipe._optional_components
    )
    classes = {"_class_name": f"{case.cls.__module__}.{case.cls.__name__}"}
    return pack_pipeline(pipe, folder, None, call(case, pipe), absent=absent, classes=classes)


SUITE.pack = pack
