r"""Grids: the values that a quantized tensor may take.

A grid has a number of bits and, for every tensor or channel, a *place*: a few numbers that put it on the line. A place is
a tensor `(numbers, *shape)` whose `shape` broadcasts to what is quantized.

- `UniformGrid`: :math:`x_q = s\,(\mathrm{clamp}(\mathrm{round}(x/s) + z, 0, 2^b - 1) - z)`, place :math:`(s, z)`, or
  :math:`(s)` alone with :math:`z = 2^{b-1}` where it is symmetric.
- `FloatGrid`: floating-point numbers with a sign, e exponent bits, m = b - 1 - e mantissa bits and a real-valued bias
  (Kuzmin et al. 2022, arXiv 2208.09225), place :math:`(u, m)` with :math:`u = 2^{-bias}`: the values
  :math:`\pm u\,k\,2^{1-m}` for :math:`k < 2^m` and :math:`\pm u\,2^E (1 + k / 2^m)` for :math:`1 \le E < 2^e`.

All arithmetic is in float32; what comes out has the dtype that went in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_SMALLEST = 1e-8  # a scale: a tensor of zeros has one as well
UNIFORM_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
FLOAT_MANTISSAS = {4: range(0, 3), 8: range(2, 6)}  # bits -> mantissa bits of the formats to choose from


class UniformGrid:
    """Evenly spaced values.

    Args:
        bits: b, one of `UNIFORM_BITS`.
        symmetric: places are a scale alone.
    """

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        self.bits, self.symmetric = bits, symmetric
        self.numbers = 1 if symmetric else 2
        self.last = 2**bits - 1

    def _parts(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | int]:
        place = place.float()
        return place[0], 2 ** (self.bits - 1) if self.symmetric else place[1]

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The place of the grid that spans `low` to `high` and has 0 on it.

        A symmetric grid spans the larger of their magnitudes both ways, by one value more below than above: its scale is
        `2 c / (2^b - 1)`.
        """
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        width = (high - low).clamp(min=self.last * _SMALLEST)
        scale = width / self.last
        # By shares: of a range of equal magnitudes both ways it is 2^(b-1) - 1/2 exactly, and rounds up to 2^(b-1).
        return scale[None] if self.symmetric else torch.stack([scale, (-low / width * self.last).round()])

    def places(self, low: torch.Tensor, high: torch.Tensor, shrinks: Sequence[float]) -> Iterator[torch.Tensor]:
        """Places to choose from: ranges shrunk by each factor."""
        for factor in shrinks:
            yield self.fit(low * factor, high * factor)

    def quantize(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid.

        Gradients go straight through the rounding: in x they are 1 inside the range and 0 outside, in the scale those of
        LSQ (Esser et al. 2019, arXiv 1902.08153).
        """
        scale, zero = self._parts(place)
        return ((_round(x.float() / scale) + zero).clamp(0, self.last) - zero).mul(scale).to(x.dtype)

    def share(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Where x lies between its two neighbours, 0 to 1."""
        scaled = x.float() / self._parts(place)[0]
        return scaled - scaled.floor()

    def between(self, x: torch.Tensor, share: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The point at `share` of the way from the neighbour below x to that above; 0 and 1 are on the grid."""
        scale, zero = self._parts(place)
        return ((_floor(x.float() / scale) + share + zero).clamp(0, self.last) - zero).mul(scale).to(x.dtype)

    def goes_up(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Whether the nearest value is the neighbour above x: `between(x, goes_up(x))` is `quantize(x)`, bit for bit."""
        scaled = x.float() / self._parts(place)[0]
        return scaled.round() > scaled.floor()

    def encode(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Codes 0 to 2^b - 1 of the nearest values, int32."""
        scale, zero = self._parts(place)
        return ((x.float() / scale).round() + zero).clamp(0, self.last).to(torch.int32)

    def decode(self, codes: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Values of codes, float32."""
        scale, zero = self._parts(place)
        return (codes.float() - zero) * scale


class FloatGrid:
    """Floating-point values, whose exponent and mantissa bits are part of the place.

    Args:
        bits: b = 1 + e + m: 8 (E5M2 to E2M5 to choose from) or 4 (E3M0, E2M1, E1M2).
    """

    numbers = 2

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.mantissas = FLOAT_MANTISSAS[bits]

    def _parts(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        unit, mantissa = place.float()
        top = torch.exp2(torch.exp2(self.bits - 1 - mantissa) - 1)  # 2^E of the largest binade
        return unit, mantissa, (2 - torch.exp2(-mantissa)) * top * unit

    def place(self, clip: torch.Tensor, mantissa: int) -> torch.Tensor:
        """The place of the grid with `mantissa` bits whose largest value is `clip`."""
        top = 2.0 ** (2 ** (self.bits - 1 - mantissa) - 1)
        unit = (clip.float().clamp(min=_SMALLEST) / (2 - 2.0**-mantissa)) / top
        return torch.stack([unit, torch.full_like(unit, mantissa)])

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The grid of the middle format (E4M3 of 8 bits, E2M1 of 4) that reaches the larger magnitude."""
        return self.place(torch.maximum(low.abs(), high.abs()), 3 if self.bits == 8 else 1)

    def places(self, low: torch.Tensor, high: torch.Tensor, shrinks: Sequence[float]) -> Iterator[torch.Tensor]:
        """Places to choose from: every format, each with clip values shrunk by each factor."""
        clip = torch.maximum(low.abs(), high.abs())
        for mantissa in self.mantissas:
            for factor in shrinks:
                yield self.place(clip * factor, mantissa)

    def _steps(self, x: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x clipped, the distance of its neighbours on the grid, and the largest value."""
        unit, mantissa, clip = self._parts(place)
        x = torch.minimum(torch.maximum(x.float(), -clip), clip)
        exponent = torch.frexp((x / unit).detach()).exponent - 1  # floor(log2 |x / u|), exactly
        return x, unit * torch.ldexp(torch.ones_like(x), exponent.clamp(min=1)) * torch.exp2(-mantissa), clip

    def quantize(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid; gradients go straight through the rounding."""
        clipped, step, _ = self._steps(x, place)
        return (_round(clipped / step) * step).to(x.dtype)

    def share(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Where x lies between its two neighbours, 0 to 1."""
        clipped, step, _ = self._steps(x, place)
        return clipped / step - (clipped / step).floor()

    def between(self, x: torch.Tensor, share: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The point at `share` of the way from the neighbour below x to that above; 0 and 1 are on the grid."""
        clipped, step, clip = self._steps(x, place)
        value = (_floor(clipped / step) + share) * step
        return torch.minimum(torch.maximum(value, -clip), clip).to(x.dtype)

    def goes_up(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Whether the nearest value is the neighbour above x."""
        clipped, step, _ = self._steps(x, place)
        scaled = clipped / step
        return scaled.round() > scaled.floor()

    def encode(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Codes 0 to 2^b - 1 of the nearest values, int32: sign, exponent, mantissa, as floating-point numbers have them."""
        value = self.quantize(x.float(), place)
        unit, mantissa, _ = self._parts(place)
        size = value.abs() / unit
        exponent = (torch.frexp(size).exponent - 1).clamp(min=0)
        # With E = 0 the implicit one is missing, and the step is that of E = 1. A mantissa that overflows carries.
        scaled = torch.ldexp(size, -exponent.clamp(min=1)) * torch.exp2(mantissa)
        code = ((exponent.clamp(min=1) - 1) * torch.exp2(mantissa) + scaled).round()
        return (code + (value < 0) * 2.0 ** (self.bits - 1)).to(torch.int32)

    def decode(self, codes: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Values of codes, float32."""
        unit, mantissa, _ = self._parts(place)
        half = 2 ** (self.bits - 1)
        sizes, ones = (codes % half).float(), torch.exp2(mantissa)
        exponent = (sizes / ones).floor()
        value = (
            torch.where(exponent > 0, sizes - (exponent - 1) * ones, sizes) * torch.exp2(exponent.clamp(min=1)) / ones
        )
        return value * unit * (1 - 2 * (codes >= half).float())


Grid = UniformGrid | FloatGrid


def grid_of(form: str, bits: int, symmetric: bool = False) -> Grid:
    """The grid of a format, "int" or "float"."""
    return FloatGrid(bits) if form == "float" else UniformGrid(bits, symmetric)


def spread(place: torch.Tensor, shape: Sequence[int], axis: int, split: int) -> torch.Tensor:
    """A place laid out so that it broadcasts to a tensor.

    Args:
        place: `(numbers, 1)` for one grid, `(numbers, 2)` for one for the first `split` channels and one for the others,
            `(numbers, channels)` for one for each channel, or any of them with one place more for each row of the tensor:
            `(numbers, groups, rows)`.
        shape: of the tensor, whose first axis is the rows.
        axis: of the channels.
        split: channels of the first of two groups, 0 for another number of groups.

    Returns:
        `(numbers, *shape that broadcasts)`.
    """
    by_row, numbers, groups = place.ndim == 3, place.shape[0], place.shape[1]
    ones = [1] * len(shape)
    if by_row:
        ones[0] = shape[0]
    if groups == 1:
        return place[:, 0].reshape(numbers, *ones)
    if not split:
        ones[axis] = groups
        return place.movedim(-1, 1).reshape(numbers, *ones) if by_row else place.reshape(numbers, *ones)
    sizes = (split, shape[axis] - split)
    parts = [part.reshape(numbers, *ones) for part in place.unbind(1)]
    layout = [[*ones[: axis % len(ones)], size, *ones[axis % len(ones) + 1 :]] for size in sizes]
    return torch.cat(
        [part.expand(numbers, *want) for part, want in zip(parts, layout, strict=True)], axis % len(ones) + 1
    )


def _round(x: torch.Tensor) -> torch.Tensor:
    """Rounded to whole numbers; the gradient is that of x."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def _floor(x: torch.Tensor) -> torch.Tensor:
    """Rounded down to whole numbers; the gradient is that of x."""
    return x + (x.floor() - x).detach() if x.requires_grad else x.floor()
