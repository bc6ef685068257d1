"""Train the planner of planned denoising (DDPD): which tokens of a text are noise.

    accelerate launch -m diffusers_ext.training.train_ddpd --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --output_dir my-planner

The model is one of transformers whose kind has token classification (`AutoModelForTokenClassification`), and whose tokenizer
has a mask token; the body of a masked language model is a good beginning. It becomes the `planner` of
`PlannedDenoisingPipeline`, beside a masked language model with the same tokenizer.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, AutoTokenizer

from ..schedulers._token_noise import tokens_but_mask
from ._card import training_card
from ._data import SampleNoise
from ._loop import add_run_arguments, check_common_arguments, setup_logging, train
from ._text import add_text_arguments
from .train_masked_diffusion_lm import MaskedDiffusionTask


def planner_loss(
    logits: torch.Tensor,
    noised: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    weighted: bool = False,
) -> torch.Tensor:
    """Cross-entropy of "this token was redrawn" (Liu et al. 2024, arXiv 2410.06264).

    Args:
        logits: `(batch, length)`.
        noised: `(batch, length)` bool, tokens that were redrawn, also those that came out as before.
        attention_mask: `(batch, length)`, 0 for tokens that do not count.
        weighted: whether each text counts by the sum over its tokens, divided by the number that was redrawn: the weight of
            the bound on the likelihood. Otherwise it is the mean over all tokens.
    """
    counted = torch.ones_like(logits) if attention_mask is None else attention_mask.to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, noised.to(logits.dtype), reduction="none") * counted
    if not weighted:
        return each.sum() / counted.sum()
    return (each.sum(-1) / (noised * counted).sum(-1).clamp(min=1)).mean()


class PlannerTask(MaskedDiffusionTask):
    """Texts as for a masked model; tokens are redrawn in place of masked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        source = args.pretrained_model_name_or_path
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=args.revision)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"`--pretrained_model_name_or_path` is {source!r}, whose tokenizer has no mask token (`mask_token`)."
            )
        set_seed(args.seed)  # the first weights of the head belong to the run
        self.model = AutoModelForTokenClassification.from_pretrained(
            source, revision=args.revision, num_labels=1, dtype=torch.float32
        )
        self.trained = {"model": self.model}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        input_ids, mask = batch["input_ids"], self.tokenizer.mask_token_id
        length = input_ids.shape[1]
        level = noise.uniform()
        shortened = noise.uniform() < self.args.random_length_probability
        lengths = torch.where(shortened, 1 + noise.integers(length), length)
        attention_mask = (torch.arange(length, device=self.device) < lengths[:, None]).long()
        noised = noise.uniform(length) < level[:, None]
        others = tokens_but_mask(noise.integers(len(self.tokenizer) - 1, length), mask)
        noisy = torch.where(noised, others, input_ids)
        logits = self.model(input_ids=noisy, attention_mask=attention_mask).logits.squeeze(-1)
        return planner_loss(logits.float(), noised, attention_mask, self.args.loss == "elbo")

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        return {}  # a planner alone writes no texts

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        loading = (
            "from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, AutoTokenizer\n\n"
            "import diffusers_ext as dx\n\n"
            f"repo = {args.hub_model_id or 'path/to/this/folder'!r}\n"
            "planner, tokenizer = AutoModelForTokenClassification.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)\n"
            'denoiser = AutoModelForMaskedLM.from_pretrained("path/to/the/masked/language/model")\n'
            "pipe = dx.PlannedDenoisingPipeline(planner, denoiser, dx.DDPDScheduler(), tokenizer)\n"
            'text = pipe("A beginning", gen_length=64).texts[0]'
        )
        return training_card(
            args,
            "train_ddpd",
            "AutoModelForTokenClassification",
            summary,
            ["planned-denoising"],
            "transformers",
            loading,
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument(
        "--loss", default="mean", choices=("mean", "elbo"), help="The mean over tokens, or the weight of the bound."
    )
    parser.add_argument(
        "--random_length_probability", type=float, default=0.01, help="Share of windows cut to a random length."
    )
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    if not 0.0 <= args.random_length_probability <= 1.0:
        raise ValueError(f"`--random_length_probability` is {args.random_length_probability}; it must lie in [0, 1].")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, PlannerTask(args))


if __name__ == "__main__":
    main()
