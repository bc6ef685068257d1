r"""Noise levels of every position at every step (Fathi et al. 2025, arXiv 2504.06416): a table of whole numbers.

A row is a step, a column a position. Level 0 is settled in that step, T ("worthless") is still nothing but noise, and a
position of a level between is active. Autoregression, blocks, a sliding window and full diffusion are four such tables.
"""

from __future__ import annotations

import torch

HYPERSCHEDULES = ("full", "block", "sliding", "autoregressive")
_SETTLED, _EDGE = 1e-4, 1e-3  # the lowest rate of masks, and that of the lowest active level


def hyperschedule_levels(kind: str, length: int, width: int, num_levels: int) -> torch.Tensor:
    """Levels `(steps, length)`, int64: at which level each position is denoised in each step.

    Args:
        kind: "autoregressive", one position after the other; "full", all positions from T - 1 to 0; "block", the same for one
            block of `width` after the other; "sliding", a window of levels that rise to the right and moves on with each step,
            growing in from the left.
        length: positions.
        width: of a block or the window; of no meaning for the other two.
        num_levels: T; 1 for "autoregressive".
    """
    if kind == "autoregressive":
        width = num_levels = 1
    elif kind == "full":
        width = length
    position = torch.arange(length)
    if kind != "sliding":
        blocks = -(-length // width)
        step = torch.arange(blocks * num_levels)[:, None]
        own, now = position // width, step // num_levels
        active = num_levels - 1 - step % num_levels
        return torch.where(own < now, 0, torch.where(own > now, num_levels, active))
    window = [round(i * (num_levels - 1) / (width - 1)) for i in range(width)] if width > 1 else [0]
    pace = window.count(0)  # positions by which it moves on
    rows = [(0, window[-count:]) for count in range(1, width)]
    while len(rows) < width or rows[-1][0] + pace < length:
        rows.append((0 if len(rows) < width else rows[-1][0] + pace, window))
    table = torch.full((len(rows), length + width), num_levels)
    for row, (start, levels) in zip(table, rows, strict=True):
        row[:start] = 0
        row[start : start + len(levels)] = torch.tensor(levels)
    table = table[:, :length]
    return table[: int((table > 0).any(1).sum()) + 1]


def active_places(levels: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Which positions are denoised in which step, bool `(steps, length)`: neither worthless nor settled before."""
    settled = torch.zeros_like(levels, dtype=torch.bool)
    settled[1:] = levels[:-1] == 0
    return (levels < num_levels) & ~settled


def mask_rates(levels: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Probability that a position of a level is a mask, float64; `levels` are those of T = `num_levels`.

    Level 0 has the rate of the lowest active level; what is settled already has none, and no step asks for it.
    """
    step = (1 - 2 * _EDGE) / max(num_levels - 1, 1)
    return torch.where(levels == num_levels, 1 - _SETTLED, _EDGE + levels.double() * step)
