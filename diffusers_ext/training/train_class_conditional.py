"""Train or fine-tune the transformer of a `DiTPipeline` on pictures with classes.

    accelerate launch -m diffusers_ext.training.train_class_conditional --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 256 --output_dir my-model

The result is a pipeline folder that the stock `DiTPipeline.from_pretrained` loads. A share of the labels is replaced by
the pipeline's null class 1000, so that guidance works (Ho & Salimans 2022, algorithm 1).
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from diffusers.models.embeddings import LabelEmbedding

from ._card import training_card
from ._data import SampleNoise, load_dataset
from ._diffusion import (
    Latents,
    add_validation_arguments,
    check_proportion,
    check_snr_gamma,
    diffusion_loss,
    write_samples,
)
from ._loop import Task, add_common_arguments, check_common_arguments, setup_logging, train

NULL_CLASS = 1000  # written out in `DiTPipeline.__call__`


class ClassConditionalTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        pipeline = DiTPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if args.vae_path is not None:
            pipeline.vae = AutoencoderKL.from_pretrained(args.vae_path)
        if pipeline.transformer.config.num_embeds_ada_norm != NULL_CLASS:
            raise ValueError(
                f"`--pretrained_model_name_or_path`: `num_embeds_ada_norm` is "
                f"{pipeline.transformer.config.num_embeds_ada_norm}; `DiTPipeline` guides with class {NULL_CLASS}, so it "
                f"must be {NULL_CLASS}."
            )
        for module in pipeline.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # each block would drop labels of its own, from the global generator
        pipeline.vae.requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.trained = pipeline, {"transformer": pipeline.transformer}
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def dataset(self, args):
        dataset = load_dataset(args, annotations=("label",))
        outside = sorted({label for label in dataset.labels if not 0 <= label < NULL_CLASS})
        if outside:
            raise ValueError(f"`--label_column` {args.label_column!r} holds {outside[:5]}; allowed are 0 to 999.")
        self.classes = sorted(set(dataset.labels))
        return dataset

    def prepare(self, dataset, accelerator):
        self.pipeline.to(accelerator.device)
        self.latents = Latents(self.pipeline.vae, self.args, dataset, accelerator.device)
        wanted, given = self.pipeline.transformer.config.sample_size, self.latents.shape[-1]
        if wanted != given:
            raise ValueError(
                f"`--resolution` {self.args.resolution} gives latents of side {given}; this transformer takes {wanted}."
            )

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.latents(batch, noise)
        dropped = noise.uniform() < self.args.proportion_empty_labels
        labels = batch["label"].to(latents.device).masked_fill(dropped, NULL_CLASS)
        timesteps = noise.integers(self.scheduler.config.num_train_timesteps)
        epsilon = noise.normal(*latents.shape[1:])
        channels = latents.shape[1]

        def denoise(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            prediction = self.pipeline.transformer(noisy, timestep=t, class_labels=labels, return_dict=False)[0]
            return prediction[:, :channels]  # the released models also predict the variance, which is left alone

        return diffusion_loss(denoise, self.scheduler, latents, epsilon, timesteps, self.args.snr_gamma)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        count = self.args.num_validation_images
        labels = [label for label in self.classes[:10] for _ in range(count)]
        pictures = self.pipeline(
            labels, guidance_scale=self.args.validation_guidance_scale, generator=torch.Generator("cpu").manual_seed(0),
            num_inference_steps=self.args.validation_inference_steps,
        ).images  # fmt: skip
        return write_samples(pictures, count, folder, step)

    def save(self, folder: Path) -> None:
        self.pipeline.transformer.eval()
        names: dict[int, list[str]] = {}
        for name, label in self.pipeline.labels.items():
            names.setdefault(label, []).append(name)
        if names:  # loading takes `id2label`, and saving forgets it
            self.pipeline.register_to_config(id2label={label: ", ".join(names[label]) for label in sorted(names)})
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_class_conditional", "DiTPipeline", summary, ["class-conditional"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--snr_gamma", type=float, help="min-SNR weighting; the paper uses 5.0.")
    parser.add_argument("--proportion_empty_labels", type=float, default=0.1, help="Label dropout, for guidance.")
    add_validation_arguments(parser, steps=20, guidance_scale=2.0)
    args = add_common_arguments(parser).parse_args(argv)
    check_proportion("proportion_empty_labels", args.proportion_empty_labels)
    check_snr_gamma(args.snr_gamma)
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, ClassConditionalTask(args))


if __name__ == "__main__":
    main()
