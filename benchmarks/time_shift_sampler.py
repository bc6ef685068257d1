"""What time-shift sampling is worth: distance to real pictures at equal calls, and on an exact score, where it cannot help.

    diffusers-ext bench time_shift_sampler            # records diffusers_ext/results/time_shift_sampler.json

The paper's claim is of Fréchet distances with few steps of DDIM. Settings were fixed before measuring: the default window
and cutoff. Pictures of the same seed are compared in pairs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel, weights
from benchmarks.data import load_fashion_mnist
from benchmarks.zoo import _fashion
from diffusers_ext.metrics import distance_difference, frechet_distance
from diffusers_ext.oracles import sampler_error

MODEL, PICTURES, REAL, STEPS = "fashion-ddpm", 1000, 2000, (5, 10)
WINDOW, CUTOFF = 40, 200.0
EXACT: dict[str, Any] = {"steps": 100, "samples": 32}
BENCHMARK = Benchmark(
    "time_shift_sampler",
    settings={
        "model": MODEL, "weights": weights(MODEL), "pictures": PICTURES, "reference": REAL, "steps": list(STEPS),
        "window": WINDOW, "cutoff": CUTOFF, "exact": EXACT,
    },
)  # fmt: skip


def shift(scheduler: Any) -> dx.TimeShiftConfig:
    return dx.TimeShiftConfig.from_scheduler(scheduler, window=WINDOW, cutoff=CUTOFF)


@functools.cache
def real_features() -> torch.Tensor:
    return _fashion.judge().features(load_fashion_mnist("reference")[0][:REAL, :, :, None])


@BENCHMARK.part(*(f"{kind}_at_{steps}" for steps in STEPS for kind in ("frechet", "kernel")), minutes=8)
def distances(recorder: Recorder) -> None:
    """Of pictures with the shift less those without."""
    zoo, judge, rows = ZooModel(MODEL), _fashion.judge(), []
    pipe = zoo.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for steps in STEPS:
        features = {}
        for name in tqdm(("stock", "shifted"), desc=f"{steps} steps", leave=False):
            if name == "shifted":
                dx.enable(pipe, shift(pipe.scheduler))
            pictures = zoo.generate(pipe, zoo.conditions(PICTURES), range(PICTURES), steps)
            features[name] = judge.features(pictures)
        dx.disable(pipe)
        for kind, title in (("frechet", "Fréchet"), ("kernel", "kernel")):
            found = distance_difference(features["shifted"], features["stock"], real_features(), kind)
            recorder.claim(
                f"{kind}_at_{steps}",
                f"{title} distance to real pictures less that of DDIM without the shift, {MODEL}, {steps} steps",
                found.value, "", found.interval, ("<=", 0.0),
            )  # fmt: skip
        for name, made in features.items():
            value = frechet_distance(made, real_features(), resamples=20)
            rows.append([steps, name, value.value, value.noise])
    recorder.table("Fréchet distance to real pictures", ["steps", "sampler", "distance", "of real pictures"], rows)


@BENCHMARK.part("exact_score_error", minutes=0.5, quick=True)
def exact_score(recorder: Recorder) -> None:
    """There is no exposure bias with an exact score and an accurate solver, so that the shift is an error there."""
    scheduler = DDIMScheduler(clip_sample=False)
    means = 0.3 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoiser = dx.GaussianMixtureDenoiser.from_components(means, 0.09, scheduler)
    pipe = DDPMPipeline(denoiser, scheduler)
    shape = (EXACT["samples"], *denoiser.shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors: dict[str, np.ndarray] = {}
    for name in ("theirs", "ours"):
        if name == "ours":
            dx.enable(pipe, shift(scheduler))
        solver = DPMSolverMultistepScheduler(timestep_spacing="trailing")
        errors[name] = sampler_error(solver, denoiser, EXACT["steps"], noise).per_sample.numpy()
    recorder.paired(
        "exact_score_error",
        f"error with the shift less that without, exact score of a mixture, DPM-Solver++ with {EXACT['steps']} steps: it "
        "should not help",
        Samples("difference", errors, 1e-4), "", (">=", 0.0),
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
