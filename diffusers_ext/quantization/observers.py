"""Ranges: from what a tensor held, the place of its grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .grids import Grid

_KEPT = 1 << 16  # values of one input that a search looks at
_MOMENTUM = 0.95  # of running ranges (Q-Diffusion's release)


def shrinks(least: float) -> list[float]:
    """Factors by which ranges are shrunk, from 1 down to `least` in steps of 0.01."""
    first = round(100 * least)
    return [percent / 100 for percent in range(100, first - 1, -1)]


def search(
    x: torch.Tensor, grid: Grid, places: Iterable[torch.Tensor], power: float, chunk: int = 1 << 22
) -> torch.Tensor:
    """Of several places for each row, that of the least mean `|x_q - x|^power`.

    Args:
        x: `(rows, n)`.
        grid: that is to be placed.
        places: each `(numbers, rows)`. Of equal ones the first wins.
        power: of the error.
        chunk: values that are quantized at once.

    Returns:
        `(numbers, rows)`.
    """
    tried = torch.stack(list(places), 1)  # (numbers, places, rows)
    errors = []
    for some in tried.split(max(1, chunk // max(1, x.numel())), 1):
        error = torch.zeros(some.shape[1:], device=x.device)
        for part in x.split(max(1, chunk // x.shape[0]), 1):
            error += (grid.quantize(part[None], some[..., None]) - part).abs_().pow_(power).sum(-1)
        errors.append(error)
    best = torch.cat(errors).argmin(0)
    return tried.gather(1, best.expand(tried.shape[0], 1, -1))[:, 0]


def weight_place(
    weight: torch.Tensor, grid: Grid, split: int, how: str, factors: Sequence[float], power: float
) -> torch.Tensor:
    """Places for a weight `(rows, channels, ...)`, one for each row and group of channels.

    Args:
        split: channels of the first of two groups, or 0.
        how: "minmax" spans the range; "search" takes the best of the shrunk ones.
        factors: to shrink by.
        power: of the error that is least.

    Returns:
        `(numbers, groups, rows)`.
    """
    found = []
    for part in [weight] if not split else [weight[:, :split], weight[:, split:]]:
        rows = part.detach().flatten(1).float()
        low, high = rows.amin(1), rows.amax(1)
        if how == "minmax":
            found.append(grid.fit(low, high))
        else:
            found.append(search(rows, grid, grid.places(low, high, factors), power))
    return torch.stack(found, 1)


def _some(values: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Values `(n,)` in random order; at most so many of them, drawn at random."""
    if len(values) <= most:
        return values[torch.randperm(len(values), generator=generator).to(values.device)]
    return values[torch.randint(len(values), (most,), generator=generator).to(values.device)]


def symmetric_range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that spans the larger magnitude both ways, or up alone where nothing is negative."""
    high = torch.maximum(low.abs(), high.abs())
    return torch.where(low < 0, -high, 0), high


class InputObserver:
    """Sees the inputs of a layer over the calibration set.

    Args:
        axis: of the channels.
        split: channels of the first of two groups, or 0.
        channels: whether each channel has a range of its own, for which there is no "search".
        how: "minmax" for the range of all, "running" for a running mean of the ranges of each call, "search" for the
            best of the shrunk ones.
    """

    def __init__(self, axis: int, split: int, how: str, channels: bool = False) -> None:
        self.axis, self.split, self.how, self.channels = axis, split, how, channels
        self.ranges: list[torch.Tensor] = []  # (2, groups) of each call
        self.values: list[list[torch.Tensor]] = []  # of each call, of each group

    def __call__(self, x: torch.Tensor) -> None:
        x = x.detach().float()
        if self.channels:
            rows = x.movedim(self.axis, 0).flatten(1)
            self.ranges.append(torch.stack([rows.amin(1), rows.amax(1)]))
            return
        parts = [x]
        if self.split:
            sizes = (self.split, x.shape[self.axis] - self.split)
            parts = list(x.split(sizes, self.axis))
        self.ranges.append(torch.stack([torch.stack(torch.aminmax(part)) for part in parts], 1))
        if self.how == "search":
            generator = torch.Generator().manual_seed(len(self.values))
            self.values.append([_some(part.flatten(), _KEPT, generator) for part in parts])
            # All calls stay equally well known: what was drawn at random may be cut short.
            most = max(1, 2 * _KEPT // len(self.values))
            if sum(parts[0].numel() for parts in self.values) > 4 * _KEPT:
                self.values = [[part[:most].clone() for part in parts] for parts in self.values]

    def place(self, grid: Grid, factors: Sequence[float], power: float, symmetric: bool) -> torch.Tensor:
        """The place of the grid, `(numbers, groups)`.

        Args:
            symmetric: whether a range with negative values is made symmetric.
        """
        ranges = torch.stack(self.ranges)
        low, high = ranges[:, 0].amin(0), ranges[:, 1].amax(0)
        if self.how == "running":
            low, high = ranges[0, 0], ranges[0, 1]
            for now in ranges[1:]:
                low, high = (_MOMENTUM * old + (1 - _MOMENTUM) * new for old, new in zip((low, high), now, strict=True))
        if symmetric:
            low, high = symmetric_range(low, high)
        if self.how != "search":
            return grid.fit(low, high)
        found, most = [], max(1, 2 * _KEPT // len(self.values))
        for group in range(ranges.shape[2]):
            values = torch.cat([parts[group][:most] for parts in self.values])[None]
            places = grid.places(low[group : group + 1], high[group : group + 1], factors)
            found.append(search(values, grid, places, power))
        return torch.cat(found, 1)
