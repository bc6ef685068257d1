"""What a method of quantization does at each stage. One file a paper derives from `PTQMethod`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .recording import evenly, normal_steps

if TYPE_CHECKING:
    from .config import PTQConfig
    from .session import Session

# Key -> module and class of ours. By name, so that a method's file is imported when it is asked for.
METHODS = {
    "minmax": "methods:PTQMethod",
    "ptq4dm": "ptq4dm:PTQ4DM",
    "q_diffusion": "q_diffusion:QDiffusion",
    "fp_quant_diffusion": "fp_quant_diffusion:FPQuantDiffusion",
}


class PTQMethod:
    """Plain ranges: weights and inputs span what they hold, and are rounded to nearest.

    Attributes:
        defaults: of the settings that a `PTQConfig` leaves to its method.
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
    }

    def kept_steps(self, config: PTQConfig, num_steps: int, samples: int, generator: torch.Generator) -> torch.Tensor:
        """Steps of a run whose inputs are recorded, 0 is the noisiest: one for each sample if `timesteps` is "normal"."""
        if config.timesteps == "normal":
            return normal_steps(num_steps, samples, config.timestep_mean, config.timestep_std, generator)
        if config.timesteps == "uniform":
            return evenly(num_steps, config.calibration_steps)
        return torch.tensor([0 if config.timesteps == "noisiest" else num_steps - 1])

    def calibrate(self, session: Session) -> None:
        """All of it, in the order of the papers: weights, then activations of the network with quantized weights."""
        session.place_weights()
        session.round_weights()
        session.place_inputs()
        session.learn_scales()


def method_of(key: str) -> PTQMethod:
    """The method `key` of `METHODS`."""
    module, _, name = METHODS[key].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)()


def defaults_of(key: str) -> dict[str, Any]:
    """Defaults of all settings that depend on the method."""
    return {**PTQMethod.defaults, **method_of(key).defaults}
