"""Train or fine-tune a language model on hybrid noise (GIDD): masks, and tokens that were changed into others.

    accelerate launch -m diffusers_ext.training.train_gidd --pretrained_model_name_or_path MODEL \
        --train_data_dir texts/ --p_uniform 0.1 --output_dir my-model

The model is any masked language model of transformers (`AutoModelForMaskedLM`) whose tokenizer has a mask token, for example
one that was trained on masks alone. It learns to say of every place, the visible ones too, which token belongs there. The
result is sampled with `GIDDScheduler` of the same `p_uniform` and `gamma`, and corrects finished texts with `SelfCorrection`.
"""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any

import torch

from ..pipelines._masked_diffusion import MaskedDiffusionPipeline
from ..schedulers._token_noise import HybridNoise, tokens_but_mask
from ..schedulers.gidd import GIDDScheduler
from ._card import training_card
from ._data import SampleNoise
from ._loop import add_run_arguments, check_common_arguments, setup_logging, train
from ._text import add_text_arguments
from .train_masked_diffusion_lm import MaskedDiffusionTask

WEIGHTINGS = ("elbo", "dynamic", "released")
EPS = 1e-4  # times are from EPS to 1 - EPS
_GOLDEN = (math.sqrt(5) - 1) / 2


def gidd_weights(
    noise: HybridNoise,
    t: torch.Tensor,
    kept: torch.Tensor,
    masked: torch.Tensor,
    num_tokens: int,
    weighting: str = "elbo",
) -> torch.Tensor:
    r"""Weights of the loss at each position, `(batch, length)` float64.

    - "elbo": those of the bound, :math:`\frac{1}{t (1 - t)}` at masks, :math:`\frac{c + (1 - t) c'}{(1 - t) c}` at wrong tokens
      and :math:`\frac{c + (1 - t) c'}{N (1 - t)(1 - t + c / N)}` at kept ones.
    - "dynamic": 2, 1 and :math:`\frac{c}{N (1 - t) + c}`: what the paper trains with. For :math:`\gamma = 1` it is
      :math:`2 t (1 - t)` times the bound's.
    - "released": 2, 1 and :math:`\frac{B}{N + 1} e^{\gamma \mathrm{sigmoid}(-t) / 2}`, as the authors' code has them: nearly the
      same for all t at kept tokens. Their checkpoints were trained with it.

    Args:
        noise: the process.
        t: `(batch,)` in (0, 1).
        kept, masked: `(batch, length)` bool.
        num_tokens: N, the vocabulary without the mask.
        weighting: see above.

    Raises:
        ValueError: another `weighting`.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` is {weighting!r}; allowed are {', '.join(map(repr, WEIGHTINGS))}.")
    t = t.double()[:, None]
    c, gamma = noise.uniform_over_masks(t), noise.gamma
    if weighting == "elbo":
        wrong = 1 / (1 - t) + gamma * (1 - 2 * t) / (2 * t * (1 - t))  # (c + (1 - t) c') / ((1 - t) c)
        on_masks, on_kept = 1 / (t * (1 - t)), wrong * c / (num_tokens * (1 - t) + c)
    else:
        wrong, on_masks, on_kept = torch.ones_like(t), torch.full_like(t, 2.0), c / (num_tokens * (1 - t) + c)
        if weighting == "released":
            scale = c / (t * (1 - t)) ** (gamma / 2)
            on_kept = (scale / (num_tokens + 1) * (gamma / 2 * torch.sigmoid(-t)).exp()).clamp(max=2.0)
    return torch.where(masked, on_masks, torch.where(kept, on_kept, wrong))


def gidd_loss(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    noisy: torch.Tensor,
    t: torch.Tensor,
    mask_token_id: int,
    p_uniform: float = 0.1,
    gamma: float = 1.0,
    weighting: str = "elbo",
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Loss of GIDD in nats a token; with `weighting="elbo"` and t uniform a bound on the negative log-likelihood.

    At each position :math:`w\,(\mathrm{KL}(q_t(\cdot | x) \| q_t(\cdot | \hat x)) + r - \log r - 1)`, with :math:`r = q_t(z | x) /
    q_t(z | \hat x)` (von Rütte et al. 2025, arXiv 2503.04482). The best :math:`\hat x` at a visible place is what the *other*
    places say. With `p_uniform=0` it is the cross-entropy of masked tokens over t.

    Args:
        logits: `(batch, length, vocabulary)`; that of the mask is left out.
        input_ids: clean tokens x, `(batch, length)`.
        noisy: tokens z at time t, `(batch, length)`.
        t: `(batch,)`, times in (0, 1).
        mask_token_id: the mask.
        p_uniform, gamma: of the noise, see `HybridNoise`.
        weighting: "elbo", "dynamic" or "released", see `gidd_weights`.
        attention_mask: `(batch, length)`, 0 for tokens that do not count.

    Raises:
        ValueError: `p_uniform`, `gamma` or `weighting` is out of its range.
    """
    noise = HybridNoise(p_uniform, gamma)
    size = logits.shape[-1]
    count = size - (mask_token_id < size)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if mask_token_id < size:
        logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    masked, kept = noisy == mask_token_id, noisy == input_ids
    weights = gidd_weights(noise, t, kept, masked, count, weighting).to(logits.dtype)
    alpha, _, uniform = (share[:, None].to(logits.dtype) for share in noise.shares(t.double()))

    log_clean = torch.log_softmax(logits, -1)
    if p_uniform == 0:  # visible tokens are right, and of weight 0
        each = torch.where(masked, -alpha * log_clean.gather(-1, input_ids[..., None]).squeeze(-1), 0.0)
    else:
        u = uniform / count
        # Of q_t(v | xhat) = alpha xhat_v + u, the part above log u: small where xhat is, so that sums keep their digits
        over = torch.log1p(log_clean.exp() * (alpha / u)[..., None])
        at_x = over.gather(-1, input_ids[..., None]).squeeze(-1)
        at_z = over.gather(-1, noisy.clamp(max=size - 1)[..., None]).squeeze(-1)
        clean = torch.log1p(alpha / u)  # log q_t(x | x), above log u
        kl = (alpha + u) * (clean - at_x) - u * (over.sum(-1) - at_x)
        log_ratio = torch.where(masked, 0.0, torch.where(kept, clean, 0.0) - at_z)
        each = kl + log_ratio.exp() - log_ratio - 1
    each = weights * each
    if attention_mask is None:
        return each.mean()
    return (each * attention_mask).sum() / attention_mask.sum()


