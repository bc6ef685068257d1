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

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from ._card import training_card
from ._data import SampleNoise
from ._diffusion import (
    Latents,
    add_validation_arguments,
    check_proportion,
    check_snr_gamma,
    diffusion_loss,
    write_samples,
)
from ._loop import Task, add_common_arguments, check_common_arguments, setup_logging, train


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
        self.device = accelerator.device
        self.latents = Latents(self.pipeline.vae, self.args, dataset, self.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.latents(batch, noise)
        dropped = (noise.uniform() < self.args.proportion_empty_prompts).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        states = self.pipeline.text_encoder(tokens.input_ids.to(self.device), return_dict=False)[0]
        timesteps = noise.integers(self.scheduler.config.num_train_timesteps)
        epsilon = noise.normal(*latents.shape[1:])

        def denoise(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.pipeline.unet(noisy, t, states, return_dict=False)[0]

        return diffusion_loss(denoise, self.scheduler, latents, epsilon, timesteps, self.args.snr_gamma)

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
        return write_samples(pictures, self.args.num_validation_images, folder, step)

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
    add_validation_arguments(parser, steps=20, guidance_scale=3.0)
    args = add_common_arguments(parser).parse_args(argv)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    check_snr_gamma(args.snr_gamma)
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, TextToImageTask(args))


if __name__ == "__main__":
    main()
