"""A pipeline as it should be, and the same with one fault each."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor

from ._checks import check_number, check_word


class PlantedPipeline(DiffusionPipeline):
    """Unconditional pictures whose last state is scaled by `gain`."""

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    first = 0

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, gain: float = 1.0) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(gain=gain)
        self.gain = gain

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 10,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> Any:
        check_number("num_inference_steps", num_inference_steps, 1, 1000, integer=True)
        check_word("output_type", output_type, ("pt", "np", "latent"))
        side = self.unet.config.sample_size
        shape = (1, self.unet.config.in_channels, side, side)
        latents = self.start(randn_tensor(shape, generator=generator, dtype=self.unet.dtype))
        self.scheduler.set_timesteps(num_inference_steps)
        self.num_timesteps = len(self.scheduler.timesteps)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps), start=self.first):
            noise = self.unet(latents, t, return_dict=False)[0]
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {name: latents for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, t, given).get("latents", latents)
        images = self.end(self.gain * latents)
        images = images if output_type != "np" else images.float().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def start(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def end(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class KeepsTheLastPicture(PlantedPipeline):
    """The next picture depends on the last."""

    def end(self, latents: torch.Tensor) -> torch.Tensor:
        last = getattr(self, "last", latents)
        self.last = latents
        return latents + 0.1 * last


class LosesItsGain(PlantedPipeline):
    """The gain is in no config, and so in no file."""

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, gain: float = 1.0) -> None:
        super().__init__(unet, scheduler, gain)
        self._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key != "gain"})


class HiddenOption(PlantedPipeline):
    """An optional component that is not listed is not saved."""

    def __init__(
        self, unet: UNet2DModel, scheduler: SchedulerMixin, gain: float = 1.0, refiner: UNet2DModel | None = None
    ) -> None:
        super().__init__(unet, scheduler, gain)
        self.register_modules(refiner=refiner)


class ChangesAWeight(PlantedPipeline):
    """A call leaves other weights behind."""

    def start(self, latents: torch.Tensor) -> torch.Tensor:
        self.unet.conv_out.bias += 1e-4
        return latents


class TakesAnyOutputType(PlantedPipeline):
    """A wrong output type gives something."""

    def __call__(self, output_type: str = "pt", **options: Any) -> Any:  # type: ignore[override]
        return super().__call__(output_type="np" if output_type == "np" else "pt", **options)


class HidesItsLoop(PlantedPipeline):
    """Methods that are on do not notice a run."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return iterable

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.__dict__.pop("progress_bar", None)
        return super().__call__(*args, **options)


class PipelineNeedsThePackage(PlantedPipeline):
    """Works here only: it reaches for this package by name, where no exporter sees it."""

    def start(self, latents: torch.Tensor) -> torch.Tensor:
        importlib.import_module("diffusers" + "_ext.registry")
        return latents


class CountsFromOne(PlantedPipeline):
    """Numbers its callbacks from one."""

    first = 1
