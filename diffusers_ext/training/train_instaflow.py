r"""Turn a pipeline into a one-step model as InstaFlow does: straighten its trajectories (reflow), then distil one step.

    accelerate launch -m diffusers_ext.training.train_instaflow --stage reflow --pretrained_model_name_or_path PIPELINE \
        --prompts prompts.txt --num_pairs 100000 --guidance_scale 6 --use_ema --output_dir my-reflow
    accelerate launch -m diffusers_ext.training.train_instaflow --stage distill --pretrained_model_name_or_path my-reflow \
        --prompts prompts.txt --num_pairs 100000 --guidance_scale 1.5 --use_ema --output_dir my-instaflow

First the teacher makes pairs of noise and clean latents by its ODE with guidance; they are kept, and runs may share them by
`--pairs_dir`. Reflow learns the velocity data minus noise on the lines between the two (equation 4 of arXiv 2309.06380); the
result can be the teacher of another reflow. Distillation learns to reach the end of the line in one step (equation 6, with the
squared distance of latents; the authors go on with LPIPS, which needs a network that is not shipped here). Both results are
pipelines with a `RectifiedFlowEulerScheduler`, to be called with `guidance_scale=1` or, after distillation, 0.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..hub import save_pretrained
from ..schedulers.instaflow import RectifiedFlowEulerScheduler
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import check_proportion
from ._loop import setup_logging, train
from ._teacher import Conditions, Pairs, Teacher, TeacherTask, add_teacher_arguments, check_teacher_arguments

STAGES = ("reflow", "distill")
NOISE_TIMESTEP = 1000  # what the network takes for pure noise

# Takes states and timesteps `1000 (1 - t)`, returns velocities.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reflow_loss(velocity: Velocity, noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""Mean of :math:`|(x_1 - x_0) - v(x_t, t)|^2` with :math:`x_t = t x_1 + (1 - t) x_0` (arXiv 2309.06380, equation 4).

    Args:
        velocity: see `Velocity`.
        noise: :math:`x_0`, `(batch, ...)`.
        clean: :math:`x_1`, what the teacher's ODE makes of it.
        t: `(batch,)` in [0, 1]; 0 is noise.
    """
    states = torch.lerp(noise, clean, t.to(noise).reshape((-1,) + (1,) * (noise.ndim - 1)))
    return (velocity(states, NOISE_TIMESTEP * (1 - t)).float() - (clean - noise).float()).square().mean()


def one_step_loss(velocity: Velocity, noise: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    r"""Mean of :math:`|x_0 + v(x_0, 0) - x_1|^2` (arXiv 2309.06380, equation 6): `reflow_loss` at noise alone."""
    return reflow_loss(velocity, noise, clean, torch.zeros(len(noise), device=noise.device))


class Lines:
    """Straight lines from noise to data, where a teacher of diffusion has a `Process`."""

    prediction_type, num_timesteps = "data minus noise", NOISE_TIMESTEP

    def levels_digest(self) -> bytes:
        """Nothing: lines have no schedule."""
        return b""


class FlowTeacher(Teacher):
    """A teacher whose denoiser predicts data minus noise, as the result of reflow."""

    def _process(self) -> Any:
        return Lines()

    @torch.no_grad()
    def sample(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        steps: int,
        guidance_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = noise
        for i in range(steps):
            t = torch.tensor(NOISE_TIMESTEP * (1 - i / steps), device=x.device)
            x = x + self.predict(x, t, conditions, guidance_scale) / steps
        return x


class InstaFlowTask(TeacherTask):
    on_device = ("noise", "clean")

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.student = self.teacher.student()
        self.trained = {self.teacher.name: self.student}

    def make_teacher(self, pipeline: Any, guidance_scale: float, latent_size: int | None) -> Teacher:
        flow = isinstance(pipeline.scheduler, RectifiedFlowEulerScheduler)
        return (FlowTeacher if flow else Teacher)(pipeline, guidance_scale, latent_size)

    def dataset(self, args: argparse.Namespace) -> Pairs:
        return self.pairs(args)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        shown = self.encode(batch).dropped(noise.uniform() < self.args.proportion_empty_prompts)

        def velocity(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.teacher.call(self.student, x, timesteps, shown.given)

        if self.args.stage == "distill":
            return one_step_loss(velocity, batch["noise"], batch["clean"])
        return reflow_loss(velocity, batch["noise"], batch["clean"], noise.uniform())

    def student_pipeline(self) -> Any:
        return self.pipeline_with(**{self.teacher.name: self.student, "scheduler": RectifiedFlowEulerScheduler()})

    def save(self, folder: Path) -> None:
        self.student.eval()
        save_pretrained(self.student_pipeline(), folder, card=False)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(args, "train_instaflow", name, summary, ["instaflow", "few-step"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(parser, validation_steps=1, validation_guidance_scale=1.0, pairs=True)
    parser.set_defaults(guidance_scale=6.0)  # the authors' for Stable Diffusion; 1.5 for what reflow gave
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--proportion_empty_prompts", type=float, help="Prompt dropout; 0.1 in reflow, else none.")
    args = parser.parse_args(argv)
    if args.proportion_empty_prompts is None:
        args.proportion_empty_prompts = 0.1 if args.stage == "reflow" else 0.0
    check_teacher_arguments(args)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, InstaFlowTask(args))


if __name__ == "__main__":
    main()
