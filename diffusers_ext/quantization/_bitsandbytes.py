"""The package bitsandbytes as a backend: its `Linear8bitLt` and `Linear4bit` in place of linear layers.

8 bits are LLM.int8() without outliers: a scale for each row of a weight, and for each row of an input, found anew in each
call. 4 bits are NF4 ("nf") or its floating point ("float") with a scale for each 64 weights, and inputs in float.

diffusers' own `BitsAndBytesConfig` refuses to load without a GPU, so models are saved with our settings: the tensors are those
that bitsandbytes gives, and stock `from_pretrained` loads them after `import diffusers_ext`, on a CPU as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .backends import COMMON, Format, imported, layers_of
from .recording import Call

if TYPE_CHECKING:
    from .config import PTQConfig

SETTINGS: dict[str, Any] = {**COMMON, "act_range": "dynamic"}
FORMATS: dict[Format, tuple[Format, ...]] = {("int", 8): (("int", 8),), ("nf", 4): (None,), ("float", 4): (None,)}
EXTRA = {"act_range": ("dynamic",), "weight_format": ("nf",)}
CALIBRATES = False
_KINDS = {"nf": "nf4", "float": "fp4"}


def package() -> Any:
    """bitsandbytes.

    Raises:
        ImportError: it is not installed.
    """
    return imported("bitsandbytes", "bitsandbytes", "bitsandbytes")


def _empty(layer: Any, config: PTQConfig) -> Any:
    """bitsandbytes' layer of the same shape, without values."""
    layers, size = package().nn, (layer.in_features, layer.out_features, layer.bias is not None)
    if config.weight_bits == 8:
        made = layers.Linear8bitLt(*size, has_fp16_weights=False, threshold=0.0, device="meta")
    else:
        kind = _KINDS[config.weight_format or ""]
        made = layers.Linear4bit(*size, compress_statistics=False, quant_type=kind, device="meta")
    return made.train(layer.training).requires_grad_(False)


def _converted(layer: Any, config: PTQConfig) -> Any:
    """bitsandbytes' layer for a float one, which is left as it is."""
    layers, made, weight = package().nn, _empty(layer, config), layer.weight.detach()
    if config.weight_bits == 8:
        whole = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        kind = _KINDS[config.weight_format or ""]
        whole = layers.Params4bit(weight, False, compress_statistics=False, quant_type=kind, module=made)
    made.weight = whole.to(weight.device)  # which quantizes it
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made


@torch.no_grad()
def calibrate(model: nn.Module, config: PTQConfig, calls: Sequence[Call]) -> None:
    """Quantize a model in place; if that fails, it is as before. `config.layers` is filled in.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: there is no linear layer to quantize.
        RuntimeError: bitsandbytes cannot compute a layer, for example one of 8 bits with an input of four axes.
    """
    from .session import put

    package()
    names = layers_of(model, config, calls, linear=True)
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in before.items():
            put(model, name, _converted(layer, config))
        calls[0].run(model)
    except BaseException:
        for name, layer in before.items():
            put(model, name, layer)
        raise
    config.layers = {name: [config.weight_bits, config.act_bits, 0] for name in names}


# --- loading ---------------------------------------------------------------------------------------------------------


def lay_out(model: nn.Module, config: PTQConfig) -> None:
    """Make an empty model take the tensors of a quantized one."""
    from .session import put

    for name in config.layers:
        put(model, name, _empty(model.get_submodule(name), config))


def is_extra(config: PTQConfig, name: str) -> bool:
    """Whether a stored tensor belongs to a weight, beside its codes."""
    layer, inside, _ = name.partition(".weight.")
    if inside:
        return layer in config.layers
    layer, _, last = name.rpartition(".")
    return last in ("SCB", "weight_format") and layer in config.layers


def is_part(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight or the bias of one of bitsandbytes' layers."""
    layers = package().nn
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (layers.Linear8bitLt, layers.Linear4bit))


def set_part(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set the codes of a weight, or a bias."""
    layer, _, last = name.rpartition(".")
    model.get_submodule(layer)._parameters[last] = nn.Parameter(value, requires_grad=False)


def finish(model: nn.Module, config: PTQConfig, extras: Mapping[str, torch.Tensor]) -> None:
    """Make weights of codes and what belongs to them.

    Raises:
        ValueError: something is missing.
    """
    layers = package().nn
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in config.layers}
    for key, value in extras.items():
        name = next(part for part in (key.partition(".weight.")[0], key.rpartition(".")[0]) if part in found)
        found[name][key[len(name) + 1 :]] = value
    for name, parts in found.items():
        layer: Any = model.get_submodule(name)
        codes = layer.weight.detach()
        if not parts or (config.weight_bits == 8 and "SCB" not in parts):
            raise ValueError(f"The file has the codes of {name!r} and not their scales.")
        if config.weight_bits == 8:
            scales = parts["SCB"].to(codes.device)
            layer.weight = layers.Int8Params(codes, False, has_fp16_weights=False, CB=codes, SCB=scales)
        else:
            layer.weight = layers.Params4bit.from_prequantized(codes, parts, device=codes.device, module=layer)
