"""What a method of quantization does at each stage. One file a paper derives from `PTQMethod`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .recording import evenly, normal_steps

if TYPE_CHECKING:
    from .config import PTQConfig
    from .session import Session

RUN_BY = ("diffusers_ext.quantization.calibration",)  # what was measured of a method is of the core that runs it
# Key -> module and class of ours. By name, so that a method's file is imported when it is asked for.
METHODS = {
    "minmax": "methods:PTQMethod",
    "ptq4dm": "ptq4dm:PTQ4DM",
    "q_diffusion": "q_diffusion:QDiffusion",
    "fp_quant_diffusion": "fp_quant_diffusion:FPQuantDiffusion",
    "tfmq_dm": "tfmq_dm:TFMQDM",
    "quest": "quest:QuEST",
}


class PTQMethod:
    """Plain ranges: weights and inputs span what they hold, and are rounded to nearest.

    Attributes:
        defaults: of the settings that a `PTQConfig` leaves to its method.
        low_bit_defaults: of those as well, where activations have at most 4 bits.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "weight_format": "int",
        "act_format": "int",
        "symmetric": False,
        "attention": True,
        "split": False,
        "timesteps": "uniform",
        "weight_range": "minmax",
        "act_range": "minmax",
        "search_from": 0.21,
        "search_power": 2.0,
        "rounding": "nearest",
        "scale_iterations": 0,
        "temporal": "none",
        "step_scales": False,
        "channel_scales": False,
        "stages": [],
    }
    low_bit_defaults: ClassVar[dict[str, Any]] = {}

    def kept_steps(self, config: PTQConfig, num_steps: int, samples: int, generator: torch.Generator) -> torch.Tensor:
        """Steps of a run whose inputs are recorded, 0 is the noisiest: one for each sample if `timesteps` is "normal"."""
        if config.timesteps == "normal":
            return normal_steps(num_steps, samples, config.timestep_mean, config.timestep_std, generator)
        if config.timesteps == "uniform":
            return evenly(num_steps, config.calibration_steps)
        return torch.tensor([0 if config.timesteps == "noisiest" else num_steps - 1])

    def calibrate(self, session: Session) -> None:
        """All of it, in the order of the papers: weights, then activations of the network with quantized weights, then finetuning."""
        session.place_weights()
        session.round_weights()
        session.place_inputs()
        session.learn_scales()
        session.finetune()


def method_of(key: str) -> PTQMethod:
    """The method `key` of `METHODS`."""
    module, _, name = METHODS[key].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)()


def defaults_of(key: str, act_bits: int | None) -> dict[str, Any]:
    """Defaults of all settings that depend on the method."""
    method = method_of(key)
    low = method.low_bit_defaults if isinstance(act_bits, int) and act_bits <= 4 else {}
    return {**PTQMethod.defaults, **method.defaults, **low}
