"""Degradations of clean pictures, for training and measuring restoration."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ._data import SampleNoise

# Kind -> (its level if none is given, what levels are allowed, in words).
DEGRADATIONS = {
    "downsample": (4.0, "a whole factor of at least 2"),
    "mask": (0.5, "a share of the side between 0 and 1"),
    "noise": (0.2, "a positive standard deviation"),
}


def check_degradation(kind: str, level: float | None) -> float:
    """The level of a degradation, or the default of its kind.

    Raises:
        ValueError: there is no such kind, or the level is out of range.
    """
    if kind not in DEGRADATIONS:
        raise ValueError(f"`degradation` is {kind!r}; allowed are {', '.join(map(repr, DEGRADATIONS))}.")
    default, allowed = DEGRADATIONS[kind]
    level = default if level is None else level
    right = {"downsample": level >= 2 and level == int(level), "mask": 0 < level < 1, "noise": level > 0}[kind]
    if not right:
        raise ValueError(f"`degradation_level` is {level}; for {kind!r} it must be {allowed}.")
    return level


def degrade(clean: torch.Tensor, kind: str, level: float, noise: SampleNoise) -> torch.Tensor:
    """Degraded pictures.

    Args:
        clean: `(batch, channels, height, width)` in [0, 1].
        kind: "downsample" (to the mean over squares of `level` pixels a side, and up again, bicubic), "mask" (a grey square
            of `level` times the side at a random place) or "noise" (white, of standard deviation `level`).
        level: see `check_degradation`.
        noise: random numbers, one sequence a picture.

    Returns:
        pictures of the same shape in [0, 1].
    """
    height, width = clean.shape[-2:]
    if kind == "downsample":
        small = F.avg_pool2d(clean, int(level), ceil_mode=True)
        return F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    if kind == "noise":
        return (clean + level * noise.normal(*clean.shape[1:])).clamp(0, 1)
    place = noise.uniform(2)
    rows, columns = _inside(height, level, place[:, :1]), _inside(width, level, place[:, 1:])
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], 0.5, clean)


def _inside(side: int, level: float, place: torch.Tensor) -> torch.Tensor:
    """Which of `side` pixels the hole covers, `(batch, side)`, for places `(batch, 1)` from 0 to 1."""
    size = round(level * side)
    first = (place * (side - size + 1)).floor()
    at = torch.arange(side, device=place.device)
    return (at >= first) & (at < first + size)
