"""What every quantizer must do: a model that is calibrated, smaller, saved and loaded by stock means.

A quantized model is an ordinary diffusers model: `save_pretrained` writes it with its `quantization_config`, and stock
`from_pretrained` loads it once this package is imported (diffusers' two maps of quantizers know the method).

`COMMON` of a quantizer: `make`, `(pipe) -> pipe`, which gives the pipeline with its denoiser quantized, calibrated where the
method does that, and raises ValueError on a pipeline that it does not support. Left out where an entry has a class method
`calibrate(pipe)` that does so.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from .journey import Parcel, pack_pipeline
from .models import Stock, World
from .scheduler import in_threads
from .suite import Case, Suite, require
from .traces import require_unchanged, trace

LARGEST_SHARE = 0.6  # of the bytes of the float32 model; 8 bits are 0.25 plus what is left in float
LARGEST_ERROR = 0.7  # relative deviation of what is drawn: 4 bits are rough, zeros are 1

SUITE = Suite(
    "quantizer",
    "a config derived from QuantizationConfigMixin",
    lambda entry: isinstance(entry, type) and issubclass(entry, QuantizationConfigMixin),
)


def quantize(case: Case, pipe: Any) -> Any:
    torch.manual_seed(0)
    return case.common.make(pipe) if case.common.make is not None else case.cls.calibrate(pipe)


def homes(case: Case, world: World) -> list[Stock]:
    """The pipelines that it supports."""

    def supports(stock: Stock) -> bool:
        try:
            quantize(case, world.pipe(stock))
        except ValueError:
            return False
        return True

    stocks = world.stocks("diffusion", "flow")
    return world.once("homes", case.name, make=lambda: [stock for stock in stocks if supports(stock)])


def first_home(case: Case, world: World) -> Stock:
    return min(homes(case, world), key=lambda stock: stock.zoo)


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def size(model: nn.Module) -> int:
    """Bytes of what a model keeps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@SUITE.rule()
def registered(case: Case, world: World) -> None:
    """diffusers' two maps know the method, so that stock from_pretrained loads what was saved."""
    from diffusers.quantizers import auto

    stock = first_home(case, world)
    config = denoiser(quantize(case, world.pipe(stock))).config.quantization_config
    method = getattr(config, "quant_method", None) or config["quant_method"]
    method = getattr(method, "value", method)
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        require(method in known, f"{method!r} is in no map of diffusers.quantizers.auto")


@SUITE.rule()
def close_and_small(case: Case, world: World) -> None:
    """On every pipeline that it supports the model is smaller, in memory and on disk, and draws nearly the same."""
    found = homes(case, world)
    require(found, "it supports no stock pipeline")
    for stock in found:
        pipe = world.pipe(stock)
        plain, full = stock.draw(pipe), size(denoiser(pipe))
        pipe = quantize(case, pipe)
        share = size(denoiser(pipe)) / full
        require(share < LARGEST_SHARE, f"{stock.name}: {share:.0%} of the bytes in memory")
        folder = world.folder()
        denoiser(pipe).save_pretrained(folder)
        share = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / full
        require(share < LARGEST_SHARE + 0.1, f"{stock.name}: {share:.0%} of the bytes on disk")
        output = stock.draw(pipe)
        require(output.isfinite().all(), f"{stock.name}: not finite")
        error = ((output - plain).norm() / plain.norm()).item()
        require(0 < error < LARGEST_ERROR, f"{stock.name}: what it draws deviates by {error:.2g}")


@SUITE.rule()
def refusals_change_nothing(case: Case, world: World) -> None:
    """A pipeline that it does not support is refused with nothing half-applied."""
    for stock in world.stocks():
        pipe = world.pipe(stock)
        before = trace(pipe)
        try:
            quantize(case, pipe)
        except ValueError:
            require_unchanged(pipe, before, f"refused on {stock.name}")


@SUITE.rule()
def repeatable(case: Case, world: World) -> None:
    """Calibrating twice from the same seed gives equal tensors and results; so does a deep copy."""
    stock = first_home(case, world)
    pipes = [quantize(case, world.pipe(stock)) for _ in range(2)]
    pipes.append(copy.deepcopy(pipes[0]))
    states = [denoiser(pipe).state_dict() for pipe in pipes]
    for other in states[1:]:
        wrong = [key for key in states[0] if key not in other or not torch.equal(other[key], states[0][key])]
        require(not wrong, f"other tensors {wrong[:3]}")
    outputs = [stock.draw(pipe) for pipe in pipes]
    require(all(torch.equal(output, outputs[0]) for output in outputs), "another result")
    require(torch.equal(stock.draw(pipes[0]), outputs[0]), "the second call differs")


@SUITE.rule()
def save_and_load(case: Case, world: World) -> None:
    """Saved and loaded by stock means it has equal tensors of the same kind and draws the same."""
    stock, folder = first_home(case, world), world.folder()
    pipe = quantize(case, world.pipe(stock))
    expected = stock.draw(pipe)
    pipe.save_pretrained(folder)
    require(not [*folder.rglob("*.bin"), *folder.rglob("*.pt")], "it writes pickles")
    loaded = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(stock.absent))
    tensors, found = denoiser(pipe).state_dict(), denoiser(loaded).state_dict()
    for key, value in tensors.items():
        right = key in found and found[key].dtype == value.dtype and torch.equal(found[key], value)
        require(right, f"after loading, {key} differs")
    error = (stock.draw(loaded) - expected).abs().max().item()
    require(error < 1e-4, f"after loading, the result is off by {error:.2g}")


@SUITE.rule()
def two_pipelines(case: Case, world: World) -> None:
    """A quantized and a plain pipeline in two threads give what each gives alone."""
    stock = first_home(case, world)
    pipes = [quantize(case, world.pipe(stock)), world.pipe(stock)]
    expected = [stock.draw(pipe) for pipe in pipes]
    found = in_threads([lambda pipe=pipe: stock.draw(pipe) for pipe in pipes])
    require(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "two pipelines disturb each other")


@SUITE.rule(slow=True)
def compiled_eagerly(case: Case, world: World) -> None:
    """`torch.compile` traces the quantized model (backend "eager") and the result is the same."""
    stock = first_home(case, world)
    pipe = quantize(case, world.pipe(stock))
    expected = stock.draw(pipe, 2)
    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    torch._dynamo.reset()
    try:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
        error = (stock.draw(pipe, 2) - expected).abs().max().item()
    finally:
        torch._dynamo.reset()
    require(error < 1e-4, f"compiled, the result is off by {error:.2g}")


@SUITE.rule()
def travels(case: Case, world: World) -> None:
    """Saved and pushed, it loads in a fresh process with this package to the same result."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    """Without this package nobody knows the method; diffusers says so."""
    stock = first_home(case, world)
    return pack_pipeline(quantize(case, world.pipe(stock)), folder, stock, self_contained=False)


SUITE.pack = pack
