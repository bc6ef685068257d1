"""Small pipelines that are quantized in tests, and numbers by formula."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from diffusers_ext.cards import method_card, snippet
from diffusers_ext.quantization import PTQConfig, calibrate
from tests.common.models import STOCKS, Stock

QUICK = {"rounding_iterations": 2, "scale_iterations": 1, "search_from": 0.8}


def formula(rows: int, columns: int, shift: float = 0.0, positive: bool = False) -> torch.Tensor:
    """The same numbers everywhere, with heavy tails."""
    index = torch.arange(rows * columns, dtype=torch.float64)
    wave = torch.sin(index * 0.7548776662 + shift) ** 3 * (1 + (index % 7) / 5)
    return (wave.abs() if positive else wave).reshape(rows, columns).float()


def stock_of(pipe: Any) -> Stock:
    """The stock pipeline that a pipeline is a copy of."""
    zoo = getattr(pipe, "text_encoder", None) is not None or _denoiser(pipe).config.get("sample_size") in (14, 28)
    found = [stock for stock in STOCKS.values() if stock.zoo == zoo and type(pipe).__name__ == _CLASSES.get(stock.name)]
    if not found:
        raise ValueError(f"`pipe` is {type(pipe).__name__}; allowed are {', '.join(_CLASSES)}.")
    return found[0]


_CLASSES = {
    "avatars-sd": "StableDiffusionPipeline", "avatars-flow": "FluxPipeline", "fashion-dit": "DiTPipeline",
    "fashion-ddpm": "DDPMPipeline", "tiny-ddpm": "DDPMPipeline", "tiny-animatediff": "AnimateDiffPipeline",
    "tiny-flux": "FluxPipeline", "tiny-sd3": "StableDiffusion3Pipeline",
}  # fmt: skip


def _denoiser(pipe: Any) -> Any:
    found = getattr(pipe, "unet", None)
    return found if found is not None else getattr(pipe, "transformer", None)


def arguments(stock: Stock, samples: int = 2) -> dict[str, Any]:
    """What `calibrate` takes for a stock pipeline."""
    call = {k: v for k, v in stock.call(2).items() if k not in ("num_inference_steps", "output_type")}
    if "prompt" in call:
        prompt = call.pop("prompt")
        return {"prompts": [f"{prompt}{' ' * i}" for i in range(samples)], **call}
    if "class_labels" in call:
        return {"prompts": [i % 10 for i in range(samples)]}
    if "batch_size" in call:
        return {"num_samples": samples}
    return call


def quantized(pipe: Any, steps: int = 2, samples: int = 1, **settings: Any) -> Any:
    """A stock pipeline, quantized after as little calibration as there can be."""
    call = arguments(stock_of(pipe), samples)
    return calibrate(pipe, PTQConfig(**{**QUICK, **settings}), num_inference_steps=steps, batch_size=2, **call)


def maker(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """`CommonCase.make` for the stock pipelines `names`: one small pipeline of each architecture, since learning takes time."""

    def make(pipe: Any) -> Any:
        if _denoiser(pipe) is None:
            return calibrate(pipe, PTQConfig(**settings), prompts=["a"])  # refused
        stock = stock_of(pipe)
        if stock.name not in names:
            raise ValueError(f"{stock.name} is left out here.")
        return quantized(pipe, steps=3, **settings)

    return make


def tiny(name: str = "tiny-ddpm") -> tuple[Any, Stock]:
    """A fresh small pipeline."""
    pipe = STOCKS[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, STOCKS[name]


def run_card(key: str, number: str, **settings: Any) -> None:
    """Read the card of a method and run its code, with two steps and `settings`, since what is shown takes minutes.

    Args:
        key: of the method.
        number: of its paper.
        settings: of the `PTQConfig`, in place of those shown.

    Raises:
        AssertionError: something is missing in the card, or its code does not give what it says.
    """
    card, code = method_card(key), snippet(key)
    assert number in card and "simulated" in card
    for heading in ("What it does", "When to use it", "When not to use it", "How to call it"):
        assert f"## {heading}" in card
    method = f'method="{key}"'
    assert code.count(method) == 1 and code.count("num_inference_steps=20") == 2
    code = code.replace("num_inference_steps=20", "num_inference_steps=2")
    for name, value in settings.items():
        code, shown = re.subn(rf"\b{name}=[^,)]+", f"{name}={value!r}", code)
        if not shown:
            code = code.replace(method, f"{method}, {name}={value!r}")
    names: dict[str, Any] = {}
    exec(compile(code, f"card of {key}", "exec"), names)
    assert names["image"].size == (32, 32)
    config = names["pipe"].unet.config.quantization_config
    assert config.method == key and config.layers and all(getattr(config, n) == v for n, v in settings.items())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def slow_uniform(x: torch.Tensor, low: float, high: float, bits: int, symmetric: bool = False) -> list[float]:
    """The affine grid, number by number; a symmetric one has 0 at the code 2^(bits - 1)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = 2 ** (bits - 1) if symmetric else round(-low / scale)
    return [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in x.flatten().tolist()]


def float_values(exponents: int, mantissas: int, bias: float) -> list[float]:
    """All values of a floating-point grid, by their definition."""
    small = [k * 2.0 ** (1 - bias - mantissas) for k in range(2**mantissas)]
    large = [2.0 ** (e - bias) * (1 + k / 2**mantissas) for e in range(1, 2**exponents) for k in range(2**mantissas)]
    return sorted({sign * value for value in (*small, *large) for sign in (-1, 1)})
