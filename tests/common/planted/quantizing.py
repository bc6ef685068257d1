"""A quantizer as it should be (int8 weights of linear layers and convolutions), and the same with one fault each."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn
from torch.nn import functional


class PlantedMethod(StrEnum):
    INT8 = "planted_int8"


class PlantedInt8Config(QuantizationConfigMixin):
    """Weights as int8, one scale a row."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = PlantedMethod.INT8

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def calibrate(cls, pipe: Any) -> Any:
        denoiser = getattr(pipe, "unet", None)
        if denoiser is None or not hasattr(denoiser, "conv_in"):
            raise ValueError(f"planted_int8 does not work on {type(pipe).__name__}: it has no U-Net.")
        state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        _replace_layers(denoiser)
        for name, layer in _layers(denoiser):
            weight = state[f"{name}.weight"].float()
            scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-8) / 127
            layer.weight = (weight / scale).round().clamp(-127, 127).to(torch.int8)
            layer.weight_scale = scale
            if layer.bias is not None:
                layer.bias = nn.Parameter(state[f"{name}.bias"].clone())
        cls._finish(denoiser)
        denoiser.register_to_config(quantization_config=cls().to_dict())
        denoiser.hf_quantizer = PlantedQuantizer(cls(), pre_quantized=True)
        denoiser.is_quantized = True
        return pipe

    @classmethod
    def _finish(cls, denoiser: nn.Module) -> None:
        pass


class PlantedLayer(nn.Module):
    """A linear layer or convolution whose weight is int8."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        shape = layer.weight.shape
        self.options = {} if isinstance(layer, nn.Linear) else {"stride": layer.stride, "padding": layer.padding}
        self.linear = isinstance(layer, nn.Linear)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(shape[0], *[1] * (len(shape) - 1)))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if layer.bias is not None else None

    def forward(self, input: torch.Tensor, *args: Any) -> torch.Tensor:
        weight = self.weight.to(input.dtype) * self.weight_scale.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return (
            functional.linear(input, weight, bias)
            if self.linear
            else functional.conv2d(input, weight, bias, **self.options)
        )


def _layers(model: nn.Module) -> list[tuple[str, PlantedLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PlantedLayer)]


def _replace_layers(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, nn.Conv2d) and module.weight.numel() >= 64:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PlantedLayer(module).train(module.training))


class PlantedQuantizer(DiffusersQuantizer):
    """Loads what `PlantedInt8Config.calibrate` made."""

    requires_calibration = False

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        return torch_dtype or torch.float32  # None would cast every tensor of the file to int8

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with torch.device("meta"):
            _replace_layers(model)
        model.config.quantization_config = self.quantization_config

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class LosesTheScales(PlantedInt8Config):
    """Rounds everything to zero."""

    @classmethod
    def _finish(cls, denoiser: nn.Module) -> None:
        for _, layer in _layers(denoiser):
            layer.weight_scale.zero_()


class KeepsTheWeights(PlantedInt8Config):
    """The float weights stay beside the small ones."""

    @classmethod
    def _finish(cls, denoiser: nn.Module) -> None:
        for _, layer in _layers(denoiser):
            layer.register_buffer("original", layer.weight.float() * layer.weight_scale)


class IsRandom(PlantedInt8Config):
    """Rounds at random, from no seed."""

    @classmethod
    def _finish(cls, denoiser: nn.Module) -> None:
        generator = torch.Generator()
        generator.seed()
        for _, layer in _layers(denoiser):
            layer.weight_scale *= 1 + 0.01 * torch.rand((), generator=generator)


class RefusesLate(PlantedInt8Config):
    """Notices too late that the pipeline does not fit."""

    @classmethod
    def calibrate(cls, pipe: Any) -> Any:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.register_forward_pre_hook(lambda *_: None)
        return super().calibrate(pipe)


def register() -> None:
    auto.AUTO_QUANTIZER_MAPPING[PlantedMethod.INT8.value] = PlantedQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[PlantedMethod.INT8.value] = PlantedInt8Config


def unregister() -> None:
    del auto.AUTO_QUANTIZER_MAPPING[PlantedMethod.INT8.value]
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[PlantedMethod.INT8.value]
