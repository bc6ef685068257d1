r"""Exponential integrators for the probability-flow ODE, in float64 coefficients.

With :math:`\lambda = \log(\alpha / \sigma)` the ODE of :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` is semi-linear, and
its linear part is solved exactly (Lu et al. 2022, arXiv 2206.00927 and 2211.01095). From `s` to `t`, with
:math:`h = \lambda_t - \lambda_s` and :math:`m^{(k)}` the k-th derivative by lambda of what the network predicts at `s`:

- noise: :math:`x_t = \frac{\alpha_t}{\alpha_s} x_s - \sigma_t \sum_k h^{k+1} \varphi_{k+1}(h)\, m^{(k)}`
- data: :math:`x_t = \frac{\sigma_t}{\sigma_s} x_s + \alpha_t \sum_k h^{k+1} \varphi_{k+1}(-h)\, m^{(k)}`

Derivatives are finite differences over predictions at other points. So each step is a linear combination of the state and
a few predictions, and all that is computed here are its weights: floats, made without touching a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Point(NamedTuple):
    """A noise level: `x = alpha x0 + sigma noise`."""

    alpha: float
    sigma: float

    @property
    def lambda_(self) -> float:
        """Half the logarithm of the signal-to-noise ratio; infinite for clean data, minus infinity for pure noise."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.alpha > 0.0 else -math.inf


class Weights(NamedTuple):
    """A step `state * x_s + sum_j predictions[j] * m_j`."""

    state: float
    predictions: tuple[float, ...]


def phi(order: int, z: float) -> float:
    r""":math:`\varphi_0(z) = e^z,\ \varphi_{k+1}(z) = (\varphi_k(z) - 1/k!) / z`, to about 1e-14 for all z.

    Args:
        order: k, at least 0.
        z: any real number.
    """
    if abs(z) < 1.0:  # the recursion cancels; the series sum_j z^j / (j + k)! does not
        term = total = 1.0 / math.factorial(order)
        for j in range(1, 24):
            term *= z / (j + order)
            total += term
        return total
    value = math.exp(z)
    for k in range(order):
        value = (value - 1.0 / math.factorial(k)) / z
    return value


def difference_weights(offsets: Sequence[float], derivative: int) -> np.ndarray:
    r"""Weights `w` with :math:`m^{(d)}(s) \approx \sum_j w_j (m(s + o_j) - m(s))`, exact for polynomials of degree n.

    Args:
        offsets: the n distinct, non-zero :math:`o_j`, in lambda.
        derivative: d, from 1 to n.

    Raises:
        ValueError: there are too few offsets for this derivative, or two are equal or zero.
    """
    n = len(offsets)
    if not 1 <= derivative <= n:
        raise ValueError(f"`derivative` is {derivative!r}; with {n} offsets it may be from 1 to {n}.")
    if len({0.0, *offsets}) != n + 1:
        raise ValueError(f"`offsets` is {list(offsets)!r}; they must be distinct and not zero.")
    scale = max(abs(offset) for offset in offsets)  # the Vandermonde matrix of relative offsets is well conditioned
    relative = np.asarray(offsets, dtype=np.float64) / scale
    powers = np.stack([relative**q / math.factorial(q) for q in range(1, n + 1)])
    unit = np.zeros(n)
    unit[derivative - 1] = 1.0
    return np.linalg.solve(powers, unit) / scale**derivative


def step_weights(
    kind: str,
    start: Point,
    end: Point,
    offsets: Sequence[float] = (),
    order: int | None = None,
    first_derivative_scale: float = 1.0,
    second_derivative_scale: float = 1.0,
    counts: Sequence[int] | None = None,
) -> Weights:
    r"""Weights of one step of Taylor order `order`, with derivatives from differences to the predictions at `offsets`.

    Args:
        kind: what the predictions are: "noise" or "data".
        start: s.
        end: t. Clean data (`sigma` 0) is allowed for "data" of order 1.
        offsets: :math:`\lambda_j - \lambda_s` of the other predictions; the points may lie before or after `s`.
        order: number of terms of the Taylor series, from 1 to `len(offsets) + 1`, which is the default.
        first_derivative_scale: factor on the first derivative's term: see `midpoint_scale`.
        second_derivative_scale: factor on the second's; 0.5 is DPM-Solver++ 3M as it is commonly implemented, of order 2.
        counts: for each derivative the number of offsets, from the first on, that its difference takes; all if None.

    Returns:
        weights whose predictions are those at `s` first, then those at `offsets`.

    Raises:
        ValueError: `kind`, `order` or `counts` is none of those, or the step to clean data is not of order 1.
    """
    if kind not in ("noise", "data"):
        raise ValueError(f"`kind` is {kind!r}; allowed are 'noise' and 'data'.")
    order = len(offsets) + 1 if order is None else order
    if not 1 <= order <= len(offsets) + 1:
        raise ValueError(
            f"`order` is {order!r}; with {len(offsets)} other predictions it may be 1 to {len(offsets) + 1}."
        )
    counts = [len(offsets)] * (order - 1) if counts is None else counts
    if len(counts) != order - 1 or not all(k <= n <= len(offsets) for k, n in enumerate(counts, 1)):
        raise ValueError(
            f"`counts` is {list(counts)!r}; order {order} needs {order - 1} of them, the k-th from k to {len(offsets)}."
        )
    h = end.lambda_ - start.lambda_
    if not math.isfinite(h):
        if kind == "data" and order == 1:  # the limit of the formulas
            at_s = end.alpha - start.alpha * end.sigma / start.sigma
            return Weights(end.sigma / start.sigma, (at_s, *[0.0] * len(offsets)))
        raise ValueError(
            f"`order` is {order!r} of kind {kind!r}; a step from pure noise or to clean data allows 1 of 'data'."
        )
    z, factor = (h, -end.sigma) if kind == "noise" else (-h, end.alpha)
    state = end.alpha / start.alpha if kind == "noise" else end.sigma / start.sigma
    at_s, others = factor * h * phi(1, z), np.zeros(len(offsets))
    scales = {1: first_derivative_scale, 2: second_derivative_scale}
    for k, n in enumerate(counts, 1):
        term = scales.get(k, 1.0) * factor * h ** (k + 1) * phi(k + 1, z)
        others[:n] += term * difference_weights(offsets[:n], k)
    return Weights(state, (float(at_s - others.sum()), *map(float, others)))


def midpoint_scale(kind: str, h: float) -> float:
    r"""Factor on the first derivative's term that turns Taylor order 2 into DPM-Solver-2 and DPM-Solver++ "midpoint".

    It is :math:`\frac{z (e^z - 1)}{2 (e^z - 1 - z)}` with z = h for noise and -h for data: also `bh2` of UniPC.
    """
    z = h if kind == "noise" else -h
    return phi(1, z) / (2.0 * phi(2, z))


def combine(weights: Weights, sample: torch.Tensor, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    """`weights.state * sample + sum_j weights.predictions[j] * predictions[j]`, in the dtype of `sample`."""
    result = sample * weights.state
    for weight, prediction in zip(weights.predictions, predictions, strict=True):
        if weight != 0.0:
            result.add_(prediction, alpha=weight)
    return result
