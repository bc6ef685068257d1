"""What calibration is worth: the score-matching loss on pictures that neither the network nor the table has seen.

    diffusers-ext bench calibrated_dpm            # records diffusers_ext/results/calibrated_dpm.json

The setting was fixed before measuring: 10 timesteps, 1,000 of the pictures that the network was trained on, each with a
noise and its negative. Losses are of timesteps halfway between those of the table as well. The paper's claim about Fréchet
distances needs tables of whole training sets, and is left alone.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._grounds import CACHE
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel
from benchmarks.data import load_fashion_mnist
from diffusers_ext import proofs
from diffusers_ext.schedulers._statistics import GuideScheduler

MODEL, TRAINING, HELD_OUT, LEVELS, BATCH = "fashion-ddpm", 1000, 500, 10, 100
SEED = 1000
# Timesteps of the table, and two halfway.
TIMES = (999, 777, 555, 500, 333, 166, 111, 0)
BENCHMARK = Benchmark(
    "calibrated_dpm",
    settings={"model": MODEL, "training": TRAINING, "held_out": HELD_OUT, "levels": LEVELS, "times": list(TIMES), "seed": SEED},
)  # fmt: skip


def pictures(split: str, count: int) -> torch.Tensor:
    return torch.from_numpy(load_fashion_mnist(split)[0][:count, None]).float() / 127.5 - 1


@functools.cache
def table() -> dx.CalibratedDPMConfig:
    CACHE.mkdir(parents=True, exist_ok=True)
    source = proofs.source_hash("diffusers_ext.hooks.calibrated_dpm")[:16]
    file = CACHE / f"calibration-{MODEL}-{TRAINING}-{source}.safetensors"
    clean = pictures("generator", TRAINING)
    pipe = ZooModel(MODEL).pipe
    return dx.calibrate(pipe, TRAINING, samples=clean, num_levels=LEVELS, batch_size=BATCH, seed=SEED, checkpoint=file)


@torch.no_grad()
def losses(zoo: ZooModel, time: int) -> np.ndarray:
    """Squared error of the predicted noise of each held-out picture, a pixel, on a noise and its negative."""
    guide = GuideScheduler.from_config(zoo.pipe.scheduler.config)
    alpha = float(guide.alphas_cumprod[time].double().sqrt())
    sigma = (1 - alpha**2) ** 0.5
    clean, found = pictures("reference", HELD_OUT), []
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(time))
    for x, n in zip(clean.split(BATCH), noise.split(BATCH), strict=True):
        errors = [zoo.pipe.unet(alpha * x + sigma * side, time).sample - side for side in (n, -n)]
        found.append(sum(error.square().flatten(1).mean(1) for error in errors) / 2)
    return torch.cat(found).double().numpy()


@BENCHMARK.part(*(f"loss_at_{time}" for time in TIMES), minutes=8)
def held_out_loss(recorder: Recorder) -> None:
    zoo, rows = ZooModel(MODEL), []
    for time in TIMES:
        plain = losses(zoo, time)
        with dx.enabled(zoo.pipe.unet, table()):
            calibrated = losses(zoo, time)
        samples = Samples("difference", {"ours": calibrated.tolist(), "theirs": plain.tolist()}, 1e-5)
        recorder.paired(
            f"loss_at_{time}", f"score-matching loss on held-out pictures less that without calibration, timestep {time}",
            samples, "", ("<=", 0.0),
        )  # fmt: skip
        rows.append([time, plain.mean(), calibrated.mean(), (calibrated / plain).mean() - 1])
    recorder.table("held-out loss", ["timestep", "plain", "calibrated", "relative change"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
