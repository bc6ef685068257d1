"""Linear and convolution layers: while they are calibrated, and as they are kept.

`CalibratedLayer` holds the float layer and the places of its grids, and can be told what to quantize. `QuantizedLayer` holds
packed codes and places alone. Both quantize the input to the layer, not its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .grids import Grid, grid_of, spread
from .int8 import integer_layer, runs_in_integers
from .observers import InputObserver
from .packing import pack, packed_shape, unpack
from .timing import Clock


@dataclass(frozen=True)
class LayerForm:
    """How one layer is quantized; what the stored tensors of a layer mean.

    Attributes:
        weight_bits: of the weights' codes.
        act_bits: of the input; None leaves it in float.
        split: channels of the first of two groups of input channels, each with grids of its own; 0 for one group.
        weight_format, act_format: "int" or "float".
        symmetric: whether integer grids of weights are symmetric.
        arithmetic: "simulated" or "int8".
        times: number of timesteps for each of which the input has grids of its own; 0 for the same at all.
        channels: whether each channel of the input has a grid of its own.
    """

    weight_bits: int
    act_bits: int | None
    split: int = 0
    weight_format: str = "int"
    act_format: str = "int"
    symmetric: bool = False
    arithmetic: str = "simulated"
    times: int = 0
    channels: bool = False

    @property
    def groups(self) -> int:
        return 2 if self.split else 1

    @property
    def input_split(self) -> int:
        """The split of the input, 0 where each channel has its own grid anyway."""
        return 0 if self.channels else self.split

    def weight_grid(self) -> Grid:
        return grid_of(self.weight_format, self.weight_bits, self.symmetric)

    def input_grid(self) -> Grid | None:
        return None if self.act_bits is None else grid_of(self.act_format, self.act_bits)


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a plain linear or two-dimensional convolution layer."""
    plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
    return plain and getattr(module, "padding_mode", "zeros") == "zeros"


class _Layer(nn.Module):
    """What a layer of either kind does with an input and a weight.

    Attributes:
        input_place: place of the input's grids, `(numbers, groups or channels)`, or with one more for each of the form's
            times as the last axis.
        clock: tells which of these times it is.
    """

    input_place: torch.Tensor | None
    clock: Clock | None = None

    def __init__(self, layer: nn.Module, form: LayerForm) -> None:
        super().__init__()
        self.form = form
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.geometry: dict[str, Any] = {}
        if self.is_conv:
            self.geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
            self.kernel_size = layer.kernel_size
        else:
            self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight_grid, self.input_grid = form.weight_grid(), form.input_grid()

    @property
    def axis(self) -> int:
        """Axis of the channels in the input."""
        return 1 if self.is_conv else -1

    def input_place_now(self, rows: int) -> torch.Tensor:
        """The place of the input's grids, `(numbers, groups)`, or `(numbers, groups, rows)` where rows differ in timestep."""
        assert self.input_place is not None
        return self.input_place if self.clock is None else self.clock.pick(self.input_place, rows)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input on its grids as they are now."""
        assert self.input_grid is not None
        place = spread(self.input_place_now(x.shape[0]), x.shape, self.axis, self.form.input_split)
        return self.input_grid.quantize(x, place)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, **self.geometry) if self.is_conv else F.linear(x, weight, bias)


class CalibratedLayer(_Layer):
    """A layer while it is calibrated. With everything off it computes what the float layer computes, bit for bit.

    Attributes:
        float_layer: the layer itself, which is never changed.
        weight_place, input_place: of the grids; None until they are known.
        rounded: weights on the grid that replace the nearest ones; None takes the nearest.
        soft: share of the way up of each weight while rounding is learnt, or None.
        free: a weight that is trained under its grid, and is rounded as `up` says, or None.
        up: whether each weight is rounded to its upper neighbour; None rounds to the nearest.
        own_bias: a bias that replaces the float layer's, or None.
        weights_on, inputs_on: what is quantized.
        observer: sees inputs, or None.
    """

    def __init__(self, layer: nn.Module, form: LayerForm) -> None:
        super().__init__(layer, form)
        self.float_layer = layer
        self.weight_place: torch.Tensor | None = None
        self.input_place: torch.Tensor | None = None
        self.rounded: torch.Tensor | None = None
        self.soft: torch.Tensor | None = None
        self.free: torch.Tensor | None = None
        self.up: torch.Tensor | None = None
        self.own_bias: torch.Tensor | None = None
        self.weights_on = self.inputs_on = False
        self.observer: InputObserver | None = None

    @property
    def float_weight(self) -> torch.Tensor:
        return self.float_layer.weight.detach()  # type: ignore[union-attr,operator,return-value]

    @property
    def weight(self) -> torch.Tensor:
        """The weight that is used now."""
        if not self.weights_on:
            return self.float_weight
        if self.free is not None:
            return self.weight_grid.between(self.free, self.goes_up().float(), self.spread_weight_place())
        if self.soft is None and self.rounded is not None:
            return self.rounded
        place = self.spread_weight_place()
        if self.soft is None:
            return self.weight_grid.quantize(self.float_weight, place)
        return self.weight_grid.between(self.float_weight, self.soft, place)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias that is used now."""
        if self.weights_on and self.own_bias is not None:
            return self.own_bias
        return self.float_layer.bias  # type: ignore[return-value]

    def goes_up(self) -> torch.Tensor:
        """Whether each weight is rounded to its upper neighbour."""
        return self.weight_grid.goes_up(self.float_weight, self.spread_weight_place()) if self.up is None else self.up

    def spread_weight_place(self) -> torch.Tensor:
        assert self.weight_place is not None
        return spread(self.weight_place, self.float_weight.shape, 1, self.form.split)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer(input)
        if not self.weights_on and not self.inputs_on:
            return self.float_layer(input)
        if self.inputs_on and self.input_grid is not None and self.input_place is not None:
            input = self.quantized_input(input)
        return self.compute(input, self.weight, self.bias)

    @torch.no_grad()
    def packed(self) -> QuantizedLayer:
        """The layer as it is kept.

        Raises:
            RuntimeError: a place is not known yet.
        """
        if self.weight_place is None or (self.input_grid is not None and self.input_place is None):
            raise RuntimeError("The layer was not calibrated.")
        weight = self.float_weight if self.rounded is None else self.rounded
        layer = QuantizedLayer(self.float_layer, self.form)
        layer.codes = pack(self.weight_grid.encode(weight, self.spread_weight_place()), self.form.weight_bits)
        layer.weight_place = self.weight_place.detach().clone()
        if self.input_place is not None and self.input_grid is not None:
            layer.input_place = self.input_place.detach().clone()
        bias = self.bias if self.own_bias is None else self.own_bias
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.clock = self.clock
        return layer.train(self.float_layer.training)


