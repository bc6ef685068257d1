"""What encoder propagation is worth: against fewer steps, the paper's key steps against uniform ones, and in time.

    diffusers-ext bench faster_diffusion            # records diffusers_ext/results/faster_diffusion.json
    diffusers-ext bench faster_diffusion --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: the paper's key steps, and every m-th step with about as many of them. Noise is not
injected, which moves pictures away from the full run on purpose.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import QualityCost, Variant
from benchmarks._record import Recorder
from benchmarks._speed import denoiser_run
from benchmarks._zoo import ZooModel
from diffusers_ext.hooks._plan import find_run
from diffusers_ext.hooks.faster_diffusion import paper_key_steps
from diffusers_ext.metrics import time_ratio

MODEL, STEPS = "avatars-sd", {20: 4, 50: 6}  # with the minutes of each
TIMING: dict[str, Any] = {"steps": 20, "batch": 2, "rounds": 9, "threads": 2}
FEATURES: dict[str, Any] = {"steps": 50, "batch": 8}


def every(steps: int) -> int:
    """Every m-th step is key, which makes about as many as the paper's."""
    return math.ceil(steps / len(paper_key_steps(steps)))


BENCHMARK = Benchmark("faster_diffusion", settings={"timing": TIMING, "features": FEATURES})
for _steps, _minutes in STEPS.items():
    BENCHMARK.add(
        QualityCost(
            MODEL,
            steps=_steps,
            guidance_scale=3.0,
            variants={
                "paper": Variant("key steps of the paper", [dx.FasterDiffusionConfig()]),
                "uniform": Variant(f"every {every(_steps)}th step", [dx.FasterDiffusionConfig(every(_steps))]),
            },
            minutes=_minutes,
            name=f"sd{_steps}",
        )
    )


@functools.cache
def unet() -> UNet2DConditionModel:
    return ZooModel(MODEL).pipe.unet


@BENCHMARK.part("time_sequential", "time_parallel", minutes=3)
def times(recorder: Recorder) -> None:
    """Time of a run of the denoiser over that of the plain one, for a batch that does not fill the machine."""
    torch.set_num_threads(TIMING["threads"])
    steps = TIMING["steps"]
    runs = {"plain": denoiser_run(unet(), steps, TIMING["batch"])}
    for name, parallel in (("sequential", False), ("parallel", True)):
        model = copy.deepcopy(unet())
        config = dx.FasterDiffusionConfig(paper_key_steps(steps), parallel)
        config.apply(model)
        runs[name] = functools.partial(_run, model, config.key, denoiser_run(model, steps, TIMING["batch"]), steps)
    result = time_ratio(runs, baseline="plain", repeats=TIMING["rounds"])
    for name in ("sequential", "parallel"):
        recorder.claim(
            f"time_{name}",
            f"time of a run of {steps} steps over that of the plain one, {name} form, batch {TIMING['batch']}",
            result[name].median, "x", result[name].interval, ("<=", 1.0),
        )  # fmt: skip
    recorder.table("time", ["form", "seconds a run"], [[name, seconds] for name, seconds in result.seconds.items()])


def _run(model: UNet2DConditionModel, key: str, run: Any, steps: int) -> None:
    """A run that is announced as a pipeline does it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    clock = find_run(model, key)
    assert clock is not None
    clock.begin(steps, scheduler)
    run()
    clock.end()


@BENCHMARK.part("encoder_change_over_decoder_change", minutes=1)
def features(recorder: Recorder) -> None:
    """The observation that the paper starts from: features of the encoder change less from step to step."""
    zoo = ZooModel(MODEL)
    blocks = {f"{kind} {i}": block for kind in ("down", "up") for i, block in enumerate(getattr(zoo.pipe.unet, f"{kind}_blocks"))}  # fmt: skip
    last: dict[str, torch.Tensor] = {}
    changes: dict[str, list[float]] = {name: [] for name in blocks}

    def watch(name: str, output: Any) -> None:
        now = output[0] if isinstance(output, tuple) else output
        if name in last:
            changes[name].append(float((now - last[name]).norm() / last[name].norm()))
        last[name] = now

    handles = [
        block.register_forward_hook(lambda _m, _a, output, name=name: watch(name, output)) for name, block in blocks.items()
    ]  # fmt: skip
    count = FEATURES["batch"]
    zoo.generate(zoo.pipe, zoo.conditions(count), range(count), FEATURES["steps"], 3.0)
    for handle in handles:
        handle.remove()
    means = {name: sum(values) / len(values) for name, values in changes.items()}
    recorder.table(
        "relative change of a block's output from step to step", ["block", "mean"], [*map(list, means.items())]
    )
    kinds = {kind: [value for name, value in means.items() if name.startswith(kind)] for kind in ("down", "up")}
    ratio = (sum(kinds["down"]) / len(kinds["down"])) / (sum(kinds["up"]) / len(kinds["up"]))
    recorder.claim(
        "encoder_change_over_decoder_change",
        f"relative change of the encoder's blocks over that of the decoder's, means of {FEATURES['steps']} steps",
        ratio, "x", goal=("<=", 1.0),
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
