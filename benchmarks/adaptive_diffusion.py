"""What skipping predictions by the latents is worth: against fewer steps, on a U-Net and on two transformers.

    diffusers-ext bench adaptive_diffusion            # records diffusers_ext/results/adaptive_diffusion.json
    diffusers-ext bench adaptive_diffusion --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: the authors' threshold, a third of it and three times it, with the paper's cap. The rule
decides for a whole batch; the cost is that of pictures made alone, over several of them. 64 pictures on the U-Net, 32 on the
transformers, which take longer.

Caches of other people are met at 20 steps, where the cost is that of the batch. Their runs are shared with the benchmarks of
the other caches: where they are not on disk yet, making them takes about 8 minutes a model more.
"""

from __future__ import annotations

from dataclasses import dataclass

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._frontier import Frontier
from benchmarks._quality import QualityCost, Variant

THRESHOLDS, COST_PICTURES, FRONTIER_STEPS = (0.003, 0.01, 0.03), 4, 20


@dataclass(frozen=True)
class Study:
    model: str
    steps: int
    guidance_scale: float
    minutes: float
    pictures: int = 64
    frontier: bool = False


STUDIES = {
    "sd20": Study("avatars-sd", 20, 3.0, 4),
    "sd50": Study("avatars-sd", 50, 3.0, 7),
    "flow": Study("avatars-flow", 28, 3.0, 4, pictures=32, frontier=True),
    "dit": Study("fashion-dit", 50, 4.0, 4, pictures=32, frontier=True),
}
VARIANTS = {
    f"t{threshold:g}": Variant(f"threshold {threshold:g}", [dx.AdaptiveDiffusionConfig(threshold)])
    for threshold in THRESHOLDS
}
BENCHMARK = Benchmark("adaptive_diffusion", settings={"thresholds": list(THRESHOLDS)}, peers=["cache-dit"])
for _name, _study in STUDIES.items():
    BENCHMARK.add(
        QualityCost(
            _study.model,
            steps=_study.steps,
            guidance_scale=_study.guidance_scale,
            variants=VARIANTS,
            pictures=_study.pictures,
            cost_pictures=COST_PICTURES,
            measures=("psnr",),
            minutes=_study.minutes,
            name=_name,
        )
    )
    if _study.frontier:
        BENCHMARK.add(Frontier(_study.model, FRONTIER_STEPS, VARIANTS, guidance_scale=_study.guidance_scale, minutes=2))


if __name__ == "__main__":
    BENCHMARK.main()
