"""Time-shift sampling (Li et al. 2024, arXiv 2305.15583): ask the network at the noise level that the sample really has.

A sampler reaches `x_t` with errors, and then another timestep of the training process fits it better than t (exposure
bias). The fit is seen from the variance of the sample, which for small data is that of the noise, `1 - abar`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from torch import nn

from .. import _compat
from ..enabling import HookConfig
from ._plan import CacheRun, Call, _ClockHook, uninstall

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# First arguments of the denoisers that take timesteps of a beta schedule: U-Nets, and DiT.
_SIGNATURES = (("sample", "timestep"), ("hidden_states", "timestep", "class_labels"))
# Below this share of data, its variance is not measured; above this variance, there is no signal.
_DATA_SHARE, _DATA_VARIANCE = 0.5, 0.6


@dataclass
class TimeShiftConfig(HookConfig):
    """Settings of time-shift sampling, and the process that the denoiser was trained with.

    `TimeShiftConfig.from_scheduler(pipe.scheduler, window=40, cutoff=200)` takes the process from a scheduler. The default
    is that of diffusers' `DDPMScheduler`.

    The network is asked at the shifted timestep, and the scheduler goes on with its own grid: what the authors released
    for DEIS. Their second form also moves the sample to the shifted level. A stock scheduler has one timestep for all
    samples of a batch, and so that form is not offered.

    Args:
        window: w, timesteps from `t - w // 2` to `t + w // 2` are tried. Below 2 nothing changes.
        cutoff: timesteps at or below it are not shifted, since there the data add to the variance. At the number of
            training timesteps or more nothing changes.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the process, as
            in `DDPMScheduler`; `beta_schedule` is "linear", "scaled_linear" or "squaredcos_cap_v2".

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "time_shift_sampler"

    window: int = 40
    cutoff: float = 200.0
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("num_train_timesteps", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        if not _is_number(self.cutoff) or self.cutoff < 0:
            raise ValueError(f"`cutoff` is {self.cutoff!r}; it must be a number of at least 0.")
        for name in ("beta_start", "beta_end"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a number between 0 and 1.")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"`beta_schedule` is {self.beta_schedule!r}; allowed are {', '.join(BETA_SCHEDULES)}.")
        if not isinstance(self.rescale_betas_zero_snr, bool):
            raise ValueError(f"`rescale_betas_zero_snr` is {self.rescale_betas_zero_snr!r}; it must be True or False.")
        betas = self.trained_betas
        if betas is not None:
            if not isinstance(betas, (list, tuple)) or not all(_is_number(beta) and 0 < beta < 1 for beta in betas):
                raise ValueError(f"`trained_betas` is {betas!r}; it must be None or a list of numbers between 0 and 1.")
            if len(betas) != self.num_train_timesteps:
                raise ValueError(
                    f"`trained_betas` has {len(betas)} values; `num_train_timesteps` is {self.num_train_timesteps}."
                )
            self.trained_betas = list(betas)

    @classmethod
    def from_scheduler(cls, scheduler: Any, window: int = 40, cutoff: float = 200.0) -> TimeShiftConfig:
        """Settings for the process of a scheduler, which is that of the pipeline's denoiser.

        Raises:
            ValueError: the scheduler has no beta schedule of those above, or another prediction type than "epsilon": the
                method is defined for networks that predict the noise.
        """
        config = getattr(scheduler, "config", {})
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(f"`scheduler` has `prediction_type` {config['prediction_type']!r}; allowed is 'epsilon'.")
        names = {field.name for field in dataclasses.fields(cls)} & set(config)
        made = None
        if getattr(scheduler, "alphas_cumprod", None) is not None and not config.get("use_flow_sigmas"):
            made = cls(window=window, cutoff=cutoff, **{name: config[name] for name in names})
            table = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
            # Some classes give the last entry of a zero terminal SNR a tiny value.
            if len(table) != made.num_train_timesteps or not torch.allclose(1 - table, made.levels(), atol=1e-6):
                made = None
        if made is None:
            raise ValueError(
                f"`scheduler` is {type(scheduler).__name__}, whose process is none of `TimeShiftConfig`'s; allowed are those "
                f"with a `beta_schedule` of {', '.join(BETA_SCHEDULES)}, or `trained_betas`."
            )
        return made

    def levels(self) -> torch.Tensor:
        """`1 - abar` by timestep, `float64` `(num_train_timesteps,)`: the variance of the noise in `x_t`."""
        scheduler = DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps, beta_start=self.beta_start, beta_end=self.beta_end,
            beta_schedule=self.beta_schedule, trained_betas=self.trained_betas,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
        )  # fmt: skip
        return 1 - scheduler.alphas_cumprod.double()

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where the method works on `module`, else the reason why not."""
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        called = any(names[: len(start)] == start for start in _SIGNATURES)
        if not called or "in_channels" not in getattr(module, "config", ()) or not list(module.children()):
            return f"{cls.key} needs a U-Net or DiT, called with a noisy sample and a timestep of a beta schedule"
        if "controlnet_cond" in names:
            return f"{cls.key} needs a denoiser, and it is a ControlNet"
        if "added_time_ids" in names:  # Stable Video Diffusion: logarithms of noise levels in place of timesteps
            return f"{cls.key} needs timesteps of a beta schedule"
        return None

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"Time-shift sampling does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: nn.Module) -> None:
        shift = _Shift(self)
        # A pre-hook of torch, and no hook of diffusers, on the denoiser itself: accelerate's offloading leaves it alone.
        handle = module.register_forward_pre_hook(shift, with_kwargs=True)
        _compat.attach_hook(next(module.children()), _RunHook(shift.run, handle), f"diffusers_ext.{self.key}.clock")
        _compat.announce_resets(module)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        name = f"diffusers_ext.{cls.key}.clock"
        next(module.children())._diffusers_hook.hooks[name].handle.remove()  # type: ignore[union-attr]
        uninstall(module, cls.key)


def apply_time_shift_sampler(module: nn.Module, config: TimeShiftConfig | None = None) -> None:
    """Put time-shift sampling on a denoiser: a U-Net, or DiT.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_time_shift_sampler`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model is no denoiser of this kind.
    """
    from ..enabling import enable

    enable(module, config if config is not None else TimeShiftConfig())


def remove_time_shift_sampler(module: nn.Module) -> None:
    """Take time-shift sampling off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, TimeShiftConfig.key)


def shifted_timesteps(
    sample: torch.Tensor, timestep: torch.Tensor, levels: torch.Tensor, window: int, cutoff: float
) -> torch.Tensor:
    r"""The timestep near t whose noise level fits a sample best (arXiv 2305.15583, algorithm 3).

    With :math:`v` the unbiased variance of all elements of a sample it is
    :math:`t_s = \arg\min_\tau (v - (1 - \bar\alpha_\tau))^2` over :math:`\tau = t - w/2, \dots, t + w/2`, within the
    training range, and t itself up to the cutoff. Between whole timesteps :math:`\bar\alpha` is linear.

    Args:
        sample: the noisy samples as the network gets them, `(batch, ...)`.
        timestep: t, whole or real, of shape `()`, `(1,)` or `(batch,)`, on the device of the sample.
        levels: `1 - abar` by timestep, `(number of training timesteps,)`, there too.
        window: w; half of it, rounded down, is on each side.
        cutoff: timesteps at or below it stay.

    Returns:
        `(batch,)`, of the dtype of `timestep`.
    """
    v = sample.to(torch.promote_types(sample.dtype, torch.float32)).flatten(1).var(1)
    t = timestep.reshape(-1).expand(len(sample))
    last = len(levels) - 1
    half = min(window // 2, last)
    near = (t[:, None] + torch.arange(-half, half + 1, device=t.device)).clamp(0, last)
    below = near.long()
    share = (near - below).to(levels.dtype)
    level = torch.lerp(levels[below], levels[(below + 1).clamp(max=last)], share).to(v.dtype)
    best = (v[:, None] - level).square().argmin(1, keepdim=True)
    return torch.where(t > cutoff, near.gather(1, best).squeeze(1), t)


class _Shift:
    """On the denoiser, before its forward: replaces the timestep."""

    def __init__(self, config: TimeShiftConfig) -> None:
        self.config, self.levels = config, config.levels().float()
        self.run = CacheRun(self)
        self.idle = config.window < 2 or config.cutoff >= config.num_train_timesteps - 1
        self.measured = False

    def mode(self, call: Call) -> str:
        """The first sample of a run is made by no sampler, and so is not shifted."""
        return "stock" if self.idle or call.step == 0 else "shifted"

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self._begin(module, sample, timestep) == "stock":
            return args, kwargs
        timestep = torch.as_tensor(timestep, device=sample.device)
        noisy = sample[:, : _noisy_channels(module)]
        shifted = shifted_timesteps(noisy, timestep, self.levels, self.config.window, self.config.cutoff)
        if len(args) > 1:
            return (args[0], shifted, *args[2:]), kwargs
        return args, {**kwargs, "timestep": shifted}

    @torch.compiler.disable
    def _begin(self, module: nn.Module, sample: torch.Tensor, timestep: Any) -> str:
        self.run.timesteps = timestep
        self.run.tick(sample)
        mode = self.run.state.mode
        self.levels = self.levels.to(sample.device)
        if mode == "shifted" and not self.measured:
            self._measure(sample[:, : _noisy_channels(module)], timestep)
        return mode

    def _measure(self, noisy: torch.Tensor, timestep: Any) -> None:
        """Once, where the sample is data enough: warn if its variance is that of the noise at every timestep."""
        t = int(torch.as_tensor(timestep).max())
        level = float(self.levels[min(max(t, 0), len(self.levels) - 1)])
        if 1 - level < _DATA_SHARE:
            return
        self.measured = True
        # Var(x_t) = abar Var(x_0) + 1 - abar.
        variance = (float(noisy.float().flatten(1).var(1).median()) - level) / (1 - level)
        if variance > _DATA_VARIANCE:
            warnings.warn(
                f"The variance of the data is about {variance:.2f}, as of latents. The noisy sample then has about the same "
                "variance at every timestep, which says nothing of its noise level: time-shift sampling only takes the "
                "largest timestep of its window. It is meant for pixels in [-1, 1].",
                stacklevel=2,
            )


class _RunHook(_ClockHook):
    """On a child of the denoiser, where pipelines look for runs; `_Shift` does the counting."""

    def __init__(self, run: CacheRun, handle: Any) -> None:
        super().__init__(run)
        self.handle = handle

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def _noisy_channels(module: nn.Module) -> int:
    """Channels of the noisy sample: a network may get conditions behind it, or learn a variance beside the mean."""
    config = module.config
    return min(config["in_channels"], config.get("out_channels") or config["in_channels"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
