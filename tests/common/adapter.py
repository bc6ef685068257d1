"""What every adapter must do: a LoRA file that stock `load_lora_weights` takes, or a model with `attach` and `detach`.

An entry that is a `ModelMixin` with `attach(pipe)` and `detach()` is of the second kind; any other row is of the first.

`COMMON` of an adapter: `make`. For a LoRA: `(pipe, folder) -> None`, which writes
`folder/pytorch_lora_weights.safetensors` for the pipeline. For a model: `(pipe) -> adapter`, not attached yet, with weights
that change the output (left out where the class can be made without arguments and does so).
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

import diffusers_ext as dx

from .arguments import same_tensor
from .journey import SIDES, Parcel
from .models import Stock, World, offload
from .scheduler import in_threads
from .suite import Broken, Case, Suite, require
from .traces import require_unchanged, trace

LORA = "pytorch_lora_weights.safetensors"


def is_attachable(entry: Any) -> bool:
    methods = all(callable(getattr(entry, name, None)) for name in ("attach", "detach"))
    return isinstance(entry, type) and issubclass(entry, ModelMixin) and methods


class _Adapters(Suite):
    """A row without an attachable class gives a case of a LoRA, about its first entry."""

    def cases_of(self, row: Any, common: Any) -> list[Case]:
        cases = super().cases_of(row, common)
        if cases[0].cls is None and common.make is not None:
            return [Case(row, cases[0].entries[0], cases[0].entries, common, row.key)]
        return cases


SUITE = _Adapters(
    "adapter", "a ModelMixin with `attach` and `detach`, or `COMMON.make` must write a LoRA file", is_attachable
)


def attaches(case: Case) -> bool:
    return is_attachable(case.cls)


def homes(case: Case, world: World) -> list[Stock]:
    """The pipelines that it supports: those for which it can be made and put on."""

    def supports(stock: Stock) -> bool:
        try:
            put_on(case, world, stock, world.pipe(stock))
        except ValueError:
            return False
        return True

    stocks = world.stocks("diffusion", "flow")
    return world.once("homes", case.name, make=lambda: [stock for stock in stocks if supports(stock)])


def make(case: Case, pipe: Any) -> Any:
    return case.common.make(pipe) if case.common.make is not None else case.cls()


def put_on(case: Case, world: World, stock: Stock, pipe: Any) -> Any:
    """Put it on `pipe`; what takes it off again."""
    if attaches(case):
        adapter = make(case, pipe)
        adapter.attach(pipe)
        return adapter.detach
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{stock.name} takes no LoRA")
    folder = world.folder()
    case.common.make(pipe, folder)
    pipe.load_lora_weights(folder, weight_name=LORA)
    return pipe.unload_lora_weights


def first_home(case: Case, world: World) -> Stock:
    return min(homes(case, world), key=lambda stock: stock.zoo)


@SUITE.rule()
def on_and_off(case: Case, world: World) -> None:
    """On, it changes the output of a pipeline that it supports; off, that is as before and nothing is left."""
    found = homes(case, world)
    require(found, "it supports no stock pipeline")
    for stock in found:
        pipe = world.pipe(stock)
        plain = stock.draw(pipe)
        before = trace(pipe)
        off = put_on(case, world, stock, pipe)
        changed = stock.draw(pipe)
        require(changed.isfinite().all(), f"{stock.name}: not finite")
        require(not torch.equal(changed, plain), f"{stock.name}: on, it changes nothing")
        require(torch.equal(stock.draw(pipe), changed), f"{stock.name}: the second call differs")
        off()
        after = stock.draw(pipe)
        if attaches(case):
            require(torch.equal(after, plain), f"{stock.name}: off, it draws something else than before")
            require_unchanged(pipe, before, "after attach and detach")
        else:  # peft puts weights back at other places in memory, and kernels round by place
            require(torch.allclose(after, plain, atol=1e-4), f"{stock.name}: off, it draws something else than before")


@SUITE.rule(when=attaches)
def refusals_change_nothing(case: Case, world: World) -> None:
    """A pipeline that it does not support is refused by a ValueError that names its class, with nothing half-applied."""
    supported = {stock.name for stock in homes(case, world)}
    adapter = make(case, world.pipe(first_home(case, world)))
    for stock in world.stocks():
        if stock.name in supported:
            continue
        pipe = world.pipe(stock)
        before = trace(pipe)
        try:
            adapter.attach(pipe)
        except ValueError as error:
            names = [type(pipe).__name__, *(type(part).__name__ for part in pipe.components.values())]
            require(
                any(name in str(error) for name in names), f"{stock.name}: the ValueError names no class of it: {error}"
            )
        else:
            raise Broken(f"{stock.name}: attached to it, and it could not be made for it")
        require_unchanged(pipe, before, f"refused on {stock.name}")


@SUITE.rule(when=attaches)
def attached_twice(case: Case, world: World) -> None:
    """Attaching it again, and detaching it where it is not attached, are refused or change nothing."""
    stock = first_home(case, world)
    pipe = world.pipe(stock)
    plain = stock.draw(pipe)
    adapter = make(case, pipe)
    adapter.attach(pipe)
    expected = stock.draw(pipe)
    for act, result in ((lambda: adapter.attach(pipe), expected), (adapter.detach, plain), (adapter.detach, plain)):
        with contextlib.suppress(ValueError):
            act()
        require(torch.equal(stock.draw(pipe), result), "attach, attach, detach, detach: another result")


@SUITE.rule(when=attaches)
def save_and_load(case: Case, world: World) -> None:
    """Saved and loaded it holds equal tensors and draws the same; attached, it does not leak into the pipeline's files."""
    stock, folder = first_home(case, world), world.folder()
    pipe = world.pipe(stock)
    plain = stock.draw(pipe)
    adapter = make(case, pipe)
    adapter.attach(pipe)
    expected = stock.draw(pipe)
    adapter.save_pretrained(folder)
    loaded = case.cls.from_pretrained(folder)
    for key, value in adapter.state_dict().items():
        require(same_tensor(loaded.state_dict()[key], value), f"after loading, {key} differs")
    other = world.pipe(stock)
    loaded.attach(other)
    require(torch.allclose(stock.draw(other), expected, atol=1e-5), "loaded and attached, it draws something else")
    whole = world.folder()
    try:
        dx.save_pretrained(pipe, whole, card=False)
    except ValueError:
        return  # refused: nothing is lost
    stock_pipe = DiffusionPipeline.from_pretrained(whole, **dict.fromkeys(stock.absent))
    require(
        torch.allclose(stock.draw(stock_pipe), plain, atol=1e-5),
        "saved with it attached, stock loading draws no plain result",
    )


