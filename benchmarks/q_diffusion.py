"""What Q-Diffusion is worth: against plain ranges and optimum-quanto, and what each of its parts adds.

    diffusers-ext bench q_diffusion       # records diffusers_ext/results/q_diffusion.json

Settings were fixed before measuring: 200 iterations of rounding and 100 of scales a block, where the paper takes 20,000 and
5,000. W8A8 is 8-bit weights and activations, W4A8 4-bit weights, W4A16 4-bit weights and activations in float. The parts are
added one after the other at W4A8 on the smallest model: the search of ranges, the split of concatenated inputs, learnt
rounding, learnt scales. 64 pictures.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import QuantizedQuality
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (50, None, 30), "fashion-dit": (25, 3.0, 25), "avatars-sd": (20, 3.0, 55)}
LEARNING = {"rounding_iterations": 200, "scale_iterations": 100}


def q_diffusion(weight_bits: int, act_bits: int | None, **settings: Any) -> PTQConfig:
    return PTQConfig(
        method="q_diffusion",
        weight_bits=weight_bits,
        act_bits=act_bits,
        calibration_steps=5,
        **{**LEARNING, **settings},
    )


def minmax(weight_bits: int, act_bits: int | None) -> PTQConfig:
    return PTQConfig(method="minmax", weight_bits=weight_bits, act_bits=act_bits, calibration_steps=5)


BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A16": (4, None)}
VARIANTS = {
    **{label: q_diffusion(*bits) for label, bits in BITS.items()},
    **{f"{label}_minmax": minmax(*bits) for label, bits in BITS.items()},
    "W8A8_quanto": PTQConfig(method="minmax", backend="quanto"),
    "W8A16_quanto": PTQConfig(method="minmax", backend="quanto", act_bits=None),
}
COMPARISONS = {
    "over_minmax_W8A8": ("W8A8", "W8A8_minmax", 0.0),
    "over_minmax_W4A8": ("W4A8", "W4A8_minmax", 6.0),
    "over_minmax_W4A16": ("W4A16", "W4A16_minmax", 0.0),
    "over_quanto_W8A8": ("W8A8", "W8A8_quanto", 0.0),
}
# Each adds one part to the one before; the last is the whole method.
PARTS = {
    "search": q_diffusion(4, 8, split=False, rounding="nearest", scale_iterations=0),
    "split": q_diffusion(4, 8, rounding="nearest", scale_iterations=0),
    "rounding": q_diffusion(4, 8, scale_iterations=0),
}
PART_COMPARISONS = {
    "part_search": ("search", "W4A8_minmax", 0.0),
    "part_split": ("split", "search", 0.0),
    "part_rounding": ("rounding", "split", 0.0),
    "part_scales": ("W4A8", "rounding", 0.0),
}
SMALLEST = "fashion-ddpm"
BENCHMARK = Benchmark("q_diffusion", peers=["optimum-quanto"])
for _model, (_steps, _guidance, _minutes) in MODELS.items():
    BENCHMARK.add(
        QuantizedQuality(
            _model,
            _steps,
            {**VARIANTS, **(PARTS if _model == SMALLEST else {})},
            {**COMPARISONS, **(PART_COMPARISONS if _model == SMALLEST else {})},
            minutes=_minutes,
            guidance_scale=_guidance,
            accuracy=[] if _guidance is None else ["W8A8", "W4A8"],
            costs=["W4A8"],
        )
    )


if __name__ == "__main__":
    BENCHMARK.main()
