r"""Train a few-step model with PeRFlow: straighten the teacher's trajectories within windows of time.

    accelerate launch -m diffusers_ext.training.train_perflow --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --windows 4 --solving_steps 8 --perflow_type diff_eps --cfg_sync \
        --use_ema --output_dir my-perflow

The teacher, the pipeline with guidance, solves its ODE from the start of a window to its end, and the student learns to point
to that end from everywhere on the line between. With `--cfg_sync` the teacher runs without guidance and the student is guided
when it is used; without, guidance is in the student. With `--prompts` instead of pictures the teacher makes the pictures first.
The result is a pipeline with a `PeRFlowScheduler`, and with `--save_delta_weights` what the training changed, to be added to
other fine-tunes of the same base by `merge_delta_weights`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from ..hub import save_pretrained
from ..schedulers.perflow import PERFLOW_TYPES, PeRFlowScheduler
from ..weight_deltas import delta_weights
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import Latents, check_proportion
from ._loop import setup_logging, train
from ._teacher import Conditions, Pairs, TeacherTask, add_teacher_arguments, check_teacher_arguments

DELTA = "delta_weights.safetensors"


def perflow_loss(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: PeRFlowScheduler,
    z_s: torch.Tensor,
    z_e: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the prediction on the lines from `z_s` to `z_e` (arXiv 2405.07510, section 3.2).

    Args:
        denoise: takes states and timesteps, `1000 t`, and returns predictions of the scheduler's type.
        scheduler: has the windows and the type.
        z_s, z_e: the teacher's states at the start and the end of the windows, `(batch, ...)`.
        t: times in (0, 1], `(batch,)`; the windows are those that they are in.
    """
    start, end = scheduler.windows_of(t)
    part = ((t - start) / (end - start)).to(z_s).reshape((-1,) + (1,) * (z_s.ndim - 1))
    prediction = denoise(torch.lerp(z_s, z_e, part), scheduler.config.num_train_timesteps * t)
    return (prediction.float() - scheduler.target(z_s, z_e, start, end).float()).square().mean()


class PeRFlowTask(TeacherTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.scheduler = PeRFlowScheduler.from_config(
            self.pipeline.scheduler.config, prediction_type=args.perflow_type, num_time_windows=args.windows
        )
        self.student = self.teacher.student()
        self.trained = {self.teacher.name: self.student}
        self.on_device = ("clean",) if self.pictures is None else ("pixel_values",)

    def dataset(self, args: argparse.Namespace) -> Any:
        return self.pairs(args) if self.pictures is None else self.pictures

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        if not isinstance(dataset, Pairs):
            self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)

    def window(
        self, clean: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's states at the ends of the windows of `t`, from clean latents and noise."""
        args, process = self.args, self.teacher.process
        start, end = (self.scheduler.indices_of(edge) for edge in self.scheduler.windows_of(t))
        z_s = process.add_noise(clean, epsilon, start)
        scale = 1.0 if args.cfg_sync else None
        return z_s, self.teacher.solve(z_s, start, end, conditions, args.solving_steps, scale)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args = self.args
        clean = batch["clean"] if self.pictures is None else self.latents(batch, noise)
        conditions = self.encode(batch)
        shown = conditions.dropped(noise.uniform() < args.proportion_empty_prompts)
        t = 1 - noise.integers(args.discrete_timesteps) / args.discrete_timesteps
        z_s, z_e = self.window(clean, noise.normal(*clean.shape[1:]), t, shown if args.cfg_sync else conditions)

        def denoise(z: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.teacher.call(self.student, z, timesteps, shown.given)

        return perflow_loss(denoise, self.scheduler, z_s, z_e, t)

    def student_pipeline(self) -> Any:
        return self.pipeline_with(**{self.teacher.name: self.student, "scheduler": self.scheduler})

    def save(self, folder: Path) -> None:
        self.student.eval()
        save_pretrained(self.student_pipeline(), folder, card=False)
        if self.args.save_delta_weights:
            save_file(delta_weights(self.student, self.teacher.denoiser), folder / DELTA)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(args, "train_perflow", name, summary, ["perflow", "few-step"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(parser, validation_steps=4, validation_guidance_scale=1.0, pairs=True)
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--windows", type=int, default=4, help="K; the result takes at least as many steps.")
    parser.add_argument("--solving_steps", type=int, default=8, help="DDIM steps of the teacher within a window.")
    parser.add_argument("--perflow_type", choices=PERFLOW_TYPES, default="ddim_eps", help="What the student predicts.")
    parser.add_argument(
        "--cfg_sync", action="store_true", help="Teacher without guidance; the student is guided later."
    )
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Prompt dropout of the student.")
    parser.add_argument("--discrete_timesteps", type=int, default=1000, help="Times that the student learns at.")
    parser.add_argument("--save_delta_weights", action="store_true", help="Also write what the training changed.")
    args = parser.parse_args(argv)
    check_teacher_arguments(args)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    for name in ("windows", "solving_steps", "discrete_timesteps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.discrete_timesteps > 1000:
        raise ValueError(f"`--discrete_timesteps` is {args.discrete_timesteps}; it must be at most 1000.")
    if args.validation_inference_steps < args.windows:
        raise ValueError(
            f"`--validation_inference_steps` is {args.validation_inference_steps}; at least one a window is needed, "
            f"{args.windows}."
        )
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, PeRFlowTask(args))


if __name__ == "__main__":
    main()
