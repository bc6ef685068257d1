r"""The sampler of PeRFlow (Yan et al. 2024, arXiv 2405.07510): straight lines within each of K windows of time.

Time t runs from 1, noise, to 0, and the network is asked at timestep :math:`1000 t`. In a window from :math:`t_s` down to
:math:`t_e` the state moves on the line from :math:`z_s` to :math:`z_e`, whose end the prediction gives,

.. math:: z_e = \lambda_s z_s + \eta_s \epsilon, \qquad
    \hat z_e = \frac{\lambda_s (t_e - t_s) z_t + \eta_s (t_e - t) \epsilon}{\lambda_s (t - t_s) + (t_e - t)}, \qquad
    v = \frac{\hat z_e - z_t}{t_e - t}

with, of :math:`\bar\alpha` at timesteps :math:`1000 t - 1` (at least 0) of the window's ends,

- "ddim_eps": :math:`\lambda_s = \sqrt{\bar\alpha_e / \bar\alpha_s}`, :math:`\eta_s = \sqrt{1 - \bar\alpha_e} - \lambda_s \sqrt{1 - \bar\alpha_s}`, a
  DDIM step;
- "diff_eps": :math:`\lambda_s = 1/g`, :math:`\eta_s = -\sqrt{1 - g^2}/g` with :math:`g = \sqrt{\bar\alpha_s / \bar\alpha_e}`;
- "velocity": the network predicts v itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ._grid import check_choice, check_number
from ._run import RunScheduler, RunSchedulerOutput

PERFLOW_TYPES = ("ddim_eps", "diff_eps", "velocity")


class PeRFlowScheduler(RunScheduler):
    """PeRFlow's windows and steps, for networks that were trained for them, as the authors' released ones.

        pipe.scheduler = dx.PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")

    Steps are shared out to the windows, the noisiest first, and there are at least as many as windows. The authors'
    Stable Diffusion 1.5 weights are of type "diff_eps", those of Stable Diffusion XL of "ddim_eps", all with 4 windows.

    Args:
        num_train_timesteps: number of timesteps of the base model.
        beta_start, beta_end, beta_schedule, trained_betas: its process, as in all of diffusers' schedulers.
        set_alpha_to_one: no effect; it is in the authors' configs.
        prediction_type: see the module; not that of the base model.
        t_noise: 1, where the first window begins; it is in the authors' configs.
        t_clean: where the last window ends, in [0, 1 / num_time_windows).
        num_time_windows: K.

    Raises:
        ValueError: a value is out of range.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        set_alpha_to_one: bool = False,
        prediction_type: str = "ddim_eps",
        t_noise: float = 1.0,
        t_clean: float = 0.0,
        num_time_windows: int = 4,
    ) -> None:
        check_number("num_train_timesteps", num_train_timesteps, 2, whole=True)
        check_number("num_time_windows", num_time_windows, 1, num_train_timesteps, whole=True)
        check_number("beta_start", beta_start, 0, 1, open_low=True)
        check_number("beta_end", beta_end, 0, 1, open_low=True)
        check_choice("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        check_choice("set_alpha_to_one", set_alpha_to_one, (True, False))
        check_choice("prediction_type", prediction_type, PERFLOW_TYPES)
        check_number("t_noise", t_noise, 1, 1)
        check_number("t_clean", t_clean, 0, 1)
        if t_clean >= 1 / num_time_windows:
            raise ValueError(
                f"`t_clean` is {t_clean!r}; it must be below 1 / `num_time_windows`, {1 / num_time_windows:g}."
            )
        if trained_betas is not None:
            if not isinstance(trained_betas, (list, tuple, np.ndarray)) or len(trained_betas) != num_train_timesteps:
                raise ValueError(
                    f"`trained_betas` is {trained_betas!r}; a list of {num_train_timesteps} betas is needed."
                )
            for beta in trained_betas:
                check_number("trained_betas", beta, 0, 1, open_low=True)
        base = DDPMScheduler(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end, beta_schedule=beta_schedule,
            trained_betas=trained_betas,
        )  # fmt: skip
        self.alphas_cumprod: torch.Tensor = base.alphas_cumprod
        self.init_noise_sigma = 1.0
        self.window_starts = [i / num_time_windows for i in range(num_time_windows, 0, -1)]
        self.window_ends = [*self.window_starts[1:], float(t_clean)]
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)
        self._weights: list[tuple[float, float]] = []

    # --- windows -----------------------------------------------------------------------------------------------------

    def windows_of(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(t_s, t_e)` of the windows that times are in, in the shape and dtype of `t`.

        Args:
            t: times in (t_clean, 1]; one between two windows is in the one that it starts.

        Raises:
            ValueError: a time is in no window.
        """
        starts, ends = (
            torch.tensor(edges, dtype=t.dtype, device=t.device) for edges in (self.window_starts, self.window_ends)
        )
        slack = 0.1 / self.config.num_train_timesteps
        passed = (t[..., None] - slack <= ends).sum(dim=-1)
        if (passed >= len(self.window_ends)).any() or (t > 1 + slack).any():
            raise ValueError(f"`t` is {t.tolist()!r}; allowed are times over {self.window_ends[-1]:g} and up to 1.")
        return starts[passed], ends[passed]

    def indices_of(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps of the base model, `1000 t - 1` and at least 0, truncated."""
        return (t.float() * self.config.num_train_timesteps - 1).long().clamp(min=0)

    def window_coefficients(self, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r""":math:`\lambda_s` and :math:`\eta_s` of windows, in float64, in the shape of `start`; not for "velocity"."""
        table = self.alphas_cumprod.to(start.device, torch.float64)
        at_start, at_end = table[self.indices_of(start)], table[self.indices_of(end)]
        scale = (at_end / at_start).sqrt()
        if self.config.prediction_type == "diff_eps":
            return scale, -(1 - at_start / at_end).sqrt() * scale
        return scale, (1 - at_end).sqrt() - scale * (1 - at_start).sqrt()

    def target(self, z_s: torch.Tensor, z_e: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """What the network should predict everywhere on the line from `z_s` to `z_e`.

        Args:
            z_s, z_e: states at the ends of windows, `(batch, ...)`.
            start, end: their times, `(batch,)`.
        """
        shape = (-1,) + (1,) * (z_s.ndim - 1)
        if self.config.prediction_type == "velocity":
            return (z_e - z_s) / (end - start).to(z_s).reshape(shape)
        scale, eta = (value.to(z_s).reshape(shape) for value in self.window_coefficients(start, end))
        return (z_e - scale * z_s) / eta

    # --- a run -------------------------------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay the grid for a run; called by the pipelines.

        Args:
            num_inference_steps: number of steps; at least one a window.
            device: where `timesteps` will be.

        Raises:
            ValueError: it is out of range.
        """
        windows, train = self.config.num_time_windows, self.config.num_train_timesteps
        check_number("num_inference_steps", num_inference_steps, windows, train, whole=True)
        each, more = divmod(int(num_inference_steps), windows)
        times = [
            np.linspace(start, end, each + (i < more), endpoint=False)
            for i, (start, end) in enumerate(zip(self.window_starts, self.window_ends, strict=True))
        ]
        grid = (np.concatenate(times) * train).astype(np.int64)
        self.timesteps = torch.from_numpy(grid).to(device)
        here, there = torch.from_numpy(grid) / train, torch.from_numpy(np.append(grid[1:], 0)) / train
        self._weights = self._step_weights(here.double(), there.double())
        self.num_inference_steps = len(grid)
        self._rewind()

    def _step_weights(self, here: torch.Tensor, there: torch.Tensor) -> list[tuple[float, float]]:
        """Of the state and of the prediction in each step."""
        if self.config.prediction_type == "velocity":
            return [(1.0, step) for step in (there - here).tolist()]
        start, end = self.windows_of(here)
        scale, eta = self.window_coefficients(start, end)
        below = scale * (here - start) + (end - here)
        part = (there - here) / (end - here)  # of the way to the window's end
        state = 1 + part * (scale * (end - start) / below - 1)
        return list(zip(state.tolist(), (part * eta * (end - here) / below).tolist(), strict=True))

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
            model_output: what the network predicted.
            timestep: of the grid.
            sample: the state there.
            generator: not used; pipelines pass it.
            return_dict: return an object with `prev_sample`, or a tuple.

        Raises:
            ValueError: `set_timesteps` was not called, the run is over, or the grid has no such timestep.
        """
        index = self._enter(timestep)
        of_state, of_prediction = self._weights[index]
        wide = torch.promote_types(sample.dtype, torch.float32)
        result = (of_state * sample.to(wide)).add_(model_output.to(wide), alpha=of_prediction).to(sample.dtype)
        self._leave(index)
        return RunSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy samples at timesteps of this scheduler, 1 to 1000: those of the base model, less 1."""
        table = self.alphas_cumprod.to(original_samples.device, torch.float64)
        alpha = table[(timesteps.to(original_samples.device).long() - 1).clamp(min=0)]
        alpha = alpha.reshape((-1,) + (1,) * (original_samples.ndim - 1))
        return alpha.sqrt().to(original_samples) * original_samples + (1 - alpha).sqrt().to(noise) * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
