"""Train a LoRA for the UNet of a Stable Diffusion pipeline on captioned pictures.

    accelerate launch -m diffusers_ext.training.train_text_to_image_lora --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --rank 4 --output_dir my-lora

The result is a folder with a standard LoRA file, which stock `pipe.load_lora_weights` loads.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ._diffusion import add_validation_arguments, check_proportion, check_snr_gamma
from ._loop import add_common_arguments, check_common_arguments, setup_logging, train
from ._lora import TrainableLora, add_lora_arguments, check_lora, lora_card
from .train_text_to_image import TextToImageTask

LOADING = """
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(BASE)
pipe.load_lora_weights(REPO)
image = pipe("a prompt").images[0]
"""


class TextToImageLoraTask(TextToImageTask):
    script = "train_text_to_image_lora"

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        set_seed(args.seed)  # the LoRA's first weights belong to the run
        self.lora = TrainableLora(self.pipeline, args.rank, args.lora_alpha)
        self.trained = {"lora": self.lora}

    def save(self, folder: Path) -> None:
        self.lora.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return lora_card(args, self.script, summary, ["text-to-image"], LOADING)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of a script that trains such a LoRA."""
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    add_lora_arguments(parser, rank=4)
    parser.add_argument("--cache_latents", action="store_true", help="Encode every picture once, before training.")
    parser.add_argument("--snr_gamma", type=float, help="min-SNR weighting; the paper uses 5.0.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Prompt dropout, for guidance.")
    parser.add_argument("--validation_prompts", nargs="*")
    add_validation_arguments(parser, steps=20, guidance_scale=3.0)
    add_common_arguments(parser).set_defaults(train_text_encoder=False)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    check_lora(args.rank, args.lora_alpha)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    check_snr_gamma(args.snr_gamma)
    check_common_arguments(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = new_parser(__doc__).parse_args(argv)
    check_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, TextToImageLoraTask(args))


if __name__ == "__main__":
    main()
