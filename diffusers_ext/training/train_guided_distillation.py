r"""Distil guidance into a U-Net that takes the guidance scale as an input, then halve its steps again and again.

    accelerate launch -m diffusers_ext.training.train_guided_distillation --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --min_guidance_scale 3 --max_guidance_scale 15 --max_train_steps 10000 \
        --student_steps 16 8 4 --halving_train_steps 10000 --output_dir my-student

Stage one: the student is a copy of the U-Net with an input for the scale, and learns what the guided teacher predicts at noised
pictures. Stage two, for each number N of `--student_steps`: one DDIM step of the student learns to end where two steps of the
student before it end, so that N steps do what 2 N did. The result is a pipeline folder for the stock
`StableDiffusionPipeline.from_pretrained`, which hands `guidance_scale` to the U-Net and calls it once a step; after stage two
with the scheduler of its few steps. Given a pipeline whose U-Net takes the scale already, stage one is left out.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from ._card import training_card
from ._data import SampleNoise
from ._diffusion import Latents
from ._loop import setup_logging, train
from ._teacher import (
    CLEAN,
    Conditions,
    Process,
    Teacher,
    TeacherTask,
    add_teacher_arguments,
    check_teacher_arguments,
    few_step_scheduler,
)

WEIGHTINGS = ("truncated_snr", "snr", "snr_plus_one")


def with_scale_input(unet: UNet2DConditionModel, dimension: int = 256) -> UNet2DConditionModel:
    """A copy of a U-Net that takes an embedding of the guidance scale, and does not heed it yet: its weights for that are zero.

    Args:
        unet: without such an input.
        dimension: of the embedding, `time_cond_proj_dim`.

    Raises:
        ValueError: it has one.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("`unet` takes the guidance scale already: its `time_cond_proj_dim` is set.")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": dimension})
    new = student.time_embedding.cond_proj
    nn.init.zeros_(new.weight)  # diffusers draws them, and what it draws would disturb the teacher's weights
    student.load_state_dict({**unet.state_dict(), "time_embedding.cond_proj.weight": new.weight.detach()})
    return student.to(unet.device, unet.dtype)


def prediction_weights(process: Process, t: torch.Tensor, like: torch.Tensor, weighting: str) -> torch.Tensor:
    r"""What squared errors of a prediction count, so that those of the clean data count :math:`\omega(SNR)`.

    Args:
        process: says what is predicted.
        t: timesteps, `(batch,)`.
        like: the prediction.
        weighting: `truncated_snr` is :math:`\max(SNR, 1)` (Salimans & Ho 2022, and the paper), `snr` the plain error of noise,
            `snr_plus_one` that of v.
    """
    alpha, sigma = process.alpha_sigma(t, like)
    snr = (alpha / sigma).square()
    omega = {"truncated_snr": snr.clamp_min(1.0), "snr": snr, "snr_plus_one": snr + 1}[weighting]
    data = {"epsilon": 1 / snr, "v_prediction": sigma.square(), "sample": torch.ones_like(snr)}[process.prediction_type]
    return omega * data


def _error(
    process: Process, found: torch.Tensor, wanted: torch.Tensor, t: torch.Tensor, weighting: str
) -> torch.Tensor:
    return (prediction_weights(process, t, wanted, weighting) * (found - wanted).square()).float().mean()


def guidance_distillation_loss(
    teacher: Teacher,
    student: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    conditions: Conditions,
    scales: torch.Tensor,
    weighting: str = "truncated_snr",
) -> torch.Tensor:
    r"""Stage one: mean of :math:`\omega |\hat x_\theta(x_t, t, c, w) - \hat x^w|^2`, the latter of the guided teacher
    (arXiv 2210.03142, section 3.1; its w is the pipeline's scale less 1).

    Args:
        x, t: noised pictures and their timesteps.
        scales: guidance scales as pipelines have them, `(batch,)`.
    """
    wanted = teacher.predict(x, t, conditions, scales)
    return _error(teacher.process, teacher.call(student, x, t, conditions.given, scales), wanted, t, weighting)


