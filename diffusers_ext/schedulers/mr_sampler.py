r"""MR Sampler: few steps for mean-reverting diffusion (Li et al. 2025, arXiv 2502.07856).

Image restoration by a diffusion that ends in the degraded picture :math:`\mu` plus noise (IR-SDE, Luo et al. 2023, arXiv
2301.11699): :math:`dx = \theta_t (\mu - x) dt + \sqrt{2 \theta_t} \sigma_\infty dw`, so that

.. math:: x_t = \mu + a_t (x_0 - \mu) + s_t \epsilon, \quad a_t = e^{-\int \theta}, \quad s_t = \sigma_\infty \sqrt{1 - a_t^2}

The distance :math:`y = x - \mu` follows ordinary variance-preserving diffusion, and the paper's steps (propositions 1 to 4)
are those of DPM-Solver++ about y.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from ._bridge import BridgeScheduler
from ._exponential import Point, Weights, combine, step_weights
from ._grid import check_choice


class MRSamplerScheduler(BridgeScheduler):
    r"""Multistep steps of the reverse ODE or SDE of mean-reverting diffusion.

    `solver_type="sde", parameterization="data", solver_order=1` at T steps is the posterior sampling of IR-SDE.

    Args:
        num_train_timesteps: T. The model is trained with timesteps 1 to T and may be asked for real ones.
        theta_schedule: "cosine", "linear" or "constant" :math:`\theta_t` (IR-SDE).
        sigma_inf: :math:`\sigma_\infty`, in units of the pixels.
        final_a: :math:`a_T`: what is left of the picture at T.
        prediction_type: what the model predicts: "epsilon", "sample" (:math:`x_0`), or "v_prediction", which is
            :math:`\sigma_\infty a_t \epsilon - \sqrt{1 - a_t^2} (x_0 - \mu)`.
        solver_order: 1 to 3. Third order is the full Taylor expansion; the authors' has half its second derivative.
        solver_type: "ode" or "sde".
        parameterization: whether the solver extrapolates the predicted "data" or "noise".
        lower_order_final: the last steps are of the order of how many are left. The authors' code has this, in part, for
            fewer than 10 steps. But the last step in log-SNR is by far the longest, and extrapolating over it costs more.
        grid: how steps are spread: uniform in "time" as in the paper, "karras", or "exponential" (uniform in log-SNR).
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_train_timesteps: int = 100,
        theta_schedule: str = "cosine",
        sigma_inf: float = 50 / 255,
        final_a: float = 0.005,
        prediction_type: str = "epsilon",
        solver_order: int = 2,
        solver_type: str = "ode",
        parameterization: str = "data",
        lower_order_final: bool = True,
        grid: str = "time",
    ) -> None:
        if not (isinstance(num_train_timesteps, int) and num_train_timesteps >= 2):
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps!r}; an integer of at least 2 is needed.")
        if not (isinstance(sigma_inf, (int, float)) and 0 < sigma_inf < math.inf):
            raise ValueError(f"`sigma_inf` is {sigma_inf!r}; it must be a positive number.")
        if not (isinstance(final_a, (int, float)) and 0 < final_a < 1):
            raise ValueError(f"`final_a` is {final_a!r}; it must lie between 0 and 1.")
        check_choice("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        check_choice("solver_order", solver_order, (1, 2, 3))
        check_choice("solver_type", solver_type, ("ode", "sde"))
        check_choice("parameterization", parameterization, ("data", "noise"))
        check_choice("lower_order_final", lower_order_final, (True, False))
        total = np.cumsum(_thetas(theta_schedule, num_train_timesteps))
        a = final_a ** (total / total[-1])
        self.lay(a, sigma_inf * np.sqrt(1 - a**2), grid)
        self.init_noise_sigma = float(sigma_inf)  # runs start at the stationary law, as in the paper
        self.start()

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, _ = super().at(times)  # theta is constant between whole timesteps
        return a, self.config.sigma_inf * np.sqrt(1 - a**2)

    def start(self) -> None:
        self._past: list[tuple[float, torch.Tensor]] = []  # (lambda, prediction), the newest first

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, there = self.points[i], self.points[i + 1]
        of_data, stochastic = self.config.parameterization == "data", self.config.solver_type == "sde"
        prediction = (self.to_data if of_data else self.to_noise)(model_output, sample, i)
        order = min(self.config.solver_order, len(self._past) + 1)
        if self.config.lower_order_final:
            order = min(order, len(self.points) - 1 - i)
        past = self._past[: order - 1]
        offsets = [lambda_ - here.lambda_ for lambda_, _ in past]
        h = there.lambda_ - here.lambda_
        if not of_data:
            weights = step_weights("noise", here, there, offsets, order)
            if stochastic:  # the reverse SDE has twice the score of the ODE
                weights = Weights(weights.state, tuple(2 * weight for weight in weights.predictions))
        elif stochastic:  # the mean is a step of the ODE with the square of the signal-to-noise ratio
            weights = step_weights("data", _squared(here), _squared(there), [2 * offset for offset in offsets], order)
        else:
            weights = step_weights("data", here, there, offsets, order)
        result = combine(weights, sample, [prediction, *(kept for _, kept in past)])
        if stochastic:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            result.add_(noise, alpha=there.sigma * math.sqrt(-math.expm1(-2 * h) if of_data else math.expm1(2 * h)))
        self._past = [(here.lambda_, prediction), *self._past][: self.config.solver_order - 1]
        return result

    def to_data(self, model_output: torch.Tensor, sample: torch.Tensor, i: int) -> torch.Tensor:
        r""":math:`y_0 = x_0 - \mu` as predicted at point `i`, of y there and a prediction about y."""
        a, s = self.points[i]
        if self.config.prediction_type == "sample":
            return model_output
        if self.config.prediction_type == "epsilon":
            return (sample - s * model_output) / a
        return a * sample - s / self.config.sigma_inf * model_output

    def to_noise(self, model_output: torch.Tensor, sample: torch.Tensor, i: int) -> torch.Tensor:
        """The noise as predicted at point `i`, of y there and a prediction about y."""
        a, s = self.points[i]
        if self.config.prediction_type == "sample":
            return (sample - a * model_output) / s
        if self.config.prediction_type == "epsilon":
            return model_output
        return (a * model_output + s / self.config.sigma_inf * sample) / self.config.sigma_inf

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, mu: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """What a model of "v_prediction" is to predict, of clean `sample` and the noise at timesteps `(batch,)`."""
        a, s = self.levels(timesteps, sample)
        return self.config.sigma_inf * a * noise - s / self.config.sigma_inf * (sample - mu)


def _squared(point: Point) -> Point:
    """The point with twice the lambda."""
    return Point(point.alpha, point.sigma**2 / point.alpha)


def _thetas(schedule: str, last: int) -> np.ndarray:
    """theta at t = 0, ..., T up to a factor, which `final_a` decides."""
    check_choice("theta_schedule", schedule, ("cosine", "linear", "constant"))
    if schedule == "constant":
        return np.ones(last + 1)
    if schedule == "linear":
        return np.linspace(0.0001, 0.02, last + 1)
    steps = np.arange(last + 3) / (last + 2)
    bar = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - bar[1:-1] / bar[0]
