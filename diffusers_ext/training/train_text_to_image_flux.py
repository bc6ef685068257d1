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

from ._card import training_card
from ._data import SampleNoise
from ._diffusion import flow_matching_loss, write_samples
from ._flux import FluxTask, add_flux_arguments, check_flux_arguments
from ._loop import add_common_arguments, check_common_arguments, setup_logging, train


class TextToImageFluxTask(FluxTask):
    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        names = ["transformer", *(["text_encoder", "text_encoder_2"] if args.train_text_encoder else [])]
        self.trained = {name: getattr(self.pipeline, name).requires_grad_(True) for name in names}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.latents(batch, noise)
        tokens_velocity = self.velocity(self.captions(batch, noise), latents)
        if self.args.weighting_scheme == "logit_normal":  # Esser et al. 2024, equation 19
            sigmas = torch.sigmoid(self.args.logit_mean + self.args.logit_std * noise.normal())
        else:
            sigmas = noise.uniform()
        epsilon = noise.normal(*latents.shape[1:])

        def velocity(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            tokens, side = (
                tokens_velocity(self.pipeline._pack_latents(noisy, *noisy.shape), sigmas),
                self.args.resolution,
            )
            return self.pipeline._unpack_latents(tokens, side, side, self.pipeline.vae_scale_factor)

        return flow_matching_loss(velocity, latents, epsilon, sigmas)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        if not self.args.validation_prompts:
            return {}
        return write_samples(self.pictures(self.pipeline), self.args.num_validation_images, folder, step)

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
    add_flux_arguments(parser, validation_steps=20)
    parser.add_argument("--train_text_encoder", action="store_true", help="Train both text encoders too.")
    parser.add_argument("--weighting_scheme", choices=("logit_normal", "none"), default="logit_normal")
    parser.add_argument("--logit_mean", type=float, default=0.0)
    parser.add_argument("--logit_std", type=float, default=1.0)
    args = add_common_arguments(parser).parse_args(argv)
    check_flux_arguments(args)
    if args.logit_std <= 0:
        raise ValueError(f"`--logit_std` is {args.logit_std}; it must be positive.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, TextToImageFluxTask(args))


if __name__ == "__main__":
    main()
