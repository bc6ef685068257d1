"""What trainers share that learn along a pipeline's own runs: no pictures, only prompts or classes.

The pipeline's own loop is led: its scheduler is replaced by one that visits each step as often as asked, hands the answer of
each visit, guidance and all, to the trainer, and takes the step with one of them. So every pipeline with a transformer works,
with its own conditions and scheduler. Gradients flow through the loop as far as the answer; a step is taken without them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import nn
from torch.utils.data import Dataset

from ._data import SampleNoise
from ._diffusion import write_samples
from ._loop import Task, add_run_arguments, check_common_arguments

# Yields, before each visit, whether the step is to be taken with its answer, and gets the answer.
Walk = Generator[bool, torch.Tensor, None]


class _Arrived(Exception):
    """The walk is at its end: what the pipeline would do with the result is not wanted."""


class _LedScheduler:
    """The scheduler of a led loop: that of the pipeline, except that timesteps come again for each further visit.

    Args:
        scheduler: of the pipeline; a fresh one.
        walk: see `Walk`.
        visits: of each step but the first, which is visited once.
    """

    def __init__(self, scheduler: Any, walk: Walk, visits: int) -> None:
        self._scheduler, self._walk, self._visits = scheduler, walk, visits
        self._takes = next(walk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    @property
    def timesteps(self) -> torch.Tensor:
        first, rest = self._scheduler.timesteps[:1], self._scheduler.timesteps[1:]
        return torch.cat([first, rest.repeat_interleave(self._visits)])

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True, **options: Any
    ) -> Any:
        with torch.no_grad():
            if self._takes:
                taken = model_output.detach()
                sample = self._scheduler.step(taken, timestep, sample, return_dict=False, **options)[0]
        self.sample = sample
        try:
            self._takes = self._walk.send(model_output)
        except StopIteration:
            raise _Arrived from None
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


def travel(pipe: DiffusionPipeline, call: dict[str, Any], walk: Walk, visits: int = 1) -> torch.Tensor:
    """Lead the loop of a pipeline along a walk; the pipeline stays as it is.

    Args:
        pipe: its scheduler should draw no noise on the way.
        call: keyword arguments of the call.
        walk: see `Walk`; where it ends, the run ends.
        visits: of each step but the first, which is visited once.

    Returns:
        The last sample, before any decoding.

    Raises:
        RuntimeError: the pipeline's loop ended before the walk did.
    """
    led, scheduler = _lead(pipe, walk, visits)
    try:
        inspect.unwrap(type(pipe).__call__)(led, **call)  # without the decorator that turns gradients off
    except _Arrived:
        return scheduler.sample
    raise RuntimeError(f"{type(pipe).__name__} did not take all steps of its scheduler.")


def _lead(pipe: DiffusionPipeline, walk: Walk, visits: int) -> tuple[Any, _LedScheduler]:
    """A pipeline of the same parts with a scheduler that leads."""
    led = copy.copy(pipe)
    led.scheduler = scheduler = _LedScheduler(type(pipe.scheduler).from_config(pipe.scheduler.config), walk, visits)
    led.set_progress_bar_config(disable=True)
    return led, scheduler


@torch.no_grad()
def count_steps(pipe: DiffusionPipeline, call: dict[str, Any]) -> int:
    """T, how many steps a call takes, found by making the first."""

    def walk() -> Walk:
        yield True

    led, scheduler = _lead(pipe, walk(), visits=1)
    with contextlib.suppress(_Arrived):
        led(**call)
    return len(scheduler.timesteps)


def with_gradients(
    value: torch.Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A loss with this value whose gradients are known already, so that no graph of a whole run is kept."""
    carrier = torch.stack([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()
    return value.detach() + carrier - carrier.detach()


class Conditions(Dataset):
    """Prompts or class labels as rows `{"condition", "index", "sample_id"}`."""

    def __init__(self, conditions: Sequence[Any]) -> None:
        self.conditions = conditions

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item
        return {"condition": self.conditions[index], "index": index, "sample_id": sample_id}


def pipeline_classes(pipe: Any) -> list[int]:
    """Class labels that a pipeline knows by name, else all that its transformer has."""
    named = sorted(set((getattr(pipe, "labels", None) or {}).values()))
    return named or list(range(pipe.transformer.config.num_embeds_ada_norm))


class TrajectoryTask(Task):
    """Base of a task along a pipeline's runs; a subclass sets `trained`, and writes `loss`, `enabled`, `save` and `card`.

    Args:
        args: those of `add_trajectory_arguments`.
    """

    on_device = ()

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
            raise ValueError(
                f"`--pretrained_model_name_or_path` is a {type(pipeline).__name__}; a pipeline with a transformer is needed."
            )
        self.by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters
        if self.by_class != (args.prompts is None):
            needed = "of classes, which it knows" if self.by_class else "of texts"
            raise ValueError(f"`--prompts` is {args.prompts!r}, and {type(pipeline).__name__} makes pictures {needed}.")
        self.conditions: list[Any] = pipeline_classes(pipeline) if self.by_class else read_prompts(args.prompts)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer

    def dataset(self, args: argparse.Namespace) -> Conditions:
        return Conditions(self.conditions)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        self.pipeline.to(accelerator.device)
        self.world = accelerator.num_processes

    def call(self, conditions: Sequence[str | int], generators: list[torch.Generator]) -> dict[str, Any]:
        """Keyword arguments of a call of the pipeline, picture i from generator i."""
        args, given = self.args, {**self.args.pipeline_arguments}
        given["class_labels" if self.by_class else "prompt"] = list(conditions)
        if isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * len(conditions)
        if args.guidance_scale is not None:
            given["guidance_scale"] = args.guidance_scale
        return {**given, "num_inference_steps": args.num_inference_steps, "generator": generators}

    def shown(self, numbers: Iterable[int]) -> list[Any]:
        """Conditions in turn."""
        return [self.conditions[number % len(self.conditions)] for number in numbers]

    def number(self, batch: dict[str, Any]) -> int:
        """Which of all optimizer steps this is, from 0."""
        return int(batch["sample_id"][0]) // (self.args.train_batch_size * self.world)

    def batch_call(self, batch: dict[str, Any], noise: SampleNoise) -> dict[str, Any]:
        """The call that makes a batch, each sample from its own noise."""
        conditions = batch["condition"]
        return self.call(conditions.tolist() if torch.is_tensor(conditions) else conditions, noise.generators)

    def enabled(self) -> Any:
        """The pipeline with what is trained, as a context."""
        raise NotImplementedError

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        count = self.args.num_validation_images
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        call = self.call(self.shown(range(count)), generators)
        with self.enabled() as pipeline:
            return write_samples(pipeline(**call).images, min(8, count), folder, step)


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: there is no such file, or no line in it.
    """
    lines = Path(file).read_text(encoding="utf-8").splitlines() if Path(file).is_file() else []
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"`--prompts` is {file!r}; a text file with one prompt a line is needed.")
    return prompts


def add_trajectory_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of a task along a pipeline's runs, with those that every script has."""
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--prompts", help="Text file with one prompt a line. Class labels come from the pipeline.")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, help="Of the runs; else the pipeline's own default.")
    parser.add_argument(
        "--pipeline_arguments", type=_json, default={}, metavar="JSON", help='More of a call, such as {"height": 512}.'
    )
    parser.add_argument("--num_validation_images", type=int, default=8)
    add_run_arguments(parser).set_defaults(dataset_name=None, max_grad_norm=float("inf"))
    return parser


def _json(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def check_trajectory_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    args.train_data_dir = args.prompts or args.pretrained_model_name_or_path  # what the shared loop asks for
    check_common_arguments(args)
    for name in ("num_inference_steps", "num_validation_images"):
        least = 2 if name == "num_inference_steps" else 1
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    if args.mixed_precision == "fp16":
        raise ValueError("`--mixed_precision` is 'fp16', in which these small gradients vanish; take 'bf16' or 'no'.")
    if args.gradient_checkpointing:
        raise ValueError("`--gradient_checkpointing` has no meaning here: the graph of one call is kept at a time.")
