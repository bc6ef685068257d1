r"""Fine-tune a masked language model as a diffusion model with the spindle schedule: rare tokens are masked earlier.

    accelerate launch -m diffusers_ext.training.train_diffusion_bert --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --output_dir my-model

The training of DiffusionBERT (arXiv 2211.15029), without a time input, which its authors found best. Word frequencies are those
of the training texts. The result is a pipeline with its scheduler:

    pipe = DiffusionPipeline.from_pretrained("my-model")      # with `import diffusers_ext`
    pipe(gen_length=64, num_inference_steps=128)

The loss tells the model how fast each hidden token appears, and so is no bound of the likelihood where `--lam` is above 0;
`spindle_bound` is one.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..pipelines.masked_diffusion import MaskedDiffusionPipeline
from ..schedulers._spindle import MAX_LAMBDA, WordFrequencies, survival, unmask_chance
from ..schedulers.spindle import SpindleScheduler
from ._card import training_card
from ._data import SampleNoise
from ._loop import add_run_arguments, check_common_arguments, setup_logging, train
from ._text import add_text_arguments
from .train_masked_diffusion_lm import MaskedDiffusionTask


def spindle_diffusion_loss(
    model: Any,
    input_ids: torch.Tensor,
    mask_token_id: int,
    frequencies: WordFrequencies,
    k: torch.Tensor,
    num_steps: int,
    u: torch.Tensor,
    lam: float = 0.3,
    hybrid_weight: float = 0.01,
) -> torch.Tensor:
    r"""Cross-entropy of hidden tokens times their chance to appear in the step, and a little of that of all tokens; a mean.

    The first is the divergence of a reverse step whose model is told the true schedule of every hidden token. The authors' code
    has the plain schedule's rate in that chance; here it is the token's own, and with `lam=0` they are the same. `num_steps`
    times it, with `lam=0` and `hybrid_weight=0`, is the loss of `train_masked_diffusion_lm` at the rate k / T.

    Args:
        model: called as `model(input_ids=, attention_mask=).logits`.
        input_ids: `(batch, length)` integers.
        mask_token_id: the mask.
        frequencies: of the tokens.
        k: `(batch,)` integers, 1 to T: the step.
        num_steps: T.
        u: `(batch, length)` uniform on [0, 1): a token is hidden where u is at least its survival probability.
        lam: of the schedule, 0 to 1 / pi.
        hybrid_weight: of the second term.
    """
    s, t, centred, log_p, masked = _predict(model, input_ids, mask_token_id, frequencies, k, num_steps, u, lam)
    losses = -log_p.gather(-1, input_ids[..., None]).squeeze(-1)
    weight = torch.where(masked, unmask_chance(s, t, centred, lam), 0.0).to(losses.dtype) + hybrid_weight
    return (weight * losses).mean()


@torch.no_grad()
def spindle_bound(
    model: Any,
    input_ids: torch.Tensor,
    mask_token_id: int,
    frequencies: WordFrequencies,
    k: torch.Tensor,
    num_steps: int,
    u: torch.Tensor,
    lam: float = 0.3,
) -> torch.Tensor:
    r"""An estimate from one step each of a bound on the negative log-likelihood of texts under `SpindleScheduler`: `(batch,)`
    nats.

    T times the divergence of the reverse step that is taken: for each hidden token x,

    .. math::
        h_x \log\frac{h_x}{p_x \hat h_x} + (1 - h_x) \log\frac{1 - h_x}{1 - \sum_v p_v \hat h_v},

    with h of the true text and :math:`\hat h` of the likeliest one. Its mean over k, uniform on 1 to T, and u is the bound.
    Arguments are those of `spindle_diffusion_loss`.
    """
    s, t, centred, log_p, masked = _predict(model, input_ids, mask_token_id, frequencies, k, num_steps, u, lam)
    log_p = log_p.double()
    guess = torch.where(masked, log_p.argmax(-1), input_ids)
    true = unmask_chance(s, t, centred, lam)
    mean = frequencies.mean(guess, torch.ones_like(guess))
    own = frequencies.frequency.double() - mean[..., None]  # (batch, 1, vocabulary)
    told = unmask_chance(s[..., None], t[..., None], own, lam).expand_as(log_p)
    appears = log_p.gather(-1, input_ids[..., None]) + told.gather(-1, input_ids[..., None]).log()
    stays = torch.log1p(-(log_p.exp() * told).sum(-1).clamp(max=1))
    divergence = torch.xlogy(true, true) - true * appears.squeeze(-1)
    left = 1 - true  # none where s is 0
    divergence = divergence + torch.where(left > 1e-12, torch.xlogy(left, left) - left * stays, 0.0)
    return num_steps * torch.where(masked, divergence, 0.0).sum(1)


def _predict(
    model: Any,
    input_ids: torch.Tensor,
    mask_token_id: int,
    frequencies: WordFrequencies,
    k: torch.Tensor,
    num_steps: int,
    u: torch.Tensor,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times s and t of the step `(batch, 1)`, centred frequencies and log-probabilities of the texts, and what is hidden."""
    s, t = ((k.double() - 1) / num_steps)[:, None], (k.double() / num_steps)[:, None]
    centred = frequencies.frequency.double()[input_ids] - frequencies.mean(input_ids, torch.ones_like(input_ids))
    masked = u >= survival(t, centred, lam)
    noisy = torch.where(masked, mask_token_id, input_ids)
    logits = model(input_ids=noisy, attention_mask=torch.ones_like(noisy)).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    return s, t, centred, F.log_softmax(logits, -1), masked