def step_levels(process: Process, steps: int) -> torch.Tensor:
    """Timesteps of a few DDIM steps from the noisiest on, as stock "trailing" spacing has them, and clean data: `(steps + 1,)`."""
    total = process.num_timesteps
    levels = (torch.arange(steps, 0, -1, dtype=torch.float64) * total / steps).round().long() - 1
    return torch.cat([levels, torch.tensor([CLEAN])])


@torch.no_grad()
def halving_target(
    teacher: Teacher,
    x: torch.Tensor,
    times: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    conditions: Conditions,
    scales: torch.Tensor | float,
) -> torch.Tensor:
    """The prediction with which one DDIM step ends where two of the teacher end.

    Args:
        x: at the first of the times.
        times: where the first step begins, where it ends, and where the second ends; timesteps `(batch,)`.
    """
    t, between, s = times
    process = teacher.process
    middle = process.jump(x, teacher.predict(x, t, conditions, scales), t, between)
    end = process.jump(middle, teacher.predict(middle, between, conditions, scales), between, s)
    data = process.jumped_data(x, end, t, s)
    alpha, sigma = process.alpha_sigma(t, x)
    return process.prediction(data, (x - alpha * data) / sigma, t)


def halving_loss(
    teacher: Teacher,
    student: nn.Module,
    x: torch.Tensor,
    times: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    conditions: Conditions,
    scales: torch.Tensor,
    weighting: str = "truncated_snr",
) -> torch.Tensor:
    r"""Stage two: mean of :math:`\omega |\hat x_\theta(x_t, t, c, w) - \tilde x|^2` (arXiv 2210.03142, section 3.2).

    Args:
        x, times: see `halving_target`.
        scales: guidance scales of both, `(batch,)`.
    """
    wanted = halving_target(teacher, x, times, conditions, scales)
    found = teacher.call(student, x, times[0], conditions.given, scales)
    return _error(teacher.process, found, wanted, times[0], weighting)


class GuidedDistillationTask(TeacherTask):
    """One stage. `args.steps` is None for stage one, else the number of steps that are made of twice as many."""

    on_device = ("pixel_values",)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        unet = self.teacher.denoiser
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                f"`--pretrained_model_name_or_path` has a {type(unet).__name__}; a UNet2DConditionModel is needed, which can "
                "take the guidance scale."
            )
        if args.steps is None:
            self.student: Any = with_scale_input(unet, args.time_cond_proj_dim).requires_grad_(True)
        else:
            self.student = self.teacher.student()
            self.levels = step_levels(self.teacher.process, 2 * args.steps)
        self.trained = {"unet": self.student}

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.student.to(accelerator.device)
        self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, process = self.args, self.teacher.process
        latents = self.latents(batch, noise)
        conditions = self.teacher.encode(batch["caption"])
        scales = args.min_guidance_scale + (args.max_guidance_scale - args.min_guidance_scale) * noise.uniform()
        epsilon = noise.normal(*latents.shape[1:])
        if args.steps is None:
            t = noise.integers(process.num_timesteps)
            x = process.add_noise(latents, epsilon, t)
            return guidance_distillation_loss(self.teacher, self.student, x, t, conditions, scales, args.weighting)
        place = 2 * noise.integers(args.steps)
        times = tuple(self.levels.to(place.device)[place + i] for i in range(3))
        x = process.add_noise(latents, epsilon, times[0])
        return halving_loss(self.teacher, self.student, x, times, conditions, scales, args.weighting)  # type: ignore[arg-type]

    def student_pipeline(self) -> DiffusionPipeline:
        pipeline = copy.copy(self.pipeline)
        pipeline.unet = self.student
        if self.args.steps is not None:
            pipeline.scheduler = few_step_scheduler(self.pipeline.scheduler)
        return pipeline

    def save(self, folder: Path) -> None:
        self.student.eval()
        self.student_pipeline().save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(
            args, "train_guided_distillation", name, summary, ["guidance-distillation", "text-to-image"]
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )  # fmt: skip
    add_teacher_arguments(parser, validation_steps=20, validation_guidance_scale=7.5)
    parser.add_argument("--guidance_scale", type=float, help="Distil this one scale, and no range.")
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--min_guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_guidance_scale", type=float, default=15.0)
    parser.add_argument("--time_cond_proj_dim", type=int, default=256, help="Of the embedding of the scale.")
    parser.add_argument("--weighting", choices=WEIGHTINGS, default="truncated_snr", help="Of errors of the clean data.")
    parser.add_argument(
        "--student_steps",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="Of stage two, each half of the one before.",
    )
    parser.add_argument("--halving_train_steps", type=int, help="Of each halving; --max_train_steps unless given.")
    args = parser.parse_args(argv)
    if args.guidance_scale is not None:
        args.min_guidance_scale = args.max_guidance_scale = args.guidance_scale
    low, high = args.min_guidance_scale, args.max_guidance_scale
    if not 1 <= low <= high < float("inf"):
        raise ValueError(
            f"`--min_guidance_scale` and `--max_guidance_scale` are {low} and {high}; 1 or more, in order."
        )
    args.guidance_scale = high
    args.validation_guidance_scale = min(max(args.validation_guidance_scale, low), high)
    if args.time_cond_proj_dim < 4 or args.time_cond_proj_dim % 2:
        raise ValueError(
            f"`--time_cond_proj_dim` is {args.time_cond_proj_dim}; an even number of at least 4 is needed."
        )
    pairs = list(zip(args.student_steps[:-1], args.student_steps[1:], strict=True))
    if any(steps < 1 for steps in args.student_steps) or any(before != 2 * after for before, after in pairs):
        raise ValueError(
            f"`--student_steps` is {args.student_steps}; numbers from 1 on are needed, each half of the one before."
        )
    if args.halving_train_steps is not None and args.halving_train_steps < 1:
        raise ValueError(f"`--halving_train_steps` is {args.halving_train_steps}; it must be at least 1.")
    if args.resume_from_checkpoint not in (None, "latest") and args.student_steps:
        raise ValueError(
            f"`--resume_from_checkpoint` is {args.resume_from_checkpoint!r}; with `--student_steps` only 'latest' is allowed."
        )
    check_teacher_arguments(args)
    return args


