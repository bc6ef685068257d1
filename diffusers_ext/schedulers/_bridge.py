r"""What schedulers of diffusion towards a picture share: :math:`x_t = \mu + a_t (x_0 - \mu) + s_t \epsilon`.

:math:`\mu` is the degraded picture, and :math:`x_0` the restored one. The distance :math:`y = x - \mu` follows ordinary
diffusion, :math:`y_t = a_t y_0 + s_t \epsilon`, whatever the mean. So a scheduler's update rule is about y alone, and this
base adds and takes off the mean.
"""

from __future__ import annotations

import numpy as np
import torch

from ._exponential import Point
from ._grid import check_choice
from ._run import RunScheduler, RunSchedulerOutput

GRIDS = ("time", "karras", "exponential")


class BridgeScheduler(RunScheduler):
    """Base of schedulers whose process ends at a picture; a subclass calls `lay` in `__init__` and writes `update`.

    Its config has `prediction_type`, where "sample" is :math:`x_0` itself, and all else is about y.
    """

    _compatibles: list[str] = []

    def lay(self, a: np.ndarray, s: np.ndarray, grid: str) -> None:
        r"""Set the process.

        Args:
            a, s: :math:`a_t` and :math:`s_t` at t = 0, ..., T, all positive, their ratio falling. The end of a run is t = 0.
            grid: how steps are spread: uniform in "time", as Karras et al. 2022, or "exponential", which is uniform in
                log-SNR.
        """
        check_choice("grid", grid, GRIDS)
        self.a, self.s = a, s
        self._log_ratios = np.log(s / a)
        self.last_timestep = len(a) - 1
        self.init_noise_sigma = float(s[-1])
        self.points: list[Point] = []
        self.timesteps = torch.arange(self.last_timestep, 0, -1)

    # --- what a subclass writes --------------------------------------------------------------------------------------

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """y at `self.points[i + 1]`, of y at `self.points[i]` and the prediction about y there; both are to be left alone."""
        raise NotImplementedError

    # --- the grid ----------------------------------------------------------------------------------------------------

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(a, s)` at real timesteps from 0 to T: the logarithms of a and of s / a are linear in between."""
        whole = np.arange(self.last_timestep + 1)
        a = np.exp(np.interp(times, whole, np.log(self.a)))
        return a, a * np.exp(np.interp(times, whole, self._log_ratios))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay the grid of a run, from T to 0.

        Args:
            num_inference_steps: number of steps, which is that of denoiser calls.
            device: where `timesteps` will be: real numbers in (0, T].
        """
        if not (isinstance(num_inference_steps, (int, np.integer)) and num_inference_steps >= 1):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; a positive integer is needed.")
        ramp, high, low = np.linspace(0, 1, num_inference_steps + 1), self._log_ratios[-1], self._log_ratios[0]
        if self.config.grid == "time":
            times = self.last_timestep * (1 - ramp)
        else:
            if self.config.grid == "karras":  # equation 5, rho = 7
                log_ratios = 7 * np.log(np.exp(high / 7) + ramp * (np.exp(low / 7) - np.exp(high / 7)))
            else:
                log_ratios = high + ramp * (low - high)
            times = np.interp(log_ratios, self._log_ratios, np.arange(self.last_timestep + 1))
        self.num_inference_steps = int(num_inference_steps)
        self.points = [Point(float(a), float(s)) for a, s in zip(*self.at(times), strict=True)]
        self.timesteps = torch.tensor(times[:-1], dtype=torch.float32, device=device)
        self._rewind()
        self.start()

    # --- a run -------------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        mu: torch.Tensor | float = 0.0,
    ) -> RunSchedulerOutput | tuple[torch.Tensor]:
        """One step of the grid.

        Args:
            model_output: prediction of the denoiser, in the shape of `sample`.
            timestep: the timestep that it was made for: an element of `self.timesteps`. Looked up in the first step only.
            sample: the current state.
            generator: for solvers that draw noise.
            return_dict: False gives a tuple.
            mu: the degraded picture, in the shape of `sample`; 0 for states that are distances from it.

        Returns:
            the next state, in the dtype of `model_output`. Computed in float32 at least.

        Raises:
            ValueError: `set_timesteps` was not called, or the run is over.
        """
        i = self._enter(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        mean = mu.to(dtype) if isinstance(mu, torch.Tensor) else mu
        prediction = model_output.to(dtype)
        if self.config.prediction_type == "sample":
            prediction = prediction - mean
        previous = mean + self.update(prediction, sample.to(dtype) - mean, i, generator)
        self._leave(i)
        previous = previous.to(model_output.dtype)
        return RunSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mu: torch.Tensor | float = 0.0,
    ) -> torch.Tensor:
        r""":math:`\mu + a_t (x_0 - \mu) + s_t \epsilon` at any timesteps `(batch,)` from 0 to T."""
        a, s = self.levels(timesteps, original_samples)
        return mu + a * (original_samples - mu) + s * noise

    def levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`a_t` and `s_t` at timesteps `(batch,)`, to be multiplied with `like`."""
        times = torch.as_tensor(timesteps).double().cpu().reshape(-1).numpy()
        a, s = (torch.from_numpy(level).to(like).view(-1, *[1] * (like.ndim - 1)) for level in self.at(times))
        return a, s

    def __len__(self) -> int:
        return self.last_timestep
