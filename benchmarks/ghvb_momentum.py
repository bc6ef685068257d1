"""What momentum is worth: fewer divergence artefacts at strong guidance, and what it costs in accuracy.

    diffusers-ext bench ghvb_momentum        # records diffusers_ext/results/ghvb_momentum.json

Settings were fixed before measuring: GHVB of order 1.8 and beta 0.8, which the paper uses most, at guidance 15 and 10
steps, as in its experiments on Stable Diffusion. Divergence is measured on latents, as there: each channel is standardised
with mean and deviation of the latents of real pictures, and what counts is the share of places where a channel lies more
than 3 deviations off. The paper also pools over 4 x 4 places, which are too many of our 16 x 16.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import Variant
from benchmarks._record import Recorder, Samples
from benchmarks._samplers import OracleStudy, TrajectoryStudy
from benchmarks._zoo import ZooModel
from benchmarks.data import FOLDER

MODEL, GUIDANCE, STEPS, LIMIT, PICTURES = "avatars-sd", 15.0, (10, 20), 3.0, 64
SAMPLERS = {
    "ghvb18": Variant("GHVB 1.8", scheduler=dx.GHVBScheduler, scheduler_options={"order": 1.8}),
    "hb_dpm": Variant("DPM-Solver++ 2M, heavy ball 0.8", scheduler=dx.HeavyBallDPMSolverMultistepScheduler),
    "hb_unipc": Variant("UniPC, heavy ball 0.8", scheduler=dx.HeavyBallUniPCMultistepScheduler),
}
WITHOUT = {
    "ddim": Variant("DDIM", scheduler=dx.GHVBScheduler, scheduler_options={"order": 1.0}),
    "plms2": Variant("PLMS 2", scheduler=dx.GHVBScheduler, scheduler_options={"order": 2.0}),
    "plms4": Variant("PLMS 4", scheduler=dx.GHVBScheduler, scheduler_options={"order": 4.0}),
    "dpm_solver_pp_2m": Variant("DPM-Solver++ 2M", scheduler=DPMSolverMultistepScheduler),
    "unipc": Variant("UniPC", scheduler=UniPCMultistepScheduler),
}
# Momentum, and what it is to be more stable than.
PAIRS = (
    ("ghvb18", "plms2"), ("ghvb18", "plms4"), ("ghvb18", "dpm_solver_pp_2m"), ("hb_dpm", "dpm_solver_pp_2m"),
    ("hb_unipc", "unipc"),
)  # fmt: skip

BENCHMARK = Benchmark(
    "ghvb_momentum",
    settings={"model": MODEL, "guidance_scale": GUIDANCE, "steps": list(STEPS), "limit": LIMIT, "pictures": PICTURES},
)
BENCHMARK.add(OracleStudy(SAMPLERS, problems=("mixture", "guided")))
BENCHMARK.add(TrajectoryStudy(MODEL, 3.0, SAMPLERS, over=("dpm_solver_pp_2m",), claim_calls=(8, 12), minutes=15))


@torch.no_grad()
def reference_range(zoo: ZooModel, count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel of the latents of real pictures, of which none was trained on."""
    rows = json.loads((FOLDER / "avatars_splits.json").read_text(encoding="utf-8"))["reference"][:count]
    with np.load(FOLDER / "avatars.npz", allow_pickle=False) as data:
        pictures = torch.from_numpy(data["image"][rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = zoo.pipe.vae.encode(pictures).latent_dist.mean * zoo.pipe.vae.config.scaling_factor
    return latents.mean((0, 2, 3)).numpy(), latents.std((0, 2, 3)).numpy()


def divergence(latents: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Share of places of each of `(n, channels, height, width)` with a channel beyond the limit."""
    standard = np.abs(latents - mean[:, None, None]) / deviation[:, None, None]
    return (standard.max(1) > LIMIT).mean((1, 2))


@BENCHMARK.part(
    *(f"divergence_{ours}_at_{steps}_over_{theirs}" for steps in STEPS for ours, theirs in PAIRS), minutes=6
)
def divergence_at_strong_guidance(recorder: Recorder) -> None:
    """Share of latents beyond the range of real pictures, of the same seeds and captions."""
    zoo = ZooModel(MODEL)
    mean, deviation = reference_range(zoo)
    conditions, rows = zoo.conditions(PICTURES), []
    zoo.pipe.scheduler = type(zoo.pipe.scheduler).from_config(zoo.pipe.scheduler.config, timestep_spacing="trailing")
    for steps in STEPS:
        shares = {}
        for name, variant in {**SAMPLERS, **WITHOUT}.items():
            with variant.on(zoo.pipe) as pipe:
                latents = zoo.generate(pipe, conditions, range(PICTURES), steps, GUIDANCE, output_type="latent")
            shares[name] = divergence(latents, mean, deviation)
            largest = float(np.median(np.abs(latents - mean[:, None, None]).max((1, 2, 3))))
            rows.append([variant.title, steps, float(shares[name].mean()), float((shares[name] > 0).mean()), largest])
        for ours, theirs in PAIRS:
            titles = [{**SAMPLERS, **WITHOUT}[name].title for name in (ours, theirs)]
            recorder.paired(
                f"divergence_{ours}_at_{steps}_over_{theirs}",
                f"share of latents beyond {LIMIT:g} deviations, {titles[0]} less {titles[1]}, {steps} steps, guidance "
                f"{GUIDANCE:g}",
                Samples("difference", {"ours": shares[ours].tolist(), "theirs": shares[theirs].tolist()}, 0.01, each=False),
                "",
                ("<=", 0.0),
            )  # fmt: skip
    recorder.table(
        "divergence",
        ["sampler", "steps", "share of latents beyond the limit", "pictures with any", "largest off the mean, median"],
        rows,
    )


if __name__ == "__main__":
    BENCHMARK.main()
