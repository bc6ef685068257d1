r"""Few ancestral steps on a found noise schedule (FastDiff, Huang et al. 2022, arXiv 2204.09934, section 3.3).

A schedule is N betas :math:`\beta_1, \dots, \beta_N`, whatever the betas that the model was trained with. It has levels of its
own, :math:`a_n^2 = \prod_{i \le n} (1 - \beta_i)` and :math:`\delta_n^2 = 1 - a_n^2`, and the network is asked at the real
timestep where its own :math:`a` would be :math:`a_n`. From there a step is that of DDPM,

.. math:: x_{n-1} = \frac{1}{\sqrt{1 - \beta_n}} \left(x_n - \frac{\beta_n}{\delta_n} \epsilon_\theta(x_n)\right)
    + \frac{\delta_{n-1}}{\delta_n} \sqrt{\beta_n}\, z

without noise at the end. `search_noise_schedule` finds schedules. The idea is that of BDDM (Lam et al. 2022, arXiv 2203.13508).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from ._grid import GridScheduler, check_choice, check_number, with_grid_arguments


class FastDiffScheduler(GridScheduler):
    r"""Ancestral sampling on a noise schedule that is given by its betas; without one, on those of stock schedulers.

        pipe.scheduler = dx.FastDiffScheduler.from_config(pipe.scheduler.config, noise_schedule=betas)
        pipe(num_inference_steps=len(betas))

    Every prediction type of a beta schedule will do. Rectified flow is refused: it has no betas.

    Args:
        noise_schedule: :math:`\beta_1, \dots, \beta_N`, the last one being of the noisiest step, each in (0, 1). A run then
            has N steps, and ends at clean data. None takes the grid that the other arguments describe; with as many steps
            as training timesteps this is DDPM.
        eta: share of the noise that steps add: 1 is DDPM, and 0 is DDIM, which draws none.
        clip_sample, clip_sample_range: clamp predicted clean samples to `[-clip_sample_range, clip_sample_range]`, as in
            DDPM and DDIM of diffusers; for models of pixels only. `thresholding` goes first.

    Raises:
        ValueError: a wrong argument, here or in `set_timesteps`.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(
        self,
        noise_schedule: Sequence[float] | None = None,
        eta: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        if self.config.use_flow_sigmas:
            raise ValueError("`use_flow_sigmas` is True; noise schedules of betas need a model with a beta schedule.")
        check_number("eta", eta, 0, 1)
        check_choice("clip_sample", clip_sample, (True, False))
        check_number("clip_sample_range", clip_sample_range, 0, open_low=True)
        if noise_schedule is not None:
            betas = check_noise_schedule(noise_schedule)
            if self.config.final_sigmas_type != "zero":
                raise ValueError(
                    f"`final_sigmas_type` is {self.config.final_sigmas_type!r}; a `noise_schedule` ends at clean data, 'zero'."
                )
            self.register_to_config(noise_schedule=betas)  # as it is when loaded

    # --- the grid ----------------------------------------------------------------------------------------------------

    def _check_number(self, number: Any) -> None:
        super()._check_number(number)
        betas = self.config.noise_schedule
        if betas is not None and number != len(betas):
            raise ValueError(f"`num_inference_steps` is {number!r}; `noise_schedule` has {len(betas)} steps.")

    def _levels(
        self, number: int | None, timesteps: np.ndarray | None, sigmas: np.ndarray | None, mu: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.config.noise_schedule is None or number is None or timesteps is not None or sigmas is not None:
            return super()._levels(number, timesteps, sigmas, mu)
        ratios = schedule_ratios(self.config.noise_schedule)
        return ratios, self._time_at(ratios)

    def _ratio_at(self, times: np.ndarray) -> np.ndarray:
        a = np.interp(times, np.arange(len(self._train_ratios)), _a_of(self._train_ratios))
        return np.sqrt((1 - a) * (1 + a)) / a

    def _time_at(self, ratios: np.ndarray) -> np.ndarray:
        return fractional_timesteps(_a_of(ratios), _a_of(self._train_ratios))

    # --- a step ------------------------------------------------------------------------------------------------------

    def to_data(self, model_output: torch.Tensor, sample: torch.Tensor, i: int) -> torch.Tensor:
        data = super().to_data(model_output, sample, i)
        limit = self.config.clip_sample_range
        return data.clamp(-limit, limit) if self.config.clip_sample and not self.config.thresholding else data

    def update(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        i: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        here, there = self.points[i], self.points[i + 1]
        data = self.to_data(model_output, sample, i)
        if self.config.clip_sample:
            noise = (sample - here.alpha * data) / here.sigma  # of the data that were clipped
        else:
            noise = self.to_noise(model_output, sample, i)
        # Share of the variance at the next point that is drawn anew: beta_n / delta_n^2 for DDPM.
        fresh = self.config.eta**2 * (1 - (there.sigma * here.alpha / (there.alpha * here.sigma)) ** 2)
        result = (there.alpha * data).add_(noise, alpha=there.sigma * math.sqrt(1 - fresh))
        if self.config.eta == 0 or there.sigma == 0:
            return result
        drawn = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return result.add_(drawn, alpha=there.sigma * math.sqrt(fresh))


def check_noise_schedule(betas: Any) -> list[float]:
    """The betas as a list of floats.

    Raises:
        ValueError: it is no list, it is empty, or a beta is not in (0, 1).
    """
    if not isinstance(betas, (list, tuple, np.ndarray)) or len(betas) == 0:
        raise ValueError(f"`noise_schedule` is {betas!r}; a list of betas, beta_1 first, is needed.")
    for beta in betas:
        check_number("noise_schedule", beta, 0, 1, open_low=True)
    if max(betas) == 1:
        raise ValueError(f"`noise_schedule` is {betas!r}; betas are below 1.")
    return [float(beta) for beta in betas]


def schedule_ratios(betas: Sequence[float]) -> np.ndarray:
    """delta / a of each level of a schedule, the noisiest first: `(N,)` in float64."""
    log_bar = np.cumsum(np.log1p(-np.asarray(betas, dtype=np.float64)))[::-1]  # of a^2
    return np.sqrt(np.expm1(-log_bar))


def fractional_timesteps(a: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Real timesteps at which the training process has these `a`: linear between those of the table, which falls.

    Beyond the table they are its first or its last timestep.
    """
    return np.interp(-np.asarray(a), -table, np.arange(len(table)))


def _a_of(ratios: np.ndarray) -> np.ndarray:
    return 1 / np.hypot(1, ratios)
