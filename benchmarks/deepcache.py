"""What DeepCache is worth: against fewer steps, against the authors' package, and under `torch.compile`.

    diffusers-ext bench deepcache            # records diffusers_ext/results/deepcache.json
    diffusers-ext bench deepcache --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: intervals 2, 3, 5 and 10 at branch 0, the paper's default. The package comparison
runs the same modules on a cached step, in one process, alternating.
"""

from __future__ import annotations

import copy
import functools
import statistics
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import QualityCost, Variant
from benchmarks._record import Recorder
from benchmarks._speed import claim_survives_compile, denoiser_run, overhead
from benchmarks._zoo import ZooModel
from diffusers_ext.hooks.deepcache import cached_modules
from diffusers_ext.metrics import bootstrap_interval, time_ratio

MODEL, BRANCH, INTERVALS = "avatars-sd", 0, (2, 3, 5, 10)
TIMING: dict[str, Any] = {"steps": 20, "batch": 16, "rounds": 11, "threads": 1, "intervals": [2, 3, 5]}
SD_LIKE: dict[str, Any] = {
    "block_out_channels": [64, 128, 256, 256], "layers_per_block": 2, "cross_attention_dim": 128, "sample_size": 32,
    "batch": 2, "steps": 20, "rounds": 9, "threads": 2, "interval": 3,
}  # fmt: skip
BENCHMARK = Benchmark(
    "deepcache",
    settings={"branch": BRANCH, "intervals": list(INTERVALS), "timing": TIMING, "sd_like": SD_LIKE},
    peers=["DeepCache"],
)
for _name, _steps, _minutes in (("", 50, 4), ("sd20", 20, 2)):
    BENCHMARK.add(
        QualityCost(
            MODEL,
            steps=_steps,
            guidance_scale=3.0,
            variants={
                f"N{n}": Variant(f"interval {n}", [dx.DeepCacheConfig(interval=n, branch=BRANCH)]) for n in INTERVALS
            },
            minutes=_minutes,
            name=_name,
        )
    )


@functools.cache
def avatars_unet() -> UNet2DConditionModel:
    return ZooModel(MODEL).pipe.unet


@functools.cache
def sd_like() -> UNet2DConditionModel:
    """A U-Net in the layout of Stable Diffusion 1.5, smaller, with random weights: for time only."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SD_LIKE["sample_size"], block_out_channels=tuple(SD_LIKE["block_out_channels"]),
        attention_head_dim=8, layers_per_block=SD_LIKE["layers_per_block"],
        cross_attention_dim=SD_LIKE["cross_attention_dim"],
    ).eval()  # fmt: skip


@BENCHMARK.part(
    *(f"{claim}_N{n}" for n in TIMING["intervals"] for claim in ("time_over_package", "not_slower_than_package")),
    minutes=4,
)
def against_package(recorder: Recorder) -> None:
    """Time of a run here over time of the same run in the authors' package, the same modules on a cached step."""
    from types import SimpleNamespace

    from DeepCache import DeepCacheSDHelper

    unet = avatars_unet()
    torch.set_num_threads(TIMING["threads"])
    rows = []
    for interval in TIMING["intervals"]:
        ours, theirs = copy.deepcopy(unet), copy.deepcopy(unet)
        dx.enable(ours, dx.DeepCacheConfig(interval=interval, branch=BRANCH))
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(TIMING["steps"])
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=theirs, scheduler=scheduler))
        helper.set_params(cache_interval=interval, cache_branch_id=BRANCH)
        helper.enable()
        runs = {
            "package": denoiser_run(theirs, TIMING["steps"], TIMING["batch"]),
            "ours": denoiser_run(ours, TIMING["steps"], TIMING["batch"]),
            "plain": denoiser_run(unet, TIMING["steps"], TIMING["batch"]),
        }
        result = time_ratio(runs, baseline="package", repeats=TIMING["rounds"])
        ratio = result["ours"]
        recorder.claim(
            f"time_over_package_N{interval}",
            f"time of a run over that of the DeepCache 0.1.1 package, interval {interval}",
            ratio.median,
            "x",
            ratio.interval,
        )
        recorder.claim(
            f"not_slower_than_package_N{interval}",
            f"lower end of the interval of that ratio, interval {interval}",
            ratio.interval[0],
            "x",
            goal=("<=", 1.0),
        )
        noise, plain = result.noise, result["plain"].median
        rows.append([interval, result.seconds["plain"], result.seconds["package"], result.seconds["ours"],
                     result.seconds["plain"] / result.seconds["ours"], result["ours"].median, *result["ours"].interval,
                     noise.median, *noise.interval, plain])  # fmt: skip
    recorder.table(
        "time against the package",
        ["interval", "plain (s)", "package (s)", "ours (s)", "speed-up", "ours / package", "low", "high",
         "package / package", "low ", "high ", "plain / package"],
        rows,
    )  # fmt: skip
    names = cached_modules(unet, BRANCH)
    recorder.table("modules that run on a cached step", ["module"], [[name] for name in names])


