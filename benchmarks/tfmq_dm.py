"""What TFMQ-DM is worth: against plain ranges and Q-Diffusion, and what each way of treating temporal features adds.

    diffusers-ext bench tfmq_dm       # records diffusers_ext/results/tfmq_dm.json

Settings were fixed before measuring: 200 iterations of rounding a block and 100 of Q-Diffusion's scales, where the papers take
20,000 and 5,000. W4A8 is 4-bit weights with 8-bit activations. The first and the last layer have 8 bits in all variants. On
the smallest model also W4A6, and each way by itself at W4A8: time layers as all others, reconstructed with grids for each
timestep, as tables. 64 pictures.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import add_models
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (25, None, 14), "avatars-sd": (20, 3.0, 10)}


def config(method: str, weight_bits: int = 4, act_bits: int = 8, **settings: Any) -> PTQConfig:
    learning = {} if method == "minmax" else {"rounding_iterations": 200}
    if method == "q_diffusion":
        learning["scale_iterations"] = 100
    return PTQConfig(
        method=method,
        weight_bits=weight_bits,
        act_bits=act_bits,
        end_bits=8,
        calibration_steps=5,
        **{**learning, **settings},
    )


VARIANTS = {
    "W4A8": config("tfmq_dm"),
    "W4A8_q_diffusion": config("q_diffusion"),
    "W4A8_minmax": config("minmax"),
}
COMPARISONS = {
    "over_minmax_W4A8": ("W4A8", "W4A8_minmax", 6.0),
    "over_q_diffusion_W4A8": ("W4A8", "W4A8_q_diffusion", 0.0),
}
PARTS = {
    "usual": config("tfmq_dm", temporal="none"),
    "reconstruct": config("tfmq_dm", temporal="reconstruct"),
    "cache": config("tfmq_dm", temporal="cache"),
    "W4A6": config("tfmq_dm", act_bits=6),
    "W4A6_q_diffusion": config("q_diffusion", act_bits=6),
}
PART_COMPARISONS = {
    "part_reconstruct": ("reconstruct", "usual", 0.0),
    "part_cache": ("cache", "usual", 0.0),
    "part_selection": ("W4A8", "reconstruct", 0.0),
    "over_q_diffusion_W4A6": ("W4A6", "W4A6_q_diffusion", 0.0),
}
BENCHMARK = Benchmark("tfmq_dm")
add_models(
    BENCHMARK, MODELS, VARIANTS, COMPARISONS, parts=PARTS, part_comparisons=PART_COMPARISONS,
    accuracy=["W4A8"], costs=["W4A8"],
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
