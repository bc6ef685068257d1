"""What ProfilingDiT is worth: blocks of the background left out, against other blocks, all blocks, and fewer steps.

    diffusers-ext bench profiling_dit            # records diffusers_ext/results/profiling_dit.json
    diffusers-ext bench profiling_dit --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: 50 steps, the first six and then every sixth full (the authors' defaults), and of 8
blocks the four with the lowest ratios left out. The others leave out as many block calls: the four with the highest
ratios, four at random, and all eight on fewer steps. The lists were made by `profile` on pictures of other seeds, and
the benchmark makes them again. On Fashion-MNIST the foreground is known: what is not black in the picture without a
cache. On the avatars it is the default of `profile_blocks`.

Caches of other people are met at 20 steps, with four and with six of the 8 blocks left out. Their runs are shared with the
benchmarks of the other caches: where they are not on disk yet, making them takes about 8 minutes a model more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._frontier import Frontier
from benchmarks._quality import QualityCost, Variant
from benchmarks._record import Recorder
from benchmarks._zoo import ZooModel
from diffusers_ext.hooks.block_profile import BlockProfile

STEPS, WARMUP, INTERVAL = 50, 6, (6, 6)
FRONTIER_STEPS, LEFT_OUT = 20, (4, 6)
ALL = {"warmup": 14, "interval": (2, 2)}  # 32 full steps of 50, so that as many block calls are left out
PROFILED: dict[str, Any] = {"pictures": 8, "steps": 10, "first_seed": 1000, "black": 0.1}
STUDIES = {"flow": ("avatars-flow", 3.0), "dit": ("fashion-dit", 4.0)}
# Blocks from the lowest ratio to the highest, as `profile` gave them.
ORDER = {"flow": (5, 1, 0, 2, 3, 4, 6, 7), "dit": (4, 1, 2, 0, 3, 5, 6, 7)}
RANDOM = {"flow": (0, 3, 6, 7), "dit": (3, 4, 5, 7)}  # `random.Random(0).sample(range(8), 4)`, in turn


def profile(study: str) -> BlockProfile:
    """Of pictures that are not compared."""
    model, guidance_scale = STUDIES[study]
    zoo, count = ZooModel(model), PROFILED["pictures"]
    seeds = range(PROFILED["first_seed"], PROFILED["first_seed"] + count)
    conditions = zoo.conditions(64 + count)[64:]
    mask_fn = None
    if model == "fashion-dit":
        pictures = zoo.generate(zoo.pipe, conditions, seeds, PROFILED["steps"], guidance_scale)
        shown = torch.from_numpy(pictures.max(-1) > PROFILED["black"])

        def mask_fn(prediction: torch.Tensor) -> torch.Tensor:
            """The picture's foreground at the size of the latents, for both halves of a guided batch."""
            mask = (
                torch.nn.functional.interpolate(shown[:, None].float(), prediction.shape[-2:], mode="area")[:, 0] >= 0.5
            )
            return mask.repeat(len(prediction) // len(mask), 1, 1)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call: dict[str, Any] = {
        "num_inference_steps": PROFILED["steps"], "generator": generators,
        "output_type": "np" if model == "fashion-dit" else "latent",
    }  # fmt: skip
    if model == "fashion-dit":
        call |= {"class_labels": conditions, "guidance_scale": guidance_scale}
    else:
        call |= {
            "prompt": conditions, "negative_prompt": [""] * count, "true_cfg_scale": guidance_scale,
            "height": 32, "width": 32, "max_sequence_length": 32,
        }  # fmt: skip
    return dx.profile_blocks(zoo.pipe, [call], mask_fn)


def _config(
    blocks: tuple[int, ...], warmup: int = WARMUP, interval: tuple[int, int] = INTERVAL
) -> dx.ProfilingDiTConfig:
    return dx.ProfilingDiTConfig(tuple(sorted(blocks)), warmup, interval)


BENCHMARK = Benchmark(
    "profiling_dit",
    settings={"steps": STEPS, "profiled": PROFILED, "order": ORDER, "random": RANDOM, "all": ALL},
    peers=["cache-dit"],
)
for _name, (_model, _guidance_scale) in STUDIES.items():
    BENCHMARK.add(
        QualityCost(
            _model,
            steps=STEPS,
            guidance_scale=_guidance_scale,
            variants={"background": Variant("background blocks", [_config(ORDER[_name][:4])])},
            baselines={
                "fewer_steps": Variant(),
                "foreground": Variant("foreground blocks", [_config(ORDER[_name][4:])], steps=STEPS),
                "random": Variant("random blocks", [_config(RANDOM[_name])], steps=STEPS),
                "all": Variant("all blocks, on fewer steps", [_config(tuple(range(8)), **ALL)], steps=STEPS),
            },
            minutes=6,
            name=_name,
        )
    )
    _left_out = {
        f"blocks{count}": Variant(f"{count} background blocks", [_config(ORDER[_name][:count])]) for count in LEFT_OUT
    }
    BENCHMARK.add(Frontier(_model, FRONTIER_STEPS, _left_out, guidance_scale=_guidance_scale, minutes=2))


@BENCHMARK.part(*(f"profile_agrees_{name}" for name in STUDIES), minutes=2)
def profiles(recorder: Recorder) -> None:
    """The profiles again: how many of the four background blocks are those of the settings."""
    rows = []
    for name, (model, _) in STUDIES.items():
        ratios = profile(name).ratios
        order = tuple(int(i) for i in np.argsort(ratios, kind="stable"))
        shared = len(set(order[:4]) & set(ORDER[name][:4]))
        recorder.claim(
            f"profile_agrees_{name}", f"background blocks of {model} that are those of the settings", shared, "of 4",
            goal=(">=", 4),
        )  # fmt: skip
        rows.append([model, *ratios])
    recorder.table(
        "share of the foreground that each block attends to", ["model", *(f"block {i}" for i in range(8))], rows
    )


if __name__ == "__main__":
    BENCHMARK.main()
