r"""EVODiff (Li et al. 2025, arXiv 2509.26096): second-order steps whose weights come from the predictions themselves.

A step goes to a probe point first, where the network is called, and is corrected after that call: as in UniPC, one call a
step. Both use differences :math:`D_1 = m_0 - r_1 m_1` and :math:`D_2 = m_t - r_2 m_0` of clean-data predictions whose
factors r are partly the variance-minimising ones, per sample and channel. :math:`\eta` and :math:`\zeta`, which mix and
scale them in the correction, are the paper's optima pressed through sigmoids.

With :math:`\kappa = \sigma / \alpha`, :math:`h = 1/\kappa_t - 1/\kappa_0` and :math:`r = \log(\kappa_1/\kappa_0) /
\log(\kappa_0/\kappa_t)`, where 0 is the current point, 1 the one before and t the target:

.. math::
    x'_t &= \frac{\sigma_t}{\sigma_0} x_0 + \sigma_t h \left(m_0 + \frac{D_1}{2 r_i}\right), \qquad m_t = D_\theta(x'_t, t) \\
    x_t &= \frac{\sigma_t}{\sigma_0} x_0 + \sigma_t h \left(m_0 + \frac{B}{2 \zeta}\right), \qquad
    B = -\frac{\eta}{r} D_1 + r (1 - \eta) D_2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from ._exponential import combine, step_weights
from ._grid import GridScheduler, with_grid_arguments

LIMIT = 2.0  # the authors' clamp of every projection coefficient
MANY_STEPS = 20  # above that, zeta falls with its optimum instead of rising
FLOOR = 0.1  # of zeta, which the authors let fall to 0 where D_1 nearly vanishes: the step then grows without bound


@dataclass
class Probe:
    """What the correction needs to know of the step that led to a probe point.

    Attributes:
        scale: :math:`\\sigma_t h`.
        r: ratio of the log-SNR steps.
        mix: w, the weight of the variance-minimising factor in `r_1` and `r_2`.
        balance: the other factor.
        data: :math:`m_0`.
        square: :math:`|m_0|^2` of each sample and channel.
        difference: :math:`D_1`.
        r_i: the probe's own r, of each sample and channel.
        steepness: of the sigmoid of zeta.
    """

    scale: float
    r: float
    mix: float
    balance: float
    data: torch.Tensor
    square: torch.Tensor
    difference: torch.Tensor
    r_i: torch.Tensor
    steepness: torch.Tensor | float


class EVODiffScheduler(GridScheduler):
    """EVODiff, one denoiser call a step, for diffusion and rectified flow.

    The first step and the last are DDIM. The authors' last step of EDM sampling also shrinks the state by
    `1 - sqrt(sigma_t sigma_0)`, which is close to 1 only where the grid ends at very little noise; it is left out.
    The factors take the grid to be near uniform in log-SNR. Grids that are uniform in time, as of flow models, are not at
    their clean end, and leave an error there that more steps do not remove.

    Inner products go over height and width (and frames) of `(batch, channels, ...)`, and over tokens of packed latents
    `(batch, tokens, channels)`.

    The arguments are those of all our ODE schedulers: see `GridScheduler`.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(self) -> None:
        pass

    def start(self) -> None:
        """Forget what was kept of an earlier run."""
        self._probe: Probe | None = None
        self._past: torch.Tensor | None = None
        ends = self._train_ratios[0], self._train_ratios[-1]  # a grid may end at clean data
        ratios = np.clip([point.sigma / point.alpha for point in self.points], *ends)
        train = self.config.num_train_timesteps
        times = ratios / (1 + ratios) if self.config.use_flow_sigmas else (self._time_at(ratios) + 1) / train
        self._times = ((times + times[-1]) / (times[0] + times[-1])).tolist()

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """The probe point of the next step, from the corrected state of this one."""
        data = self.to_data(model_output, sample, i)
        if self._probe is not None:
            sample = self._corrected(self._probe, sample, data)
        here, there = self.points[i], self.points[i + 1]
        past, self._past, self._probe = self._past, data, None
        state = combine(step_weights("data", here, there, order=1), sample, [data])
        if past is None or self.is_last(i):
            return state
        before = self.points[i - 1]
        shrink, h = there.sigma / here.sigma, there.alpha / there.sigma - here.alpha / here.sigma
        r = (here.lambda_ - before.lambda_) / (there.lambda_ - here.lambda_)
        balance = math.sqrt(shrink / (here.sigma / before.sigma))
        mix = 0.5 * (1 - self._times[i + 1] ** 2)
        r_1, r_i = self._factors(data, past, mix, balance, r)
        difference = torch.addcmul(data, r_1, past, value=-1)
        steepness: torch.Tensor | float = 1.0
        if self.num_inference_steps > MANY_STEPS:  # type: ignore[operator]  # set in every run
            change = data - past
            agreement = projection(h * dot(data, change), dot(change, change))
            steepness = -torch.sigmoid(agreement * (2 - shrink**2))
        scale = there.sigma * h
        self._probe = Probe(scale, r, mix, balance, data, dot(data, data), difference, r_i, steepness)
        return state.addcmul_(difference, scale / (2 * r_i))

    def _factors(
        self, data: torch.Tensor, past: torch.Tensor, mix: float, balance: float, r: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`r_1` and `r_i` of the probe; 1 and r would make it a step of DPM-Solver++ (2M)."""
        r_1 = (1 - mix) * balance + mix * projection(dot(data, past), dot(past, past))
        return r_1, torch.sigmoid(r_1.abs() / 4) * r

    def _corrected(self, probe: Probe, sample: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """:math:`x_t`, from the probe point :math:`x'_t` and the `data` that the network has predicted there."""
        r, first = probe.r, probe.difference
        r_2 = (1 - probe.mix) * probe.balance + probe.mix * projection(dot(data, probe.data), probe.square)
        second = torch.addcmul(data, r_2, probe.data, value=-1)
        one_one, two_two, one_two = dot(first, first), dot(second, second), dot(first, second)
        # eta* = <N + P, N - P> / (2 |N - P|^2), of the scaled differences P = D_1 / r and N = r D_2.
        p, n = one_one / r**2, two_two * r**2
        eta = torch.sigmoid(projection(n - p, n - 2 * one_two + p).abs() / 2) / 2
        # zeta* = what B leaves of the probe's own step, projected on D_1, over sigma_t h.
        share = -eta / r + r * (1 - eta) * quotient(one_two, one_one)
        zeta_star = (probe.scale * (1 - share) / (2 * probe.r_i)).clamp(-LIMIT, LIMIT) / probe.scale
        zeta = torch.sigmoid((zeta_star.abs() - 0.5) * probe.steepness).clamp_min(FLOOR)
        half = probe.scale / 2
        sample = torch.addcmul(sample, first, -half * (eta / (r * zeta) + 1 / probe.r_i))
        return sample.addcmul_(second, half * r * (1 - eta) / zeta)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of each sample and channel, in a shape that broadcasts against `a`."""
    return (a * b).sum(dim=1 if a.ndim <= 3 else tuple(range(2, a.ndim)), keepdim=True)


def quotient(numerator: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """`numerator / square`, or 0 where a vanishing vector makes both 0."""
    return numerator / square.clamp_min(torch.finfo(square.dtype).tiny)


def projection(numerator: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Coefficient of a projection, clamped as the authors do."""
    return quotient(numerator, square).clamp(-LIMIT, LIMIT)