@SUITE.rule()
def pipelines_share_nothing(case: Case, world: World) -> None:
    """Beside one pipeline with it, another without it draws the plain result, also in two threads."""
    stock = first_home(case, world)
    pipe, other = world.pipe(stock), world.pipe(stock)
    plain = stock.draw(other)
    put_on(case, world, stock, pipe)
    expected = stock.draw(pipe)
    found = in_threads([lambda: stock.draw(pipe), lambda: stock.draw(other)])
    require(torch.equal(found[0], expected) and torch.equal(found[1], plain), "two pipelines disturb each other")


@SUITE.rule()
def deepcopy(case: Case, world: World) -> None:
    """A deep copy of the pipeline with it draws the same, with weights of its own."""
    stock = first_home(case, world)
    pipe = world.pipe(stock)
    put_on(case, world, stock, pipe)
    expected = stock.draw(pipe)
    clone = copy.deepcopy(pipe)
    require(torch.equal(stock.draw(clone), expected), "the copy draws something else")
    with torch.no_grad():
        for part in clone.components.values():
            for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                parameter.mul_(0.5)
    require(torch.equal(stock.draw(pipe), expected), "the copy shares weights with the original")


@SUITE.rule()
def offloading(case: Case, world: World) -> None:
    """With model, sequential and group offloading of the denoiser, before or after it, it draws the same."""
    stock = first_home(case, world)
    pipe = world.pipe(stock)
    put_on(case, world, stock, pipe)
    expected = stock.draw(pipe)
    for kind in ("model", "sequential", "group"):
        # Stock `load_lora_weights` starts offloading anew, for which it wants an accelerator.
        for first in ("offloading", "adapter") if attaches(case) else ("adapter",):
            pipe = world.pipe(stock)
            denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            if first == "offloading":
                offload(denoiser, kind)
            put_on(case, world, stock, pipe)
            if first == "adapter":
                offload(denoiser, kind)
            near = torch.allclose(stock.draw(pipe), expected, atol=1e-5)
            require(near, f"{kind} offloading and the adapter, {first} first: another result")


@SUITE.rule()
def bfloat16(case: Case, world: World) -> None:
    """In bfloat16 it draws a finite result."""
    found = [stock for stock in homes(case, world) if not stock.only_numpy]
    for stock in found[:1]:
        pipe = world.pipe(stock).to(torch.bfloat16)
        put_on(case, world, stock, pipe)
        require(stock.draw(pipe.to(torch.bfloat16)).isfinite().all(), f"{stock.name}: not finite")


@SUITE.rule()
def travels(case: Case, world: World) -> None:
    """Saved, it loads in a fresh process: a LoRA by stock diffusers, from disk and from the Hub; a model by its class."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    stock = first_home(case, world)
    pipe = world.pipe(stock)
    plain = stock.draw(pipe)
    pipe.save_pretrained(folder)
    if attaches(case):
        adapter = make(case, pipe)
        adapter.attach(pipe)
        adapter.save_pretrained(folder / "adapter")
        expected = {SIDES[0]: stock.draw(pipe), SIDES[1]: plain}
        return Parcel("attached", folder, stock.call(3), expected, cls=case.cls.__name__, absent=stock.absent)
    case.common.make(pipe, folder)
    pipe.load_lora_weights(folder, weight_name=LORA)
    return Parcel(
        "pipeline", folder, stock.call(3), dict.fromkeys(SIDES, stock.draw(pipe)), absent=stock.absent, lora=LORA
    )


SUITE.pack = pack
