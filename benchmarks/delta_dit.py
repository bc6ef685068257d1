"""What Δ-DiT is worth: against fewer steps, the other order of its stages, and one range of blocks alone.

    diffusers-ext bench delta_dit            # records diffusers_ext/results/delta_dit.json
    diffusers-ext bench delta_dit --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: those of the paper (20 steps, every second full, three quarters of the blocks,
boundary at 12 of 20), the stages the other way round, and our continuation of the deltas. All of them, and one range
alone, leave the same number of blocks out. The runs of other people's caches are shared with the benchmarks of the other
caches: where they are not on disk yet, making them takes about 8 minutes a model more.
"""

from __future__ import annotations

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._frontier import Frontier
from benchmarks._quality import QualityCost, Variant

STEPS, BOUNDARY = 20, 0.6
MODELS = {"flow": ("avatars-flow", 3.0), "dit": ("fashion-dit", 4.0)}
VARIANTS = {
    "paper": Variant("rear early", [dx.DeltaDiTConfig(boundary=BOUNDARY)]),
    "reversed": Variant("front early", [dx.DeltaDiTConfig(boundary=BOUNDARY, early="front")]),
    "line": Variant("rear early, continued", [dx.DeltaDiTConfig(boundary=BOUNDARY, continuation=1)]),
}
BASELINES = {
    "fewer_steps": Variant(),
    "front_only": Variant("Δ-Cache of the front only", [dx.DeltaDiTConfig(boundary=0.0)], steps=STEPS),
    "rear_only": Variant("Δ-Cache of the rear only", [dx.DeltaDiTConfig(boundary=1.0)], steps=STEPS),
}
BENCHMARK = Benchmark("delta_dit", settings={"steps": STEPS, "boundary": BOUNDARY}, peers=["cache-dit"])
for _name, (_model, _guidance_scale) in MODELS.items():
    BENCHMARK.add(
        QualityCost(
            _model,
            steps=STEPS,
            guidance_scale=_guidance_scale,
            variants=VARIANTS,
            baselines=BASELINES,
            minutes=5,
            name=_name,
        )
    )
    BENCHMARK.add(Frontier(_model, STEPS, VARIANTS, guidance_scale=_guidance_scale, minutes=2))


if __name__ == "__main__":
    BENCHMARK.main()
