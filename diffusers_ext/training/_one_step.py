r"""Students that draw in one call of the denoiser, read at a timestep that may be less than the last.

A student G asked at :math:`t'` makes of noise z what `TimestepShiftLCMScheduler` makes of it in one step,

.. math:: G(z) = c_{out} \frac{z - \sigma_{t'} \epsilon(z, t')}{\alpha_{t'}} + c_{skip}\, z

where a small :math:`t'` keeps the division from making errors large: :math:`1 / \alpha` is 15 at the last timestep of Stable Diffusion.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..hub import save_pretrained
from ..loading import Pipeline
from ..schedulers.nitrofusion import TimestepShiftLCMScheduler
from ._teacher import TeacherTask, add_teacher_arguments, check_teacher_arguments


class OneStepTask(TeacherTask):
    """Base; a subclass writes `loss` and `card`.

    Args:
        args: those of `add_one_step_arguments`.

    Attributes:
        student: trained; a copy of the teacher's denoiser, with the weights of `--student_path` where that is given.
        scheduler: of the result, set to one step.

    Raises:
        ValueError: `--shifted_timestep` is more than the process has, or `--student_path` has another denoiser.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.scheduler = self.new_scheduler()
        self.scheduler.set_timesteps(1)
        self.student: Any = self.teacher.student()
        if args.student_path is not None:
            self.student.load_state_dict(self._weights(args.student_path))
        self.trained: dict[str, nn.Module] = {self.teacher.name: self.student}

    def _weights(self, path: str) -> dict[str, torch.Tensor]:
        """Of another pipeline's denoiser in the teacher's layout."""
        other = getattr(Pipeline.from_pretrained(path, dtype=torch.float32), self.teacher.name, None)
        found = other.state_dict() if isinstance(other, nn.Module) else {}
        needed = self.student.state_dict()
        if {name: value.shape for name, value in found.items()} != {name: v.shape for name, v in needed.items()}:
            raise ValueError(f"`--student_path` is {path!r}, whose denoiser has other weights than the teacher's.")
        return found

    def new_scheduler(self) -> TimestepShiftLCMScheduler:
        return TimestepShiftLCMScheduler.from_config(
            self.pipeline.scheduler.config, shifted_timestep=self.args.shifted_timestep, original_inference_steps=4,
            clip_sample=False, thresholding=False,
        )  # fmt: skip

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.student.to(accelerator.device)
        args = self.args
        self._step_samples = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps

    def number(self, batch: dict[str, Any]) -> int:
        """Of the optimizer step that a batch belongs to, from 0; the same in all processes."""
        return int(batch["sample_id"][0]) // self._step_samples

    def draw(self, noise: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        """G of noise, with gradients where they are on: clean latents, `(batch, ...)`."""
        t = self.scheduler.timesteps[0]
        output = self.teacher.call(self.student, noise, t, condition)
        data, _ = self.teacher.process.data_and_noise(noise, output.float(), t)
        c_skip, c_out = self.scheduler.get_scalings_for_boundary_condition_discrete(int(t))
        return c_out * data + c_skip * noise

    def student_pipeline(self) -> Any:
        return self.pipeline_with(**{self.teacher.name: self.student, "scheduler": self.new_scheduler()})

    def save(self, folder: Path) -> None:
        self.student.eval()
        save_pretrained(self.student_pipeline(), folder, card=False)


def add_one_step_arguments(parser: argparse.ArgumentParser, shifted_timestep: int, pairs: bool = False) -> None:
    """Arguments of such a training, with those that every script has.

    Args:
        shifted_timestep: default.
        pairs: add those of `TeacherTask.pairs`.
    """
    add_teacher_arguments(parser, validation_steps=1, validation_guidance_scale=1.0, pairs=pairs)
    parser.add_argument("--student_path", help="Begin with the denoiser of this pipeline, and not with the teacher's.")
    parser.add_argument(
        "--shifted_timestep", type=int, default=shifted_timestep,
        help="The student is asked at the timestep before this one; that of the scheduler of the result.",
    )  # fmt: skip


def check_one_step_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    check_teacher_arguments(args)
    if args.shifted_timestep < 1:
        raise ValueError(f"`--shifted_timestep` is {args.shifted_timestep}; it must be at least 1.")
    if args.mixed_precision == "fp16":
        raise ValueError(
            "`--mixed_precision` is 'fp16', which scales the loss of the student alone; take 'bf16' or 'no'."
        )
