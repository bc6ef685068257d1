"""What a LoRA of one step is worth: against the base at one step and at many, other losses, and full fine-tuning.

    diffusers-ext bench hipa            # records diffusers_ext/results/hipa.json

Each of four trainings is made with three seeds, on the same pairs, with equally many steps and pictures a step; one that is
broken off goes on, and one that is finished is kept. Pairs are of captions and noise of their own, pictures of captions that
the model was not trained with. The teacher's are the base's own 20 guided steps, which is also what the gap is measured to.
Learning rates, cut-off, weight and number of steps were chosen on other seeds, before measuring.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._feature_nets import nets
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, with_task, write_lines
from benchmarks._zoo import ZooModel, weights
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import frechet_distance, high_frequency_energy_ratio
from diffusers_ext.training._teacher import Pairs, few_step_scheduler
from diffusers_ext.training.train_hipa import HiPATask, parse_args

MODEL, TEACHER_STEPS, SCALE, SEEDS = "avatars-sd", 20, 3.0, (0, 1, 2)
PICTURES, FIRST_SEED, CUTOFF = 632, 10**6, 4.0
PAIRS: dict[str, Any] = {"num_pairs": 1024, "teacher_steps": TEACHER_STEPS, "guidance_scale": SCALE}
TRAINING: dict[str, Any] = {
    "rank": 16, "cutoff": CUTOFF, "hf_weight": 0.1, "train_batch_size": 8, "max_train_steps": 600,
    "learning_rate": 2e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 30, "adam_weight_decay": 0.0,
    "checkpointing_steps": 100, "checkpoints_total_limit": 2,
}  # fmt: skip


class Shared(HiPATask):
    """All trainings on the same pairs."""

    def pairs(self, args: argparse.Namespace) -> Pairs:
        return Pairs(args.pairs_dir, self.conditions, args.num_pairs, self.teacher.shape)


class SquaresTask(Shared):
    """The same LoRA by squared differences of the pixels."""

    def distance(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pred - target).square().mean()


class FullTask(Shared):
    """The whole U-Net by the same loss."""

    def attach(self) -> dict[str, nn.Module]:
        return {"unet": self.pipeline.unet.requires_grad_(True)}

    def save(self, folder: Path) -> None:
        self.pipeline.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")


# Label -> title, task, and what its training has of its own.
TRAININGS: dict[str, tuple[str, type[HiPATask], dict[str, Any]]] = {
    "hipa": ("HiPA", Shared, {}),
    "spatial": ("LoRA, spatial loss", Shared, {"hf_weight": 0.0}),
    "squares": ("LoRA, squared differences", SquaresTask, {}),
    "full": ("full fine-tuning, loss of HiPA", FullTask, {"learning_rate": 1e-4}),
}
BENCHMARK = Benchmark(
    "hipa",
    settings={
        "model": MODEL, "weights": weights(MODEL), "pictures": PICTURES, "first_seed": FIRST_SEED, "pairs": PAIRS,
        "trainings": {label: {"title": title, **TRAINING, **own} for label, (title, _, own) in TRAININGS.items()},
        "seeds": list(SEEDS),
    },
)  # fmt: skip


def work() -> Path:
    """Where these sources train."""
    return training_folder(
        "hipa",
        "diffusers_ext.training.train_hipa",
        [PAIRS, TRAINING, {label: own for label, (*_, own) in TRAININGS.items()}],
    )


def trained(label: str, seed: int) -> Path:
    """Folder of a training; made, or gone on with, where it is not finished."""
    _, task, own = TRAININGS[label]
    values = {
        "pretrained_model_name_or_path": dx.zoo_path(MODEL), "pairs_dir": work() / "pairs", **PAIRS, **TRAINING, **own, "seed": seed,
        "prompts": write_lines(work() / "prompts.txt", _avatars.captions("generator")[: PAIRS["num_pairs"]]),
    }  # fmt: skip
    return trained_once(with_task(parse_args, task), work() / f"{label}-{seed}", values)


def student(label: str, seed: int) -> tuple[Any, int]:
    """A pipeline of one step, and how many of its parameters were trained."""
    pipe, folder = ZooModel(MODEL).pipe, trained(label, seed)
    pipe.scheduler = few_step_scheduler(pipe.scheduler)
    if (folder / "unet").is_dir():
        pipe.unet = type(pipe.unet).from_pretrained(folder / "unet")
        return pipe, sum(parameter.numel() for parameter in pipe.unet.parameters())
    pipe.load_lora_weights(folder)
    return pipe, sum(parameter.numel() for name, parameter in pipe.unet.named_parameters() if ".lora_" in name)


class Found:
    """What was measured of one way to draw: Fréchet distance by net, energy at high frequencies, attribute accuracy.

    Args:
        zoo: the model.
        pipe: draws.
        steps, scale: of the calls.
        teacher: pictures to compare the energy with; None: these are the teacher's.
    """

    def __init__(self, zoo: ZooModel, pipe: Any, steps: int, scale: float, teacher: np.ndarray | None = None) -> None:
        conditions = zoo.conditions(PICTURES)
        seeds = range(FIRST_SEED, FIRST_SEED + PICTURES)
        self.pictures = zoo.generate(pipe, conditions, seeds, steps, scale)
        self.frechet = {
            name: frechet_distance(net(self.pictures), real, resamples=2).value for name, (net, real) in nets().items()
        }
        radius = 2 * CUTOFF / self.pictures.shape[1]  # in units of half a period a pixel
        reference = self.pictures if teacher is None else teacher
        self.energy = high_frequency_energy_ratio(self.pictures, reference, radius)
        self.accuracy = float(zoo.accuracy(self.pictures, conditions, range(PICTURES)).mean())  # type: ignore[union-attr]

    def row(self) -> list[float]:
        return [*self.frechet.values(), self.energy, self.accuracy]


_NETS = ("judge", "efficientnet")
_RIVALS = {label: title for label, (title, *_) in TRAININGS.items() if label not in ("hipa", "full")}


@BENCHMARK.part(
    *(f"gap_closed_{net}" for net in _NETS),
    *(f"{net}_over_{rival}" for net in _NETS for rival in (*_RIVALS, "full")),
    *(f"energy_over_{rival}" for rival in _RIVALS),
    "trained_share",
    minutes=85,
)
def measure(recorder: Recorder) -> None:
    zoo = ZooModel(MODEL)
    many = Found(zoo, zoo.pipe, TEACHER_STEPS, SCALE)
    plain = ZooModel(MODEL).pipe
    plain.scheduler = few_step_scheduler(plain.scheduler)
    one = Found(zoo, plain, 1, 0.0, many.pictures)
    rows = [["base, 20 guided steps", None, None, *many.row()], ["base, one step", None, None, *one.row()]]
    found: dict[str, list[Found]] = {}
    trained_parameters: dict[str, int] = {}
    for label, seed in tqdm([(label, seed) for seed in SEEDS for label in TRAININGS], desc="Trainings"):
        pipe, trained_parameters[label] = student(label, seed)
        found.setdefault(label, []).append(Found(zoo, pipe, 1, 0.0, many.pictures))
    for label, (title, *_) in TRAININGS.items():
        rows += [
            [f"{title}, seed {seed}", trained_parameters[label], trained_parameters[label] / trained_parameters["full"], *each.row()]
            for seed, each in zip(SEEDS, found[label], strict=True)
        ]  # fmt: skip

    for net in _NETS:
        gap = one.frechet[net] - many.frechet[net]
        closed = [(one.frechet[net] - each.frechet[net]) / gap for each in found["hipa"]]
        recorder.paired(
            f"gap_closed_{net}",
            f"share that HiPA closes of the gap in Fréchet distance ({net}) between the base at one step and at 20, {MODEL}",
            Samples("value", {"ours": closed}, 1.0), "", (">=", 0.5),
        )  # fmt: skip
        for rival in (*_RIVALS, "full"):
            ours, theirs = ([each.frechet[net] for each in found[label]] for label in ("hipa", rival))
            recorder.paired(
                f"{net}_over_{rival}",
                f"Fréchet distance ({net}) of HiPA at one step less that of {TRAININGS[rival][0]}, {MODEL}",
                Samples("difference", {"ours": ours, "theirs": theirs}, 1.0), "", None if rival == "full" else ("<=", 0.0),
            )  # fmt: skip
    for rival in _RIVALS:
        ours, theirs = ([abs(each.energy - 1) for each in found[label]] for label in ("hipa", rival))
        recorder.paired(
            f"energy_over_{rival}",
            f"distance from 1 of the energy share above the cut-off, over the teacher's, less that of {TRAININGS[rival][0]}",
            Samples("difference", {"ours": ours, "theirs": theirs}, 1.0), "", ("<=", 0.0),
        )  # fmt: skip
    recorder.claim(
        "trained_share", "parameters that HiPA trains over those of the U-Net", trained_parameters["hipa"] / trained_parameters["full"], ""
    )  # fmt: skip
    recorder.table(
        "one step",
        ["pictures by", "trained parameters", "share", "Fréchet (judge)", "Fréchet (EfficientNet)",
         "energy above the cut-off / teacher's", "attribute accuracy"],
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
