"""What Q-Diffusion is worth: against plain ranges, optimum-quanto and torchao, and what each of its parts adds.

    diffusers-ext bench q_diffusion       # records diffusers_ext/results/q_diffusion.json

Settings were fixed before measuring: 200 iterations of rounding and 100 of scales a block, where the paper takes 20,000 and
5,000. W8A8 is 8-bit weights and activations, W4A8 4-bit weights, W4A16 4-bit weights and activations in float. The parts are
added one after the other at W4A8 on the smallest model: the search of ranges, the split of concatenated inputs, learnt
rounding, learnt scales. 64 pictures, and 128 for the Fréchet distances: what W8A8 changes, over what other seeds change.

torchao quantizes linear layers alone, with scales of activations that it finds as the model runs. Where there are convolutions
its pictures are those of a model that is mostly in float, so that the comparison with it has no goal.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import add_models
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (25, None, 13), "fashion-dit": (25, 3.0, 9), "avatars-sd": (20, 3.0, 18)}
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
    "W8A8_torchao": PTQConfig(method="minmax", backend="torchao"),
}
COMPARISONS = {
    "over_minmax_W8A8": ("W8A8", "W8A8_minmax", 0.0),
    "over_minmax_W4A8": ("W4A8", "W4A8_minmax", 6.0),
    "over_minmax_W4A16": ("W4A16", "W4A16_minmax", 0.0),
    "over_quanto_W8A8": ("W8A8", "W8A8_quanto", 0.0),
    "over_torchao_W8A8": ("W8A8", "W8A8_torchao", None),
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
BENCHMARK = Benchmark("q_diffusion", peers=["optimum-quanto", "torchao"])
add_models(
    BENCHMARK, MODELS, VARIANTS, COMPARISONS, parts=PARTS, part_comparisons=PART_COMPARISONS,
    accuracy=["W8A8", "W4A8"], costs=["W4A8"], frechet=["W8A8"],
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
