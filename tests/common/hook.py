"""What every method must do that is switched on and off: hooks, and with them attention processors and guiders.

Its row names a config: a dataclass derived from `HookConfig`. Each rule puts it on every stock model (`models.MODELS`) and
pipeline (`models.STOCKS`: the zoo and tiny ones) that it supports; what it supports, `supports` and `check` tell.

`COMMON` of such a method (all optional): `settings` of the config; `make`, `(model) -> config`, where settings depend on the
model (statistics, a trained router); `models`, more `Model`s, where it supports none of the stock ones; `changes_output =
False` for a method that computes the same in another way.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffusers_ext as dx
from diffusers_ext import recipe as recipes
from diffusers_ext.enabling import HookConfig
from diffusers_ext.hooks._plan import find_run

from . import arguments, models
from .journey import SIDES, Parcel, pack_pipeline
from .models import Model, Stock, World
from .scheduler import in_threads
from .suite import Broken, Case, Suite, is_class_of, require
from .traces import require_unchanged, trace

SUITE = Suite("hook", "a config derived from HookConfig", is_class_of(HookConfig))
STEPS = 3


# --- what it goes on -------------------------------------------------------------------------------------------------


def configs(case: Case, model: nn.Module) -> list[HookConfig]:
    """The configs to try on a model."""
    if case.common.make is not None:
        return [case.common.make(model)]
    return [case.cls(**settings) for settings in case.settings]


def fits(config: HookConfig, model: nn.Module, on_pipeline: bool) -> bool:
    if type(config).supports(model) is not None:
        return False
    try:
        config.check(model, on_pipeline)
    except ValueError:
        return False
    return True


def on_models(case: Case, world: World, first: bool = False) -> Iterator[tuple[Model, HookConfig]]:
    """Every model that it supports with the first config that fits it by itself, and every config once."""
    tried: list[HookConfig] = []
    for model in (*world.models(), *case.common.models):
        bare = world.peek(model)
        if case.cls.supports(bare) is not None:
            continue
        fitting = [config for config in configs(case, bare) if fits(config, bare, on_pipeline=False)]
        yield from ((model, config) for config in _first_and_new(fitting, tried, first))


def _first_and_new(fitting: list[HookConfig], tried: list[HookConfig], first: bool) -> list[HookConfig]:
    """The first config, and, unless `first`, those that were not tried on anything yet."""
    chosen = fitting[:1] if first else [c for i, c in enumerate(fitting) if i == 0 or c not in tried]
    tried += chosen
    return chosen


def smallest(case: Case, world: World) -> tuple[Model, HookConfig] | None:
    """The model of fewest weights that it supports."""
    pairs = list(on_models(case, world, first=True))
    size = lambda pair: sum(parameter.numel() for parameter in world.peek(pair[0]).parameters())  # noqa: E731
    return min(pairs, key=size, default=None)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def on_pipelines(
    case: Case, world: World, first: bool = False, tiny: bool = False
) -> Iterator[tuple[Stock, HookConfig]]:
    """Every pipeline that it supports with the first config that fits, and every config once; tiny ones first.

    Args:
        first: the first config only.
        tiny: leave out the zoo, where it supports a tiny one.
    """
    tried: list[HookConfig] = []
    for stock in sorted(world.stocks(), key=lambda stock: stock.zoo):
        if tiny and stock.zoo and tried:
            return
        parts = denoisers(world.peek(stock)).values()
        found = [part for part in parts if case.cls.supports(part) is None]
        if not found:
            continue
        fitting = [c for c in configs(case, found[0]) if all(fits(c, part, on_pipeline=True) for part in found)]
        yield from ((stock, config) for config in _first_and_new(fitting, tried, first))


def enabled_model(world: World, model: Model, config: HookConfig) -> nn.Module:
    return dx.enable(world.model(model), copy.deepcopy(config))


def enabled_pipe(world: World, stock: Stock, config: HookConfig) -> Any:
    return dx.enable(world.pipe(stock), copy.deepcopy(config))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def said(target: Model | Stock, config: HookConfig) -> str:
    return f"{target.name} with {config}"


# --- settings --------------------------------------------------------------------------------------------------------


@SUITE.rule()
def names(case: Case, world: World) -> None:
    """The config has the row's key and version; `apply_<key>(module, config)` and `remove_<key>(module)` are there too."""
    cls, key = case.cls, case.row.key
    require(cls.key == key, f"`key` of {cls.__name__} is {cls.key!r}")
    require(
        cls.version == case.row.version,
        f"`version` of {cls.__name__} is {cls.version}, that of the row {case.row.version}",
    )
    found = smallest(case, world)
    functions = {name: _function(case, f"{name}_{key}") for name in ("apply", "remove")}
    if found is not None and None not in functions.values():
        model, config = found
        bare = world.model(model)
        before = trace(bare)
        functions["apply"](bare, config)
        expected = model.run(enabled_model(world, model, config), STEPS)
        require(equal(model.run(bare, STEPS), expected), f"`apply_{key}` does something else than `enable`")
        functions["remove"](bare)
        require_unchanged(bare, before, f"after `apply_{key}` and `remove_{key}`")
    for name, function in functions.items():
        require(callable(function), f"there is no `{name}_{key}` beside {cls.__name__}")


