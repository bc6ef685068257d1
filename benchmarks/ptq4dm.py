"""What PTQ4DM is worth: against plain ranges and optimum-quanto, by its calibration set, and in time.

    diffusers-ext bench ptq4dm            # records diffusers_ext/results/ptq4dm.json

Settings were fixed before measuring. W8A8 is 8-bit weights and activations, W4A8 4-bit weights, W4A16 4-bit weights and
activations in float. Calibration sets are compared at W8A6, where activations matter most, on the smallest model and on as
many inputs each: one step of each sample, by the paper's normal distribution, at the first or at the last step. 64 pictures.

The time of integer products hangs on the processor: without AVX512-VNNI or AMX torch has no fast ones.
"""

from __future__ import annotations

from benchmarks._bench import Benchmark
from benchmarks._quantized import add_models, claim_integer_time
from benchmarks._record import Recorder
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (25, None, 9), "fashion-dit": (25, 3.0, 7), "avatars-sd": (20, 3.0, 10)}
SAMPLES = 32  # one input each: more than where a sample gives five
TIMING = {"channels": [320, 640], "batch": 1, "rounds": 3, "threads": 2}


def ptq4dm(weight_bits: int, act_bits: int | None, **settings) -> PTQConfig:
    return PTQConfig(method="ptq4dm", weight_bits=weight_bits, act_bits=act_bits, **settings)


def minmax(weight_bits: int, act_bits: int | None) -> PTQConfig:
    """Plain ranges, with what else the method has: symmetric grids, ends of 8 bits, attention inputs in float."""
    return PTQConfig(
        method="minmax", weight_bits=weight_bits, act_bits=act_bits, symmetric=True, end_bits=8, attention=False
    )


VARIANTS = {
    "W8A8": ptq4dm(8, 8),
    "W4A8": ptq4dm(4, 8),
    "W4A16": ptq4dm(4, None),
    "W8A16": ptq4dm(8, None),
    "W8A8_minmax": minmax(8, 8),
    "W4A8_minmax": minmax(4, 8),
    "W4A16_minmax": minmax(4, None),
    "W8A8_quanto": PTQConfig(method="minmax", backend="quanto"),
    "W8A16_quanto": PTQConfig(method="minmax", backend="quanto", act_bits=None),
}
COMPARISONS = {
    "over_minmax_W8A8": ("W8A8", "W8A8_minmax", 0.0),
    "over_minmax_W4A8": ("W4A8", "W4A8_minmax", 6.0),
    "over_minmax_W4A16": ("W4A16", "W4A16_minmax", 0.0),
    "over_quanto_W8A8": ("W8A8", "W8A8_quanto", 0.0),
    "over_quanto_W8A16": ("W8A16", "W8A16_quanto", 0.0),
}
PARTS = {f"W8A6_{steps}": ptq4dm(8, 6, timesteps=steps) for steps in ("normal", "noisiest", "cleanest")}
PART_COMPARISONS = {
    "normal_over_noisiest": ("W8A6_normal", "W8A6_noisiest", 0.0),
    "normal_over_cleanest": ("W8A6_normal", "W8A6_cleanest", 0.0),
}
BENCHMARK = Benchmark("ptq4dm", settings={"timing": TIMING}, peers=["optimum-quanto"])
add_models(
    BENCHMARK, MODELS, VARIANTS, COMPARISONS, parts=PARTS, part_comparisons=PART_COMPARISONS,
    accuracy=["W8A8", "W4A8"], costs=["W8A8"], samples=SAMPLES,
)  # fmt: skip


@BENCHMARK.part("integer_time", minutes=6)
def integer_time(recorder: Recorder) -> None:
    claim_integer_time(recorder, TIMING["channels"], TIMING["batch"], TIMING["rounds"], TIMING["threads"])


if __name__ == "__main__":
    BENCHMARK.main()
