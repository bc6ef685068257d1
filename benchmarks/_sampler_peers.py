"""Samplers that a benchmark compares, and diffusers' own as their peers.

A sampler is a `Variant`: a scheduler class with options, enabled methods, or `prepare`, which changes a copy of the
pipeline. One that differs by the number of calls (a searched plan) is a function of that number that returns a `Variant`.

Peers have their default orders; what pipelines pass and they do not know is kept from them. Where they are off the common
ground, it is said here: DEIS ends at the first training timestep, DDIM and PNDM take steps of whole timesteps that may not
add up to the grid, and on pictures of flows DPM-Solver++ and UniPC round the timesteps. On oracles timesteps are not rounded,
DDIM is DPM-Solver++ of order 1, which is the same update, PNDM has its uniform timesteps, the only ones that it knows, and
Heun's grid ends at the last of such timesteps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from benchmarks._quality import Variant

Sampler = Variant | Callable[[int], Variant]


@functools.cache
def fitting(cls: type, unrounded: bool = False) -> type:
    """A scheduler of diffusers that takes what any pipeline passes and starts where the others start.

    Args:
        cls: its class. A generator and `mu` are not handed on to it where it does not know them or is not to use them;
            the flow grid begins a training step before pure noise; noise is scaled to the first level exactly.
        unrounded: timesteps are real numbers, where the class would cut them to whole ones and tell the model another
            noise level than that of its state.
    """

    class Fitting(cls):  # type: ignore[misc, valid-type]
        def set_timesteps(
            self, num_inference_steps: int | None = None, device: Any = None, mu: Any = None, sigmas: Any = None
        ) -> None:
            if is_flow(self) and "sigmas" in inspect.signature(super().set_timesteps).parameters:
                levels = np.linspace(1.0, 0.0, int(num_inference_steps or len(sigmas)) + 1)[:-1]
                levels[0] = 1 - 1 / self.config.num_train_timesteps
                super().set_timesteps(device=device, sigmas=levels)
            else:
                super().set_timesteps(int(num_inference_steps or len(sigmas)), device=device)
            if unrounded:
                self.timesteps = _times_of(self)

        def step(self, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            if "generator" in inspect.signature(super().step).parameters:
                kwargs["generator"] = generator
            return super().step(*args, **kwargs)

        @property
        def init_noise_sigma(self) -> Any:
            if issubclass(cls, HeunDiscreteScheduler):
                return (self.sigmas.max() ** 2 + 1) ** 0.5
            return self.__dict__.get("init_noise_sigma", 1.0)

        @init_noise_sigma.setter
        def init_noise_sigma(self, value: float) -> None:
            self.__dict__["init_noise_sigma"] = value

    Fitting.__name__ = Fitting.__qualname__ = cls.__name__
    return Fitting


def _times_of(scheduler: Any) -> torch.Tensor:
    """Timesteps of a scheduler's noise levels."""
    levels = scheduler.sigmas[:-1].double().numpy()
    if is_flow(scheduler):
        return torch.from_numpy(levels * scheduler.config.num_train_timesteps).float()
    bar = scheduler.alphas_cumprod.double().numpy()
    return torch.from_numpy(np.interp(np.log(levels), np.log((1 - bar) / bar) / 2, np.arange(len(bar)))).float()


def is_flow(scheduler: Any) -> bool:
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def _peer(title: str, cls: type, unrounded: bool = False, **options: Any) -> Variant:
    return Variant(title, scheduler=fitting(cls, unrounded), scheduler_options=options)


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PEERS: dict[str, Variant] = {
    "ddim": _peer("DDIM", DDIMScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler),
    "unipc": _peer("UniPC", UniPCMultistepScheduler),
    "deis": _peer("DEIS", DEISMultistepScheduler),
    "pndm": _peer("PNDM", PNDMScheduler, skip_prk_steps=True),
    "heun": _peer("Heun", HeunDiscreteScheduler),
}
FLOW_PEERS: dict[str, Variant] = {
    "euler": _peer("Euler", FlowMatchEulerDiscreteScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, **_FLOW),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, **_FLOW),
}
ORACLE_PEERS: dict[str, Variant] = {
    "ddim": _peer("DDIM", DPMSolverMultistepScheduler, True, solver_order=1),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, True),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, True),
    "deis": _peer("DEIS", DEISMultistepScheduler, True),
    "pndm": _peer("PNDM", PNDMScheduler, skip_prk_steps=True, timestep_spacing="trailing", set_alpha_to_one=False),
    "heun": _peer("Heun", HeunDiscreteScheduler),
}
FLOW_ORACLE_PEERS: dict[str, Variant] = {
    "euler": _peer("Euler", FlowMatchEulerDiscreteScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, True, **_FLOW),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, True, **_FLOW),
}
# Pipelines that neither scale the first noise nor the model's input.
_UNSCALED = ("DiTPipeline", "DDPMPipeline")


def peers_of(pipeline: str, flow: bool) -> dict[str, Variant]:
    """diffusers' samplers for a pipeline of that class, whose process is rectified flow or not."""
    if flow:
        return dict(FLOW_PEERS)
    return {name: peer for name, peer in PEERS.items() if name != "heun" or pipeline not in _UNSCALED}


def reference_run(flow: bool, steps: int) -> Variant:
    """The run that pictures are compared with: DPM-Solver++ 2M with many steps."""
    cls = fitting(DPMSolverMultistepScheduler, unrounded=flow)
    return Variant(f"{steps} steps", scheduler=cls, scheduler_options=_FLOW if flow else {}, steps=steps)


def variant_of(sampler: Sampler, calls: int) -> Variant:
    """The variant that a sampler is at a budget of `calls`."""
    return sampler if isinstance(sampler, Variant) else sampler(calls)


def settings_of(sampler: Sampler, calls: Iterable[int]) -> dict[str, Any]:
    if isinstance(sampler, Variant):
        return sampler.settings()
    return {str(number): sampler(number).settings() for number in calls}
