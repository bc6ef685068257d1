"""The package optimum-quanto as a backend: its layers, calibrated by its `Calibration` on our calibration set.

It quantizes linear and convolution layers with symmetric scales, one for each row of a weight (in groups of up to 128 for 4
and 2 bits), and one for the output of each layer whose next operation takes quantized tensors. Ranges of activations are
running means of maxima. There are no grids for attention inputs, no split and no learning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .backends import COMMON, Format, imported, layers_of
from .recording import Call

if TYPE_CHECKING:
    from .config import PTQConfig

SETTINGS: dict[str, Any] = {**COMMON, "act_range": "running"}
EXTRA: dict[str, tuple[str, ...]] = {}
CALIBRATES = True
_TYPES: dict[tuple[str | None, int], str] = {
    ("int", 8): "qint8",
    ("int", 4): "qint4",
    ("int", 2): "qint2",
    ("float", 8): "qfloat8",
}
FORMATS: dict[Format, tuple[Format, ...]] = {form: (None, ("int", 8), ("float", 8)) for form in _TYPES}


def package() -> Any:
    """optimum-quanto.

    Raises:
        ImportError: it is not installed.
    """
    return imported("optimum.quanto", "quanto", "optimum-quanto")


def _converted(layer: nn.Module, config: PTQConfig) -> nn.Module:
    """quanto's module for a layer, which shares its weights until it is frozen."""
    package()
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

    quanto = package()
    names = layers_of(model, config, calls, linear=False)
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


def is_extra(config: PTQConfig, name: str) -> bool:
    """Whether a stored tensor is none of the model's own: there is none."""
    return False


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


def finish(model: nn.Module, config: PTQConfig, extras: Mapping[str, torch.Tensor]) -> None:
    """Build quanto's weights anew from their loaded parts: a weight that was made empty goes on saying that it is."""
    for name in config.layers:
        layer = model.get_submodule(name)
        layer.load_state_dict(layer.state_dict(), assign=True)
        layer.requires_grad_(False)
