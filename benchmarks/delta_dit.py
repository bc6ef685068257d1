"""What Δ-DiT is worth: against fewer steps, one range of blocks alone, and the caches of other people.

    diffusers-ext bench delta_dit            # records diffusers_ext/results/delta_dit.json
    diffusers-ext bench delta_dit --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: those of the paper (20 steps, every second full, three quarters of the blocks,
boundary at 12 of 20), and two that leave all blocks out and continue their deltas, which is ours: one with more full steps and
one with fewer, chosen for each model on pictures of other captions, classes and seeds. One range alone leaves as many blocks out as the paper's.
The runs of other people's caches are shared with the benchmarks of the other caches: where they are not on disk yet,
making them takes about 8 minutes a model more.
"""

from __future__ import annotations

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._frontier import Frontier
from benchmarks._quality import QualityCost, Variant

STEPS, BOUNDARY, BLOCKS = 20, 0.6, 8
PAPER = Variant("paper", [dx.DeltaDiTConfig(boundary=BOUNDARY)])
# Model, guidance scale, and of the two continued settings: order, warm-up, interval.
MODELS = {
    "flow": ("avatars-flow", 3.0, {"more": (2, 5, 2), "less": (1, 3, 3)}),
    "dit": ("fashion-dit", 4.0, {"more": (1, 0, 2), "less": (1, 0, 3)}),
}
RANGES = {
    "front_only": Variant("Δ-Cache of the front only", [dx.DeltaDiTConfig(boundary=0.0)], steps=STEPS),
    "rear_only": Variant("Δ-Cache of the rear only", [dx.DeltaDiTConfig(boundary=1.0)], steps=STEPS),
}


def continued(order: int, warmup: int, interval: int) -> Variant:
    """All blocks left out, their deltas continued."""
    config = dx.DeltaDiTConfig(BLOCKS, interval=interval, continuation=order, warmup=warmup)
    return Variant(f"all blocks, order {order}, warm-up {warmup}, N = {interval}", [config])


BENCHMARK = Benchmark("delta_dit", settings={"steps": STEPS, "boundary": BOUNDARY}, peers=["cache-dit"])
for _name, (_model, _guidance_scale, _continued) in MODELS.items():
    _ours = {label: continued(*setting) for label, setting in _continued.items()}
    BENCHMARK.add(
        QualityCost(
            _model,
            steps=STEPS,
            guidance_scale=_guidance_scale,
            variants={"paper": PAPER},
            baselines={"fewer_steps": Variant(), **RANGES},
            minutes=3,
            name=_name,
        )
    )
    BENCHMARK.add(
        QualityCost(
            _model,
            steps=STEPS,
            guidance_scale=_guidance_scale,
            variants=_ours,
            baselines={"fewer_steps": Variant()},
            minutes=3,
            name=f"{_name}_continued",
        )
    )
    BENCHMARK.add(Frontier(_model, STEPS, {"paper": PAPER, **_ours}, guidance_scale=_guidance_scale, minutes=2))


if __name__ == "__main__":
    BENCHMARK.main()
