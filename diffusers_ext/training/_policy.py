r"""A stochastic sampler as a policy: the law of a step, and the log-probability of steps that were taken.

A step of DDIM with :math:`\eta = 1` from :math:`x` at level :math:`\bar\alpha` to level :math:`\bar\alpha'` is normal, with the mean
of DDPM's posterior and

.. math:: \sigma^2 = \frac{1 - \bar\alpha'}{1 - \bar\alpha} \Bigl(1 - \frac{\bar\alpha}{\bar\alpha'}\Bigr)

The last step has :math:`\sigma = 0`, and so no density: it gets a width of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def transition(
    scheduler: Any, epsilon: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor, last_std: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the next samples, `(n, ...)`, and standard deviation, `(n, 1, ...)`.

    Args:
        scheduler: a `DDIMScheduler` after `set_timesteps`.
        epsilon: the predicted noise, `(n, ...)`.
        timesteps: of each sample, `(n,)` integers.
        sample: `(n, ...)`.
        last_std: of the last step.
    """
    levels = scheduler.alphas_cumprod.to(sample)
    before = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    here = levels[timesteps]
    there = torch.where(before >= 0, levels[before.clamp_min(0)], scheduler.final_alpha_cumprod.to(sample))
    here, there = (level.reshape(-1, *[1] * (sample.ndim - 1)) for level in (here, there))
    variance = (1 - there) / (1 - here) * (1 - here / there)
    clean = (sample - (1 - here).sqrt() * epsilon) / here.sqrt()
    mean = there.sqrt() * clean + (1 - there - variance).clamp_min(0).sqrt() * epsilon
    last = (timesteps == scheduler.timesteps[-1].to(timesteps)).reshape(there.shape)
    return mean, torch.where(last, torch.full_like(variance, last_std), variance.sqrt())


def log_density(mean: torch.Tensor, std: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Log-density of a normal law at `x`, of each element."""
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