class QuantizedLayer(_Layer):
    """A layer as it is kept: codes `(rows, ...)` packed, places of the grids, and the bias in float.

    Its tensors are made as empty ones; `CalibratedLayer.packed` and loading fill them.

    Args:
        layer: a float layer of the same shape; its values are not looked at.
        form: how it is quantized.
    """

    codes: torch.Tensor
    weight_place: torch.Tensor

    def __init__(self, layer: nn.Module, form: LayerForm) -> None:
        super().__init__(layer, form)
        given: torch.Tensor = layer.weight  # type: ignore[assignment]
        self.weight_shape, self.dtype = tuple(given.shape), given.dtype
        shape, dtype = packed_shape(self.weight_shape, form.weight_bits)
        self.register_buffer("codes", torch.empty(shape, dtype=dtype, device=given.device))
        numbers = (self.weight_grid.numbers, form.groups, self.weight_shape[0])
        self.register_buffer("weight_place", torch.empty(numbers, device=given.device))
        inputs = None
        if self.input_grid is not None:
            channels = self.in_channels if self.is_conv else self.in_features
            size = [self.input_grid.numbers, channels if form.channels else form.groups]
            inputs = torch.empty([*size, form.times] if form.times else size, device=given.device)
        self.register_buffer("input_place", inputs)
        bias = None
        if layer.bias is not None:
            bias = nn.Parameter(torch.empty(self.weight_shape[0], dtype=given.dtype, device=given.device), False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, made at each look."""
        place = spread(self.weight_place, self.weight_shape, 1, self.form.split)
        return self.weight_grid.decode(unpack(self.codes, self.weight_shape, self.form.weight_bits), place).to(
            self.dtype
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.input_grid is not None:
            if self.form.arithmetic == "int8" and runs_in_integers(self):
                place = self.input_place_now(input.shape[0])
                if place.ndim == 2:  # all rows are at one timestep
                    return integer_layer(self, input, place)
            input = self.quantized_input(input)
        return self.compute(input, self.weight.to(input.dtype), self.bias)

    def dequantized(self) -> nn.Module:
        """A stock layer with the weight that the codes stand for."""
        weight = self.weight
        options = {"bias": self.bias is not None, "device": "meta", "dtype": weight.dtype}
        layer: nn.Module
        if self.is_conv:
            layer = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, **self.geometry, **options)
        else:
            layer = nn.Linear(self.in_features, self.out_features, **options)
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        sizes = ", ".join(map(str, self.weight_shape))
        return f"{sizes}, weight_bits={self.form.weight_bits}, act_bits={self.form.act_bits}"