@BENCHMARK.part(*(f"cached_step_over_listed_modules_{label}" for label in (MODEL, "sd-like")), minutes=1)
def overheads(recorder: Recorder) -> None:
    """Of a cached step, on the zoo's model and on one in a common layout."""
    config, rounds = dx.DeepCacheConfig(interval=10**6, branch=BRANCH), 4 * TIMING["rounds"]
    for label, unet, batch in ((MODEL, avatars_unet(), TIMING["batch"]), ("sd-like", sd_like(), SD_LIKE["batch"])):
        ratios = overhead(unet, config, cached_modules(unet, BRANCH), batch, rounds, label)
        recorder.claim(
            f"cached_step_over_listed_modules_{label}",
            f"time of a cached step over the time of its modules in an unhooked forward, {label}, branch {BRANCH}",
            statistics.median(ratios), "x", bootstrap_interval(ratios), ("<=", 1.10),
        )  # fmt: skip


@BENCHMARK.part("full_plan_time", "full_plan_not_slower", minutes=1)
def full_plan(recorder: Recorder) -> None:
    """Time of a run with all hooks on and a plan that computes everything, over that of the same run without hooks."""
    unet = avatars_unet()
    torch.set_num_threads(TIMING["threads"])
    hooked = dx.enable(copy.deepcopy(unet), dx.DeepCacheConfig(interval=1, branch=BRANCH))
    runs = {name: denoiser_run(model, TIMING["steps"], 8) for name, model in (("plain", unet), ("hooked", hooked))}
    result = time_ratio(runs, baseline="plain", repeats=2 * TIMING["rounds"])
    ratio, spread = result["hooked"], result.noise.interval
    recorder.claim(
        "full_plan_time", "time of a run with a plan that computes everything over that of no hook, batch 8",
        ratio.median, "x", ratio.interval,
    )  # fmt: skip
    recorder.claim(
        "full_plan_not_slower",
        "lower end of the interval of that ratio less the upper end of that of no hook against itself",
        ratio.interval[0] - spread[1], "x", goal=("<=", 0.0),
    )  # fmt: skip
    recorder.table(
        "a plan that computes everything",
        ["no hook (s)", "hooked (s)", "ratio", "low", "high", "no hook again, low", "high "],
        [[result.seconds["plain"], result.seconds["hooked"], ratio.median, *ratio.interval, *spread]],
    )


@BENCHMARK.part("compiled_speedup", "compiled_graphs_growth", minutes=3)
def compiled(recorder: Recorder) -> None:
    torch.set_num_threads(SD_LIKE["threads"])
    config = dx.DeepCacheConfig(interval=SD_LIKE["interval"], branch=BRANCH)
    claim_survives_compile(recorder, sd_like(), config, SD_LIKE["steps"], SD_LIKE["batch"], SD_LIKE["rounds"])


if __name__ == "__main__":
    BENCHMARK.main()
