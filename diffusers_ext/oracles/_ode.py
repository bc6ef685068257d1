"""Ordinary differential equations with smooth right-hand sides, to nearly machine precision."""

from __future__ import annotations

from collections.abc import Callable

import torch

_STAGES = 7  # extrapolated from 2, 4, ..., 14 substeps: order 14
_MAX_STEPS = 100_000

# From states `(stages, *shape)` and one time for each stage, `(stages,)`, to slopes of the shape of the states.
Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def integrate(f: Field, y: torch.Tensor, start: float, end: float, tolerance: float) -> torch.Tensor:
    r"""Solve :math:`dy/dt = f(y, t)` by extrapolation of the modified midpoint rule.

    Gragg's method with Richardson extrapolation in the squared step, after Bulirsch and Stoer (Hairer, Nørsett and
    Wanner, Solving Ordinary Differential Equations I, section II.9). All rows of a batch share their steps, so the
    worst row decides. The stages of a step do not depend on each other and are evaluated together.

    Args:
        f: the right-hand side, of several states at once; analytic in `y` and `t`, or the order is lost.
        y: `float64` state at `start`.
        start, end: the interval, in either direction.
        tolerance: bound on the estimated error that one step adds, relative to `1 + |y|`, for every element.

    Returns:
        The state at `end`.

    Raises:
        RuntimeError: the steps become too small or too many: `f` is not smooth, or the tolerance below what `float64`
            allows.
    """
    t, span = start, end - start
    step = span / 8
    for _ in range(_MAX_STEPS):
        if t == end:
            return y
        last = abs(step) >= abs(end - t)
        if last:
            step = end - t
        stages = _midpoint(f, y, t, step)
        row = [stages[0]]
        for stage in range(1, _STAGES):
            previous, row = row, [stages[stage]]
            for k, below in enumerate(previous, start=1):
                ratio = (stage + 1) / (stage + 1 - k)
                row.append(row[-1] + (row[-1] - below) / (ratio**2 - 1))
        # Two estimates, because one is now and then small by chance.
        estimate = torch.maximum((row[-1] - row[-2]).abs(), (row[-1] - previous[-1]).abs())
        error = float((estimate / (1 + y.abs())).max()) / tolerance
        if error <= 1:
            y, t = row[-1], end if last else t + step
        # The estimate is of order 2 (_STAGES - 1), one more for a single step.
        step *= min(4.0, max(0.1, 0.9 * (1 / max(error, 1e-30)) ** (1 / (2 * _STAGES - 1)))) if error == error else 0.1
        if abs(step) < 1e-14 * abs(span):
            break
    raise RuntimeError(
        f"The equation could not be solved to a tolerance of {tolerance:g}: stopped at {t:g} of {end:g}."
    )


def _midpoint(f: Field, y: torch.Tensor, t: float, step: float) -> torch.Tensor:
    """The modified midpoint rule with 2, 4, ... substeps and Gragg's smoothing, `(stages, *shape)`.

    The error of each has even powers of its substep only.
    """
    h = step / (2 * torch.arange(1, _STAGES + 1, dtype=y.dtype, device=y.device))
    wide = h.reshape(-1, *[1] * y.ndim)
    before = y.expand(_STAGES, *y.shape)
    now = y + wide * f(y[None], torch.full_like(h[:1], t))
    for m in range(1, 2 * _STAGES):
        first = m // 2  # those before have had all their substeps
        after = before[first:] + 2 * wide[first:] * f(now[first:], t + m * h[first:])
        before, now = torch.cat([before[:first], now[first:]]), torch.cat([now[:first], after])
    return (before + now + wide * f(now, torch.full_like(h, t + step))) / 2
