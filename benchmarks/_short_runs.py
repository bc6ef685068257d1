"""What fine-tuning for a few steps is worth on fashion-ddpm: shared by the benchmarks of the methods that do it.

Pictures of new noise are compared with held-out ones in two unrelated feature nets and by their pixels; how far a picture is
from the nearest other one that was drawn shows whether they still differ from each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler

import diffusers_ext as dx
from benchmarks._bench import OUTPUT
from benchmarks._feature_nets import FASHION, nets
from benchmarks._trainings import trained_once
from benchmarks._zoo import ZooModel
from benchmarks.data import load_fashion_mnist
from benchmarks.zoo import _fashion
from diffusers_ext import proofs
from diffusers_ext.metrics import frechet_distance, kernel_distance

MODEL, SEEDS, PICTURES, FIRST_SEED, DIRECTIONS = "fashion-ddpm", (0, 1, 2), 500, 10**6, 256
COLUMNS = [
    "pictures by", "steps", "Fréchet (judge)", "Fréchet (EfficientNet)", "kernel (EfficientNet)", "sliced distance of pixels",
    "to the nearest neighbour",
]  # fmt: skip


def sliced_distance(pictures: np.ndarray, real: np.ndarray) -> float:
    """Wasserstein distance of order 2 between the pixels along random directions, as a root mean square over them."""
    directions = torch.randn(pictures[0].size, DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    levels = torch.linspace(0.0005, 0.9995, 1000)
    one, other = (
        torch.quantile(torch.from_numpy(each.reshape(len(each), -1)).float() @ directions, levels, dim=0)
        for each in (pictures, real)
    )
    return float((one - other).square().mean().sqrt())


class Found:
    """What was measured of one way to draw."""

    def __init__(self, pipe: Any, steps: int, **options: Any) -> None:
        zoo = ZooModel(MODEL, pipe)
        seeds = range(FIRST_SEED, FIRST_SEED + PICTURES)
        pictures = zoo.generate(pipe, zoo.conditions(PICTURES), seeds, steps, **options)
        features = {name: net(pictures) for name, (net, _) in nets(MODEL).items()}
        self.frechet = {
            name: frechet_distance(features[name], real, resamples=2).value for name, (_, real) in nets(MODEL).items()
        }
        self.kernel = kernel_distance(features["efficientnet"], nets(MODEL)["efficientnet"][1], resamples=2).value
        real = load_fashion_mnist("reference")[0][:FASHION, :, :, None] / 255.0
        self.sliced = sliced_distance(pictures, real)
        apart = torch.cdist(features["efficientnet"], features["efficientnet"]).fill_diagonal_(float("inf"))
        self.variety = float(apart.min(dim=1).values.mean())
        self.steps = steps

    def row(self, title: str) -> list[Any]:
        return [title, self.steps, *self.frechet.values(), self.kernel, self.sliced, self.variety]


def ddim_pipeline(**config: Any) -> DDIMPipeline:
    """The zoo's model with DDIM, which does not cut off what it predicts."""
    base = ZooModel(MODEL).pipe
    pipe = DDIMPipeline(base.unet, base.scheduler)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True, **config
    )
    return pipe


def dpm_solver_pipeline() -> Any:
    """The zoo's model with DPM-Solver++ of order 2."""
    base = ZooModel(MODEL).pipe
    config = {name: value for name, value in base.scheduler.config.items() if name != "variance_type"}
    base.scheduler = DPMSolverMultistepScheduler.from_config(config, thresholding=False)
    return base


def trained(key: str, main: Callable[[list[str]], None], seed: int, values: dict[str, Any]) -> DDIMPipeline:
    """The result of a training; made, or gone on with, where it is not finished."""
    source = proofs.source_hash(f"diffusers_ext.training.train_{key}")
    settings = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    folder = OUTPUT / "cache" / f"{key}-{source[:12]}" / f"{settings}-{seed}"
    given = {
        **values, "seed": seed, "pretrained_model_name_or_path": dx.zoo_path(MODEL), "checkpointing_steps": 10,
        "checkpoints_total_limit": 2,
    }  # fmt: skip
    return DDIMPipeline.from_pretrained(trained_once(main, folder, given, _fashion.DATA))
