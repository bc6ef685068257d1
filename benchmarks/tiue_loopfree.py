"""What a shared encoder is worth: four decoders on one encoder against one step, the same distillation, in quality and time.

    diffusers-ext bench tiue_loopfree            # records diffusers_ext/results/tiue_loopfree.json

Both students are trained with three seeds, with equally many optimizer steps and prompts a step, about 5 minutes of one core each;
one that is broken off goes on, and one that is finished is kept. The one-step student is the same trainer with one decoder.
Pictures are of captions that no training saw. Settings were fixed before measuring: the authors' weights and guidance, learning
rates for short trainings, and steps that begin at the last timestep, without which one step has no noise to begin with.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._feature_nets import nets
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, write_lines
from benchmarks._zoo import ZooModel, weights
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import frechet_distance, time_ratio
from diffusers_ext.training.train_tiue_loopfree import main as train_student

MODEL, SEEDS, PICTURES, FIRST_SEED = "avatars-sd", (0, 1, 2), 632, 10**6
STUDENTS = {"tiue": 4, "one_step": 1}  # with the steps
TITLES = {"tiue": "TiUE, 4 decoders", "one_step": "one step"}
TRAINING = {
    "guidance_scale": 4.5, "lambda_kl": 0.1, "rank": 16, "lora_alpha": 27.0, "timestep_spacing": "trailing",
    "train_batch_size": 4, "max_train_steps": 400, "learning_rate": 1e-4, "learning_rate_lora": 1e-3, "adam_weight_decay": 0.0,
    "checkpointing_steps": 50, "checkpoints_total_limit": 2,
}  # fmt: skip
DIVERSITY = {"prompts": 16, "pictures": 8}
TIMING = {"pictures": 4, "rounds": 9, "threads": 1}
NETS = ("judge", "efficientnet")
BENCHMARK = Benchmark(
    "tiue_loopfree",
    settings={
        "model": MODEL, "weights": weights(MODEL), "pictures": PICTURES, "first_seed": FIRST_SEED, "students": STUDENTS,
        "training": TRAINING, "seeds": list(SEEDS), "diversity": DIVERSITY, "timing": TIMING,
    },
)  # fmt: skip


def trained(label: str, seed: int) -> Path:
    """Folder of a student; trained, or gone on with, where it is not finished."""
    work = training_folder("tiue_loopfree", "diffusers_ext.training.train_tiue_loopfree", [STUDENTS, TRAINING])
    values = {
        "pretrained_model_name_or_path": dx.zoo_path(MODEL), "num_decoder_steps": STUDENTS[label], **TRAINING, "seed": seed,
        "prompts": write_lines(work / "prompts.txt", _avatars.captions("generator")),
    }  # fmt: skip
    return trained_once(train_student, work / f"{label}-{seed}", values)


def student(label: str, seed: int) -> Any:
    pipe = dx.Pipeline.from_pretrained(trained(label, seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Found:
    """Fréchet distance by net, attribute accuracy, and diversity of one way to draw.

    Args:
        zoo: the model.
        pipe: draws.
        steps, scale: of the calls.
    """

    def __init__(self, zoo: ZooModel, pipe: Any, steps: int, scale: float) -> None:
        conditions = zoo.conditions(PICTURES)
        pictures = zoo.generate(pipe, conditions, range(FIRST_SEED, FIRST_SEED + PICTURES), steps, scale)
        self.values = {
            name: frechet_distance(net(pictures), real, resamples=2).value for name, (net, real) in nets().items()
        }
        self.values["accuracy"] = float(zoo.accuracy(pictures, conditions, range(PICTURES)).mean())  # type: ignore[union-attr]
        self.values["diversity"] = self._diversity(zoo, pipe, steps, scale)

    @staticmethod
    def _diversity(zoo: ZooModel, pipe: Any, steps: int, scale: float) -> float:
        """Mean root mean square difference between pictures of one prompt."""
        count, distances = DIVERSITY["pictures"], []
        for prompt in zoo.conditions(DIVERSITY["prompts"]):
            made = zoo.generate(pipe, [prompt] * count, range(FIRST_SEED, FIRST_SEED + count), steps, scale)
            distances += [float(np.sqrt(np.square(a - b).mean())) for a, b in itertools.combinations(made, 2)]
        return float(np.mean(distances))


_MEASURES = {
    "judge": ("Fréchet distance (judge)", ("<=", 0.0)), "efficientnet": ("Fréchet distance (EfficientNet)", ("<=", 0.0)),
    "accuracy": ("attribute accuracy", (">=", 0.0)), "diversity": ("difference between pictures of one prompt", (">=", 0.0)),
}  # fmt: skip


@BENCHMARK.part(*(f"{name}_over_one_step" for name in _MEASURES), minutes=40)
def quality(recorder: Recorder) -> None:
    zoo = ZooModel(MODEL)
    many = Found(zoo, zoo.pipe, 20, 3.0)
    found: dict[str, list[Found]] = {label: [] for label in STUDENTS}
    for seed, label in tqdm(list(itertools.product(SEEDS, STUDENTS)), desc="Students"):
        found[label].append(Found(zoo, student(label, seed), STUDENTS[label], 1.0))
    rows = [["teacher, 20 guided steps", *many.values.values()]]
    for label in STUDENTS:
        rows += [
            [f"{TITLES[label]}, seed {seed}", *each.values.values()]
            for seed, each in zip(SEEDS, found[label], strict=True)
        ]
    for name, (title, goal) in _MEASURES.items():
        columns = {
            whose: [each.values[name] for each in found[label]]
            for whose, label in (("ours", "tiue"), ("theirs", "one_step"))
        }
        recorder.paired(
            f"{name}_over_one_step", f"{title} of TiUE less that of the one-step student, over training seeds, {MODEL}",
            Samples("difference", columns, 1.0), "", goal,
        )  # fmt: skip
    recorder.table("students", ["pictures by", *(title for title, _ in _MEASURES.values())], rows)


@BENCHMARK.part("time_over_one_step", "time_over_four_passes", minutes=2)
def times(recorder: Recorder) -> None:
    """Time of whole runs, weights aside: the same U-Net at one step, with one encoder for four, and at four."""
    torch.set_num_threads(TIMING["threads"])
    zoo, count = ZooModel(MODEL), TIMING["pictures"]
    conditions, pipes = zoo.conditions(count), {name: student("tiue", 0) for name in ("tiue", "one", "four")}
    for name in ("one", "four"):
        dx.disable(pipes[name])
    runs = {
        name: functools.partial(zoo.generate, pipes[name], conditions, range(count), 1 if name == "one" else 4, 1.0)
        for name in pipes
    }
    for base, title, goal in (("one", "one_step", 2.0), ("four", "four_passes", 1.0)):
        ratio = time_ratio({name: runs[name] for name in ("tiue", base)}, baseline=base, repeats=TIMING["rounds"])[
            "tiue"
        ]
        recorder.claim(
            f"time_over_{title}", f"time of a run of TiUE over that of {title.replace('_', ' ')}, {count} pictures, {MODEL}",
            ratio.median, "x", ratio.interval, ("<=", goal),
        )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
