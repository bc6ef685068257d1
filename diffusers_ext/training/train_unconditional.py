"""Train or fine-tune the UNet of a `DDPMPipeline` on pictures, in pixel space.

    accelerate launch -m diffusers_ext.training.train_unconditional --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 64 --output_dir my-model

The result is a pipeline folder that the stock `DDPMPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ._card import training_card
from ._data import SampleNoise, load_dataset
from ._diffusion import add_validation_arguments, check_snr_gamma, diffusion_loss, write_samples
from ._loop import Task, add_common_arguments, check_common_arguments, setup_logging, train


class UnconditionalTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.pipeline = DDPMPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if self.pipeline.unet.config.sample_size != args.resolution:
            raise ValueError(
                f"`--resolution` is {args.resolution}; this UNet draws {self.pipeline.unet.config.sample_size}."
            )
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.trained = {"unet": self.pipeline.unet}

    def dataset(self, args):
        return load_dataset(args, annotations=())

    def prepare(self, dataset, accelerator):
        channels, given = self.pipeline.unet.config.in_channels, dataset[0]["pixel_values"].shape[0]
        if given != channels:
            raise ValueError(f"The pictures have {given} channels; this UNet takes {channels}.")
        self.pipeline.to(accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        clean = batch["pixel_values"]
        timesteps = noise.integers(self.scheduler.config.num_train_timesteps)
        epsilon = noise.normal(*clean.shape[1:])

        def denoise(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.pipeline.unet(noisy, t, return_dict=False)[0]

        return diffusion_loss(denoise, self.scheduler, clean, epsilon, timesteps, self.args.snr_gamma)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        # The deterministic sampler shows a model's progress in few steps.
        pipeline = DDPMPipeline(self.pipeline.unet, DDIMScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            self.args.num_validation_images, generator=torch.Generator("cpu").manual_seed(0),
            num_inference_steps=self.args.validation_inference_steps,
        ).images  # fmt: skip
        return write_samples(pictures, min(8, len(pictures)), folder, step)

    def save(self, folder: Path) -> None:
        self.pipeline.unet.eval()
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_unconditional", "DDPMPipeline", summary, ["unconditional-image-generation"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--snr_gamma", type=float, help="min-SNR weighting; the paper uses 5.0.")
    add_validation_arguments(parser, steps=50)
    args = add_common_arguments(parser).parse_args(argv)
    check_snr_gamma(args.snr_gamma)
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, UnconditionalTask(args))


if __name__ == "__main__":
    main()