def _function(case: Case, name: str) -> Any:
    """A public function of ours, or one of the module of a third party's config."""
    cls = case.cls
    if cls.__module__.startswith("diffusers_ext."):
        return getattr(dx, name, None)
    return getattr(__import__(cls.__module__, fromlist=[name]), name, None)


@SUITE.rule()
def config_round_trip(case: Case, world: World) -> None:
    """The config keeps what it is given, by name and by position, and comes back from JSON and from a recipe."""
    cls = case.cls
    arguments.check_dataclass_survives(case)
    for settings in case.settings:
        arguments.check_positional(cls, settings, dataclasses.asdict, lambda config: cls(**dataclasses.asdict(config)))
        config = cls(**settings)
        row = {"method": cls.key, "version": cls.version, "component": "unet", "config": dataclasses.asdict(config)}
        found = recipes.validate({"schema": recipes.SCHEMA, "methods": [row]})
        require(found == [("unet", config)], f"a recipe of {config} gives {found}")


@SUITE.rule()
def wrong_settings(case: Case, world: World) -> None:
    """A wrong value of a setting is a ValueError that names it."""
    arguments.check_wrong_values(case, case.common.free_text)


# --- where it goes ---------------------------------------------------------------------------------------------------


@SUITE.rule()
def has_an_effect(case: Case, world: World) -> None:
    """It supports a stock model or pipeline, and changes what that computes: the other rules are not about nothing."""
    tried = []
    for model, config in on_models(case, world):
        tried.append(said(model, config))
        plain = model.run(world.model(model), STEPS)
        if not equal(model.run(enabled_model(world, model, config), STEPS), plain):
            return
    for stock, config in on_pipelines(case, world):
        tried.append(said(stock, config))
        plain = stock.draw(world.pipe(stock), STEPS)
        if not torch.equal(stock.draw(enabled_pipe(world, stock, config), STEPS), plain):
            return
    require(tried, f"it supports none of {', '.join((*models.MODELS, *models.STOCKS))}: give `COMMON` `models`")
    require(not case.common.changes_output, f"nothing changes on {'; '.join(tried)}: give `COMMON` other `settings`")


@SUITE.rule()
def off_is_bit_equal(case: Case, world: World) -> None:
    """On, run, off: outputs are bit-equal to before and nothing is left behind, on every model and pipeline."""
    for model, config in on_models(case, world):
        bare = world.model(model)
        plain, before = model.run(bare, STEPS), trace(bare)
        dx.enable(bare, copy.deepcopy(config))
        model.run(bare, STEPS)
        dx.disable(bare, config.key)
        require_unchanged(bare, before, f"after on and off ({config})")
        require(
            equal(model.run(bare, STEPS), plain), f"{said(model, config)}: off, it computes something else than before"
        )
        require(dx.status(bare) == [], f"{said(model, config)}: `status` still shows {dx.status(bare)}")
    for stock, config in on_pipelines(case, world):
        pipe = world.pipe(stock)
        plain = stock.draw(pipe)
        before = trace(pipe)
        dx.enable(pipe, copy.deepcopy(config))
        stock.draw(pipe)
        dx.disable(pipe, config.key)
        require_unchanged(pipe, before, f"after on and off ({config})")
        require(
            torch.equal(stock.draw(pipe), plain), f"{said(stock, config)}: off, it draws something else than before"
        )


