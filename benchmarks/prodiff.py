"""What ProDiff is worth: clean data against noise at two steps, and halving 8 -> 4 -> 2 against two steps of what it began with.

    diffusers-ext bench prodiff            # records diffusers_ext/results/prodiff.json

For three training seeds: a teacher of clean data, fine-tuned from the checkpoint, which predicts noise; students of two steps
distilled from it; and students distilled from the checkpoint itself with as many steps. About three minutes of one core for each. DDIM
steps of all begin at the last timestep. A training that was broken off goes on.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._few_steps import FewSteps, claims_of, trained
from benchmarks._quality import RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import rmse
from diffusers_ext.training._teacher import few_step_scheduler
from diffusers_ext.training.train_prodiff import main as train_prodiff

MODEL, SCALE, SEEDS, MANY, FEW = "avatars-sd", 3.0, (0, 1, 2), 8, 2
BOTH = ("--center_crop", "--adam_weight_decay=0", "--lr_scheduler=cosine", "--checkpointing_steps=50", "--checkpoints_total_limit=1")  # fmt: skip
TEACHER = (
    "--stage=teacher", "--proportion_empty_prompts=0.1", "--train_batch_size=16", "--max_train_steps=300",
    "--learning_rate=5e-4", "--lr_warmup_steps=20", "--use_ema", "--ema_decay=0.98",
)  # fmt: skip
DISTILL = (
    "--stage=distill", f"--guidance_scale={SCALE:g}", "--student_steps", "4", "2", "--train_batch_size=12",
    "--max_train_steps=100", "--learning_rate=2e-4",
)  # fmt: skip
STUDY = FewSteps(MODEL, SCALE)
BENCHMARK = Benchmark(
    "prodiff",
    settings={
        **STUDY.settings, "both": list(BOTH), "teacher": list(TEACHER), "distill": list(DISTILL), "training_seeds": list(SEEDS),
        "steps": {"many": MANY, "few": FEW},
    },
    threads=1,
)  # fmt: skip


def networks(seed: int) -> dict[str, Path]:
    """Folders of the teacher of clean data, the student of it, and the student of the checkpoint."""

    def run(name: str, start: Path | str, flags: tuple[str, ...]) -> Path:
        more = [f"--pretrained_model_name_or_path={start}", f"--seed={seed}", *_avatars.DATA, *BOTH, *flags]
        return trained(train_prodiff, f"prodiff/{name}-seed{seed}", more)

    teacher = run("teacher", dx.zoo_path(MODEL), TEACHER)
    return {
        "teacher": teacher,
        "student": run("student", teacher, DISTILL),
        "of_noise": run("of_noise", dx.zoo_path(MODEL), DISTILL),
    }


@functools.cache
def _folders() -> list[dict[str, Path]]:
    return [networks(seed) for seed in tqdm(SEEDS, desc="training seeds")]


def _pipes(name: str) -> list[Any]:
    return [dx.Pipeline.from_pretrained(made[name], dtype=torch.float32) for made in _folders()]


def _ddim() -> Any:
    """The checkpoint with the steps of the others."""
    pipe = copy.copy(STUDY.zoo.pipe)
    pipe.scheduler = few_step_scheduler(pipe.scheduler)
    return pipe


@BENCHMARK.part(
    *(claim for name in ("clean_over_noise", "student_2", "over_teacher", "over_of_noise") for claim in claims_of(name)),
    "nearer_to_8_steps", minutes=32,
)  # fmt: skip
def two_steps(recorder: Recorder) -> None:
    """Teachers at two steps, and students against them, against each other and against DPM-Solver++."""
    base, students = STUDY.draw(_ddim(), FEW, SCALE), _pipes("student")
    undistilled = STUDY.compare(
        recorder, "clean_over_noise", "a teacher of clean data, guided", FEW, _pipes("teacher"), guidance_scale=SCALE,
        over=[base] * len(SEEDS), over_title=f"the checkpoint, which predicts noise, guided, {FEW} DDIM steps",
    )  # fmt: skip
    ours = STUDY.compare(recorder, "student_2", "ProDiff", FEW, students)
    STUDY.compare(
        recorder, "over_teacher", "ProDiff", FEW, students, over=undistilled,
        over_title=f"its teacher, guided, {FEW} steps",
    )  # fmt: skip
    STUDY.compare(
        recorder, "over_of_noise", "ProDiff", FEW, students,
        over=[STUDY.draw(pipe, FEW, 1.0) for pipe in _pipes("of_noise")],
        over_title=f"students of noise, distilled as long, {FEW} steps",
    )  # fmt: skip
    many = [STUDY.draw(pipe, MANY, SCALE) for pipe in _pipes("teacher")]
    distances = {
        kind: np.mean([rmse(one, goal).numpy() for one, goal in zip(sets, many, strict=True)], axis=0).tolist()
        for kind, sets in (("ours", ours), ("theirs", undistilled))
    }
    recorder.paired(
        "nearer_to_8_steps",
        f"RMSE to {MANY} guided steps of the teacher of clean data, from the same noise: {FEW} steps of the student less {FEW} of "
        "the teacher",
        Samples("difference", distances, RMSE_TOLERANCE, True), "", ("<=", 0.0),
    )  # fmt: skip
    STUDY.draw_sheet(OUTPUT / "prodiff-pictures.png")


if __name__ == "__main__":
    BENCHMARK.main()
