"""What trainers on Flux pipelines share: loading, dropping prompts, and the transformer's velocity of packed latents."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline

from ._data import SampleNoise
from ._diffusion import Latents, add_validation_arguments, check_proportion
from ._loop import Task

# Calls the transformer with tokens `(batch, tokens, channels)` and noise levels `(batch,)`; returns tokens.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class FluxTask(Task):
    """Base of a task on a `FluxPipeline`; a subclass sets `trained`, and writes `loss`, `validate`, `save` and `card`.

    Nothing of the pipeline is trained unless the subclass says so.

    Args:
        args: with `pretrained_model_name_or_path`, `revision`, `vae_path`, and those of `add_flux_arguments`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        pipeline = FluxPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if args.vae_path is not None:
            pipeline.vae = AutoencoderKL.from_pretrained(args.vae_path)
        pipeline.set_progress_bar_config(disable=True)
        for module in (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            module.requires_grad_(False)
        self.pipeline = pipeline

    def prepare(self, dataset, accelerator):
        self.pipeline.to(accelerator.device)
        self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)
        if self.latents.shape[1] % 2:
            raise ValueError(
                f"`--resolution` is {self.args.resolution}; Flux packs 2x2 latents, so this VAE needs a multiple of "
                f"{2 * self.pipeline.vae_scale_factor}."
            )

    def captions(self, batch: dict[str, Any], noise: SampleNoise) -> list[str]:
        """Prompts of a batch, a share of them left empty."""
        dropped = (noise.uniform() < self.args.proportion_empty_prompts).tolist()
        return ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]

    def velocity(self, captions: list[str], latents: torch.Tensor) -> Velocity:
        """The transformer's velocity for these prompts, of packed latents in the shape of `latents`."""
        pipeline, (count, _, height, width) = self.pipeline, latents.shape
        states, pooled, text_ids = pipeline.encode_prompt(
            captions, prompt_2=None, max_sequence_length=self.args.max_sequence_length
        )
        image_ids = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((count,), self.args.guidance_scale, device=latents.device)

        def call(tokens: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            return pipeline.transformer(
                hidden_states=tokens, timestep=sigmas, guidance=guidance, pooled_projections=pooled,
                encoder_hidden_states=states, txt_ids=text_ids, img_ids=image_ids, return_dict=False,
            )[0]  # fmt: skip

        return call

    def pictures(self, pipeline: FluxPipeline) -> list[Any]:
        """Validation pictures, prompt by prompt."""
        args, pictures = self.args, []
        for prompt in args.validation_prompts or []:
            seeds = range(args.num_validation_images)
            pictures += pipeline(
                prompt, negative_prompt="", true_cfg_scale=args.validation_guidance_scale,
                guidance_scale=args.guidance_scale, height=args.resolution, width=args.resolution,
                max_sequence_length=args.max_sequence_length, num_images_per_prompt=len(seeds),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=args.validation_inference_steps,
            ).images  # fmt: skip
        return pictures


def add_flux_arguments(parser: argparse.ArgumentParser, validation_steps: int) -> None:
    """Arguments of a task on a Flux pipeline, besides those that all tasks have."""
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--max_sequence_length", type=int, default=512, help="Tokens of the T5 prompt.")
    parser.add_argument("--guidance_scale", type=float, default=3.5, help="For models with embedded guidance.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Prompt dropout, for guidance.")
    parser.add_argument("--validation_prompts", nargs="*")
    add_validation_arguments(parser, steps=validation_steps, guidance_scale=3.0)


def check_flux_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
