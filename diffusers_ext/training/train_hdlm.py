r"""Train or fine-tune a masked language model on hybrid noise: masks, and a few wrong tokens that it learns to find.

    accelerate launch -m diffusers_ext.training.train_hdlm --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --output_dir my-model

The epsilon-hybrid training of arXiv 2504.06416: each token becomes a mask with probability m, and else, with probability
`--epsilon`, a random token. The model predicts all tokens. Masked ones weigh 1 / m, wrong ones `--visible_weight` (1 - epsilon)
/ (1 - m), right ones `--visible_weight` epsilon / (1 - m). With `--hyperschedule`, m differs from place to place: a step of the
table is drawn, settled tokens are clean, those that are not yet begun are masks, and only active ones have a loss. The result
is for `AdaptiveCorrectionScheduler` and `HyperScheduleScheduler`, and loads as any masked language model of transformers.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from torch.nn import functional as F

from ..schedulers._hyperschedule import active_places, hyperschedule_levels, mask_rates
from ._card import training_card
from ._data import SampleNoise
from ._loop import add_run_arguments, check_common_arguments, setup_logging, train
from ._text import add_text_arguments
from .train_masked_diffusion_lm import MaskedDiffusionTask


def epsilon_hybrid_loss(
    model: Any,
    input_ids: torch.Tensor,
    mask_token_id: int,
    m: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    tokens: torch.Tensor,
    epsilon: float = 0.01,
    visible_weight: float = 1.0,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""The weighted cross-entropy of a text's active tokens, divided by their number; a mean over the texts.

    At a mask the best answer is the model of the language, as in `masked_diffusion_loss`, and with `epsilon=0` the losses are
    equal. At a visible token z it is :math:`p(x) (1/V + 1[x = z])`, up to a factor, where p is what the other places say and V
    the number of tokens: the weights count right and wrong tokens as if they were equally frequent.

    Args:
        model: called as `model(input_ids=, attention_mask=).logits`.
        input_ids: `(batch, length)` integers.
        mask_token_id: the mask, which is never a wrong token.
        m: `(batch, 1)` or `(batch, length)`, rates of masks; in (0, 1) for active tokens.
        u: `(batch, length)` uniform on [0, 1): a token is masked where u < m.
        v: `(batch, length)` uniform on [0, 1): an active one that is not masked becomes another where v < epsilon.
        tokens: `(batch, length)`, what it becomes.
        epsilon: share of wrong tokens.
        visible_weight: the paper's lambda.
        active: bool `(batch, length)`, which tokens have a loss; None for all.
    """
    active = torch.ones_like(input_ids, dtype=torch.bool) if active is None else active
    masked = u < m
    wrong = (v < epsilon) & active & ~masked
    noisy = torch.where(masked, mask_token_id, torch.where(wrong, tokens, input_ids))
    logits = model(input_ids=noisy, attention_mask=torch.ones_like(noisy)).logits[active]
    m, masked, wrong = m.expand_as(u)[active], masked[active], wrong[active]
    visible = visible_weight / (1 - m) * torch.where(wrong, 1 - epsilon, epsilon)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    losses = F.cross_entropy(logits, input_ids[active], reduction="none")
    losses = (losses * torch.where(masked, 1 / m, visible)).to(logits.dtype)
    total = losses.new_zeros(len(input_ids)).index_add(0, active.nonzero()[:, 0], losses)
    return (total / active.sum(1)).mean()


class HybridTask(MaskedDiffusionTask):
    """The task of `train_masked_diffusion_lm`, with another loss."""

    def prepare(self, dataset, accelerator):
        super().prepare(dataset, accelerator)
        args = self.args
        if args.hyperschedule is not None:
            levels = hyperschedule_levels(args.hyperschedule, args.max_seq_length, args.width, args.num_levels)
            active = active_places(levels, args.num_levels)
            rates = torch.where(active, mask_rates(levels, args.num_levels), (levels == args.num_levels).double())
            self.active, self.rates = active.to(self.device), rates.float().to(self.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, input_ids = self.args, batch["input_ids"]
        length, mask = input_ids.shape[1], self.tokenizer.mask_token_id
        time, u, v = noise.uniform(), noise.uniform(length), noise.uniform(length)
        tokens = noise.integers(len(self.tokenizer) - 1, length)
        tokens = tokens + (tokens >= mask)  # any but the mask
        if args.hyperschedule is None:
            m, active = (args.min_mask_ratio + (1 - args.min_mask_ratio) * time)[:, None], None
        else:
            step = (time * len(self.rates)).long()
            m, active = self.rates[step], self.active[step]
        return epsilon_hybrid_loss(
            self.model, input_ids, mask, m, u, v, tokens, args.epsilon, args.visible_weight, active
        )

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_hdlm", "AutoModelForMaskedLM", summary, ["masked-diffusion", "hybrid-noise"], "transformers"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--epsilon", type=float, default=0.01, help="Share of wrong tokens among those not masked.")
    parser.add_argument("--visible_weight", type=float, default=1.0, help="Weight of visible tokens, lambda.")
    parser.add_argument("--min_mask_ratio", type=float, default=1e-4, help="Smallest m, without a hyperschedule.")
    parser.add_argument(
        "--hyperschedule", choices=("full", "block", "sliding"), help="Without one, all places have the same m."
    )
    parser.add_argument("--width", type=int, default=8, help="Of a block or the window of the hyperschedule.")
    parser.add_argument("--num_levels", type=int, default=8, help="Levels of the hyperschedule, at least 2.")
    parser.add_argument("--num_validation_texts", type=int, default=2)
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    for name in ("epsilon", "min_mask_ratio"):
        value = getattr(args, name)
        if not (0.0 < value < 1.0 or (name == "epsilon" and value == 0)):
            raise ValueError(f"`--{name}` is {value}; it must lie in (0, 1){', or be 0' * (name == 'epsilon')}.")
    if not 0.0 <= args.visible_weight < float("inf"):
        raise ValueError(f"`--visible_weight` is {args.visible_weight}; it must be a number of at least 0.")
    for name, least in (("width", 1), ("num_levels", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, HybridTask(args))


if __name__ == "__main__":
    main()
