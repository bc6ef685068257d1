"""What floating-point quantization is worth: against integers of the same width, and nearest against learnt rounding.

    diffusers-ext bench fp_quant_diffusion    # records diffusers_ext/results/fp_quant_diffusion.json

Settings were fixed before measuring. FP8 is weights and activations in 8-bit floats, FP4 weights in 4-bit and activations in
8-bit floats. INT8 and INT4 are integers with the same search of clip values and, at 4 bits, the same learnt rounding (200
iterations a block). 64 pictures.
"""

from __future__ import annotations

from typing import Any

from benchmarks._bench import Benchmark
from benchmarks._quantized import QuantizedQuality
from diffusers_ext.quantization import PTQConfig

MODELS = {"fashion-ddpm": (50, None, 25), "avatars-sd": (20, 3.0, 45)}


def config(weight_bits: int, **settings: Any) -> PTQConfig:
    return PTQConfig(
        method="fp_quant_diffusion", weight_bits=weight_bits, calibration_steps=5, rounding_iterations=200, **settings
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
for _model, (_steps, _guidance, _minutes) in MODELS.items():
    BENCHMARK.add(
        QuantizedQuality(
            _model,
            _steps,
            VARIANTS,
            COMPARISONS,
            minutes=_minutes,
            guidance_scale=_guidance,
            accuracy=[] if _guidance is None else ["FP8", "FP4"],
            costs=["FP4"],
        )
    )


if __name__ == "__main__":
    BENCHMARK.main()