def stages(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Arguments of each stage. The last one writes to the output folder, those before it beside its checkpoints.

    Raises:
        ValueError: there is nothing to do, or several processes are to make more than one stage.
    """
    config = UNet2DConditionModel.load_config(
        args.pretrained_model_name_or_path, subfolder="unet", revision=args.revision
    )
    todo: list[int | None] = [*([None] if config.get("time_cond_proj_dim") is None else []), *args.student_steps]
    if not todo:
        raise ValueError(
            "`--student_steps` is empty, and the U-Net takes the guidance scale already: nothing is to be done."
        )
    if len(todo) > 1 and PartialState().num_processes > 1:
        raise ValueError(
            f"`--student_steps` is {args.student_steps}: {len(todo)} stages. Several processes make one stage a launch: start "
            "from the result of the one before."
        )
    source, revision = args.pretrained_model_name_or_path, args.revision
    for steps in todo:
        stage = copy.copy(args)
        stage.steps, stage.pretrained_model_name_or_path, stage.revision = steps, source, revision
        if steps is not None:
            stage.max_train_steps = args.halving_train_steps or args.max_train_steps
            stage.validation_inference_steps = steps
        if steps != todo[-1]:
            stage.output_dir = str(
                Path(args.output_dir, f"checkpoint-{'guidance' if steps is None else f'{steps}-steps'}")
            )
            stage.push_to_hub = False
        source, revision = stage.output_dir, None
        yield stage


def train_stages(
    args: argparse.Namespace, stages: Iterable[argparse.Namespace], task: Callable[[argparse.Namespace], TeacherTask]
) -> None:
    """Train one stage after the other. A resumed run leaves out those before the last whose pipelines are finished.

    Args:
        args: of the whole run.
        stages: arguments of each stage; the last one writes to the output folder of the run.
        task: makes the task of a stage.
    """
    for stage in stages:
        finished = stage.output_dir != args.output_dir and Path(stage.output_dir, "model_index.json").is_file()
        if not (finished and args.resume_from_checkpoint):
            train(stage, task(stage))


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train_stages(args, stages(args), GuidedDistillationTask)


if __name__ == "__main__":
    main()
