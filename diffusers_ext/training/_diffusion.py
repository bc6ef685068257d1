"""What the scripts that train on pictures share: the losses, cached latents, and validation sheets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import compute_snr
from tqdm.auto import tqdm

from ._data import SampleNoise
from ._loop import picture_grid


def diffusion_loss(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of the prediction (epsilon or v), weighted by min(SNR, gamma) where `snr_gamma` is given.

    Args:
        denoise: takes the noisy sample and the time steps, returns the prediction.
        scheduler: gives `add_noise`, `alphas_cumprod` and `config.prediction_type`.
        clean, noise: `(batch, channels, height, width)`, scaled latents or pixels, and standard normal noise.
        timesteps: `(batch,)` integers in `[0, num_train_timesteps)`.
        snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, equation 8, adapted to epsilon and v); None: no weights.
    """
    prediction = denoise(scheduler.add_noise(clean, noise, timesteps), timesteps)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        raise ValueError(f"`prediction_type` is {prediction_type!r}; allowed are 'epsilon' and 'v_prediction'.")
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        error = error * weight
    return error.mean()


def flow_matching_loss(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the velocity `noise - clean` on the line between them (Liu et al. 2022, equation 1).

    Args:
        velocity: takes the noisy sample and sigmas, returns the prediction.
        clean, noise: `(batch, channels, height, width)`, scaled latents and standard normal noise.
        sigmas: `(batch,)` in [0, 1]; 0 is clean, 1 is noise.
    """
    at = sigmas.view(-1, 1, 1, 1)
    prediction = velocity((1.0 - at) * clean + at * noise, sigmas)
    return (prediction.float() - (noise - clean).float()).square().mean()


class Latents:
    """Scaled latents of a batch, drawn from the posterior of a frozen VAE by the sample's own noise.

    Args:
        vae: an `AutoencoderKL`.
        args: `resolution`; `cache_latents` encodes every picture once, before training.
        dataset: the pictures.
        device: where the VAE is.

    Raises:
        ValueError: the resolution does not suit the VAE, or latents that are cached would have to change.
    """

    def __init__(self, vae, args: argparse.Namespace, dataset, device: torch.device):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if args.resolution % factor:
            raise ValueError(f"`--resolution` is {args.resolution}; this VAE needs a multiple of {factor}.")
        if args.cache_latents and (args.random_flip or not args.center_crop):
            raise ValueError(
                "`--cache_latents` fixes each picture: use it with `--center_crop` and without `--random_flip`."
            )
        self.vae, self.device = vae, device
        self.shape = (vae.config.latent_channels, args.resolution // factor, args.resolution // factor)
        self.moments = self._encode_all(dataset) if args.cache_latents else None

    @torch.no_grad()
    def _encode_all(self, dataset) -> torch.Tensor:
        moments = []
        for start in tqdm(range(0, len(dataset), 64), desc="Encoding", mininterval=1.0):
            pixels = [dataset[i]["pixel_values"] for i in range(start, min(start + 64, len(dataset)))]
            moments.append(self.vae.encode(torch.stack(pixels).to(self.device)).latent_dist.parameters.cpu())
        return torch.cat(moments)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        """Scaled and shifted latents `(batch, channels, height, width)`; draws once from `noise`."""
        sample = noise.normal(*self.shape)
        if self.moments is not None:
            mean, logvar = self.moments[batch["index"]].to(self.device).chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * sample
        else:
            posterior = self.vae.encode(batch["pixel_values"]).latent_dist
            latents = posterior.mean + posterior.std * sample
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor


def write_samples(pictures: list, columns: int, folder: Path, step: int) -> dict[str, Any]:
    """Write pictures as one sheet, `step-<number>.png`; returns it for the trackers."""
    sheet = picture_grid(pictures, columns, scale=max(1, 96 // pictures[0].width))
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / f"step-{step:06d}.png")
    return {"validation": np.asarray(sheet)}


def add_validation_arguments(parser: argparse.ArgumentParser, steps: int, guidance_scale: float | None = None) -> None:
    """Arguments of the validation pictures; `guidance_scale` None: the pipeline has no guidance."""
    parser.add_argument("--num_validation_images", type=int, default=4)
    parser.add_argument("--validation_inference_steps", type=int, default=steps)
    if guidance_scale is not None:
        parser.add_argument("--validation_guidance_scale", type=float, default=guidance_scale)


def check_snr_gamma(snr_gamma: float | None) -> None:
    if snr_gamma is not None and snr_gamma <= 0:
        raise ValueError(f"`--snr_gamma` is {snr_gamma}; it must be positive.")


def check_proportion(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`--{name}` is {value}; it must lie in [0, 1].")
