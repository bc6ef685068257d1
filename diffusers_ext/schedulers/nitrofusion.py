r"""LCM steps at shifted timesteps, as NitroFusion has them (Chen et al. 2024, arXiv 2412.02030).

With the timesteps :math:`p` of an LCM run and T training timesteps the network is asked at :math:`t' = \lfloor p\, s / T \rfloor`, and
its prediction is read at the level of :math:`t'`:

.. math:: \hat x_0 = c_{out}(t') \frac{x - \sigma_{t'} \epsilon_\theta(x, t')}{\alpha_{t'}} + c_{skip}(t')\, x, \qquad
    x_{next} = \alpha_{p_{next}} \hat x_0 + \sigma_{p_{next}} \epsilon

Only the noise that is added again has the level of the unshifted timestep. For one step this makes a network that was trained to
draw from noise at :math:`t' = s - 1` one of a scheduler, and the same network refines its picture in more steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers import LCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

from ._grid import PREDICTION_TYPES, check_choice, check_number


class TimestepShiftLCMScheduler(LCMScheduler):
    """For one-step networks such as NitroSD, in the stock pipelines of Stable Diffusion (1, 2, XL).

        pipe.scheduler = dx.TimestepShiftLCMScheduler.from_config(pipe.scheduler.config, shifted_timestep=250)
        pipe(prompt, num_inference_steps=1, guidance_scale=0)   # or 2 to 4

    Takes the arguments of `LCMScheduler` by name, and:

    Args:
        shifted_timestep: s, in training timesteps, from 1 to `num_train_timesteps`, with which it is `LCMScheduler` bit for
            bit. Released weights: 250 for NitroSD-Realism, 500 for NitroSD-Vibrant.
        original_inference_steps: of the grid that a run takes its steps from; 4 for these weights, 50 in `LCMScheduler`.

    Raises:
        ValueError: an argument is out of range; or in `set_timesteps` two steps have the same shifted timestep.
    """

    timesteps: torch.Tensor

    @register_to_config
    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        original_inference_steps: int = 4,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        shifted_timestep: int = 250,
    ) -> None:
        check_number("num_train_timesteps", num_train_timesteps, 2, whole=True)
        check_number("shifted_timestep", shifted_timestep, 1, num_train_timesteps, whole=True)
        check_number("original_inference_steps", original_inference_steps, 1, num_train_timesteps, whole=True)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES[:3])
        check_choice("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        # Without its `register_to_config`: ours has noted all arguments.
        inspect.unwrap(LCMScheduler.__init__)(
            self, num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, original_inference_steps,
            clip_sample, clip_sample_range, set_alpha_to_one, steps_offset, prediction_type, thresholding,
            dynamic_thresholding_ratio, sample_max_value, timestep_spacing, timestep_scaling, rescale_betas_zero_snr,
        )  # fmt: skip

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Lay the grid for a run; arguments as in `LCMScheduler`, with `timesteps` before the shift.

        Raises:
            ValueError: also where two steps would be at one timestep after the shift.
        """
        super().set_timesteps(num_inference_steps, device, original_inference_steps, timesteps, strength)
        # What noise is added for; `timesteps` is what the network is asked at.
        self.noise_timesteps = self.timesteps
        self.timesteps = self.noise_timesteps * self.config.shifted_timestep // self.config.num_train_timesteps
        if (self.timesteps.diff() >= 0).any():
            found, self.num_inference_steps = self.timesteps.tolist(), None
            raise ValueError(
                f"`num_inference_steps` is {len(found)}, which with `shifted_timestep` {self.config.shifted_timestep} makes "
                f"two steps at one timestep: {found}. Take fewer steps or a larger shift."
            )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple:
        """The sample at the next timestep; arguments as in `LCMScheduler`, `timestep` after the shift."""
        if self.num_inference_steps is not None and self.step_index is None:
            self._init_step_index(timestep)
        shifted = self.timesteps
        try:
            self.timesteps = self.noise_timesteps if self.num_inference_steps is not None else shifted
            return super().step(model_output, timestep, sample, generator, return_dict)
        finally:
            self.timesteps = shifted

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Samples as a run has them at shifted timesteps of its grid, with the noise of the unshifted ones.

        Image-to-image and inpainting begin and go on with these. The authors' scheduler adds the noise of the shifted
        timestep instead, less than the network is given in a run from noise.

        Raises:
            ValueError: `set_timesteps` was not called, or one of `timesteps` is none of its grid.
        """
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None; call `set_timesteps` first.")
        same = self.timesteps.to(timesteps.device)[:, None] == timesteps.reshape(-1)
        if not same.any(dim=0).all():
            raise ValueError(f"`timesteps` is {timesteps.tolist()}; the grid has {self.timesteps.tolist()}.")
        level = self.noise_timesteps.to(timesteps.device)[same.int().argmax(dim=0)]
        return super().add_noise(original_samples, noise, level)
