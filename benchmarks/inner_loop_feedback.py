"""What predicted features are worth: against the plain cache, which takes them as they are, and against fewer steps.

    diffusers-ext bench inner_loop_feedback            # records diffusers_ext/results/inner_loop_feedback.json

The module is trained here, on classes and noise of its own, about 15 minutes on one idle core; a training can be broken off and
goes on, and one that is finished is kept. Place and interval were fixed before measuring. The plain cache is the same module
with s = 0, which costs as much.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._quality import RMSE_TOLERANCE, QualityCost, Variant
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel
from diffusers_ext import proofs
from diffusers_ext.metrics import rmse
from diffusers_ext.training.train_inner_loop_feedback import main as train_feedback

MODEL, STEPS, SCALE, PICTURES = "fashion-dit", 20, 4.0, 64
PLACES = {"resume7": (6, 7)}  # b and resume of 8 blocks: a cheap step costs 3 of them
TRAINING = (
    f"--num_inference_steps={STEPS}", f"--guidance_scale={SCALE:g}", "--train_batch_size=4", "--max_train_steps=500",
    "--learning_rate=1e-3", "--lr_scheduler=cosine", "--checkpointing_steps=20", "--checkpoints_total_limit=2", "--seed=0",
)  # fmt: skip
BENCHMARK = Benchmark("inner_loop_feedback", settings={"training": list(TRAINING), "places": PLACES})


def work_of(label: str) -> Path:
    """Where the module that these sources train is, or will be."""
    source = proofs.source_hash("diffusers_ext.training.train_inner_loop_feedback")
    return OUTPUT / "inner_loop_feedback" / f"{label}-{source[:12]}"


def folder_of(label: str) -> Path:
    """Where a trained module is.

    Raises:
        FileNotFoundError: it was not trained.
    """
    folder = work_of(label)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"There is no module {label!r}: `diffusers-ext bench inner_loop_feedback` trains it.")
    return folder


@BENCHMARK.part(minutes=15)
def training(recorder: Recorder) -> None:
    """Train what these sources have not finished; what was broken off goes on."""
    for label, (block, resume) in PLACES.items():
        if not (work_of(label) / "config.json").is_file():
            places = [f"--block={block}", f"--resume_block={resume}", "--resume_from_checkpoint=latest"]
            folders = [f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--output_dir={work_of(label)}"]
            train_feedback([*folders, *TRAINING, *places])


def fed(label: str) -> Callable[[Any], Any]:
    """Puts a trained module on a pipeline."""

    def put(pipe: Any) -> Any:
        return dx.enable(pipe, dx.InnerLoopFeedbackConfig(str(folder_of(label))))

    return put


STUDY = QualityCost(
    MODEL,
    steps=STEPS,
    guidance_scale=SCALE,
    variants={label: Variant(f"b = {b}, resume = {a}", prepare=fed(label)) for label, (b, a) in PLACES.items()},
    minutes=2,
    pictures=PICTURES,
)
STUDY.quick = False  # the module is trained where it is measured
BENCHMARK.add(STUDY)


@BENCHMARK.part(*(f"over_plain_cache_{label}" for label in PLACES), minutes=2)
def over_plain_cache(recorder: Recorder) -> None:
    """Distance to the full run less that of the features taken as they are."""
    zoo = ZooModel(MODEL)
    conditions = zoo.conditions(PICTURES)

    def draw(folder: Path | None) -> np.ndarray:
        if folder is None:
            return zoo.generate(zoo.pipe, conditions, range(PICTURES), STEPS, SCALE)
        with dx.enabled(zoo.pipe, dx.InnerLoopFeedbackConfig(str(folder))):
            return draw(None)

    full, rows = draw(None), []
    for label in tqdm(PLACES, desc="plain caches"):
        module = dx.InnerLoopFeedback.from_pretrained(folder_of(label))
        scale = module.scale.item()
        with torch.no_grad():
            module.scale.zero_()
        plain = OUTPUT / "inner_loop_feedback" / f"{label}-plain"
        module.save_pretrained(plain)
        errors = {
            kind: rmse(draw(folder), full).tolist() for kind, folder in (("ours", folder_of(label)), ("theirs", plain))
        }
        rows.append([label, scale, *(float(np.mean(errors[kind])) for kind in ("ours", "theirs"))])
        recorder.paired(
            f"over_plain_cache_{label}",
            f"RMSE to the full run less that of the plain cache (s = 0), {label}, {MODEL}",
            Samples("difference", errors, RMSE_TOLERANCE),
            "",
            ("<=", 0.0),
        )
    recorder.table("plain cache", ["place", "s", "mean RMSE", "mean RMSE with s = 0"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
