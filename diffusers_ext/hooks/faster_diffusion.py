"""Faster Diffusion (Li et al. 2023, arXiv 2312.09608): run the encoder of a U-Net at a few key steps only.

The features of the encoder change little from step to step. At a key step everything runs; the steps after it run the
decoder on the encoder's last features. What they predict does not depend on their latents, so that the decoders of a key
step and of those after it can run as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..enabling import HookConfig
from . import _unets
from ._plan import PlanBuilder, find_run, uninstall
from ._values import is_count, is_number

# Of 50 steps (section 3.2): dense where the features change.
_PAPER_KEYS, _PAPER_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50


@dataclass
class FasterDiffusionConfig(HookConfig):
    """Settings of encoder propagation.

    Args:
        key_steps: the steps whose encoder runs. A list of step numbers with 0 in it; an integer m for every m-th step, 1
            computes everything; or "paper", 9 of 50 steps, scaled to the length of the run. "paper" needs that length, so
            it is enabled on a pipeline, not on a bare model.
        parallel: run the decoders of a key step and of all steps up to the next as one batch. The result is the same up to
            rounding. It takes less time where single calls do not fill the device, and the memory of that batch: up to 15
            times the rows for the paper's 50 steps. Prompts and other conditions of a group of steps are those of its key
            step. Needs a pipeline, for the timesteps to come.

    Residuals of a ControlNet or a T2I-Adapter count as the encoder's: those of the last key step are used.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "faster_diffusion"
    family: ClassVar[str] = "cache"

    key_steps: list[int] | int | str = "paper"
    parallel: bool = False

    def __post_init__(self) -> None:
        steps = self.key_steps
        if isinstance(steps, tuple):
            steps = self.key_steps = list(steps)
        whole = [steps] if isinstance(steps, int) else steps if isinstance(steps, list) else []
        fine = bool(whole) and all(map(is_count, whole))
        if steps != "paper" and not (fine and (0 in whole) == isinstance(steps, list)):
            raise ValueError(
                f"`key_steps` is {steps!r}; allowed are a list of step numbers with 0 among them, an integer of at least 1, "
                "and 'paper'."
            )
        if not isinstance(self.parallel, bool):
            raise ValueError(f"`parallel` is {self.parallel!r}; allowed are True and False.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where encoder propagation works on `module`, else the reason why not."""
        return _unets.unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"FasterDiffusion does not work on {type(module).__name__}: {reason}.")
        if not on_pipeline and self.key_steps == "paper":
            raise ValueError(
                "`key_steps` is 'paper', which needs the number of steps: enable it on the pipeline, not on its model."
            )
        if self.parallel:
            _unets.check_parallel(module, on_pipeline, "FasterDiffusion")

    def apply(self, module: nn.Module) -> None:
        plan = _unets.PropagationPlan(_Keys(self.key_steps), self.parallel, "FasterDiffusion")
        _unets.propagate_encoder(PlanBuilder(module, self.key, plan), plan)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_faster_diffusion(module: nn.Module, config: FasterDiffusionConfig | None = None) -> None:
    """Put encoder propagation on a U-Net.

    A bare model has no number of steps and no scheduler: give `key_steps` as a list or an integer, and `parallel=False`.

    Raises:
        ValueError: the model is no U-Net of this kind, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config if config is not None else FasterDiffusionConfig())


def remove_faster_diffusion(module: nn.Module) -> None:
    """Take encoder propagation off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, FasterDiffusionConfig.key)


def paper_key_steps(num_steps: int) -> list[int]:
    """The key steps of the paper, {0, 1, 2, 3, 5, 10, 15, 25, 35} of 50, scaled to a run of `num_steps` and rounded."""
    scaled = {(2 * step * num_steps + _PAPER_STEPS) // (2 * _PAPER_STEPS) for step in _PAPER_KEYS}
    return sorted(step for step in scaled if step < num_steps)


class _Keys:
    """Whether a step is a key step."""

    def __init__(self, key_steps: list[int] | int | str) -> None:
        self.key_steps = key_steps
        self._known: tuple[int, frozenset[int]] | None = None

    def __call__(self, step: int, num_steps: int | None) -> bool:
        if isinstance(self.key_steps, int):
            return step % self.key_steps == 0
        if isinstance(self.key_steps, list):
            return step in self.key_steps
        if num_steps is None:  # a model shared with a pipeline that it was not enabled on
            raise ValueError(
                "`key_steps` is 'paper', which needs the number of steps: enable FasterDiffusion on this pipeline as well."
            )
        if self._known is None or self._known[0] != num_steps:
            self._known = (num_steps, frozenset(paper_key_steps(num_steps)))
        return step in self._known[1]


class PriorNoiseInjection(PipelineCallback):
    r"""Mix a little of the starting noise back in late in a run, against lost texture (section 3.3).

        dx.enable(pipe, dx.FasterDiffusionConfig())
        pipe(prompt, num_inference_steps=50, callback_on_step_end=dx.PriorNoiseInjection())

    Before each step at a timestep below `start` of those of training, :math:`x_t \leftarrow x_t + \alpha x_T`, for the
    denoiser and the scheduler alike. A pipeline lets a callback change its latents between steps, so that a run whose
    first step lies there already, as in image-to-image, goes without at that step. `FasterDiffusionConfig` has to be on:
    it knows the starting noise.

    Args:
        scale: alpha, the weight of the starting noise.
        start: share of the training timesteps, from 0 for never to 1 for all but the first step.

    Raises:
        ValueError: a value is out of range; in a run also where `FasterDiffusionConfig` is not on, or the denoiser's input
            is shaped otherwise than the latents (video).
    """

    tensor_inputs = ["latents"]  # as in diffusers

    @register_to_config
    def __init__(self, scale: float = 0.003, start: float = 0.5) -> None:
        for name, value, most in (("scale", scale, float("inf")), ("start", start, 1.0)):
            if not is_number(value, 0, most):
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a number of at least 0{', up to 1' * (most == 1)}."
                )
        self._noise: torch.Tensor | None = None
        self._timesteps: list[float] = []

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What pipelines call after each step."""
        latents = callback_kwargs["latents"]
        if step_index == 0:
            self._noise = _starting_noise(pipeline, latents)
            schedule = pipeline.scheduler.timesteps.tolist()
            self._timesteps = schedule[schedule.index(float(timestep)) :]
        following = self._timesteps[step_index + 1 : step_index + 2]
        if not following:
            self._noise, self._timesteps = None, []
        elif following[0] < self.config.start * pipeline.scheduler.config.num_train_timesteps:
            callback_kwargs["latents"] = latents + self.config.scale * self._noise
        return callback_kwargs


def _starting_noise(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """x_T, from the first input of the denoiser of a run; what comes with it (guidance, conditions) comes after it."""
    unet = getattr(pipeline, "unet", None)
    run = None if unet is None else find_run(unet, FasterDiffusionConfig.key)
    if run is None or "first_input" not in run.state.memory:
        raise ValueError("`PriorNoiseInjection` needs `FasterDiffusionConfig` on the pipeline: enable it first.")
    memory = run.state.memory
    noise = memory["first_input"][: len(latents)]
    if noise.ndim != latents.ndim or noise.shape[2:] != latents.shape[2:]:
        raise ValueError(
            f"`latents` has shape {tuple(latents.shape)}, and the denoiser gets {tuple(noise.shape)}: `PriorNoiseInjection` "
            "is for pictures."
        )
    return (noise[:, : latents.shape[1]] / memory["scale"]).to(latents.dtype)
