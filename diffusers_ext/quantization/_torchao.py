"""The package torchao as a backend: its `quantize_`, on linear layers. Ranges of inputs are found anew in each call, for each row.

What it makes is saved by diffusers' own `TorchAoConfig`, so that stock `from_pretrained` loads it without this package. Left
to itself that loads in bfloat16: give the `dtype` that the model had.

Its packed 4-bit weights have kernels for CUDA and XPU alone; on a CPU it keeps 4 bits in a byte each. So they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .backends import COMMON, Format, imported, layers_of
from .recording import Call

if TYPE_CHECKING:
    from .config import PTQConfig

SETTINGS: dict[str, Any] = {**COMMON, "act_range": "dynamic"}
FORMATS: dict[Format, tuple[Format, ...]] = {("int", 8): (None, ("int", 8)), ("float", 8): (None,)}
EXTRA = {"act_range": ("dynamic",)}
CALIBRATES = False


def package() -> Any:
    """torchao's quantization.

    Raises:
        ImportError: it is not installed.
    """
    return imported("torchao.quantization", "torchao", "torchao")


def _form(config: PTQConfig) -> Any:
    """torchao's settings. Those of torch's compiler, which it changes for the whole process, are left alone."""
    torchao = package()
    if config.weight_format == "float":
        return torchao.Float8WeightOnlyConfig(set_inductor_config=False)
    if config.act_bits is None:
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


@torch.no_grad()
def calibrate(model: nn.Module, config: PTQConfig, calls: Sequence[Call]) -> None:
    """Quantize a model in place; if that fails, it is as before. `config.layers` is filled in.

    Raises:
        ImportError: torchao is not installed.
        ValueError: there is no linear layer to quantize.
    """
    torchao, form = package(), _form(config)
    names = layers_of(model, config, calls, linear=True)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    before = {name: layer.weight for name, layer in layers.items()}
    try:
        torchao.quantize_(model, form, filter_fn=lambda module, name: name in layers)
        calls[0].run(model)
    except BaseException:
        for name, layer in layers.items():
            layer.weight = before[name]
            vars(layer).pop("extra_repr", None)  # torchao's
        raise
    for layer in layers.values():
        layer.requires_grad_(False)
    config.layers = {name: [config.weight_bits, config.act_bits, 0] for name in names}


def stock_quantizer(config: PTQConfig) -> Any:
    """diffusers' own quantizer, as it is after loading such a model."""
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    quantizer = TorchAoHfQuantizer(TorchAoConfig(_form(config)), pre_quantized=True)
    quantizer.validate_environment()  # saving asks for what it notes
    return quantizer