class SpindleTask(MaskedDiffusionTask):
    """The task of `train_masked_diffusion_lm`, with another noise."""

    def prepare(self, dataset, accelerator):
        super().prepare(dataset, accelerator)
        counts = torch.bincount(dataset.tokens.long(), minlength=self.model.config.vocab_size)
        self.frequencies = WordFrequencies.from_counts(counts, self.tokenizer.pad_token_id).to(self.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, input_ids = self.args, batch["input_ids"]
        k, u = 1 + noise.integers(args.num_diffusion_steps), noise.uniform(input_ids.shape[1])
        mask = self.tokenizer.mask_token_id
        return spindle_diffusion_loss(
            self.model, input_ids, mask, self.frequencies, k, args.num_diffusion_steps, u, args.lam, args.hybrid_weight
        )

    def save(self, folder: Path) -> None:
        self.model.eval()
        config = SpindleScheduler(lam=self.args.lam, block_length=self.args.max_seq_length).config
        scheduler = SpindleScheduler.from_config(config, statistics=self.frequencies)
        MaskedDiffusionPipeline(self.model, scheduler, self.tokenizer).save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        where = args.hub_model_id or "path/to/this/folder"
        loading = f"import diffusers_ext as dx\n\npipe = dx.MaskedDiffusionPipeline.from_pretrained({where!r})"
        return training_card(
            args, "train_diffusion_bert", "MaskedDiffusionPipeline", summary, ["masked-diffusion"], "diffusers_ext",
            loading=loading,
        )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--lam", type=float, default=0.3, help="How far the schedules of tokens differ, 0 to 1 / pi.")
    parser.add_argument("--num_diffusion_steps", type=int, default=2048, help="Steps of the process.")
    parser.add_argument("--hybrid_weight", type=float, default=0.01, help="Weight of the cross-entropy of all tokens.")
    parser.add_argument("--num_validation_texts", type=int, default=2)
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    if not 0.0 <= args.lam <= MAX_LAMBDA:
        raise ValueError(f"`--lam` is {args.lam}; it must lie in [0, {MAX_LAMBDA:.4f}], 1 / pi.")
    if args.num_diffusion_steps < 1:
        raise ValueError(f"`--num_diffusion_steps` is {args.num_diffusion_steps}; it must be at least 1.")
    if not 0.0 <= args.hybrid_weight < float("inf"):
        raise ValueError(f"`--hybrid_weight` is {args.hybrid_weight}; it must be a number of at least 0.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, SpindleTask(args))


if __name__ == "__main__":
    main()