@SUITE.rule()
def refusals_change_nothing(case: Case, world: World) -> None:
    """What it does not support is refused by a ValueError that names method and class, with nothing half-applied.

    Tried on every stock model and pipeline that it does not support, and, where it does, with integers far out of range.
    """
    key = case.cls.key
    for model in world.models():
        if case.cls.supports(world.peek(model)) is None:
            continue
        bare = world.model(model)
        for config in _any_config(case, bare):
            _refused(bare, config, key, f"{model.name} is not supported")
    for stock in world.stocks():
        if any(case.cls.supports(part) is None for part in denoisers(world.peek(stock)).values()):
            continue
        pipe = world.pipe(stock)
        for config in _any_config(case, next(iter(denoisers(pipe).values()))):
            _refused(pipe, config, key, f"{stock.name} is not supported")
    for model, config in on_models(case, world, first=True):
        for field in dataclasses.fields(config):
            if type(getattr(config, field.name)) is not int:
                continue
            bare = world.model(model)
            before = trace(bare)
            try:
                dx.enable(bare, dataclasses.replace(config, **{field.name: 10**6}))
            except ValueError:
                require_unchanged(bare, before, f"refused with `{field.name}` = 10**6")
                require(dx.status(bare) == [], f"refused with `{field.name}` = 10**6, `status` shows it")


def _any_config(case: Case, model: nn.Module) -> list[HookConfig]:
    """A config to be refused; none where it cannot even be made for the model."""
    try:
        return configs(case, model)[:1]
    except ValueError:
        return []


def _refused(target: Any, config: HookConfig, key: str, what: str) -> None:
    before = trace(target)
    try:
        dx.enable(target, config)
    except ValueError as error:
        text = "".join(filter(str.isalnum, str(error).lower()))
        for name in (key, type(target).__name__):
            require(
                "".join(filter(str.isalnum, name.lower())) in text,
                f"{what}: the ValueError does not name {name}: {error}",
            )
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__} instead of a ValueError that says why: {error}") from error
    else:
        raise Broken(f"{what} by `supports`, but `enable` takes it")
    require_unchanged(target, before, f"refused because {what}")


@SUITE.rule()
def again_and_around(case: Case, world: World) -> None:
    """Enabling twice is as enabling once; `status` shows it; `enabled` takes it off again."""
    found = smallest(case, world)
    if found is None:
        return
    model, config = found
    expected = model.run(enabled_model(world, model, config), STEPS)
    bare = world.model(model)
    plain, before = model.run(bare, STEPS), trace(bare)
    for _ in range(2):
        dx.enable(bare, copy.deepcopy(config))
        require(equal(model.run(bare, STEPS), expected), f"{said(model, config)}: enabled twice, another result")
    shown = [(entry.key, entry.config) for entry in dx.status(bare)]
    require(shown == [(config.key, config)], f"{said(model, config)}: `status` shows {shown}")
    dx.disable(bare)
    require_unchanged(bare, before, "after enabling twice and disabling once")
    with dx.enabled(bare, copy.deepcopy(config)):
        model.run(bare, 2)
    require_unchanged(bare, before, "after `with enabled(...)`")
    require(equal(model.run(bare, STEPS), plain), f"{said(model, config)}: after `with enabled(...)`, another result")


# --- runs ------------------------------------------------------------------------------------------------------------


@SUITE.rule()
def runs_leave_nothing(case: Case, world: World) -> None:
    """A run is the same after another run, one of another batch size, and one that was broken off."""
    for model, config in on_models(case, world):
        one = enabled_model(world, model, config)
        expected = model.run(one, STEPS)
        model.run(one, 2, batch=3, seed=1)
        require(
            equal(model.run(one, STEPS), expected), f"{said(model, config)}: after a shorter run of another batch size"
        )
    for stock, config in on_pipelines(case, world, tiny=True):
        pipe = enabled_pipe(world, stock, config)
        expected = stock.draw(pipe, STEPS)
        require(torch.equal(stock.draw(pipe, STEPS), expected), f"{said(stock, config)}: the second call differs")
        models.abort(stock, pipe, seed=9)
        again = stock.draw(pipe, STEPS)
        require(torch.equal(again, expected), f"{said(stock, config)}: after a run broken off, another result")


