"""What benchmarks of policies for masked language models share: a base model on a task with a program for its reward.

The base learns from examples of digits written in any order, and is then unsure of the order. Problems that policies are measured
on were never seen.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from benchmarks._trainings import training_folder
from diffusers_ext.schedulers._unmasking import UnmaskingScheduler
from diffusers_ext.training import _digit_orders, train_masked_diffusion_lm
from diffusers_ext.training._loop import train
from diffusers_ext.training._unmasking_policy import Layout, UnmaskingPolicyTask, completion_texts, run_policy

LENGTH = _digit_orders.LONGEST
PROMPT = LENGTH + 1  # tokens of the longest prompt
PROBLEMS: dict[str, Any] = {"train": 20_000, "seed": 0, "measured": 400, "measured_seed": 10**6}
BASE: dict[str, Any] = {
    "max_seq_length": 2 * LENGTH + 2, "train_batch_size": 64, "max_train_steps": 2000, "learning_rate": 2e-3,
    "random_length_probability": 0.0, "adam_weight_decay": 0.0, "lr_warmup_steps": 50, "num_validation_texts": 1,
}  # fmt: skip


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@functools.cache
def base() -> tuple[Path, Path]:
    """Folder of the base model, and the problems to train policies on; made, or gone on with, where it is not finished."""
    told = {**PROBLEMS, **BASE}
    folder = training_folder("digit-orders", "diffusers_ext.training.train_masked_diffusion_lm", told)
    problems, texts = _digit_orders.write(folder / "data", PROBLEMS["train"], PROBLEMS["seed"])
    if not (folder / "model" / "config.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _digit_orders.write_untrained_model(folder / "start")
        train_masked_diffusion_lm.main(_flags({
            **BASE, "pretrained_model_name_or_path": folder / "start", "train_data_dir": texts,
            "output_dir": folder / "model", "seed": 0, "checkpointing_steps": 200, "resume_from_checkpoint": "latest",
        }))  # fmt: skip
    return folder / "model", problems


def trained(
    key: str,
    parse_args: Callable[[list[str]], argparse.Namespace],
    task: type[UnmaskingPolicyTask],
    seed: int,
    values: dict[str, Any],
) -> Path:
    """Folder of a policy; made, or gone on with, where it is not finished."""
    start, problems = base()
    told = {**PROBLEMS, **BASE, **values, "task": task.__name__}
    folder = training_folder(key, parse_args.__module__, told) / str(seed)
    if not (folder / "config.json").is_file():
        args = parse_args(_flags({
            **values, "pretrained_model_name_or_path": start, "train_data_dir": problems, "reward": "digit_orders",
            "max_prompt_length": PROMPT, "max_completion_length": LENGTH, "output_dir": folder, "seed": seed,
            "checkpointing_steps": 50, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest",
        }))  # fmt: skip
        train(args, task(args))
    return folder


def measure(folder: Path, scheduler: UnmaskingScheduler, steps: int, temperature: float) -> torch.Tensor:
    """Rewards `(problems, steps)` of what is predicted at each step, on unseen problems, of fixed seeds."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    problems = _digit_orders.problems(PROBLEMS["measured"], PROBLEMS["measured_seed"])
    prompts = [row["prompt"] for row in problems]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    layout = Layout.of(ids, PROMPT, LENGTH, tokenizer.mask_token_id, tokenizer.eos_token_id)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    runs = run_policy(model, scheduler, layout, steps, temperature, tokenizer.mask_token_id, generators)
    texts = [completion_texts(tokenizer, answers) for answers in runs.predictions.unbind(1)]
    return torch.tensor([_digit_orders.reward(one, prompts, prompts) for one in texts]).T


def accuracy(folder: Path, scheduler: UnmaskingScheduler, steps: int, temperature: float) -> float:
    """Share of unseen problems that a policy answers rightly."""
    return measure(folder, scheduler, steps, temperature)[:, -1].mean().item()
