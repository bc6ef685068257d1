r"""Arithmetic in 8-bit integers: what a quantized layer computes, by integer matrix products.

With :math:`x_i = s_x (q_i - z_x)` and :math:`w_{oi} = s_o (p_{oi} - z_o)`, each group of input channels gives

.. math:: s_x s_o \Big(\sum_i q_i p_{oi} - z_x \sum_i p_{oi} - z_o \sum_i q_i + n z_x z_o\Big),

whose sums are exact. A convolution is the product of the patches of its input, padded with :math:`z_x`, which stands for 0.
It equals the simulation up to the rounding of float32.

The products are torch's `_int_mm`. It is fast on CUDA and on CPUs with AVX512-VNNI or AMX. On other CPUs it is a plain loop, many times
slower than float32: there the simulation is what to use.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .grids import UniformGrid
from .packing import unpack

if TYPE_CHECKING:
    from .layers import LayerForm, QuantizedLayer

_HALF = 128  # codes 0 to 255 less this are int8
_ROWS, _ALIGN = 17, 8  # what CUDA's kernel needs: more than 16 rows, and other sizes in multiples of 8


def fits_int8(form: LayerForm) -> bool:
    """Whether weights and inputs of that form are integers of at most 8 bits."""
    formats = form.weight_format == form.act_format == "int"
    return formats and form.act_bits is not None and form.act_bits <= 8 and form.weight_bits <= 8


def runs_in_integers(layer: QuantizedLayer) -> bool:
    """Whether `integer_layer` computes this layer; grouped convolutions, named paddings and inputs with a grid for each
    channel are simulated."""
    plain = layer.geometry.get("groups", 1) == 1 and not isinstance(layer.geometry.get("padding", 0), str)
    return plain and fits_int8(layer.form) and not layer.form.channels


def integer_layer(layer: QuantizedLayer, x: torch.Tensor, input_place: torch.Tensor) -> torch.Tensor:
    """Output of a layer for an input in float, whose grids lie at `input_place` `(numbers, groups)`."""
    assert isinstance(layer.weight_grid, UniformGrid)
    form, out, channels = layer.form, layer.weight_shape[0], layer.weight_shape[1]
    weights = unpack(layer.codes, layer.weight_shape, form.weight_bits)
    weights = (weights.to(torch.int16) - _HALF).to(torch.int8)
    bounds = (0, form.split, channels) if form.split else (0, channels)
    total: torch.Tensor | None = None
    for group, (first, end) in enumerate(itertools.pairwise(bounds)):
        scale, zero = input_place[:, group].float()
        codes = (x.narrow(layer.axis, first, end - first).float() / scale).round_()
        codes = codes.add_(zero).clamp_(0, 2 ** (form.act_bits or 0) - 1).sub_(_HALF).to(torch.int8)
        zero = zero - _HALF  # both codes are less by 128, and so are both zeros: the differences stay
        rows = _patches(codes, zero, layer)
        columns = _last(weights[:, first:end]).reshape(out, -1)
        place = layer.weight_place[:, group].float()
        row_zero = (2 ** (form.weight_bits - 1) if layer.weight_grid.symmetric else place[1]) - _HALF
        sums = int8_product(rows, columns).float()
        if torch.is_tensor(row_zero) or row_zero:
            sums -= rows.sum(1, dtype=torch.int32).float()[:, None] * row_zero
        by_column = columns.sum(1, dtype=torch.int32).float()
        factor = scale * place[0]
        sums.mul_(factor).add_((columns.shape[1] * row_zero - by_column) * zero * factor)
        total = sums if total is None else total.add_(sums)
    assert total is not None
    if layer.bias is not None:
        total.add_(layer.bias.float())
    return _folded(total, x, layer).to(x.dtype)


def int8_product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`rows @ columns.T` of int8 matrices `(m, k)` and `(n, k)`: int32 `(m, n)`."""
    m, n = rows.shape[0], columns.shape[0]
    if rows.is_cuda:
        inner = -rows.shape[1] % _ALIGN
        rows = F.pad(rows, (0, inner, 0, max(_ROWS - m, 0)))
        columns = F.pad(columns, (0, inner, 0, -n % _ALIGN))
    return torch._int_mm(rows.contiguous(), columns.t())[:m, :n]


def _sizes(layer: QuantizedLayer, x: torch.Tensor) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    padding, dilation, stride = (layer.geometry[name] for name in ("padding", "dilation", "stride"))
    found = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (layer.kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return found[0], found[1]


def _last(x: torch.Tensor) -> torch.Tensor:
    """Channels last, so that patches are copied in runs of them."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _patches(codes: torch.Tensor, zero: torch.Tensor, layer: QuantizedLayer) -> torch.Tensor:
    """Inputs of each output, `(m, k)`, in the order of a kernel with channels last."""
    if not layer.is_conv:
        return codes.reshape(-1, codes.shape[-1])
    padding, dilation, stride = (layer.geometry[name] for name in ("padding", "dilation", "stride"))
    codes = _last(codes)
    if any(padding):
        height, width = codes.shape[1] + 2 * padding[0], codes.shape[2] + 2 * padding[1]
        padded = zero.to(torch.int8).expand(codes.shape[0], height, width, codes.shape[3]).clone()
        padded[:, padding[0] : height - padding[0], padding[1] : width - padding[1]] = codes
        codes = padded
    codes = codes.contiguous()
    high, wide = (
        (codes.shape[1 + i] - dilation[i] * (layer.kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    n, h, w, c = codes.stride()
    view = codes.as_strided(
        (codes.shape[0], high, wide, *layer.kernel_size, codes.shape[3]),
        (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c),
    )
    return view.reshape(codes.shape[0] * high * wide, -1)


def _folded(total: torch.Tensor, x: torch.Tensor, layer: QuantizedLayer) -> torch.Tensor:
    """Rows `(m, out)` in the layout of the layer's output."""
    if not layer.is_conv:
        return total.view(*x.shape[:-1], -1)
    high, wide = _sizes(layer, x)
    return total.view(x.shape[0], high, wide, -1).permute(0, 3, 1, 2).contiguous()