class GIDDTask(MaskedDiffusionTask):
    """Hybrid noise in place of masks; the rest is that of the masked training."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, input_ids, mask = self.args, batch["input_ids"], self.tokenizer.mask_token_id
        length = input_ids.shape[1]
        shortened = noise.uniform() < args.random_length_probability
        lengths = torch.where(shortened, 1 + noise.integers(length), length)
        attention_mask = (torch.arange(length, device=self.device) < lengths[:, None]).long()
        # Times of samples that follow one another lie far apart, in whatever batches and processes they are.
        number = torch.as_tensor(batch["sample_id"], dtype=torch.float64, device=self.device)
        t = EPS + (1 - 2 * EPS) * ((number + args.seed) * _GOLDEN % 1)
        others = tokens_but_mask(noise.integers(self.model.config.vocab_size - 1, length), mask)
        noisy = HybridNoise(args.p_uniform, args.gamma).add(input_ids, t, noise.uniform(length), others, mask)
        logits = self.model(input_ids=noisy, attention_mask=attention_mask).logits
        return gidd_loss(logits, input_ids, noisy, t, mask, args.p_uniform, args.gamma, args.weighting, attention_mask)

    def _draw(self, seed: int) -> str:
        pipe = MaskedDiffusionPipeline(self.model, GIDDScheduler(**self.process), self.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe(gen_length=self.args.max_seq_length, generator=torch.Generator().manual_seed(seed)).texts[0]

    @property
    def process(self) -> dict[str, float]:
        return {"p_uniform": self.args.p_uniform, "gamma": self.args.gamma}

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        loading = (
            "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\nimport diffusers_ext as dx\n\n"
            f"repo = {args.hub_model_id or 'path/to/this/folder'!r}\n"
            "model, tokenizer = AutoModelForMaskedLM.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)\n"
            f"scheduler = dx.GIDDScheduler(p_uniform={args.p_uniform}, gamma={args.gamma})\n"
            "pipe = dx.MaskedDiffusionPipeline(model, scheduler, tokenizer)\n"
            'text = pipe("A beginning", gen_length=64, num_inference_steps=128).texts[0]'
        )
        return training_card(
            args, "train_gidd", "AutoModelForMaskedLM", summary, ["masked-diffusion"], "transformers", loading
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--p_uniform", type=float, default=0.1, help="Share of changed tokens in mid-process.")
    parser.add_argument("--gamma", type=float, default=1.0, help="How steeply that share rises and falls.")
    parser.add_argument("--weighting", default="dynamic", choices=WEIGHTINGS, help="Weights of the loss.")
    parser.add_argument(
        "--random_length_probability", type=float, default=0.01, help="Share of windows cut to a random length."
    )
    parser.add_argument("--num_validation_texts", type=int, default=2)
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    for name in ("p_uniform", "random_length_probability"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must lie in [0, 1].")
    HybridNoise(args.p_uniform, args.gamma)
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, GIDDTask(args))


if __name__ == "__main__":
    main()