@SUITE.rule()
def late_start_after_an_abort(case: Case, world: World) -> None:
    """Image-to-image that begins late, after a run that broke off early: its timesteps alone do not tell a new run."""
    from diffusers import StableDiffusionImg2ImgPipeline

    for stock, config in on_pipelines(case, world):
        if stock.name != "avatars-sd" or not fits(config, world.peek(stock).unet, on_pipeline=False):
            continue  # a pipeline of `from_pipe` shares the model, and does not announce its runs
        pipe = enabled_pipe(world, stock, config)
        late = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
        call = {**stock.call(6), "image": image, "strength": 0.5}
        expected = models.draw(late, call)
        models.abort(stock, pipe, 1, num_inference_steps=6)
        require(torch.equal(models.draw(late, call), expected), f"{said(stock, config)}: another picture")


@SUITE.rule()
def targets_share_nothing(case: Case, world: World) -> None:
    """Two models whose calls alternate, and two pipelines in two threads, give what each gives alone."""
    for model, config in on_models(case, world):
        pair = [enabled_model(world, model, config) for _ in range(2)]
        expected = [model.run(one, STEPS, batch=2 + i, seed=i) for i, one in enumerate(pair)]
        pair = [enabled_model(world, model, config) for _ in range(2)]
        found: list[list[torch.Tensor]] = [[], []]
        for step in range(STEPS):
            for i, one in enumerate(pair):
                found[i].append(model.predict(one, step, batch=2 + i, seed=i))
        for i in (0, 1):
            require(
                equal(found[i], expected[i]), f"{said(model, config)}: alternating with another, number {i} differs"
            )
    for stock, config in itertools.islice(on_pipelines(case, world, first=True), 1):
        pipes = [enabled_pipe(world, stock, config) for _ in range(2)]
        alone = [stock.draw(pipe, STEPS, seed=seed) for seed, pipe in enumerate(pipes)]
        calls = [functools.partial(stock.draw, pipe, STEPS, seed=seed) for seed, pipe in enumerate(pipes)]
        together = in_threads(calls)
        require(equal(alone, together), f"{said(stock, config)}: two pipelines in two threads disturb each other")


@SUITE.rule()
def deepcopy(case: Case, world: World) -> None:
    """A deep copy computes the same with its own weights and state, and what happens to it leaves the original alone."""
    for model, config in on_models(case, world, first=True):
        original = enabled_model(world, model, config)
        expected = model.run(original, STEPS)
        clone, other = copy.deepcopy(original), world.model(model)
        require(equal(model.run(clone, STEPS), expected), f"{said(model, config)}: the copy computes something else")
        with torch.no_grad():
            for parameter in [*clone.parameters(), *other.parameters()]:
                parameter.mul_(0.5)
        dx.enable(other, copy.deepcopy(config))
        same = equal(model.run(clone, STEPS), model.run(other, STEPS))
        require(same, f"{said(model, config)}: the copy, with other weights, does not compute with those alone")
        require(equal(model.run(original, STEPS), expected), f"{said(model, config)}: the copy changes the original")
        dx.disable(clone)
        require(
            [entry.key for entry in dx.status(original)] == [config.key], f"{said(model, config)}: off on the copy only"
        )
        require(
            equal(model.run(original, STEPS), expected), f"{said(model, config)}: off on the copy, the original differs"
        )


# --- beside other libraries ------------------------------------------------------------------------------------------


