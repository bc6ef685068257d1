"""A model and an adapter as they should be, and the same with one fault each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from ._checks import check_number


@dataclass
class PlantedOutput(BaseOutput):
    sample: torch.Tensor


class PlantedModel(ModelMixin, ConfigMixin):
    """Two layers on vectors: `(batch, width) -> (batch, width)`."""

    @register_to_config
    def __init__(self, *, width: int = 4, hidden: int = 8) -> None:
        super().__init__()
        check_number("width", width, 1, 1000, integer=True)
        check_number("hidden", hidden, 1, 1000, integer=True)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        result = self.second(torch.tanh(self.first(sample)))
        return PlantedOutput(sample=result) if return_dict else (result,)


class IgnoresAnArgument(PlantedModel):
    """The parent writes its default over `hidden` in the config."""

    @register_to_config
    def __init__(self, *, width: int = 4, hidden: int = 8) -> None:
        super().__init__(width=width)


class TakesAnyWidth(PlantedModel):
    """A wrong argument goes through to torch, whose message does not name it."""

    @register_to_config
    def __init__(self, *, width: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.register_to_config(width=width, hidden=hidden)


class HasADeadLayer(PlantedModel):
    """A layer that no gradient reaches."""

    @register_to_config
    def __init__(self, *, width: int = 4, hidden: int = 8) -> None:
        super().__init__(width=width, hidden=hidden)
        self.unused = nn.Linear(width, hidden)


class LosesABuffer(PlantedModel):
    """A random table that no file holds."""

    @register_to_config
    def __init__(self, *, width: int = 4, hidden: int = 8) -> None:
        super().__init__(width=width, hidden=hidden)
        self.register_buffer("table", torch.randn(width), persistent=False)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        return super().forward(sample + self.table, return_dict)


class RemembersItsInput(PlantedModel):
    """The output depends on the call before."""

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        last = self.__dict__.get("last", torch.zeros_like(sample))
        self.__dict__["last"] = sample
        return super().forward(sample + last, return_dict)


class Upcasts(PlantedModel):
    """Gives float32 whatever it gets."""

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        result = super().forward(sample, return_dict=False)[0].float()
        return PlantedOutput(sample=result) if return_dict else (result,)


# --- an adapter ------------------------------------------------------------------------------------------------------


class _Shift:
    """A forward hook on `conv_in` that adds a bias; an object and not a closure, so that copies are copies."""

    def __init__(self, bias: nn.Parameter) -> None:
        self.bias = bias

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.bias.to(output).reshape(1, -1, 1, 1)


class PlantedAdapter(ModelMixin, ConfigMixin):
    """Adds a learned bias to the output of a U-Net's first layer, of up to 64 channels."""

    @register_to_config
    def __init__(self, *, scale: float = 0.5) -> None:
        super().__init__()
        check_number("scale", scale, 0, 10)
        self.bias = nn.Parameter(torch.full((64,), float(scale)))
        self._handle: Any = None

    def attach(self, pipe: Any) -> None:
        self._check(pipe)
        self.detach()
        conv = pipe.unet.conv_in
        self._handle = conv.register_forward_hook(_Shift(nn.Parameter(self.bias[: conv.out_channels].detach())))

    def _check(self, pipe: Any) -> None:
        if not isinstance(getattr(getattr(pipe, "unet", None), "conv_in", None), nn.Conv2d):
            raise ValueError(f"The adapter does not work on {type(pipe).__name__}: it has no U-Net with `conv_in`.")

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class StaysAttached(PlantedAdapter):
    """Detached, it is still there."""

    def detach(self) -> None:
        self._handle = None


class AttachesHalf(PlantedAdapter):
    """Notices too late that the pipeline does not fit."""

    def attach(self, pipe: Any) -> None:
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and not hasattr(part, "conv_in"):
                part.register_forward_pre_hook(lambda *_: None)
        super().attach(pipe)


class SavesNothing(PlantedAdapter):
    """Its weights are in no file."""

    @register_to_config
    def __init__(self, *, scale: float = 0.5) -> None:
        super().__init__(scale=scale)
        bias = torch.rand(64)
        del self.bias
        self.register_buffer("bias", bias, persistent=False)
        self.extra = nn.Parameter(torch.zeros(1))


class AddsUp(PlantedAdapter):
    """Attached twice, it adds twice."""

    def attach(self, pipe: Any) -> None:
        self._check(pipe)
        self._handle = pipe.unet.conv_in.register_forward_hook(
            _Shift(nn.Parameter(self.bias[: pipe.unet.conv_in.out_channels]))
        )
