"""Train or fine-tune a masked diffusion language model on texts.

    accelerate launch -m diffusers_ext.training.train_masked_diffusion_lm --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --output_dir my-model

The model is any masked language model of transformers (`AutoModelForMaskedLM`) whose tokenizer has a mask token. The
loss is the exact bound of absorbing diffusion without time conditioning (Sahoo et al. 2024, equation 10; Ou et al. 2024,
equation 3.6): mask each token with probability t, and weigh the cross-entropy of the masked ones by 1 / t. With `--loss
k_dce` the number k of masks is drawn and not their rate, and the weight is length / k (Ou et al. 2024, equation 3.9): the
same bound, the negative log-likelihood of any-order autoregression. The loss over diffusion time that the paper calls t-DCE
is the first one with t = 1 - e^(-sigma).
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ._card import training_card
from ._data import SampleNoise
from ._loop import Task, add_run_arguments, check_common_arguments, setup_logging, train
from ._text import TextWindows, add_text_arguments, load_documents


def masked_diffusion_loss(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask_token_id: int, t: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Bound on the negative log-likelihood, in nats a token, of the tokens that `attention_mask` keeps.

    Args:
        model: called as `model(input_ids=, attention_mask=).logits`.
        input_ids, attention_mask: `(batch, length)` integers.
        mask_token_id: the absorbing state.
        t: `(batch,)` in (0, 1], how much is masked; the log-linear schedule, alpha_t = 1 - t.
        u: `(batch, length)` uniform on [0, 1): a token is masked where u < t.
    """
    masked = (u < t[:, None]) & attention_mask.bool()
    return _weighted_loss(model, input_ids, attention_mask, mask_token_id, masked, 1.0 / t)


def any_order_loss(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask_token_id: int, k: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """The same bound from an exact number of masks: `k` of them in each row, of weight length / k.

    Args:
        model, input_ids, attention_mask, mask_token_id: as in `masked_diffusion_loss`.
        k: `(batch,)` integers from 1 to the number of tokens that `attention_mask` keeps in the row.
        u: `(batch, length)` uniform on [0, 1): the kept tokens with the k smallest numbers are masked.
    """
    kept = attention_mask.bool()
    rank = u.masked_fill(~kept, torch.inf).argsort(1).argsort(1)
    masked = (rank < k[:, None]) & kept
    return _weighted_loss(model, input_ids, attention_mask, mask_token_id, masked, kept.sum(1) / k)


def _weighted_loss(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mask_token_id: int,
    masked: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the masked tokens, times the weight `(batch,)` of their row, over the number of kept tokens."""
    noisy = torch.where(masked, mask_token_id, input_ids)
    logits = model(input_ids=noisy, attention_mask=attention_mask).logits
    # A clean token is never the mask itself (zero masking probabilities, Sahoo et al. 2024, section 3.2.3).
    chosen = logits[masked].float().index_fill(1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    weights = weight[:, None].expand_as(masked)[masked]
    total = (F.cross_entropy(chosen, input_ids[masked], reduction="none") * weights).sum()
    return total / attention_mask.sum()


class MaskedDiffusionTask(Task):
    on_device = ("input_ids",)

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"`--pretrained_model_name_or_path` is {args.pretrained_model_name_or_path!r}, whose tokenizer has no "
                "mask token (`mask_token`)."
            )
        self.model = AutoModelForMaskedLM.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        self.trained = {"model": self.model}

    def dataset(self, args):
        return TextWindows(load_documents(args), self.tokenizer, args.max_seq_length)

    def prepare(self, dataset, accelerator):
        self.model.to(accelerator.device)
        self.device = accelerator.device

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        input_ids = batch["input_ids"]
        length = input_ids.shape[1]
        uniform = noise.uniform()
        shortened = noise.uniform() < self.args.random_length_probability
        lengths = torch.where(shortened, 1 + noise.integers(length), length)
        attention_mask = (torch.arange(length, device=self.device) < lengths[:, None]).long()
        mask, u = self.tokenizer.mask_token_id, noise.uniform(length)
        if self.args.loss == "k_dce":
            return any_order_loss(self.model, input_ids, attention_mask, mask, 1 + (uniform * lengths).long(), u)
        t = self.args.min_mask_ratio + (1.0 - self.args.min_mask_ratio) * uniform
        return masked_diffusion_loss(self.model, input_ids, attention_mask, mask, t, u)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        text = "\n\n".join(self._draw(seed) for seed in range(self.args.num_validation_texts))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{step:06d}.txt").write_text(text + "\n", encoding="utf-8")
        return {}

    def _draw(self, seed: int) -> str:
        """A text, one token at a time in random order: exact ancestral sampling of the model."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.full((1, self.args.max_seq_length), self.tokenizer.mask_token_id, device=self.device)
        for position in torch.randperm(ids.shape[1], generator=generator).tolist():
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, position].float().cpu()
            logits[self.tokenizer.mask_token_id] = -torch.inf
            ids[0, position] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[0]
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self.model.eval()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_masked_diffusion_lm", "AutoModelForMaskedLM", summary, ["masked-diffusion"], "transformers"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument(
        "--loss",
        default="lambda_dce",
        choices=("lambda_dce", "k_dce"),
        help="Whether the rate or the number of masks is drawn.",
    )
    parser.add_argument("--min_mask_ratio", type=float, default=1e-3, help="Smallest t: bounds the weight 1 / t.")
    parser.add_argument(
        "--random_length_probability", type=float, default=0.01, help="Share of windows cut to a random length."
    )
    parser.add_argument("--num_validation_texts", type=int, default=2)
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    if not 0.0 < args.min_mask_ratio < 1.0:
        raise ValueError(f"`--min_mask_ratio` is {args.min_mask_ratio}; it must lie in (0, 1).")
    if not 0.0 <= args.random_length_probability <= 1.0:
        raise ValueError(f"`--random_length_probability` is {args.random_length_probability}; it must lie in [0, 1].")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, MaskedDiffusionTask(args))


if __name__ == "__main__":
    main()
