"""What PeRFlow is worth: 1, 2 and 4 steps against DPM-Solver++ with as many, and the delta on another fine-tune.

    diffusers-ext bench perflow              # records diffusers_ext/results/perflow.json

One student is trained for each number of windows, 1, 2 and 4, and takes one step a window; the one of 4 windows also takes 8.
Three training seeds each, about five minutes of one core a training; a training that was broken off goes on. One window of
the whole time is reflow without pairs. The other fine-tune is of darker pictures, and what it draws is compared with those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._few_steps import FewSteps, claims_of, trained
from benchmarks._record import Recorder
from benchmarks.data import FOLDER
from benchmarks.zoo import _avatars
from diffusers_ext.training.train_perflow import DELTA
from diffusers_ext.training.train_perflow import main as train_perflow
from diffusers_ext.training.train_text_to_image import main as train_text_to_image

MODEL, SCALE, SEEDS = "avatars-sd", 3.0, (0, 1, 2)
# windows -> DDIM steps of the teacher in each, and optimizer steps that take as long as those of the others.
STUDENTS = {1: (10, 75), 2: (5, 130), 4: (3, 190)}
TRAINING = (
    f"--guidance_scale={SCALE:g}", "--center_crop", "--train_batch_size=16", "--learning_rate=5e-4",
    "--lr_scheduler=cosine", "--use_ema", "--ema_decay=0.95", "--proportion_empty_prompts=0.0", "--checkpointing_steps=25",
    "--checkpoints_total_limit=1", "--save_delta_weights",
)  # fmt: skip
FINE_TUNE = (
    "--resolution=32", "--caption_column=caption", "--center_crop", "--train_batch_size=16", "--max_train_steps=200",
    "--learning_rate=5e-4", "--lr_scheduler=cosine", "--seed=9", "--checkpointing_steps=100",
)  # fmt: skip
STUDY = FewSteps(MODEL, SCALE)
COMPARED = {"K1": (1, 1), "K2": (2, 2), "K4": (4, 4), "K4_8": (4, 8)}  # name -> windows and steps
BENCHMARK = Benchmark(
    "perflow",
    settings={
        **STUDY.settings, "training": list(TRAINING), "students": {str(k): list(v) for k, v in STUDENTS.items()},
        "training_seeds": list(SEEDS), "fine_tune": list(FINE_TUNE),
    },
    threads=1,
)  # fmt: skip


def student(windows: int, seed: int) -> Path:
    """Folder of a trained student."""
    solving_steps, steps = STUDENTS[windows]
    return trained(
        train_perflow,
        f"perflow/K{windows}-seed{seed}",
        [
            f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", *_avatars.DATA, *TRAINING,
            f"--windows={windows}", f"--solving_steps={solving_steps}", f"--max_train_steps={steps}", f"--seed={seed}",
            f"--validation_inference_steps={windows}",
        ],
    )  # fmt: skip


def load(folder: Path) -> Any:
    return dx.Pipeline.from_pretrained(folder, dtype=torch.float32)


@BENCHMARK.part(*(claim for name in COMPARED for claim in claims_of(name)), minutes=52)
def few_steps(recorder: Recorder) -> None:
    """Students against DPM-Solver++ with as many steps."""
    folders = {
        windows: [student(windows, seed) for seed in tqdm(SEEDS, desc=f"{windows} windows")] for windows in STUDENTS
    }
    for name, (windows, steps) in COMPARED.items():
        pipes = [load(folder) for folder in folders[windows]]
        STUDY.compare(recorder, name, f"PeRFlow, {windows} windows", steps, pipes)
    STUDY.draw_sheet(OUTPUT / "perflow-pictures.png")


def dark(pictures: np.ndarray) -> np.ndarray:
    """The style of the other fine-tune, of 8-bit pictures."""
    return pictures // 3 * 2


def fine_tuned() -> Path:
    """Folder of another fine-tune of the base, of dark pictures."""
    data = OUTPUT / "cache" / "perflow" / "dark.npz"
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())["generator"]
    data.parent.mkdir(parents=True, exist_ok=True)
    with np.load(FOLDER / "avatars.npz") as avatars:
        np.savez(data, image=dark(avatars["image"][rows]), caption=avatars["caption"][rows])
    flags = [f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--train_data_dir={data}", *FINE_TUNE]
    return trained(train_text_to_image, "perflow/fine-tune", flags)


@BENCHMARK.part(*claims_of("delta"), minutes=5)
def delta(recorder: Recorder) -> None:
    """The weights' difference on another fine-tune of the base, against that fine-tune by DPM-Solver++."""
    other = FewSteps(MODEL, SCALE, style=dark)
    other.zoo.pipe.unet = load(fine_tuned()).unet
    pipes = []
    for seed in SEEDS:
        folder, pipe = student(4, seed), load(fine_tuned())
        dx.merge_delta_weights(pipe.unet, folder / DELTA)
        pipe.scheduler = load(folder).scheduler
        pipes.append(pipe)
    other.compare(recorder, "delta", "the delta of PeRFlow on another fine-tune", 4, pipes)


if __name__ == "__main__":
    BENCHMARK.main()
