"""How sure a measured number is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] = np.median,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values.

    For a paired comparison give one difference, or ratio, a pair.

    Args:
        values: one number a unit (picture, seed, round).
        statistic: function of an array and `axis`, such as `np.median` or `np.mean`.
        level: share of the resampled statistics between the two ends; 0.95 cuts at 2.5 and 97.5 percent.
        resamples: how often as many values are drawn with replacement.
        seed: of the draws; equal values and seed give equal intervals.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: `values` is empty, not one-dimensional or not finite, or `level` is not inside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"`values` is {values!r}; it must be one-dimensional, finite and not empty.")
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level!r}; it must lie between 0 and 1.")
    drawn = np.random.default_rng(seed).integers(array.size, size=(resamples, array.size))
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(array[drawn], axis=1), [tail, 1 - tail])
    return float(low), float(high)
