"""What backtracking is worth: DisBack against the same score distillation from the teacher alone, at equal updates of networks.

    diffusers-ext bench disback            # records diffusers_ext/results/disback.json

An update is an optimizer step of the student or of a score. The baseline spends all on distillation, two a step. DisBack spends the first
quarter on the path, one a step, and the rest as the baseline. Both are compared after as many updates, three times in a training,
for three training seeds. About two and a half minutes of one core a training; one that was broken off goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._few_steps import FewSteps, claims_of, prompts_file, trained
from benchmarks._record import Recorder, Samples
from diffusers_ext.training.train_disback import main as train_disback

MODEL, SCALE, SEEDS = "avatars-sd", 3.0, (0, 1, 2)
EVERY, RECORDED, UPDATES = 40, 80, 320  # steps between checkpoints, of the recording, and updates in all
TRAINING = (
    f"--guidance_scale={SCALE:g}", "--train_batch_size=8", "--learning_rate=1e-4", "--learning_rate_score=1e-4",
    "--score_updates=1", "--adam_weight_decay=0", "--use_ema", "--ema_decay=0.95", f"--checkpointing_steps={EVERY}",
    "--shifted_timestep=1000",
)  # fmt: skip
WAYS = {
    "disback": (
        f"--record_steps={RECORDED}", "--record_every=20", "--switch_steps=12",
        f"--max_train_steps={(UPDATES - RECORDED) // 2}",
    ),
    "baseline": ("--record_steps=0", f"--max_train_steps={UPDATES // 2}"),
}  # fmt: skip
MARKS = tuple(
    RECORDED + 2 * step for step in range(EVERY, (UPDATES - RECORDED) // 2 + 1, EVERY)
)  # 160, 240, 320 updates
STUDY = FewSteps(MODEL, SCALE)
BENCHMARK = Benchmark(
    "disback",
    settings={
        **STUDY.settings, "training": list(TRAINING), "ways": {name: list(flags) for name, flags in WAYS.items()},
        "training_seeds": list(SEEDS), "updates": list(MARKS),
    },
    threads=1,
)  # fmt: skip


def student(way: str, seed: int) -> Path:
    """Folder of a student."""
    flags = [
        f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--prompts={prompts_file()}", f"--seed={seed}",
        *TRAINING, *WAYS[way],
    ]  # fmt: skip
    return trained(train_disback, f"disback/{way}-seed{seed}", flags)


def pipeline(way: str, seed: int, updates: int) -> Any:
    """A student after some updates."""
    folder = student(way, seed)
    step = (updates - (RECORDED if way == "disback" else 0)) // 2
    pipe = dx.Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.unet = UNet2DConditionModel.from_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
    return pipe


@BENCHMARK.part(
    *(claim for name in [f"after_{updates}" for updates in MARKS] for claim in claims_of(name)), "mean_over_updates", minutes=24
)  # fmt: skip
def one_step(recorder: Recorder) -> None:
    """DisBack less the baseline after equal updates, and the mean over the curve."""
    for way in WAYS:
        for seed in tqdm(SEEDS, desc=f"trainings of {way}"):
            student(way, seed)
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for updates in MARKS:
        pipes = [pipeline("disback", seed, updates) for seed in SEEDS]
        theirs = [STUDY.draw(pipeline("baseline", seed, updates), 1, 1.0) for seed in SEEDS]
        ours = STUDY.compare(
            recorder, f"after_{updates}", f"DisBack after {updates} updates", 1, pipes, over=theirs,
            over_title=f"the baseline after {updates} updates, 1 step",
        )  # fmt: skip
        for way, pictures in (("disback", ours), ("baseline", theirs)):
            curves[way].append([STUDY.frechet(each) for each in pictures])
    by_seed = {way: np.mean(found, axis=0).tolist() for way, found in curves.items()}
    columns = {"ours": by_seed["disback"], "theirs": by_seed["baseline"]}
    recorder.paired(
        "mean_over_updates",
        f"Fréchet distance to real pictures, mean over {', '.join(map(str, MARKS))} updates, a training each: DisBack less the "
        "baseline",
        Samples("difference", columns, 1e-3, True), "", ("<=", 0.0),
    )  # fmt: skip
    rows = [[way, *(float(np.mean(found)) for found in curves[way])] for way in WAYS]
    recorder.table("curve", ["way", *(f"Fréchet after {updates}" for updates in MARKS)], rows)
    STUDY.draw_sheet(OUTPUT / "disback-pictures.png")


if __name__ == "__main__":
    BENCHMARK.main()
