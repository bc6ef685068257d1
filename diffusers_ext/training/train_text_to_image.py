"""Train or fine-tune the UNet (and on request the text encoder) of a Stable Diffusion pipeline on captioned pictures.

    accelerate launch -m diffusers_ext.training.train_text_to_image --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --output_dir my-model

The result is a pipeline folder that the stock `StableDiffusionPipeline.from_pretrained` loads. Data, noise, time steps
and prompt dropout are functions of the seed and the global sample number: a resumed run equals an uninterrupted one
bit for bit.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr

from ._card import training_card
from ._data import SampleNoise
from ._loop import Task, add_common_arguments, check_common_arguments, picture_grid, setup_logging, train


def diffusion_loss(
    unet,
    scheduler,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of the prediction (epsilon or v), weighted by min(SNR, gamma) where `snr_gamma` is given.

    Args:
        unet: called as `unet(noisy_latents, timesteps, encoder_hidden_states)`.
        scheduler: gives `add_noise`, `alphas_cumprod` and `config.prediction_type`.
        latents, noise: `(batch, channels, height, width)`, scaled latents and standard normal noise.
        encoder_hidden_states: `(batch, tokens, width)`.
        timesteps: `(batch,)` integers in `[0, num_train_timesteps)`.
        snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, equation 8, adapted to epsilon and v); None: no weights.
    """
    prediction = unet(
        scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states, return_dict=False
    )[0]
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"`prediction_type` is {prediction_type!r}; allowed are 'epsilon' and 'v_prediction'.")
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        error = error * weight
    return error.mean()


class TextToImageTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        pipeline = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, safety_checker=None, dtype=torch.float32,
            requires_safety_checker=False,
        )  # fmt: skip
        if args.vae_path is not None:
            pipeline.vae = type(pipeline.vae).from_pretrained(args.vae_path)
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(args.train_text_encoder)
        self.trained = {"unet": pipeline.unet}
        if args.train_text_encoder:
            self.trained["text_encoder"] = pipeline.text_encoder

    def prepare(self, dataset, accelerator):
        self.pipeline.to(accelerator.device)
        self.device, self.moments = accelerator.device, None
        self.latent_channels = self.pipeline.vae.config.latent_channels
        self.latent_side = self.args.resolution // self.pipeline.vae_scale_factor
        if self.args.resolution % self.pipeline.vae_scale_factor:
            raise ValueError(
                f"`--resolution` is {self.args.resolution}; this VAE needs a multiple of {self.pipeline.vae_scale_factor}."
            )
        if self.args.cache_latents:
            if self.args.random_flip or not self.args.center_crop:
                raise ValueError(
                    "`--cache_latents` fixes each picture: use it with `--center_crop` and without `--random_flip`."
                )
            self.moments = self._encode_all(dataset)

    def _encode_all(self, dataset) -> torch.Tensor:
        moments = []
        with torch.no_grad():
            for start in range(0, len(dataset), 64):
                pixels = [dataset[i]["pixel_values"] for i in range(start, min(start + 64, len(dataset)))]
                moments.append(
                    self.pipeline.vae.encode(torch.stack(pixels).to(self.device)).latent_dist.parameters.cpu()
                )
        return torch.cat(moments)

    def _latents(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        sample = noise.normal(self.latent_channels, self.latent_side, self.latent_side)
        if self.moments is not None:
            mean, logvar = self.moments[batch["index"]].to(self.device).chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * sample
        else:
            with torch.no_grad():
                posterior = self.pipeline.vae.encode(batch["pixel_values"]).latent_dist
            latents = posterior.mean + posterior.std * sample
        return latents * self.pipeline.vae.config.scaling_factor

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self._latents(batch, noise)
        dropped = (noise.uniform() < self.args.proportion_empty_prompts).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        states = self.pipeline.text_encoder(tokens.input_ids.to(self.device), return_dict=False)[0]
        timesteps = noise.integers(self.scheduler.config.num_train_timesteps)
        epsilon = noise.normal(*latents.shape[1:])
        return diffusion_loss(
            self.pipeline.unet, self.scheduler, latents, states, epsilon, timesteps, self.args.snr_gamma
        )

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        prompts = self.args.validation_prompts or []
        if not prompts:
            return {}
        pictures = []
        for prompt in prompts:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(self.args.num_validation_images)]
            pictures += self.pipeline(
                prompt, num_images_per_prompt=len(generators), generator=generators,
                num_inference_steps=self.args.validation_inference_steps,
                guidance_scale=self.args.validation_guidance_scale,
            ).images  # fmt: skip
        sheet = picture_grid(pictures, self.args.num_validation_images, scale=max(1, 96 // pictures[0].width))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{step:06d}.png")
        return {"validation": np.asarray(sheet)}

    def save(self, folder: Path) -> None:
        self.pipeline.unet.eval()
        self.pipeline.text_encoder.eval()
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_text_to_image", "StableDiffusionPipeline", summary, ["text-to-image"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--snr_gamma", type=float, help="min-SNR weighting; the paper uses 5.0.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Prompt dropout, for guidance.")
    parser.add_argument("--validation_prompts", nargs="*")
    parser.add_argument("--num_validation_images", type=int, default=4)
    parser.add_argument("--validation_inference_steps", type=int, default=20)
    parser.add_argument("--validation_guidance_scale", type=float, default=3.0)
    args = add_common_arguments(parser).parse_args(argv)
    if not 0.0 <= args.proportion_empty_prompts <= 1.0:
        raise ValueError(f"`--proportion_empty_prompts` is {args.proportion_empty_prompts}; it must lie in [0, 1].")
    if args.snr_gamma is not None and args.snr_gamma <= 0:
        raise ValueError(f"`--snr_gamma` is {args.snr_gamma}; it must be positive.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, TextToImageTask(args))


if __name__ == "__main__":
    main()
