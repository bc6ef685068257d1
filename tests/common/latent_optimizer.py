"""What every optimiser of the initial noise must do: `<Name>(config)(pipe, latents, **call_kwargs) -> latents`.

Its row names the optimiser, a class that takes a config, and the config, a dataclass.

`COMMON` of an optimiser (all optional): `settings` of the config, the first of them quick; `make`, `(config, pipe) ->
optimiser`, where it needs more than the config (a reward, a bank of latents); `inputs`, `(stock) -> more call_kwargs`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline

from . import arguments
from .models import Stock, World
from .scheduler import in_threads
from .suite import Broken, Case, Suite, require
from .traces import require_unchanged, trace


def is_optimizer(entry: Any) -> bool:
    """A class, itself no config, whose objects are called with a pipeline and latents."""
    if not isinstance(entry, type) or dataclasses.is_dataclass(entry) or "__call__" not in vars(entry):
        return False
    return {"pipe", "latents"} <= inspect.signature(entry.__call__).parameters.keys()


SUITE = Suite("latent_optimizer", "a class whose objects are called with `(pipe, latents, ...)`", is_optimizer)


def config_class(case: Case) -> Any:
    found = [entry for entry in case.entries if isinstance(entry, type) and dataclasses.is_dataclass(entry)]
    require(found, "no entry is its config, a dataclass")
    return found[0]


def of_config(case: Case) -> Case:
    return dataclasses.replace(case, cls=config_class(case))


def optimizer(case: Case, pipe: Any, settings: dict[str, Any]) -> Any:
    config = config_class(case)(**settings)
    return case.common.make(config, pipe) if case.common.make is not None else case.cls(config)


def latents_of(stock: Stock, pipe: Any) -> torch.Tensor:
    """The latents that a call of the pipeline starts from: what its own first step of the scheduler gets."""
    seen: list[torch.Tensor] = []
    step = pipe.scheduler.step

    class Seen(Exception):
        pass

    def record(output: Any, t: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(sample.clone())
        raise Seen

    record.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # pipelines ask what it takes
    pipe.scheduler.step = record
    try:
        stock.draw(pipe)
    except Seen:
        pass
    finally:
        del pipe.scheduler.step
    return seen[0]


def optimize(
    case: Case, stock: Stock, pipe: Any, settings: dict[str, Any], latents: torch.Tensor, seed: int = 0
) -> Any:
    call = {name: value for name, value in stock.call(3).items() if name not in ("output_type",)}
    call |= dict(case.common.inputs(stock)) if case.common.inputs is not None else {}
    generator = torch.Generator().manual_seed(seed)
    return optimizer(case, pipe, settings)(pipe, latents, **call, generator=generator)


def homes(case: Case, world: World) -> list[Stock]:
    """The pipelines that take `latents` and that it supports."""

    def supports(stock: Stock) -> bool:
        pipe = world.pipe(stock)
        if "latents" not in inspect.signature(pipe.__call__).parameters:
            return False
        try:
            optimize(case, stock, pipe, of_config(case).settings[0], latents_of(stock, pipe))
        except ValueError:
            return False
        return True

    stocks = world.stocks("diffusion", "flow")
    return world.once("homes", case.name, make=lambda: [stock for stock in stocks if supports(stock)])


def first_home(case: Case, world: World) -> Stock:
    found = homes(case, world)
    if not found:
        raise Broken("it supports no stock pipeline that takes `latents`")
    return min(found, key=lambda stock: stock.zoo)


@SUITE.rule()
def config_round_trip(case: Case, world: World) -> None:
    """The config keeps what it is given and comes back from JSON."""
    arguments.check_dataclass_survives(of_config(case))


@SUITE.rule()
def wrong_settings(case: Case, world: World) -> None:
    """A wrong value of a setting is a ValueError that names it."""
    arguments.check_wrong_values(of_config(case), case.common.free_text)


@SUITE.rule()
def better_latents(case: Case, world: World) -> None:
    """It gives other latents of the same kind, finite, which the pipeline draws from; the same for the same generator."""
    first_home(case, world)
    for stock in homes(case, world):
        pipe = world.pipe(stock)
        latents = latents_of(stock, pipe)
        given = latents.clone()
        for settings in of_config(case).settings:
            found = optimize(case, stock, pipe, settings, latents)
            kind = (found.shape, found.dtype, found.device, found.requires_grad)
            require(
                kind == (latents.shape, latents.dtype, latents.device, False), f"{stock.name}: its latents are {kind}"
            )
            require(found.isfinite().all(), f"{stock.name}: not finite")
            require(torch.equal(latents, given), f"{stock.name}: it writes into the latents")
            require(
                torch.equal(optimize(case, stock, pipe, settings, latents), found),
                f"{stock.name}: the second time, others",
            )
            require(
                stock.draw(pipe, latents=found).isfinite().all(), f"{stock.name}: what is drawn from them is not finite"
            )
        require(not torch.equal(found, latents) or not case.common.changes_output, f"{stock.name}: it changes nothing")


@SUITE.rule()
def pipeline_unchanged(case: Case, world: World) -> None:
    """The pipeline is bit-equal to before, gradients, configs and hooks included, also where it was broken off."""
    stock = first_home(case, world)
    pipe = world.pipe(stock)
    latents = latents_of(stock, pipe)
    plain, before = stock.draw(pipe), trace(pipe)
    settings = of_config(case).settings[0]
    optimize(case, stock, pipe, settings, latents)
    require_unchanged(pipe, before, "after optimising")
    require(torch.equal(stock.draw(pipe), plain), "after optimising the pipeline draws something else")
    forward = type(pipe.unet if hasattr(pipe, "unet") else pipe.transformer).forward
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    denoiser.forward = failing
    try:
        optimize(case, stock, pipe, settings, latents)
    except KeyboardInterrupt:
        pass
    finally:
        del denoiser.forward
    require(denoiser.forward.__func__ is forward, "broken off, it leaves a forward behind")
    require_unchanged(pipe, before, "broken off")
    require(torch.equal(stock.draw(pipe), plain), "broken off, the pipeline draws something else than before")


@SUITE.rule()
def refusals_change_nothing(case: Case, world: World) -> None:
    """A pipeline that it does not support is refused by a ValueError that says why, with nothing half-applied."""
    supported = {stock.name for stock in homes(case, world)}
    for stock in world.stocks():
        if stock.name in supported:
            continue
        pipe = world.pipe(stock)
        before = trace(pipe)
        try:
            optimize(case, stock, pipe, of_config(case).settings[0], torch.zeros(1, 4, 8, 8))
        except ValueError as error:
            require(type(pipe).__name__ in str(error), f"{stock.name}: the ValueError does not name its class: {error}")
        require_unchanged(pipe, before, f"refused on {stock.name}")


@SUITE.rule()
def two_pipelines(case: Case, world: World) -> None:
    """Two in two threads give what each gives alone; DiffusionPipeline.from_pipe and a deep copy do not disturb."""
    stock = first_home(case, world)
    pipes = [world.pipe(stock) for _ in range(2)]
    latents, settings = latents_of(stock, pipes[0]), of_config(case).settings[0]
    alone = [optimize(case, stock, pipe, settings, latents, seed) for seed, pipe in enumerate(pipes)]
    calls = [
        lambda pipe=pipe, s=seed: optimize(case, stock, pipe, settings, latents, s) for seed, pipe in enumerate(pipes)
    ]
    found = in_threads(calls)
    require(all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)), "two pipelines disturb each other")
    clone: DiffusionPipeline = copy.deepcopy(pipes[0])
    require(torch.equal(optimize(case, stock, clone, settings, latents), alone[0]), "on a deep copy, others")


@SUITE.rule()
def bfloat16(case: Case, world: World) -> None:
    """In bfloat16 it gives finite bfloat16."""
    stock = first_home(case, world)
    pipe = world.pipe(stock).to(torch.bfloat16)
    found = optimize(case, stock, pipe, of_config(case).settings[0], latents_of(stock, pipe))
    require(
        found.dtype == torch.bfloat16 and found.isfinite().all(),
        f"it gives {found.dtype}, finite: {found.isfinite().all()}",
    )
