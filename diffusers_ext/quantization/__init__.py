"""Calibrated post-training quantization of denoisers: one core, one short file a method.

    import diffusers_ext as dx
    pipe = dx.quantization.calibrate(pipe, dx.PTQConfig(method="q_diffusion", weight_bits=4, act_bits=8), prompts=prompts)
    pipe.save_pretrained("small")              # packed; stock `from_pretrained` loads it after `import diffusers_ext`

What lies where, in the order in which a calibration goes through it:

- `config`: `PTQConfig`, all settings; also what a saved model says of itself.
- `methods`: `PTQMethod`, what a paper may change: defaults of the settings, which steps are recorded, the order of the
  stages. `ptq4dm`, `q_diffusion`, `fp_quant_diffusion`, `tfmq_dm`, `quest` derive from it.
- `calibration`: `calibrate`, from a pipeline to a quantized one. `cost`: the minutes and the memory that it takes.
- `recording`: the calibration set, calls of the denoiser that the pipeline made.
- `structure`: layers, concatenated inputs, attention and blocks of a denoiser, found by running it once.
- `temporal`: the layers that see the timestep alone, by themselves, and tables of what they give.
- `session`: the model during calibration and the stages: place weights, round them, place activations, learn scales, finetune.
- `grids`: the values that tensors may take, integers and floating point. `observers`: where a grid is placed.
- `rounding`: what is learnt against full precision, block by block. `finetuning`: in the whole network.
- `layers`, `attention`: what is quantized, while it is calibrated and as it is kept. `packing`: codes in bytes. `timing`: which
  entry of a table with one for each timestep holds.
- `int8`: the same by integer products. `backends`: other packages behind the same settings: `quanto`, `_torchao`, `_bitsandbytes`.
- `loader`: the diffusers quantizer, which saves and loads. `summary`: what a card says of a quantized pipeline.
"""

import sys

import diffusers.quantizers.auto  # noqa: F401  # first: its import registers our quantizer, which imports this package

from .calibration import calibrate
from .config import PTQConfig
from .loader import PTQQuantizer, register
from .methods import PTQMethod
from .summary import summary

quantization = sys.modules[__name__]  # what the lazy name `diffusers_ext.quantization` resolves to
register()

__all__ = ["PTQConfig", "PTQMethod", "PTQQuantizer", "calibrate", "quantization", "register", "summary"]
