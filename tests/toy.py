"""A scheduler, a model and a pipeline that live in `diffusers_ext` for the time of a test, as classes of it do.

Their modules are written into a folder: one file each, and the core that they share.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "diffusers_ext.toy"
SOURCES = {
    "_toy_core": '''
        """What the toys share."""

        from __future__ import annotations

        import torch


        def blend(new: torch.Tensor, old: torch.Tensor, weight: float) -> torch.Tensor:
            return new + weight * (old - new)
    ''',
    "scheduling_toy": '''
        """A scheduler for tests: DDIM that holds on to a part of the old sample."""

        from __future__ import annotations

        import torch
        from diffusers import ConfigMixin, SchedulerMixin
        from diffusers.configuration_utils import register_to_config
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        from ._toy_core import blend


        class ToyScheduler(SchedulerMixin, ConfigMixin):
            order = 1

            @register_to_config
            def __init__(self, num_train_timesteps: int = 1000, hold: float = 0.05, steps_offset: int = 1):
                betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_train_timesteps) ** 2
                self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
                self.init_noise_sigma = 1.0
                self.timesteps = torch.arange(num_train_timesteps).flip(0)

            def set_timesteps(self, num_inference_steps: int, device=None):
                self.stride = self.config.num_train_timesteps // num_inference_steps
                self.timesteps = (torch.arange(num_inference_steps) * self.stride).flip(0).to(device)

            def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
                return sample

            def step(self, model_output: torch.Tensor, timestep, sample: torch.Tensor, return_dict: bool = True):
                alpha = self.alphas_cumprod[timestep]
                before = timestep - self.stride
                alpha_before = self.alphas_cumprod[before] if before >= 0 else self.alphas_cumprod.new_ones(())
                clean = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
                new = alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * model_output
                new = blend(new, sample, self.config.hold)
                return SchedulerOutput(prev_sample=new) if return_dict else (new,)
    ''',
    "modeling_toy": '''
        """A model for tests: a U-Net that is not quite sure of its noise."""

        from __future__ import annotations

        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput

        from ._toy_core import blend


        class ToyUNet(UNet2DConditionModel):
            def forward(self, sample, timestep, encoder_hidden_states, return_dict: bool = True, **kwargs):
                (noise,) = super().forward(sample, timestep, encoder_hidden_states, return_dict=False, **kwargs)
                noise = blend(noise, sample, 0.01)
                return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)
    ''',
    "pipeline_toy": '''
        """A pipeline for tests: Stable Diffusion that says its name."""

        from __future__ import annotations

        from diffusers import StableDiffusionPipeline

        from ._toy_core import blend


        class ToyPipeline(StableDiffusionPipeline):
            def say(self) -> str:
                return f"toy {blend(2, 1, 0)}"
    ''',
}


def toy_pipeline(pipe: Any, toys: types.SimpleNamespace, hold: float) -> Any:
    """The toy pipeline with a toy scheduler and a toy U-Net, of the weights of `pipe`."""
    unet = toys.ToyUNet.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    components = {**pipe.components, "scheduler": toys.ToyScheduler(hold=hold), "unet": unet.eval()}
    return toys.ToyPipeline(**components, requires_safety_checker=False)


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[types.SimpleNamespace]:
    """Write the modules into `folder` and make their classes public names of `diffusers_ext`."""
    import diffusers_ext
    from diffusers_ext import registry

    for name, text in SOURCES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    package: Any = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    names = {
        "ToyScheduler": f"{PACKAGE}.scheduling_toy",
        "ToyUNet": f"{PACKAGE}.modeling_toy",
        "ToyPipeline": f"{PACKAGE}.pipeline_toy",
    }
    registry.LAZY_NAMES.update(names)
    try:
        yield types.SimpleNamespace(
            **{name: getattr(importlib.import_module(module), name) for name, module in names.items()}
        )
    finally:
        for name in names:
            del registry.LAZY_NAMES[name]
            vars(diffusers_ext).pop(name, None)
        for module in [module for module in sys.modules if module == PACKAGE or module.startswith(f"{PACKAGE}.")]:
            del sys.modules[module]
