"""Noise schedules: what a denoiser is to understand by a timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import nn

PROCESSES = ("discrete", "flow", "edm")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
_SLACK = 1e-3  # timesteps may be rounded by this much over the ends: schedulers keep them in float32


class NoiseProcess(nn.Module):
    r"""Maps a timestep to :math:`(\alpha_t, \sigma_t)` of :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.

    - `discrete`: the table :math:`\bar\alpha_t = \alpha_t^2` of a DDPM-type scheduler (Ho et al. 2020),
      :math:`\sigma_t^2 = 1 - \alpha_t^2`. Between integers :math:`\log(\sigma_t / \alpha_t)` is linear in t, which
      inverts the `_sigma_to_t` of diffusers' schedulers. Timestep -1 is clean data; between it and 0 the ratio itself
      is linear.
    - `flow`: :math:`\alpha = 1 - s, \sigma = s` with s the timestep over `num_train_timesteps` (Lipman et al. 2023;
      Liu et al. 2023). Timestep 0 is clean data.
    - `edm`: the preconditioned input of Karras et al. 2022 (table 1): at noise level :math:`\varsigma` the timestep is
      :math:`\ln(\varsigma) / 4`, and :math:`\alpha = c_{in} = (\varsigma^2 + \sigma_{data}^2)^{-1/2}`,
      :math:`\sigma = \varsigma c_{in}`.
    """

    alphas_cumprod: torch.Tensor

    def __init__(self, kind: str, num_train_timesteps: int, sigma_data: float) -> None:
        super().__init__()
        if kind not in PROCESSES:
            raise ValueError(f"`process` is {kind!r}; allowed are {', '.join(PROCESSES)}.")
        if num_train_timesteps < 2:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps!r}; it must be at least 2.")
        if not sigma_data > 0:
            raise ValueError(f"`sigma_data` is {sigma_data!r}; it must be positive.")
        self.kind, self.num_train_timesteps, self.sigma_data = kind, num_train_timesteps, sigma_data
        if kind == "discrete":
            betas = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64)  # as in Ho et al. 2020
            self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))

    def forward(self, timestep: Any, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`(alpha, sigma)` as `float64` tensors `(batch,)`.

        Args:
            timestep: number, or tensor of shape `()`, `(1,)` or `(batch,)`; None for clean data.

        Raises:
            ValueError: another shape, or a timestep outside the schedule.
        """
        if timestep is None:
            one = torch.ones(batch, dtype=torch.float64, device=device)
            return one, torch.zeros_like(one)
        t = torch.as_tensor(timestep, dtype=torch.float64, device=device)
        if t.ndim > 1 or t.numel() not in (1, batch):
            raise ValueError(f"`timestep` has shape {tuple(t.shape)}; allowed are (), (1,) and ({batch},).")
        t = t.reshape(-1).expand(batch)
        low, high = {
            "discrete": (-1.0, self.num_train_timesteps - 1.0),
            "flow": (0.0, float(self.num_train_timesteps)),
            "edm": (-float("inf"), float("inf")),
        }[self.kind]
        if not bool(((t >= low - _SLACK) & (t <= high + _SLACK)).all()):
            raise ValueError(
                f"`timestep` is {timestep!r}; this {self.kind} process knows timesteps from {low:g} to {high:g}."
            )
        t = t.clamp(low, high)
        if self.kind == "flow":
            s = t / self.num_train_timesteps
            return 1 - s, s
        if self.kind == "edm":
            noise = torch.exp(4 * t)
            scale = torch.rsqrt(noise**2 + self.sigma_data**2)
            return scale, noise * scale
        return self._interpolate(t)

    def _interpolate(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.alphas_cumprod.double()
        ratios = torch.cat([table.new_zeros(1), torch.sqrt((1 - table) / table)])  # of timesteps -1, 0, ..., T - 1
        low = torch.clamp(torch.floor(t.detach()).long() + 1, 0, len(ratios) - 2)
        share = t + 1 - low
        left, right = ratios[low], ratios[low + 1]
        # The first cell starts at ratio 0; a zero terminal SNR makes the last ratio infinite. Neither has a logarithm.
        inner = (low > 0) & torch.isfinite(right)
        one = torch.ones_like(left)
        log_left, log_right = torch.log(torch.where(inner, left, one)), torch.log(torch.where(inner, right, one))
        outer = torch.where(low > 0, torch.where(share > 0, right, left), share * right)
        ratio = torch.where(inner, torch.exp(log_left + share * (log_right - log_left)), outer)
        angle = torch.atan(ratio)
        return torch.cos(angle), torch.sin(angle)


def read_scheduler(scheduler: Any) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The process that a scheduler of diffusers integrates: arguments of a denoiser, and its `alphas_cumprod` if any.

    Raises:
        ValueError: a scheduler whose process is not one of `PROCESSES`.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        raise ValueError(f"`scheduler` is {scheduler!r}; a scheduler of diffusers, with a config, is needed.")
    prediction = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(scheduler, (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)):
        return {
            "process": "edm",
            "num_train_timesteps": steps,
            "sigma_data": config["sigma_data"],
            "prediction_type": prediction,
        }, None
    if isinstance(scheduler, EulerDiscreteScheduler) and config.get("timestep_type") == "continuous":
        if prediction != "v_prediction":
            raise ValueError(
                f"`scheduler` has continuous timesteps and `prediction_type` {prediction!r}; with continuous timesteps "
                "only 'v_prediction' is supported."
            )
        return {
            "process": "edm",
            "num_train_timesteps": steps,
            "sigma_data": 1.0,
            "prediction_type": "v_prediction",
        }, None
    flow_classes = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
    if isinstance(scheduler, flow_classes) or config.get("use_flow_sigmas"):
        kind = "flow_prediction" if isinstance(scheduler, flow_classes) else prediction
        return {"process": "flow", "num_train_timesteps": steps, "prediction_type": kind}, None
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or prediction == "flow_prediction":
        raise ValueError(
            f"`scheduler` is {type(scheduler).__name__} with `prediction_type` {prediction!r}; allowed are schedulers "
            "with `alphas_cumprod`, flow-matching schedulers (or `use_flow_sigmas=True`) and the two EDM schedulers."
        )
    table = torch.as_tensor(table).double().cpu()
    return {"process": "discrete", "num_train_timesteps": len(table), "prediction_type": prediction}, table
