"""What QuEST is worth: against Q-Diffusion, and what each of its parts adds.

    diffusers-ext bench quest       # records diffusers_ext/results/quest.json

Settings were fixed before measuring: 200 iterations of rounding a block; ten epochs of each stage over 16 samples at five
steps, at 1e-4 for weights and 1e-3 for the logarithms of scales, where the paper takes 300 and 20 epochs over 8 and 64 samples a
step at 1e-5. W4A8 is 4-bit weights with 8-bit activations, W4A4 both with 4 bits. The parts are added one after the other
at W4A4 on the smallest model: Q-Diffusion without learnt scales, scales for each step and channel, the first stage, the
second. 64 pictures.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import add_models
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (25, None, 16), "fashion-dit": (25, 3.0, 13)}


def config(method: str, act_bits: int, **settings: Any) -> PTQConfig:
    tuning = {"time_epochs": 10, "layer_epochs": 10}
    learning = {"scale_iterations": 100} if method == "q_diffusion" else tuning
    return PTQConfig(
        method=method,
        weight_bits=4,
        act_bits=act_bits,
        calibration_steps=5,
        rounding_iterations=200,
        **{**learning, **settings},
    )


VARIANTS = {
    "W4A4": config("quest", 4),
    "W4A4_q_diffusion": config("q_diffusion", 4),
    "W4A8": config("quest", 8),
    "W4A8_q_diffusion": config("q_diffusion", 8),
}
COMPARISONS = {
    "over_q_diffusion_W4A4": ("W4A4", "W4A4_q_diffusion", 0.0),
    "over_q_diffusion_W4A8": ("W4A8", "W4A8_q_diffusion", 0.0),
}
# Each adds one part to the one before; the last is the whole method.
PARTS = {
    "plain": config("quest", 4, step_scales=False, channel_scales=False, stages=[]),
    "scales": config("quest", 4, stages=[]),
    "stage_1": config("quest", 4, stages=["time_embedding"]),
}
PART_COMPARISONS = {
    "part_scales": ("scales", "plain", 0.0),
    "part_stage_1": ("stage_1", "scales", 0.0),
    "part_stage_2": ("W4A4", "stage_1", 0.0),
}
BENCHMARK = Benchmark("quest")
add_models(
    BENCHMARK, MODELS, VARIANTS, COMPARISONS, parts=PARTS, part_comparisons=PART_COMPARISONS,
    accuracy=["W4A8", "W4A4"], costs=["W4A4"],
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
