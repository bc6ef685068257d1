"""Train a LoRA on captioned pictures, and every few steps repeat the last update while a validation loss falls (Fast Forward).

    accelerate launch -m diffusers_ext.training.train_fast_forward_lora --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --rank 4 --fast_forward_interval 6 --output_dir my-lora

The last `--fast_forward_pictures` of the pictures are not trained on; the loss on them is at noise and timesteps of their own
that never change. All else is as in `train_text_to_image_lora`.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ._data import SampleNoise, collate
from ._loop import setup_logging, train
from .fast_forward import FastForward
from .train_text_to_image_lora import TextToImageLoraTask, check_arguments, new_parser

_VALIDATION = 0x66617374  # a seed of its own: the noise of the validation set is not that of training


class First(Dataset):
    """The first rows of a dataset."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: Any) -> Any:
        return self.dataset[item]


class FastForwardTask(TextToImageLoraTask):
    script = "train_fast_forward_lora"

    def dataset(self, args: argparse.Namespace) -> First:
        everything, held_out = super().dataset(args), args.fast_forward_pictures
        if len(everything) <= held_out:
            raise ValueError(
                f"`--fast_forward_pictures` is {held_out}, and there are {len(everything)} pictures; some must be left to train on."
            )
        return First(everything, len(everything) - held_out)

    def prepare(self, dataset: First, accelerator: Accelerator) -> None:
        super().prepare(dataset.dataset, accelerator)
        args, held_out = self.args, range(len(dataset), len(dataset.dataset))

        def validation_loss() -> float:
            # One number for all processes, to the last bit: each decides by it.
            return accelerator.reduce(self.fixed_loss(dataset.dataset, held_out, accelerator), "mean").item()

        self.callbacks = (
            FastForward(
                (parameter for module in self.trained.values() for parameter in module.parameters()), validation_loss,
                interval=args.fast_forward_interval, warmup=args.fast_forward_warmup_steps,
                patience=args.fast_forward_patience,
            ),
        )  # fmt: skip

    @torch.no_grad()
    def fixed_loss(self, dataset: Any, rows: range, accelerator: Accelerator) -> torch.Tensor:
        """Mean loss of these rows at noise and timesteps that depend on the seed and the row only."""
        total = torch.zeros((), device=self.device)
        for start in range(0, len(rows), self.args.train_batch_size):
            chunk = rows[start : start + self.args.train_batch_size]
            batch = collate([dataset[(row, row)] for row in chunk])
            batch |= {name: batch[name].to(self.device) for name in self.on_device}
            noise = SampleNoise(_VALIDATION ^ self.args.seed, batch["sample_id"], self.device)
            with accelerator.autocast():
                total += self.loss(batch, noise).float() * len(chunk) / len(rows)
        return total


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--fast_forward_interval", type=float, default=6, help="Optimizer steps; inf: never.")
    parser.add_argument("--fast_forward_pictures", type=int, default=32, help="Held out, for the validation loss.")
    parser.add_argument("--fast_forward_warmup_steps", type=int, default=0)
    parser.add_argument(
        "--fast_forward_patience", type=int, default=3, help="Stages without a gain until there are no more."
    )
    args = parser.parse_args(argv)
    check_arguments(args)
    interval = args.fast_forward_interval
    if not (interval == math.inf or (interval >= 1 and interval == int(interval))):
        raise ValueError(f"`--fast_forward_interval` is {interval}; it must be a whole number from 1, or inf.")
    for name, least in (("fast_forward_pictures", 1), ("fast_forward_warmup_steps", 0), ("fast_forward_patience", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, FastForwardTask(args))


if __name__ == "__main__":
    main()
