"""The package optimum-quanto as a backend: its layers, calibrated by its `Calibration` on our calibration set.

It quantizes linear and convolution layers with symmetric scales, one for each row of a weight (in groups of up to 128 for 4
and 2 bits), and one for the output of each layer whose next operation takes quantized tensors. Ranges of activations are
running means of maxima. There are no grids for attention inputs, no split and no learning.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .recording import Call
from .structure import trace

if TYPE_CHECKING:
    from .config import PTQConfig

# What the backend does, whatever the method; other values are refused.
SETTINGS: dict[str, Any] = {
    "attention": False, "split": False, "symmetric": True, "rounding": "nearest", "scale_iterations": 0,
    "weight_range": "minmax", "act_range": "running", "end_bits": None, "arithmetic": "simulated",
    "temporal": "none", "step_scales": False, "channel_scales": False, "stages": [],
}  # fmt: skip
_TYPES: dict[tuple[str | None, int], str] = {
    ("int", 8): "qint8",
    ("int", 4): "qint4",
    ("int", 2): "qint2",
    ("float", 8): "qfloat8",
}


def check_settings(config: PTQConfig) -> None:
    """Refuse what the backend cannot do.

    Raises:
        ValueError: a setting is another than the backend's.
    """
    for name, value in SETTINGS.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}; backend 'quanto' allows {value!r}.")
    for what, bits, form in (
        ("weight_bits", config.weight_bits, config.weight_format), ("act_bits", config.act_bits, config.act_format),
    ):  # fmt: skip
        fits = (form, bits) in _TYPES and (what == "weight_bits" or bits == 8)
        if not fits and bits is not None:
            raise ValueError(
                f"`{what}` is {bits!r} of format {form!r}; backend 'quanto' has integers of 8, 4 and 2 bits and floats "
                "of 8 for weights, and either of 8 bits, or none, for activations."
            )


def _quanto() -> Any:
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        raise ImportError("`backend` is 'quanto', and optimum-quanto is not installed: pip install optimum-quanto.")
    import optimum.quanto

    return optimum.quanto


def _converted(layer: nn.Module, config: PTQConfig) -> nn.Module:
    """quanto's module for a layer, which shares its weights until it is frozen."""
    _quanto()
    from optimum.quanto.nn.qmodule import quantize_module

    types = [
        None if bits is None else _TYPES[form, bits]
        for form, bits in ((config.weight_format, config.weight_bits), (config.act_format, config.act_bits))
    ]
    return quantize_module(layer, weights=types[0], activations=types[1])


@torch.no_grad()
def calibrate(model: nn.Module, config: PTQConfig, calls: Sequence[Call]) -> None:
    """Quantize a model in place; if that fails, it is as before. `config.layers` is filled in.

    Raises:
        ImportError: optimum-quanto is not installed.
        ValueError: there is no layer to quantize.
    """
    from .session import put

    quanto = _quanto()
    names = [
        name
        for name in trace(model, calls[0]).layers
        if not any(name == part or name.startswith(f"{part}.") for part in config.exclude)
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to quantize.")
    before = {name: model.get_submodule(name) for name in names}
    try:
        after = {name: _converted(layer, config) for name, layer in before.items()}
        for name, layer in after.items():
            put(model, name, layer.train(before[name].training))
        if config.act_bits is not None:
            with quanto.Calibration():
                for call in tqdm(calls, desc="Ranges of activations", unit="call", delay=2.0, leave=False):
                    call.run(model)
        for layer in after.values():
            layer.freeze()  # type: ignore[operator]
            layer.requires_grad_(False)
    except BaseException:
        for name, layer in before.items():
            put(model, name, layer)
        raise
    # The third number tells whether the layer's output is quantized: quanto turns that off where nothing uses it.
    config.layers = {
        name: [config.weight_bits, config.act_bits, int(_quantizes_output(layer))] for name, layer in after.items()
    }


def _quantizes_output(layer: Any) -> bool:
    hook = layer._quantize_hooks.get("output")
    return hook is not None and hook.id in layer._forward_hooks


def lay_out(model: nn.Module, config: PTQConfig) -> None:
    """Make an empty model take the tensors of a quantized one."""
    from .session import put

    for name, (_, _, output) in config.layers.items():
        layer: Any = _converted(model.get_submodule(name), config)
        layer.freeze()
        layer.requires_grad_(False)
        if not output:
            layer.disable_output_quantization()
        put(model, name, layer)


def _parent(model: nn.Module, name: str) -> tuple[Any, str]:
    parent: Any = model
    *path, last = name.split(".")
    for part in path:
        parent = getattr(parent, part)
    return parent, last


def is_part(model: nn.Module, name: str) -> bool:
    """Whether `name` is a tensor inside one of quanto's quantized weights."""
    return isinstance(_parent(model, name)[0], torch.Tensor)


def set_part(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a tensor inside one of quanto's quantized weights."""
    parent, last = _parent(model, name)
    setattr(parent, last, value)


def finish(model: nn.Module, config: PTQConfig) -> None:
    """Build quanto's weights anew from their loaded parts: a weight that was made empty goes on saying that it is."""
    for name in config.layers:
        layer = model.get_submodule(name)
        layer.load_state_dict(layer.state_dict(), assign=True)
        layer.requires_grad_(False)
