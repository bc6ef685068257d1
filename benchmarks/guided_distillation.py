"""What distilled guidance and halved steps are worth: 4 steps of one call against 8 guided DDIM steps, and stage one by itself.

    diffusers-ext bench guided_distillation            # records diffusers_ext/results/guided_distillation.json

Settings were fixed before measuring. Each training seed goes from the checkpoint over stage one and 8 steps to 4, on the
captioned pictures of the training split. A training can be broken off and goes on, and one that is finished is kept. The
guided DDIM steps are at the times of the student's ("trailing"), which serve few steps better than those that the checkpoint
comes with. Accuracy is by the judge of avatars, and within the noise if it falls short by less than the noise of the guided run
against itself, as in `benchmarks.agd`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._quality import ACCURACY_TOLERANCE, RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder
from benchmarks._zoo import ZooModel, weights
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import bootstrap_interval, rmse, time_ratio
from diffusers_ext.training._teacher import few_step_scheduler
from diffusers_ext.training.train_guided_distillation import main as train_student

MODEL, SCALE, PICTURES, SEEDS = "avatars-sd", 3.0, 128, (0, 1, 2)
STEPS, FEW, MANY, REFERENCE = 20, 4, 8, 50
TRAINING = (
    "--center_crop", "--min_guidance_scale=1", "--max_guidance_scale=5", "--train_batch_size=16",
    "--max_train_steps=250", "--student_steps", "8", "4", "--halving_train_steps=250", "--learning_rate=2e-4",
    "--lr_scheduler=cosine", "--lr_warmup_steps=20", "--adam_weight_decay=0", "--checkpointing_steps=50",
    "--checkpoints_total_limit=1",
)  # fmt: skip
TIMING: dict[str, Any] = {"pictures": 8, "rounds": 9}
BENCHMARK = Benchmark(
    "guided_distillation",
    settings={
        "model": MODEL, "weights": weights(MODEL), "guidance_scale": SCALE, "pictures": PICTURES, "timing": TIMING,
        "steps": {"few": FEW, "many": MANY, "stage one": STEPS, "reference": REFERENCE}, "training": list(TRAINING),
    },
)  # fmt: skip


def trained(seed: int) -> Path:
    """Folder of the student of 4 steps, with that of stage one in `checkpoint-guidance`; trains them first, or goes on."""
    work = training_folder("guided_distillation", "diffusers_ext.training.train_guided_distillation", list(TRAINING))
    values = {"pretrained_model_name_or_path": dx.zoo_path(MODEL), "seed": seed}
    return trained_once(train_student, work / f"seed-{seed}", values, [*_avatars.DATA, *TRAINING])


class Pictures:
    """Pictures of held-out captions, each way of the same noise."""

    def __init__(self, count: int) -> None:
        self.zoo = ZooModel(MODEL)
        self.conditions, self.count = self.zoo.conditions(count), count
        self.own = self.zoo.pipe.scheduler

    def draw(
        self, pipe: DiffusionPipeline, steps: int, scale: float = SCALE, first_seed: int = 0, **options: Any
    ) -> np.ndarray:
        seeds = range(first_seed, first_seed + self.count)
        return self.zoo.generate(pipe, self.conditions, seeds, steps, scale, **options)

    def guided(self, steps: int, trailing: bool, **options: Any) -> np.ndarray:
        """By the checkpoint, with guidance."""
        self.zoo.pipe.scheduler = few_step_scheduler(self.own) if trailing else self.own
        try:
            return self.draw(self.zoo.pipe, steps, **options)
        finally:
            self.zoo.pipe.scheduler = self.own

    def by_student(self, folder: Path, steps: int, **options: Any) -> np.ndarray:
        pipe = ZooModel.load(folder)
        pipe.set_progress_bar_config(disable=True)
        return self.draw(pipe, steps, **options)


@functools.cache
def _compared() -> dict[str, dict[str, np.ndarray]]:
    """Accuracy of each picture, and distance to the reference run, by what made it: means over the training seeds."""
    pictures = Pictures(PICTURES)
    reference = pictures.guided(REFERENCE, trailing=True)
    made: dict[str, list[np.ndarray]] = {
        f"guided, {REFERENCE} steps": [reference],
        f"guided, {STEPS} steps": [pictures.guided(STEPS, trailing=False)],
        f"guided, {STEPS} steps, other seeds": [pictures.guided(STEPS, trailing=False, first_seed=10_000)],
        f"no guidance, {STEPS} steps": [pictures.guided(STEPS, trailing=False, scale=1.0)],
        f"guided, {MANY} steps, as it comes": [pictures.guided(MANY, trailing=False)],
    }
    for steps in (MANY, FEW, FEW // 2):
        made[f"guided, {steps} steps"] = [pictures.guided(steps, trailing=True)]
    for name, part, steps in (("stage one", "checkpoint-guidance", STEPS), ("student", "", FEW)):
        folders = [trained(seed) / part for seed in tqdm(SEEDS, desc=name)]
        made[f"{name}, {steps} steps"] = [pictures.by_student(folder, steps) for folder in folders]
    accuracy = {}
    for name, sets in made.items():
        shares = [pictures.zoo.accuracy(each, pictures.conditions, range(PICTURES)) for each in sets]
        accuracy[name] = np.mean(np.stack([share for share in shares if share is not None]), axis=0)
    _save_sheet({name: sets[0][:16] for name, sets in made.items()})
    twenty = made[f"guided, {STEPS} steps"][0]
    return {
        "accuracy": accuracy,
        "distance": {name: np.mean([rmse(each, reference).numpy() for each in sets], axis=0) for name, sets in made.items()},
        "distance to 20": {name: np.mean([rmse(each, twenty).numpy() for each in sets], axis=0) for name, sets in made.items()},
    }  # fmt: skip


def _save_sheet(sheet: dict[str, np.ndarray]) -> None:
    """Rows of pictures, to be looked at: `outputs/bench/guided_distillation-pictures.png`."""
    from PIL import Image

    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in sheet.values()], axis=0)
    picture = Image.fromarray((rows * 255).round().astype(np.uint8))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "guided_distillation-pictures.png"
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file)


@BENCHMARK.part(
    "accuracy_within_noise_of_8_guided", "accuracy_over_4_guided", "nearer_than_4_guided", "accuracy_over_2_guided",
    "nearer_than_2_guided", "stage_one_accuracy_within_noise", "stage_one_nearer_than_no_guidance", minutes=60,
)  # fmt: skip
def pictures(recorder: Recorder) -> None:
    """Attribute accuracy, and distance to runs of the teacher."""
    found = _compared()
    accuracy, distance, to_twenty = found["accuracy"], found["distance"], found["distance to 20"]
    twenty = f"guided, {STEPS} steps"
    low, high = bootstrap_interval(accuracy[twenty] - accuracy[f"{twenty}, other seeds"], np.mean)
    noise = (high - low) / 2
    student, one = f"student, {FEW} steps", f"stage one, {STEPS} steps"
    where = f"{MODEL}, guidance {SCALE:g}, mean of {len(SEEDS)} training seeds"
    for name, ours, theirs, column, said, goal in (
        ("accuracy_within_noise_of_8_guided", student, f"guided, {MANY} steps", accuracy,
         f"attribute accuracy of {FEW} steps of one call less that of {MANY} guided DDIM steps", (">=", -noise)),
        ("accuracy_over_4_guided", student, f"guided, {FEW} steps", accuracy,
         f"attribute accuracy of {FEW} steps of one call less that of {FEW} guided DDIM steps", (">=", 0.0)),
        ("nearer_than_4_guided", student, f"guided, {FEW} steps", distance,
         f"RMSE to {REFERENCE} guided steps of {FEW} steps of one call less that of {FEW} guided DDIM steps", ("<=", 0.0)),
        ("accuracy_over_2_guided", student, f"guided, {FEW // 2} steps", accuracy,
         f"attribute accuracy of {FEW} steps of one call less that of {FEW // 2} guided DDIM steps, as many calls", (">=", 0.0)),
        ("nearer_than_2_guided", student, f"guided, {FEW // 2} steps", distance,
         f"RMSE to {REFERENCE} guided steps of {FEW} steps of one call less that of {FEW // 2} guided DDIM steps, as many calls",
         ("<=", 0.0)),
        ("stage_one_accuracy_within_noise", one, twenty, accuracy,
         f"attribute accuracy of stage one in {STEPS} steps less that of {STEPS} guided steps", (">=", -noise)),
        ("stage_one_nearer_than_no_guidance", one, f"no guidance, {STEPS} steps", to_twenty,
         f"RMSE to {STEPS} guided steps of stage one less that of {STEPS} steps without guidance", ("<=", 0.0)),
    ):  # fmt: skip
        tolerance, each = (ACCURACY_TOLERANCE, False) if column is accuracy else (RMSE_TOLERANCE, True)
        samples = {"ours": column[ours].tolist(), "theirs": column[theirs].tolist()}
        recorder.paired(name, f"{said}, {where}", Samples("difference", samples, tolerance, each), "", goal)
    rows = [[name, *(float(column[name].mean()) for column in (accuracy, distance, to_twenty))] for name in accuracy]
    columns = ["made by", "attribute accuracy", f"RMSE to {REFERENCE} guided steps", f"RMSE to {STEPS} guided steps"]
    recorder.table("pictures", columns, [*rows, ["noise", noise, None, None]])


@BENCHMARK.part("calls_over_8_guided", "time_over_8_guided", minutes=2)
def cost(recorder: Recorder) -> None:
    """Work and time of 4 steps of one call over those of 8 guided steps."""
    pictures = Pictures(TIMING["pictures"])
    student = ZooModel.load(trained(SEEDS[0]))
    student.set_progress_bar_config(disable=True)
    runs = {
        "guided": lambda: pictures.guided(MANY, trailing=True, output_type="latent"),
        "student": lambda: pictures.draw(student, FEW, output_type="latent"),
    }
    rows: dict[str, int] = {}
    for name, unet in (("guided", pictures.zoo.pipe.unet), ("student", student.unet)):
        seen: list[int] = []
        handle = unet.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(len(args[0])))
        runs[name]()
        handle.remove()
        rows[name] = sum(seen)
    recorder.claim(
        "calls_over_8_guided", f"evaluations of the denoiser, one a row of a batch, of {FEW} steps over those of {MANY} guided steps",
        rows["student"] / rows["guided"], "", goal=("<=", 0.25),
    )  # fmt: skip
    torch.set_num_threads(1)
    result = time_ratio(runs, baseline="guided", repeats=TIMING["rounds"])
    torch.set_num_threads(BENCHMARK.threads)
    ratio = result["student"]
    recorder.claim(
        "time_over_8_guided",
        f"time of a run of {TIMING['pictures']} pictures in {FEW} steps over that in {MANY} guided steps, one thread, without the decoder",
        ratio.median, "", ratio.interval, ("<=", 0.35),
    )  # fmt: skip
    rows_of_table = [[name, rows[name], result.seconds[name]] for name in rows]
    recorder.table("cost", ["run", "evaluations", "seconds"], rows_of_table)


if __name__ == "__main__":
    BENCHMARK.main()
