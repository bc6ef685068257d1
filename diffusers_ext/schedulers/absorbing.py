r"""RADD's ancestral samplers of absorbing diffusion (Ou et al. 2024, arXiv 2406.03736).

A token becomes a mask by time t with probability :math:`1 - e^{-\bar\sigma(t)}`. For this noise the network needs no time
(theorem 1): the concrete score is the conditional of the clean token times a number. Going back from t to s < t, every mask
becomes a token on its own, with the probability

.. math::
    r = \frac{e^{-\bar\sigma(s)} - e^{-\bar\sigma(t)}}{1 - e^{-\bar\sigma(t)}}
    \qquad\text{or}\qquad r = (t - s)\, \bar\sigma'(t) \frac{e^{-\bar\sigma(t)}}{1 - e^{-\bar\sigma(t)}},

by Tweedie's formula or by an Euler step, and is drawn from what the network says of the state at t. Where a step changes
nothing, the next one needs no network call.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config

from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number

METHODS = ("tweedie", "euler")
SCHEDULES = ("loglinear", "cosine")


class AbsorbingDiffusionScheduler(UnmaskingScheduler):
    """Unmasks every position on its own, as the reverse process of absorbing diffusion does.

    With an exact network and many steps its samples follow the data; `temperature=1` and no `top_p` or `top_k` are needed
    for that. `LLaDA2Pipeline` needs `temperature=1, editing_threshold=None, eos_early_stop=False` besides, which are not its
    defaults, and calls the network in every step; `MaskedDiffusionPipeline` leaves out the calls that nothing changed for.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        method: "tweedie" or "euler". For the log-linear schedule they are the same.
        schedule: "loglinear", a share t of the tokens is masked at time t, or "cosine", :math:`1 - e^{-\\bar\\sigma} =
            \\cos(\\pi (1 - t) / 2)`.
        eps: the last time; the grid is uniform from 1 to it.
    """

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        method: str = "tweedie",
        schedule: str = "loglinear",
        eps: float = 1e-5,
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        for name, value, allowed in (("method", method, METHODS), ("schedule", schedule, SCHEDULES)):
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}; allowed are {' and '.join(map(repr, allowed))}.")
        check_number("eps", eps, 0, 0.5)

    def unmask_probabilities(self, num_inference_steps: int) -> list[float]:
        """The probability r of each step, the last of which is 1."""
        t = torch.linspace(1, self.config.eps, num_inference_steps + 1, dtype=torch.float64)
        visible, rate = _visible(t, self.config.schedule)
        if self.config.method == "tweedie":
            r = (visible[1:] - visible[:-1]) / (1 - visible[:-1])
        else:
            r = (t[:-1] - t[1:]) * rate[:-1] / (1 - visible[:-1])
        return [*r[:-1].clamp(max=1).tolist(), 1.0]

    def expected_calls(self, num_inference_steps: int, length: int) -> float:
        r"""Network calls that a row of `length` masks takes on average where unchanged states need none.

        A call is made in the first step and after every step that changed the row and left masks: as many as there are
        steps that change it. For the log-linear schedule and eps = 0 these are :math:`N (1 - (1 - 1/N)^L)` (Ou et al. 2024,
        equation 4.1).
        """
        left, calls = 1.0, 0.0  # the share of positions that are masked before a step
        for r in self.unmask_probabilities(num_inference_steps):
            unmasked_now = left * r
            calls += 1 - (1 - unmasked_now) ** length
            left -= unmasked_now
        return calls

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        if now.is_last:
            return now.masked
        return now.masked & (now.random() < self.rates[now.step])

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        self.rates = self.unmask_probabilities(num_inference_steps)


def _visible(t: torch.Tensor, schedule: str) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The share :math:`e^{-\bar\sigma(t)}` of tokens that are visible at time t, and how fast it falls."""
    if schedule == "loglinear":
        return 1 - t, torch.ones_like(t)
    angle = math.pi * (1 - t) / 2
    return 1 - angle.cos(), math.pi / 2 * angle.sin()
