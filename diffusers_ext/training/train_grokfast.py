"""Train a LoRA on captioned pictures with gradients whose slow part is amplified (Grokfast).

    accelerate launch -m diffusers_ext.training.train_grokfast --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --grad_filter ema --adam_weight_decay 0.01 --output_dir my-lora

All else is as in `train_text_to_image_lora`. Any other task of this package takes the filter as one of its `callbacks`.
"""

from __future__ import annotations

import argparse
from typing import Any

from accelerate import Accelerator

from ._loop import setup_logging, train
from .grokfast import GrokfastEMA, GrokfastMA
from .train_text_to_image_lora import TextToImageLoraTask, check_arguments, new_parser


class GrokfastTask(TextToImageLoraTask):
    script = "train_grokfast"

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.callbacks = (gradient_filter(self.args, self.lora.parameters()),)


def gradient_filter(args: argparse.Namespace, parameters: Any) -> GrokfastEMA | GrokfastMA:
    """The filter that the arguments ask for."""
    lamb = {} if args.grad_filter_lamb is None else {"lamb": args.grad_filter_lamb}
    if args.grad_filter == "ema":
        return GrokfastEMA(parameters, args.grad_filter_alpha, **lamb)
    return GrokfastMA(parameters, args.grad_filter_window, **lamb)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--grad_filter", choices=("ema", "ma"), default="ema")
    parser.add_argument("--grad_filter_alpha", type=float, default=0.98, help="Of `ema`.")
    parser.add_argument("--grad_filter_window", type=int, default=100, help="Of `ma`.")
    parser.add_argument("--grad_filter_lamb", type=float, help="Not given: 2 of `ema`, 5 of `ma`.")
    args = parser.parse_args(argv)
    check_arguments(args)
    if not 0 < args.grad_filter_alpha < 1:
        raise ValueError(f"`--grad_filter_alpha` is {args.grad_filter_alpha}; it must lie between 0 and 1.")
    if args.grad_filter_window < 1:
        raise ValueError(f"`--grad_filter_window` is {args.grad_filter_window}; it must be at least 1.")
    if args.grad_filter_lamb is not None and not args.grad_filter_lamb >= 0:
        raise ValueError(f"`--grad_filter_lamb` is {args.grad_filter_lamb}; it must be at least 0.")
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, GrokfastTask(args))


if __name__ == "__main__":
    main()
