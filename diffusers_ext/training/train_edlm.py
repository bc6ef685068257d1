"""Train the energy of EDLM for a frozen masked language model, by noise-contrastive estimation.

    accelerate launch -m diffusers_ext.training.train_edlm --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --output_dir my-energy

A share of each text's tokens is masked, uniform from `--min_mask_ratio` to 1. The energy learns to tell the text from what the
model draws for the masks. It begins as the model itself (`NCEEnergy.from_denoiser`), and is for `EnergyReweightedScheduler`. The
denoiser is frozen.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ..models.nce_energy import NCEEnergy, nce_energy_loss
from ._card import training_card
from ._data import SampleNoise
from ._loop import Task, add_run_arguments, check_common_arguments, setup_logging, train
from ._text import TextWindows, add_text_arguments, load_documents


class EnergyTask(Task):
    on_device = ("input_ids",)

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        name = args.pretrained_model_name_or_path
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=args.revision)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"`--pretrained_model_name_or_path` is {name!r}, whose tokenizer has no mask token (`mask_token`)."
            )
        self.denoiser = AutoModelForMaskedLM.from_pretrained(name, revision=args.revision, dtype=torch.float32)
        self.denoiser.eval().requires_grad_(False)
        torch.manual_seed(args.seed)
        self.energy = NCEEnergy.from_denoiser(self.denoiser)
        self.trained = {"energy": self.energy}

    def dataset(self, args):
        return TextWindows(load_documents(args), self.tokenizer, args.max_seq_length)

    def prepare(self, dataset, accelerator):
        self.denoiser.to(accelerator.device)
        self.energy.to(accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        input_ids = batch["input_ids"]
        length, least = input_ids.shape[1], self.args.min_mask_ratio
        t = least + (1 - least) * noise.uniform()
        u, draws = noise.uniform(length), noise.uniform(length)
        mask, whole = self.tokenizer.mask_token_id, torch.ones_like(input_ids)
        return nce_energy_loss(self.energy, self.denoiser, input_ids, whole, mask, t, u, draws)

    def save(self, folder: Path) -> None:
        self.energy.eval()
        self.energy.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        where = args.hub_model_id or "path/to/this/folder"
        loading = (
            "import diffusers_ext as dx\n\n"
            f"pipe.scheduler = dx.EnergyReweightedScheduler()\n"
            f"pipe.scheduler.guide(pipe.model, dx.NCEEnergy.from_pretrained({where!r}))"
        )
        return training_card(
            args, "train_edlm", "NCEEnergy", summary, ["masked-diffusion"], "diffusers_ext", loading=loading
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="The denoiser.")
    parser.add_argument("--revision")
    parser.add_argument("--min_mask_ratio", type=float, default=1e-3, help="Smallest share of masked tokens.")
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    if not 0.0 < args.min_mask_ratio < 1.0:
        raise ValueError(f"`--min_mask_ratio` is {args.min_mask_ratio}; it must lie in (0, 1).")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, EnergyTask(args))


if __name__ == "__main__":
    main()
