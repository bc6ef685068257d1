"""A scheduler as it should be (DDIM), and the same with one fault each."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ._checks import check_number, check_word


class PlantedScheduler(SchedulerMixin, ConfigMixin):
    """DDIM with trailing timesteps."""

    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
    ) -> None:
        check_number("num_train_timesteps", num_train_timesteps, 1, 10_000, integer=True)
        check_number("beta_start", beta_start, 0, 1)
        check_number("beta_end", beta_end, 0, 1)
        check_word("beta_schedule", beta_schedule, ("linear", "scaled_linear"))
        check_word("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        power = 0.5 if beta_schedule == "scaled_linear" else 1.0
        betas = torch.linspace(beta_start**power, beta_end**power, num_train_timesteps) ** (1 / power)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        check_number("num_inference_steps", num_inference_steps, 1, self.config.num_train_timesteps, integer=True)
        self.num_inference_steps = num_inference_steps
        stride = self.config.num_train_timesteps / num_inference_steps
        self.timesteps = (torch.arange(num_inference_steps, 0, -1) * stride).round().long().sub(1).to(device)
        self._begin_index = self._step_index = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha = self.alphas_cumprod.to(original_samples)[timesteps].reshape(-1, *[1] * (original_samples.ndim - 1))
        return alpha.sqrt() * original_samples + (1 - alpha).sqrt() * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None; call `set_timesteps` before `step`.")
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._index(timestep)
        new = self.solve(model_output.float(), sample.float(), self._step_index).to(sample.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=new) if return_dict else (new,)

    def _index(self, timestep: Any) -> int:
        return int((self.timesteps == timestep).nonzero()[0])

    def alpha(self, index: int) -> torch.Tensor:
        """Cumulative alpha of step number `index`; one after the last."""
        if index >= len(self.timesteps):
            return self.alphas_cumprod.new_ones(())
        return self.alphas_cumprod[self.timesteps[index]]

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        alpha, after = self.alpha(index), self.alpha(index + 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "epsilon":
            clean, noise = (sample - b * output) / a, output
        elif self.config.prediction_type == "sample":
            clean, noise = output, (sample - a * output) / b
        else:
            clean, noise = a * sample - b * output, a * output + b * sample
        return after.sqrt() * clean + (1 - after).sqrt() * noise


class DropsAnArgument(PlantedScheduler):
    """The parent writes its default over `beta_end` in the config."""

    @register_to_config
    def __init__(
        self, *, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, beta_start=beta_start)


class TakesPositions(PlantedScheduler):
    """Arguments by position become defaults in the config."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
    ) -> None:
        PlantedScheduler.__init__.__wrapped__(  # without its own decorator, which would mend the config
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
        )


class LosesATensor(PlantedScheduler):
    """What was learned is not saved."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.learned = torch.rand(3)


class HidesArguments(PlantedScheduler):
    """The config does not see what goes through `**kwargs`."""

    @register_to_config
    def __init__(self, *, beta_end: float = 0.012, **kwargs: Any) -> None:
        super().__init__(beta_end=beta_end, **kwargs)


class TakesAnything(PlantedScheduler):
    """Wrong arguments go through."""

    @register_to_config
    def __init__(
        self, *, beta_start: float = 0.00085, beta_end: float = 0.012, prediction_type: str = "epsilon"
    ) -> None:
        super().__init__()
        self.register_to_config(beta_start=beta_start, beta_end=beta_end, prediction_type=prediction_type)


class TakesAnyNumber(PlantedScheduler):
    """`set_timesteps(0)` goes through."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(max(1, int(num_inference_steps)), device)


class NoGenerator(PlantedScheduler):
    """`DDPMPipeline` always passes a generator."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:  # type: ignore[override]
        return super().step(model_output, timestep, sample, return_dict=return_dict)


class WrongMaths(PlantedScheduler):
    """The noise of this step in place of that of the next."""

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        alpha, after = self.alpha(index), self.alpha(index + 1)
        clean = (sample - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return after.sqrt() * clean + (1 - alpha).sqrt() * output


class WrongForOneType(PlantedScheduler):
    """Right for epsilon, wrong for v."""

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        return super().solve(-output if self.config.prediction_type == "v_prediction" else output, sample, index)


class KeepsState(PlantedScheduler):
    """A multistep method whose history outlives the run."""

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        last = getattr(self, "last", None)
        self.last = output
        return super().solve(
            output if last is None or last.shape != output.shape else 0.9 * output + 0.1 * last, sample, index
        )


class SharesState(PlantedScheduler):
    """Its history belongs to the class."""

    history: dict[str, torch.Tensor] = {}

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.history.clear()

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        mean = output.mean()
        result = super().solve(output + 0.1 * self.history.get("mean", mean), sample, index)
        self.history["mean"] = mean
        return result


class CopiesNothing(PlantedScheduler):
    """A deep copy is the same object."""

    def __deepcopy__(self, memo: Any) -> CopiesNothing:
        return self


class TooLoud(PlantedScheduler):
    """Starts from the noise of another process."""

    @register_to_config
    def __init__(
        self, *, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        self.init_noise_sigma = 14.6


class WrongNoise(PlantedScheduler):
    """Adds the noise of another process."""

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return original_samples + noise


class BeginsAtTheStart(PlantedScheduler):
    """Forgets `set_begin_index`, and takes every run for a whole one."""

    def _index(self, timestep: Any) -> int:
        return 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass


class WrongOrder(PlantedScheduler):
    """Says that it takes two calls a step, and takes one."""

    order = 2


class NotOnTheDevice(PlantedScheduler):
    """Leaves the timesteps where they are."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)


class Upcasts(PlantedScheduler):
    """Gives float32 whatever it gets."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        return super().step(model_output, timestep, sample.float(), generator, return_dict)


class WritesIntoTheSample(PlantedScheduler):
    """The caller's tensor is not the caller's any more."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        new = super().step(model_output, timestep, sample, generator, return_dict=False)[0]
        sample.copy_(new)
        return SchedulerOutput(prev_sample=new) if return_dict else (new,)


class Overflows(PlantedScheduler):
    """Not finite from 50 steps on."""

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        return super().solve(output, sample, index) / (0.0 if index > 40 else 1.0)


class NeedsThePackage(PlantedScheduler):
    """Works here only: it reaches for this package by name, where no exporter sees it."""

    def solve(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        importlib.import_module("diffusers" + "_ext.registry")
        return super().solve(output, sample, index)
