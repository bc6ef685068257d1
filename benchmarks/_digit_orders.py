"""What benchmarks of policies for masked language models share: a base model on a task with a program for its reward.

The base learns to write digits in any order, and is then unsure of the order: right where it writes one digit a step, and often
wrong where it writes several. Policies are measured on prompts that nothing was trained on.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer

from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, with_task
from diffusers_ext.schedulers._unmasking import UnmaskingScheduler
from diffusers_ext.training import _digit_orders, train_masked_diffusion_lm
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._unmasking_policy import Layout, UnmaskingPolicyTask, completion_texts, run_policy
from diffusers_ext.training.train_masked_diffusion_lm import MaskedDiffusionTask, masked_diffusion_loss

LENGTH = _digit_orders.LONGEST
PROMPT = LENGTH + 1  # tokens of the longest prompt
SEEDS = (1, 2, 3)
PROBLEMS: dict[str, Any] = {"train": 10_000, "seed": 0, "measured": 400, "measured_seed": 10**6}
BASE: dict[str, Any] = {
    "max_seq_length": PROMPT + LENGTH, "train_batch_size": 64, "max_train_steps": 1000, "learning_rate": 1e-3,
    "adam_weight_decay": 0.0, "lr_warmup_steps": 50, "num_validation_texts": 0,
}  # fmt: skip
TASK: dict[str, Any] = {"digits": LENGTH, "problems": PROBLEMS, "base": BASE}


class AnswersTask(MaskedDiffusionTask):
    """Masked diffusion of answers whose prompts are always shown: the states that a policy decodes."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        ids = batch["input_ids"]
        ends = (ids == self.tokenizer.convert_tokens_to_ids(">")).int().argmax(1, keepdim=True)
        place = torch.arange(ids.shape[1], device=ids.device) - ends  # from 1 on in the answer
        u = noise.uniform(ids.shape[1]).masked_fill(place < 1, 1.0)  # which no rate masks
        t = noise.uniform().clamp(min=self.args.min_mask_ratio)
        return masked_diffusion_loss(self.model, ids, (place <= LENGTH).long(), self.tokenizer.mask_token_id, t, u)


@functools.cache
def base() -> tuple[Path, Path]:
    """Folder of the base model, and the problems to train policies on; made, or gone on with, where it is not finished."""
    told = [TASK, AnswersTask.__name__]
    folder = training_folder("digit-orders", "diffusers_ext.training.train_masked_diffusion_lm", told)
    problems, texts = _digit_orders.write(folder / "data", PROBLEMS["train"], PROBLEMS["seed"])
    if not (folder / "start" / "model.safetensors").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _digit_orders.write_untrained_model(folder / "start")
    script = with_task(train_masked_diffusion_lm.parse_args, AnswersTask)
    given = {
        **BASE, "pretrained_model_name_or_path": folder / "start", "train_data_dir": texts, "seed": 0, "checkpointing_steps": 200
    }  # fmt: skip
    return trained_once(script, folder / "model", given), problems


def trained(
    key: str,
    parse_args: Callable[[list[str]], argparse.Namespace],
    task: type[UnmaskingPolicyTask],
    seed: int,
    values: dict[str, Any],
) -> Path:
    """Folder of a policy; made, or gone on with, where it is not finished."""
    start, problems = base()
    folder = training_folder(key, parse_args.__module__, [start.parent.name, values, task.__name__]) / str(seed)
    given = {
        **values, "pretrained_model_name_or_path": start, "train_data_dir": problems, "reward": "digit_orders",
        "max_prompt_length": PROMPT, "max_completion_length": LENGTH, "seed": seed, "checkpointing_steps": 50,
        "checkpoints_total_limit": 2,
    }  # fmt: skip
    return trained_once(with_task(parse_args, task), folder, given)


@functools.cache
def measured() -> list[str]:
    """Prompts that nothing is trained on. Short ones are rare among them: there are few, and most are trained on."""
    known = {row["prompt"] for row in _digit_orders.problems(PROBLEMS["train"], PROBLEMS["seed"])}
    drawn = _digit_orders.problems(4 * PROBLEMS["measured"], PROBLEMS["measured_seed"])
    unseen = [row["prompt"] for row in drawn if row["prompt"] not in known]
    assert len(unseen) >= PROBLEMS["measured"]
    return unseen[: PROBLEMS["measured"]]


def measure(folder: Path, scheduler: UnmaskingScheduler, steps: int, temperature: float) -> torch.Tensor:
    """Rewards `(problems, steps)` of what is predicted at each step, on `measured` prompts, of fixed seeds."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = measured()
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    layout = Layout.of(ids, PROMPT, LENGTH, tokenizer.mask_token_id, tokenizer.eos_token_id)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    runs = run_policy(model, scheduler, layout, steps, temperature, tokenizer.mask_token_id, generators)
    texts = [completion_texts(tokenizer, answers) for answers in runs.predictions.unbind(1)]
    return torch.tensor([_digit_orders.reward(one, prompts, prompts) for one in texts]).T


def accuracy(folder: Path, scheduler: UnmaskingScheduler, steps: int, temperature: float) -> float:
    """Share of unseen problems that a policy answers rightly."""
    return measure(folder, scheduler, steps, temperature)[:, -1].mean().item()


def compare(
    recorder: Recorder,
    key: str,
    parse_args: Callable[[list[str]], argparse.Namespace],
    tasks: Mapping[str, type[UnmaskingPolicyTask]],
    values: dict[str, Any],
    scheduler: UnmaskingScheduler,
    claim: str,
    kind: str = "steps",
) -> None:
    """Measure what policies gain over the base and over policies of a rival, and show all of them.

    Args:
        key: begins the folders' names.
        parse_args: of the trainer.
        tasks: ours and the rival's, by what they train by.
        values: arguments of the trainings.
        scheduler: decodes when policies are measured.
        claim: of the gain over the rival; that over the base is `accuracy_over_untrained`.
        kind: of the steps, in the statements.
    """
    steps, temperature = values["num_inference_steps"], values["temperature"]
    before = accuracy(base()[0], scheduler, steps, temperature)
    one_digit = accuracy(base()[0], UnmaskingScheduler(), LENGTH, temperature)
    found: dict[str, list[float]] = {}
    for name, task in tqdm(tasks.items(), desc="Tasks"):
        folders = [trained(key, parse_args, task, seed, values) for seed in SEEDS]
        found[name] = [accuracy(folder, scheduler, steps, temperature) for folder in folders]
    ours, rival = found
    for title, other, theirs, goal in (
        ("accuracy_over_untrained", "untrained", [before] * len(SEEDS), (">=", 0.05)),
        (claim, f"trained by {rival}", found[rival], (">=", 0.0)),
    ):
        recorder.paired(
            title,
            f"share of right answers after {values['max_train_steps']} updates less that of the model {other}, {steps} {kind}, "
            "digits in any order",
            Samples("difference", {"ours": found[ours], "theirs": theirs}, 0.05), "", goal,
        )  # fmt: skip
    rows: list[list[Any]] = [["untrained", None, before], ["untrained, one token a step", None, one_digit]]
    rows += [[by, seed, share] for by, shares in found.items() for seed, share in zip(SEEDS, shares, strict=True)]
    recorder.table("policies", ["trained by", "seed", "right"], rows)
