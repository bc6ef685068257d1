"""Restore pictures with mean-reverting diffusion (Luo et al. 2023, arXiv 2301.11699; sampler: arXiv 2502.07856)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class MeanRevertingPipeline(DiffusionPipeline):
    """Image restoration: from a degraded picture plus noise back to a clean one.

    Args:
        unet: a `UNet2DModel` that takes the distance of the state from the degraded picture, and that picture, side by
            side (so twice the channels of a picture), and a real timestep.
        scheduler: a scheduler of a process that ends at the degraded picture: `MRSamplerScheduler`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        if unet.config.in_channels != 2 * unet.config.out_channels:
            raise ValueError(
                f"`unet` takes {unet.config.in_channels} channels and gives {unet.config.out_channels}; it must take twice "
                "what it gives."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Restore pictures.

        Args:
            image: degraded pictures: PIL, a list of them, an array `(batch, height, width, channels)` or a tensor `(batch,
                channels, height, width)` in [0, 1].
            num_inference_steps: number of denoiser calls.
            generator: one, or one a picture.
            output_type: "pil", "np" or "pt"; the last two are in [0, 1].
            return_dict: False gives a tuple.

        Raises:
            ValueError: an argument is out of range, or the pictures do not suit the network.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; allowed are 'pil', 'np' and 'pt'.")
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        mu = self.image_processor.preprocess(image).to(device, dtype)
        channels, factor = self.unet.config.out_channels, 2 ** (len(self.unet.config.block_out_channels) - 1)
        if mu.shape[1] != channels or mu.shape[2] % factor or mu.shape[3] % factor:
            raise ValueError(
                f"`image` has the shape {tuple(mu.shape)}; this model takes {channels} channels, and sides that are "
                f"multiples of {factor}."
            )
        if isinstance(generator, list) and len(generator) != len(mu):
            raise ValueError(f"`generator` has {len(generator)} generators for {len(mu)} pictures; one each is needed.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        noise = randn_tensor(mu.shape, generator=generator, device=device, dtype=dtype)
        x = mu + self.scheduler.init_noise_sigma * noise
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([x - mu, mu], dim=1).to(self.unet.dtype)
            output = self.unet(model_input, t, return_dict=False)[0].to(dtype)
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False, mu=mu)[0]
        images = self.image_processor.postprocess(x.clamp(0, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
