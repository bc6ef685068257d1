r"""Euler steps of a rectified flow as InstaFlow has it (Liu et al. 2023, arXiv 2309.06380): velocity is data minus noise.

.. math:: x_t = t\, x_1 + (1 - t)\, x_0, \qquad v = x_1 - x_0, \qquad x_{t + 1/N} = x_t + \tfrac{1}{N} v(x_t, 1000 (1 - t))

with noise :math:`x_0` and data :math:`x_1`, so that one step is :math:`x_1 = x_0 + v(x_0, 1000)`. The flow-matching schedulers of
diffusers have the other sign.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ._grid import check_number
from ._run import RunScheduler, RunSchedulerOutput


class RectifiedFlowEulerScheduler(RunScheduler):
    """For networks that predict data minus noise, such as InstaFlow's, in the pipelines of Stable Diffusion.

        pipe.scheduler = dx.RectifiedFlowEulerScheduler()
        pipe(prompt, num_inference_steps=1, guidance_scale=0)

    Timesteps are real numbers, `num_train_timesteps (1 - i / N)`, the first of them `num_train_timesteps`.

    Args:
        num_train_timesteps: what the network takes for pure noise.

    Raises:
        ValueError: it is no whole number of at least 1.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(self, *, num_train_timesteps: int = 1000) -> None:
        check_number("num_train_timesteps", num_train_timesteps, 1, whole=True)
        self.init_noise_sigma = 1.0
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)
        self._steps: list[float] = []

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay the grid for a run; called by the pipelines.

        Args:
            num_inference_steps: N, from 1 to `num_train_timesteps`.
            device: where `timesteps` will be.

        Raises:
            ValueError: it is out of range.
        """
        train = self.config.num_train_timesteps
        check_number("num_inference_steps", num_inference_steps, 1, train, whole=True)
        grid = train * (1 - np.arange(num_inference_steps) / num_inference_steps)
        self.timesteps = torch.from_numpy(grid.astype(np.float32)).to(device)
        self._steps = [1 / int(num_inference_steps)] * int(num_inference_steps)
        self.num_inference_steps = int(num_inference_steps)
        self._rewind()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> RunSchedulerOutput | tuple[torch.Tensor]:
        """The state at the next timestep.

        Args:
            model_output: the velocity, data minus noise.
            timestep: of the grid.
            sample: the state there.
            generator: not used; pipelines pass it.
            return_dict: return an object with `prev_sample`, or a tuple.

        Raises:
            ValueError: `set_timesteps` was not called, the run is over, or the grid has no such timestep.
        """
        index = self._enter(timestep)
        wide = torch.promote_types(sample.dtype, torch.float32)
        result = torch.add(sample.to(wide), model_output.to(wide), alpha=self._steps[index]).to(sample.dtype)
        self._leave(index)
        return RunSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """States on the lines from noise to data, at timesteps from 0, data, to `num_train_timesteps`, noise."""
        share = timesteps.to(original_samples.device).float() / self.config.num_train_timesteps
        share = share.reshape((-1,) + (1,) * (original_samples.ndim - 1)).to(original_samples.dtype)
        return (1 - share) * original_samples + share * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