@SUITE.rule()
def offloading(case: Case, world: World) -> None:
    """With model, sequential and group offloading, enabled before or after, it computes the same, and off is off."""
    from accelerate.hooks import remove_hook_from_module

    found = smallest(case, world)
    if found is None:
        return
    model, config = found
    plain = model.run(world.model(model), STEPS)
    expected = model.run(enabled_model(world, model, config), STEPS)
    for kind in ("model", "sequential", "group"):
        for first in ("offloading", "method"):
            when = f"{said(model, config)}: {kind} offloading and the method, {first} first"
            bare = world.model(model)
            order: list[Callable[[], Any]] = [
                functools.partial(models.offload, bare, kind),
                functools.partial(dx.enable, bare, copy.deepcopy(config)),
            ]
            for act in order if first == "offloading" else reversed(order):
                act()
            for _ in range(2):
                require(equal(model.run(bare, STEPS), expected), f"{when}: another result")
            dx.disable(bare)
            require(equal(model.run(bare, STEPS), plain), f"{when}: off, another result than before")
            remove_hook_from_module(bare, recurse=True)
            require(equal(model.run(bare, STEPS), plain), f"{when}: both off, another result than before")


def _check_compiled(case: Case, world: World, backend: str) -> None:
    found = smallest(case, world)
    if found is None:
        return
    model, config = found
    one = enabled_model(world, model, config)
    expected = model.run(one, STEPS)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(one, backend=backend)
        for _ in range(2):
            for a, b in zip(model.run(compiled, STEPS), expected, strict=True):
                scale = max(b.abs().max().item(), 1.0)
                require((a - b).abs().max().item() <= 1e-4 * scale, f"{said(model, config)}: compiled, another result")
    finally:
        torch._dynamo.reset()


@SUITE.rule()
def compiled_eagerly(case: Case, world: World) -> None:
    """`torch.compile` traces it (backend "eager") and the result is the same."""
    _check_compiled(case, world, "eager")


@SUITE.rule(slow=True)
def compiled(case: Case, world: World) -> None:
    """`torch.compile` with inductor gives the same result."""
    _check_compiled(case, world, "inductor")


@SUITE.rule()
def bfloat16(case: Case, world: World) -> None:
    """In bfloat16 it gives finite bfloat16, and off is bit-equal to before."""
    for model, config in on_models(case, world, first=True):
        bare = world.model(model).to(torch.bfloat16)
        plain = model.run(bare, STEPS)
        dx.enable(bare, copy.deepcopy(config))
        for output in model.run(bare, STEPS):
            require(output.dtype == torch.bfloat16, f"{said(model, config)}: bfloat16 became {output.dtype}")
            require(output.isfinite().all(), f"{said(model, config)}: not finite")
        dx.disable(bare)
        require(equal(model.run(bare, STEPS), plain), f"{said(model, config)}: off, another result than before")


@SUITE.rule()
def noticed_when_taken_off(case: Case, world: World) -> None:
    """Cache methods: hooks that another library took off are noticed, or they are still on; never silently missing."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    found = smallest(case, world)
    if found is None or case.cls.family != "cache":
        return
    model, config = found
    bare = world.model(model)
    cpu_offload(bare, torch.device("cpu"))
    dx.enable(bare, copy.deepcopy(config))
    require(find_run(bare, config.key) is not None, f"{said(model, config)}: its run is not found behind offloading")
    remove_hook_from_module(bare, recurse=True)
    try:
        run = find_run(bare, config.key)
    except RuntimeError as error:
        require("taken off by another library" in str(error), f"{said(model, config)}: it says {error}")
        return
    # accelerate hooks no modules that have no weights of their own, and so takes off nothing of ours there.
    require(run is not None, f"{said(model, config)}: its run is lost, and nothing says so")
    hooked = model.run(dx.enable(world.model(model), copy.deepcopy(config)), STEPS)
    require(equal(model.run(bare, STEPS), hooked), f"{said(model, config)}: it computes something else than before")


# --- sharing ---------------------------------------------------------------------------------------------------------


@SUITE.rule()
def travels(case: Case, world: World) -> None:
    """Saved, pushed and loaded in a fresh process, it is on with this package; stock diffusers gets the plain pipeline."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    """The smallest pipeline that it supports, with the method on."""
    found = next(on_pipelines(case, world, first=True), None)
    if found is None:
        raise Broken("it supports no stock pipeline to travel in")
    stock, config = found
    plain = stock.draw(world.pipe(stock))
    parcel = pack_pipeline(enabled_pipe(world, stock, config), folder, stock)
    parcel.expected[SIDES[1]] = plain
    return parcel


SUITE.pack = pack
