"""Train or fine-tune the transformer of a Flux pipeline (and on request its text encoders) on captioned pictures.

    accelerate launch -m diffusers_ext.training.train_text_to_image_flux --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --output_dir my-model

Rectified flow: the velocity on straight lines between data and noise. The result is a pipeline folder that the stock
`FluxPipeline.from_pretrained` loads. A share of the prompts is left empty, so that true guidance works
(`true_cfg_scale` with `negative_prompt=""`).
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline

from ._card import training_card
from ._data import SampleNoise
from ._diffusion import Latents, add_validation_arguments, check_proportion, flow_matching_loss, write_samples
from ._loop import Task, add_common_arguments, check_common_arguments, setup_logging, train


class FluxTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        pipeline = FluxPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if args.vae_path is not None:
            pipeline.vae = AutoencoderKL.from_pretrained(args.vae_path)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.requires_grad_(False)
        self.pipeline, self.trained = pipeline, {"transformer": pipeline.transformer}
        for name in ("text_encoder", "text_encoder_2"):
            getattr(pipeline, name).requires_grad_(args.train_text_encoder)
            if args.train_text_encoder:
                self.trained[name] = getattr(pipeline, name)

    def prepare(self, dataset, accelerator):
        self.pipeline.to(accelerator.device)
        self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)
        if self.latents.shape[1] % 2:
            raise ValueError(
                f"`--resolution` is {self.args.resolution}; Flux packs 2x2 latents, so this VAE needs a multiple of "
                f"{2 * self.pipeline.vae_scale_factor}."
            )

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.latents(batch, noise)
        dropped = (noise.uniform() < self.args.proportion_empty_prompts).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        states, pooled, text_ids = self.pipeline.encode_prompt(
            captions, prompt_2=None, max_sequence_length=self.args.max_sequence_length
        )
        if self.args.weighting_scheme == "logit_normal":  # Esser et al. 2024, equation 19
            sigmas = torch.sigmoid(self.args.logit_mean + self.args.logit_std * noise.normal())
        else:
            sigmas = noise.uniform()
        epsilon = noise.normal(*latents.shape[1:])
        transformer, (count, channels, height, width) = self.pipeline.transformer, latents.shape
        image_ids = self.pipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, latents.device, latents.dtype
        )
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((count,), self.args.guidance_scale, device=latents.device)

        def velocity(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            packed = transformer(
                hidden_states=self.pipeline._pack_latents(noisy, count, channels, height, width), timestep=sigmas,
                guidance=guidance, pooled_projections=pooled, encoder_hidden_states=states, txt_ids=text_ids,
                img_ids=image_ids, return_dict=False,
            )[0]  # fmt: skip
            side = self.args.resolution
            return self.pipeline._unpack_latents(packed, side, side, self.pipeline.vae_scale_factor)

        return flow_matching_loss(velocity, latents, epsilon, sigmas)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        prompts, count = self.args.validation_prompts or [], self.args.num_validation_images
        if not prompts:
            return {}
        pictures = []
        for prompt in prompts:
            pictures += self.pipeline(
                prompt, negative_prompt="", true_cfg_scale=self.args.validation_guidance_scale,
                guidance_scale=self.args.guidance_scale, height=self.args.resolution, width=self.args.resolution,
                max_sequence_length=self.args.max_sequence_length, num_images_per_prompt=count,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
                num_inference_steps=self.args.validation_inference_steps,
            ).images  # fmt: skip
        return write_samples(pictures, count, folder, step)

    def save(self, folder: Path) -> None:
        for module in self.trained.values():
            module.eval()
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_text_to_image_flux", "FluxPipeline", summary, ["text-to-image"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    parser.add_argument("--train_text_encoder", action="store_true", help="Train both text encoders too.")
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--max_sequence_length", type=int, default=512, help="Tokens of the T5 prompt.")
    parser.add_argument("--guidance_scale", type=float, default=3.5, help="For models with embedded guidance.")
    parser.add_argument("--weighting_scheme", choices=("logit_normal", "none"), default="logit_normal")
    parser.add_argument("--logit_mean", type=float, default=0.0)
    parser.add_argument("--logit_std", type=float, default=1.0)
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Prompt dropout, for guidance.")
    parser.add_argument("--validation_prompts", nargs="*")
    add_validation_arguments(parser, steps=20, guidance_scale=3.0)
    args = add_common_arguments(parser).parse_args(argv)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    if args.logit_std <= 0:
        raise ValueError(f"`--logit_std` is {args.logit_std}; it must be positive.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, FluxTask(args))


if __name__ == "__main__":
    main()
