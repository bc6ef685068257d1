r"""Make a few-step pipeline that predicts clean data: train such a teacher, then halve its steps again and again (ProDiff).

    accelerate launch -m diffusers_ext.training.train_prodiff --stage teacher --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --max_train_steps 20000 --output_dir my-teacher
    accelerate launch -m diffusers_ext.training.train_prodiff --stage distill --pretrained_model_name_or_path my-teacher \
        --train_data_dir pictures/ --resolution 512 --student_steps 4 2 --max_train_steps 10000 --output_dir my-student

The teacher's denoiser predicts the clean latents themselves, by the absolute distance and structural similarity: a prediction of noise
is divided by :math:`\alpha`, which few steps do not forgive. For each number N of `--student_steps` a copy of it then learns clean data
with which one DDIM step ends where two steps of the network before it end, so that N steps do what 2 N did. Both results are
pipelines for stock diffusers with a `DDIMScheduler` that has these steps. The paper's data are mel spectrograms; here they are what
the VAE of a text-to-image or class-conditional pipeline encodes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import DDIMScheduler
from torch import nn

from ._card import training_card
from ._data import SampleNoise
from ._diffusion import Latents, check_proportion
from ._loop import setup_logging
from ._teacher import (
    Conditions,
    Process,
    Teacher,
    TeacherTask,
    add_teacher_arguments,
    check_teacher_arguments,
    few_step_scheduler,
)
from .train_guided_distillation import halving_target, step_levels, train_stages

STAGES = ("teacher", "distill")
_BIAS = 6.0  # the authors', so that local means, which are divided by, are positive
_WINDOW, _STD, _C1, _C2 = 11, 1.5, 0.01**2, 0.03**2


def prodiff_betas(levels: int) -> list[float]:
    r"""The paper's noise levels: :math:`\bar\alpha_k = \exp(-0.1 \frac{k}{K} - 19.95 \frac{k^2}{K^2})`, as betas for k = 1 to K.

    Timestep i of a scheduler is level k = i + 1: its timestep 0 has noise already.

    Args:
        levels: K, at least 1.
    """
    return [1 - math.exp(-0.1 / levels - 19.95 * (2 * k - 1) / levels**2) for k in range(1, levels + 1)]


def structural_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""Mean SSIM of maps `(batch, channels, height, width)` (Wang et al. 2004, equation 13), zeros around them, both plus 6.

    Windows are Gaussian, 11 wide, of deviation 1.5; constants are :math:`0.01^2` and :math:`0.03^2`.
    """
    at = torch.arange(_WINDOW, dtype=a.dtype, device=a.device) - _WINDOW // 2
    line = torch.exp(-at.square() / (2 * _STD**2))
    window = (line[:, None] * line).expand(a.shape[1], 1, -1, -1) / line.sum() ** 2

    def local(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, window, padding=_WINDOW // 2, groups=a.shape[1])

    a, b = a + _BIAS, b + _BIAS
    mean_a, mean_b = local(a), local(b)
    variances = local(a * a) - mean_a.square() + local(b * b) - mean_b.square()
    covariance = local(a * b) - mean_a * mean_b
    means = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return (means * (2 * covariance + _C2) / (variances + _C2)).mean()


def clean_data_loss(found: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    r"""Of the teacher: :math:`\frac12 \mathrm{mean} |\hat x_0 - x_0| + \frac12 (1 - SSIM)` (arXiv 2207.06389, section 4.3).

    Args:
        found, clean: predicted and true clean data, `(batch, channels, height, width)`.
    """
    found, clean = found.float(), clean.float()
    return 0.5 * (found - clean).abs().mean() + 0.5 * (1 - structural_similarity(found, clean))


def prodiff_distillation_loss(
    teacher: Teacher,
    student: nn.Module,
    x: torch.Tensor,
    times: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    conditions: Conditions,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    r"""Mean of :math:`|\hat x_\theta(x_t, t, c) - \tilde x|`, with the clean data that stand for two steps of the teacher.

    One DDIM step with :math:`\tilde x` ends where two of the teacher end (arXiv 2207.06389, algorithm 2). The label of the
    student's call is the level of its input; the authors' code gives it the level where the step ends.

    Args:
        x: noised data at the first of `times`, `(batch, ...)`.
        times: see `halving_target`.
        guidance_scale: of the teacher.
    """
    process, t = teacher.process, times[0]
    wanted = process.data_and_noise(x, halving_target(teacher, x, times, conditions, guidance_scale), t)[0]
    found = process.data_and_noise(x, teacher.call(student, x, t, conditions.given), t)[0]
    return (found - wanted).float().abs().mean()


class ProDiffTask(TeacherTask):
    """The teacher, where `args.steps` is None, or one halving: `args.steps` of twice as many."""

    on_device = ("pixel_values",)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.student: Any = self.teacher.student()
        self.trained: dict[str, nn.Module] = {self.teacher.name: self.student}
        self.scheduler = self._scheduler()
        self.process = Process.of(self.scheduler)
        if args.steps is not None:
            limit = self.process.num_timesteps
            if 2 * args.steps > limit:
                raise ValueError(
                    f"`--student_steps` has {args.steps}; the pipeline has {limit} timesteps, and twice as many are needed."
                )
            self.levels = step_levels(self.process, 2 * args.steps)

    def _scheduler(self) -> DDIMScheduler:
        """Of the result."""
        scheduler = few_step_scheduler(self.pipeline.scheduler)
        if self.args.steps is not None:
            return scheduler
        changes: dict[str, Any] = {"prediction_type": "sample"}
        if self.args.noise_levels is not None:
            betas = prodiff_betas(self.args.noise_levels)
            changes |= {"num_train_timesteps": len(betas), "trained_betas": betas}
        return DDIMScheduler.from_config(scheduler.config, **changes)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.student.to(accelerator.device)
        self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, process = self.args, self.process
        latents, conditions = self.latents(batch, noise), self.encode(batch)
        epsilon = noise.normal(*latents.shape[1:])
        conditions = conditions.dropped(noise.uniform() < args.proportion_empty_prompts)
        if args.steps is None:
            t = noise.integers(process.num_timesteps)
            x = process.add_noise(latents, epsilon, t)
            return clean_data_loss(self.teacher.call(self.student, x, t, conditions.given), latents)
        place = 2 * noise.integers(args.steps)
        first, between, last = (self.levels.to(place.device)[place + i] for i in range(3))
        x = process.add_noise(latents, epsilon, first)
        times = (first, between, last)
        return prodiff_distillation_loss(self.teacher, self.student, x, times, conditions, args.guidance_scale)

    def student_pipeline(self) -> Any:
        return self.pipeline_with(**{self.teacher.name: self.student, "scheduler": self._scheduler()})

    def save(self, folder: Path) -> None:
        self.student.eval()
        self.student_pipeline().save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(args, "train_prodiff", name, summary, ["prodiff", "progressive-distillation"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(parser, validation_steps=8, validation_guidance_scale=1.0)
    parser.set_defaults(guidance_scale=1.0)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument(
        "--noise_levels", type=int, help="Of a new teacher: the paper's schedule of so many levels; else the pipeline's own."
    )  # fmt: skip
    parser.add_argument(
        "--student_steps", type=int, nargs="*", default=[], metavar="N", help="To distil, each half of the one before."
    )
    parser.add_argument(
        "--proportion_empty_prompts", type=float, default=0.0, help="For teachers that are to be guided."
    )
    args = parser.parse_args(argv)
    check_teacher_arguments(args)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    if args.noise_levels is not None and (args.stage != "teacher" or args.noise_levels < 2):
        raise ValueError(f"`--noise_levels` is {args.noise_levels}; allowed are numbers from 2 on, for a teacher.")
    pairs = list(zip(args.student_steps[:-1], args.student_steps[1:], strict=True))
    wrong = any(steps < 1 for steps in args.student_steps) or any(before != 2 * after for before, after in pairs)
    if wrong or bool(args.student_steps) != (args.stage == "distill"):
        raise ValueError(
            f"`--student_steps` is {args.student_steps}; to distil, numbers from 1 on are needed, each half of the one "
            "before, and for a teacher none."
        )
    if len(args.student_steps) > 1 and args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"`--resume_from_checkpoint` is {args.resume_from_checkpoint!r}; with several `--student_steps` only 'latest' is "
            "allowed."
        )
    return args


def stages(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Arguments of each training. The last one writes to the output folder, those before it beside its checkpoints.

    Guidance is the first one's: the networks that follow have it in their weights.

    Raises:
        ValueError: several processes are to make more than one.
    """
    if len(args.student_steps) > 1 and PartialState().num_processes > 1:
        raise ValueError(
            f"`--student_steps` is {args.student_steps}. Several processes make one halving a launch: start from the result of "
            "the one before."
        )
    source, revision, scale = args.pretrained_model_name_or_path, args.revision, args.guidance_scale
    for steps in args.student_steps or [None]:
        stage = copy.copy(args)
        stage.steps, stage.pretrained_model_name_or_path, stage.revision, stage.guidance_scale = (
            steps,
            source,
            revision,
            scale,
        )
        if steps is not None:
            stage.validation_inference_steps = steps
        if args.student_steps and steps != args.student_steps[-1]:
            stage.output_dir = str(Path(args.output_dir, f"checkpoint-{steps}-steps"))
            stage.push_to_hub = False
        source, revision, scale = stage.output_dir, None, 1.0
        yield stage


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train_stages(args, stages(args), ProDiffTask)


if __name__ == "__main__":
    main()
