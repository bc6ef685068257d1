r"""Distil a pipeline into one step by scores, along the path on which the teacher decays into the new student (DisBack).

    accelerate launch -m diffusers_ext.training.train_disback --pretrained_model_name_or_path PIPELINE --prompts prompts.txt \
        --guidance_scale 8 --record_steps 1000 --record_every 100 --switch_steps 200 --train_batch_size 16 \
        --max_train_steps 10000 --output_dir my-student

It needs prompts, and no picture. Recording: a copy of the teacher learns the samples of the student as it is at the start, and is
kept every `--record_every` steps. Backtracking: these copies, from the last but one back to the teacher, are the targets of score
distillation for `--switch_steps` steps each, and the last of them is where the model of the student's own samples begins. So the two
scores are close from the first step on. `--record_steps 0` is plain distribution matching distillation, without its
regression and its discriminator. The result is a pipeline for one step with a `TimestepShiftLCMScheduler`, without guidance.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..schedulers._model_statistics import weight_marks
from ._card import training_card
from ._data import GlobalBatches, SampleNoise
from ._diffusion import check_proportion
from ._loop import setup_logging, train
from ._one_step import OneStepTask, add_one_step_arguments, check_one_step_arguments
from ._score_distillation import FakeScore, distillation_loss
from ._teacher import Conditions, Teacher
from ._trajectories import Conditions as ConditionRows

_SHARES = (0.02, 0.98)  # of the timesteps, between which the target judges
_RECORDING = 0x50415448  # a seed of its own: noise of the recording is not that of a training step


def dmd_gradient(clean: torch.Tensor, wanted: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    r""":math:`(\hat x_{fake} - \hat x_{target}) / \mathrm{mean} |x - \hat x_{target}|`, the mean over each sample's elements.

    By the clean sample, as distribution matching distillation has it (Yin et al. 2024, arXiv 2311.18828, equations 7 and 8).

    Args:
        clean: x, `(batch, ...)`.
        wanted, fake: clean data predicted at noisy x, by the target and by the model of the student's samples.
    """
    size = (clean - wanted).abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(clean.dtype).tiny)
    return (fake - wanted) / size.reshape((-1,) + (1,) * (clean.ndim - 1))


def target_number(step: int, recorded: int, interval: int) -> int:
    """Which of the path is the target: from `recorded - 1` down to 0, the teacher, which stays to the end.

    Args:
        step: of the student, from 0.
        recorded: networks on the path after the teacher.
        interval: steps with each target.
    """
    return max(recorded - 1 - step // interval, 0)


class DisBackTask(OneStepTask):
    def dataset(self, args: argparse.Namespace) -> Dataset:
        return ConditionRows(self.conditions)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        args = self.args
        self.accelerator = accelerator
        self.score_net = self.teacher.student().to(accelerator.device)
        self.path = DegradationPath(Path(args.output_dir, "checkpoint-path"), args.record_steps // args.record_every)
        if self.path.count:
            self.path.record(self)
            self.score_net.load_state_dict(self.path.weights(self.path.count))
        self.score = self.new_score(args.gradient_accumulation_steps)
        self.callbacks = [self.score]
        self._target: tuple[int, Teacher] = (0, self.teacher)

    def new_score(self, accumulate: int = 1) -> FakeScore:
        """What trains `score_net`, from now on."""
        args = self.args
        parameters = dict(self.score_net.named_parameters())
        return FakeScore(parameters, self.accelerator, args.learning_rate_score, args.max_grad_norm, accumulate)

    def target(self, step: int) -> Teacher:
        """The target of a step; one that is not the teacher is a copy with weights of the path."""
        number = target_number(step, self.path.count, self.args.switch_steps)
        if number != self._target[0]:
            target = self.teacher
            if number > 0:
                net = copy.deepcopy(self.teacher.denoiser)
                net.load_state_dict(self.path.weights(number))
                target = copy.copy(self.teacher)
                target.pipeline = self.pipeline_with(**{self.teacher.name: net})
            self._target = number, target
        return self._target[1]

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        teacher, process = self.teacher, self.teacher.process
        conditions = teacher.encode(batch["condition"])
        for _ in range(self.args.score_updates - 1):
            self.learn_score(conditions, noise, self.score)
            self.score.around_step(lambda: None)
        clean = self.draw(noise.normal(*teacher.shape), conditions.given)
        low, high = (int(share * process.num_timesteps) for share in _SHARES)
        t, epsilon = low + noise.integers(high + 1 - low), noise.normal(*teacher.shape)
        with torch.no_grad():
            noisy = process.add_noise(clean, epsilon, t)
            outputs = (
                self.target(self.number(batch)).predict(noisy, t, conditions),
                teacher.call(self.score_net, noisy, t, conditions.given),
            )
            wanted, fake = (process.data_and_noise(noisy, output.float(), t)[0] for output in outputs)
            gradient = dmd_gradient(clean, wanted, fake)
        self.score.learn(self.score_loss(clean.detach(), conditions, noise))
        return distillation_loss(clean, gradient)

    def learn_score(self, conditions: Conditions, noise: SampleNoise, score: FakeScore) -> None:
        """Add gradients at fresh samples of the student."""
        with torch.no_grad():
            clean = self.draw(noise.normal(*self.teacher.shape), conditions.given)
        score.learn(self.score_loss(clean, conditions, noise))

    def score_loss(self, clean: torch.Tensor, conditions: Conditions, noise: SampleNoise) -> torch.Tensor:
        r""":math:`\mathrm{mean} (\epsilon_\phi - \epsilon)^2`, without guidance; prompts are dropped by sample."""
        process, shape = self.teacher.process, self.teacher.shape
        t, epsilon = noise.integers(process.num_timesteps), noise.normal(*shape)
        shown = conditions.dropped(noise.uniform() < self.args.proportion_empty_prompts)
        noisy = process.add_noise(clean, epsilon, t)
        prediction = self.teacher.call(self.score_net, noisy, t, shown.given)
        return (process.data_and_noise(noisy, prediction, t)[1] - epsilon).float().square().mean()

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(args, "train_disback", name, summary, ["disback", "few-step", "distillation"])


class DegradationPath:
    """Networks between the teacher, number 0, and a model of the first student's samples, number `count`; on disk.

    They lie in `path-<number>.safetensors`; `path.json`, written last, says what they were recorded with. A recording that
    was broken off begins anew, with the same bits.

    Args:
        folder: where they are, or will be.
        count: networks after the teacher.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def file(self, number: int) -> Path:
        return self.folder / f"path-{number:04d}.safetensors"

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        return load_file(self.file(number))

    def record(self, task: DisBackTask) -> None:
        """Train the task's `score_net`, a copy of the teacher, on the student as it is, where no recording is there.

        Raises:
            ValueError: the folder holds another recording.
        """
        args, accelerator = task.args, task.accelerator
        facts, note = self._facts(task), self.folder / "path.json"
        if note.is_file():
            there = json.loads(note.read_text())
            other = sorted(name for name in facts.keys() | there.keys() if facts.get(name) != there.get(name))
            if other:
                raise ValueError(
                    f"{self.folder} holds a path that was recorded with another {', '.join(other)}; name another "
                    "`--output_dir`, or delete that folder."
                )
            return
        score, world = task.new_score(), accelerator.num_processes
        batches = GlobalBatches(
            len(task.conditions), args.train_batch_size, args.seed, 0, args.record_steps, accelerator.process_index, world
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(batches, desc="Recording", disable=not accelerator.is_local_main_process, mininterval=1.0)
        for step, batch in enumerate(bar, start=1):
            conditions = task.teacher.encode([task.conditions[index] for index, _ in batch])
            ids = torch.tensor([sample_id for _, sample_id in batch])
            with accelerator.autocast():
                task.learn_score(conditions, SampleNoise(_RECORDING ^ args.seed, ids, accelerator.device), score)
            score.around_step(lambda: None)
            if step % args.record_every == 0 and accelerator.is_main_process:
                weights = {name: value.contiguous() for name, value in task.score_net.state_dict().items()}
                save_file(weights, self.file(step // args.record_every))
        if accelerator.is_main_process:
            partial = self.folder / f".path.json.{os.getpid()}"
            partial.write_text(json.dumps(facts, indent=2) + "\n")
            partial.rename(note)
        accelerator.wait_for_everyone()

    def _facts(self, task: DisBackTask) -> dict[str, Any]:
        """What the path depends on."""
        names = (
            "record_steps", "record_every", "shifted_timestep", "seed", "learning_rate_score", "max_grad_norm",
            "proportion_empty_prompts", "mixed_precision", "train_batch_size",
        )  # fmt: skip
        start = hashlib.sha256(weight_marks(task.student).numpy().tobytes())
        return {
            "teacher": task.teacher.marks(), "student": start.hexdigest()[:16],
            "conditions": hashlib.sha256(json.dumps(task.conditions).encode()).hexdigest()[:16],
            **{name: getattr(task.args, name) for name in names},
        }  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_one_step_arguments(parser, shifted_timestep=400)
    parser.set_defaults(learning_rate=5e-7, guidance_scale=8.0)
    parser.add_argument("--record_steps", type=int, default=1000, help="Of the recording; 0: no path.")
    parser.add_argument("--record_every", type=int, default=100, help="Steps from one network of the path to the next.")
    parser.add_argument("--switch_steps", type=int, default=200, help="Steps of the student with each target.")
    parser.add_argument("--learning_rate_score", type=float, default=5e-7, help="Of the student's score and the path.")
    parser.add_argument("--score_updates", type=int, default=5, help="Of the student's score, one by one, a step.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Of the score's prompts.")
    args = parser.parse_args(argv)
    check_one_step_arguments(args)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    for name in ("record_every", "switch_steps", "score_updates"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.record_steps < 0 or args.record_steps % args.record_every:
        raise ValueError(f"`--record_steps` is {args.record_steps}; 0 or a multiple of `--record_every` is needed.")
    if not 0 < args.learning_rate_score < float("inf"):
        raise ValueError(f"`--learning_rate_score` is {args.learning_rate_score}; it must be a number above 0.")
    if args.score_updates > 1 and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`--score_updates` is {args.score_updates}; with `--gradient_accumulation_steps` above 1 it must be 1."
        )
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, DisBackTask(args))


if __name__ == "__main__":
    main()
