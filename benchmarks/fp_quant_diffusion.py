"""What floating-point quantization is worth: against integers of the same width, and nearest against learnt rounding.

    diffusers-ext bench fp_quant_diffusion    # records diffusers_ext/results/fp_quant_diffusion.json

Settings were fixed before measuring. FP8 is weights and activations in 8-bit floats, FP4 weights in 4-bit and activations in
8-bit floats. INT8 and INT4 are integers with the same search of clip values, from 0.4 of the largest on, and at 4 bits the same
learnt rounding (200 iterations a block). 64 pictures.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import add_models
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (25, None, 12), "avatars-sd": (20, 3.0, 27)}


def config(weight_bits: int, **settings: Any) -> PTQConfig:
    return PTQConfig(
        method="fp_quant_diffusion",
        weight_bits=weight_bits,
        calibration_steps=5,
        search_from=0.4,
        rounding_iterations=200,
        **settings,
    )


INTEGERS = {"weight_format": "int", "act_format": "int"}
VARIANTS = {
    "FP8": config(8, rounding="nearest"),
    "FP4": config(4),
    "FP4_nearest": config(4, rounding="nearest"),
    "INT8": config(8, rounding="nearest", **INTEGERS),
    "INT4": config(4, **INTEGERS),
}
COMPARISONS = {
    "fp8_over_int8": ("FP8", "INT8", 0.0),
    "learnt_over_nearest": ("FP4", "FP4_nearest", 0.0),
    "fp4_over_int4": ("FP4", "INT4", 0.0),
}
BENCHMARK = Benchmark("fp_quant_diffusion")
add_models(BENCHMARK, MODELS, VARIANTS, COMPARISONS, accuracy=["FP8", "FP4"], costs=["FP4"])


if __name__ == "__main__":
    BENCHMARK.main()
