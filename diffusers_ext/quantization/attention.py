"""Inputs of attention: queries, keys, values, and what the softmax gives.

Attention modules keep their class's code and their processor. While one runs, calls of torch's
`scaled_dot_product_attention` in its thread are computed here, on quantized inputs: that is where the processors of U-Nets,
SD3- and Flux-like transformers end, after their norms and rotary embeddings.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .grids import Grid, grid_of
from .observers import InputObserver
from .timing import Clock

INPUTS = ("query", "key", "value", "softmax")
_NAME = "attention_inputs"


class AttentionInputs(nn.Module):
    """Quantizes the inputs of one attention module.

    Args:
        bits: of queries, keys and values.
        softmax_bits: of what the softmax gives; None leaves it in float, and torch's fused attention in place.
        form: "int" or "float".
        device: of the places.
        times: number of timesteps that have places of their own; 0 for the same at all.

    Attributes:
        places: `(numbers, 4)` of the grids, in the order of `INPUTS`, or `(numbers, 4, times)`.
        clock: tells which of the times it is.
        on: whether anything is quantized; off while ranges are observed.
        observers: one for each input while ranges are observed.
    """

    places: torch.Tensor

    def __init__(
        self,
        bits: int,
        softmax_bits: int | None,
        form: str = "int",
        device: torch.device | str | None = None,
        times: int = 0,
    ) -> None:
        super().__init__()
        self.grids: list[Grid | None] = [grid_of(form, bits)] * 3
        self.grids.append(None if softmax_bits is None else grid_of(form, softmax_bits))
        size = (2, len(INPUTS), times) if times else (2, len(INPUTS))
        self.register_buffer("places", torch.zeros(size, device=device))
        self.clock: Clock | None = None
        self.on = True
        self.observers: list[InputObserver] | None = None

    def observe(self, how: str) -> None:
        """Look at inputs from now on."""
        self.observers = [InputObserver(-1, 0, how) for _ in INPUTS]
        self.on = False

    def quantized(self, which: int, x: torch.Tensor) -> torch.Tensor:
        if self.observers is not None:
            self.observers[which](x)
        grid = self.grids[which]
        if not self.on or grid is None:
            return x
        place = self.places[:, which]
        if self.clock is not None:
            place = self.clock.pick(place, x.shape[0])
            if place.ndim == 2:  # rows differ in timestep
                place = place.reshape(*place.shape, *[1] * (x.ndim - 1))
        return grid.quantize(x, place)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As `scaled_dot_product_attention`, on quantized inputs."""
        query, key, value = (self.quantized(i, x) for i, x in enumerate((query, key, value)))
        if self.grids[3] is None or not (self.on or self.observers is not None):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return F.dropout(self.quantized(3, scores.softmax(-1)), dropout_p, dropout_p > 0) @ value


class _Interception(TorchFunctionMode):
    """Inside, attention of this thread is computed by `inputs`."""

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__()
        self.inputs, self.seen = inputs, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen = True
            return self.inputs.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def _with_quantized_inputs(cls: type) -> type:
    """A class as `cls`, whose modules have an `AttentionInputs` named `_NAME`."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _Interception(getattr(self, _NAME))
        with mode:
            output = cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if not mode.seen:
            raise RuntimeError(
                f"{cls.__name__} was quantized with its attention inputs, and its processor "
                f"{type(self.processor).__name__} did not call scaled_dot_product_attention; use a processor that does, or calibrate with `attention=False`."
            )
        return output

    body = {
        "forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "_quantized_from": cls,
        "__reduce_ex__": lambda self, protocol: (_revived, (cls,), self.__dict__),
    }  # fmt: skip
    return type(cls.__name__, (cls,), body)


def _revived(cls: type) -> Any:
    """An object of the class that `_with_quantized_inputs` makes; no name leads to that class."""
    made = _with_quantized_inputs(cls)
    return made.__new__(made)  # type: ignore[call-overload]  # a class, of some kind


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention module of diffusers."""
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def attach(module: nn.Module, inputs: AttentionInputs) -> None:
    """Quantize the inputs of an attention module."""
    setattr(module, _NAME, inputs)
    module.__class__ = _with_quantized_inputs(type(module))  # type: ignore[arg-type]  # classes are hashable


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    module.__class__ = type(module)._quantized_from  # type: ignore[assignment,union-attr]
    delattr(module, _NAME)


def attached(model: nn.Module) -> dict[str, AttentionInputs]:
    """Name of each attention module with quantized inputs -> its `AttentionInputs`."""
    return {
        name: getattr(module, _NAME)
        for name, module in model.named_modules()
        if hasattr(type(module), "_quantized_from")
    }
