r"""Measures of text models: likelihood or its bound, validity, entropy, tokens per second.

A model is called as `model(input_ids, attention_mask=...).logits`, `(batch, length, vocabulary)`, and is masked
(predicts the tokens under masks, at their places) or causal (predicts the next token). Token i counts for position i in
both. All likelihoods are in nats and `float64`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from .intervals import bootstrap_interval
from .timing import RatioEstimate, TimeRatios, time_ratio

_MAX_ENUMERATED = 16  # scored positions; 65,535 masks


class _Language(Protocol):
    def validity(self, tokens: torch.Tensor) -> torch.Tensor: ...


# --- likelihood ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of sequences, or an upper bound on it.

    Attributes:
        nats: `(n,)`, of each sequence.
        tokens: `(n,)`, how many of its tokens were scored.
    """

    nats: torch.Tensor
    tokens: torch.Tensor

    @property
    def nats_per_token(self) -> float:
        """Over all sequences together, so that a long one counts for more."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """:math:`e` to the nats per token."""
        return math.exp(self.nats_per_token)

    def per(self, units: torch.Tensor) -> Likelihood:
        """The same likelihood counted in other units, such as the characters `(n,)` of each sequence.

        Numbers per token are comparable only under the same tokenizer; per character or word they always are.

        Raises:
            ValueError: not one positive number a sequence.
        """
        units = torch.as_tensor(units)
        if units.shape != self.tokens.shape or not bool((units > 0).all()):
            raise ValueError(
                f"`units` has shape {tuple(units.shape)}; it must hold {len(self.tokens)} positive numbers."
            )
        return Likelihood(self.nats, units)

    def interval(self, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of `nats_per_token` over sequences; arguments as `bootstrap_interval`.

        Raises:
            ValueError: a sequence has an infinite likelihood, or `level` is not inside (0, 1).
        """
        infinite = int((~torch.isfinite(self.nats)).sum())
        if infinite:
            raise ValueError(f"{infinite} of {len(self.nats)} sequences are impossible under the model: no interval.")
        nats, tokens = self.nats.cpu().numpy(), self.tokens.cpu().double().numpy()

        def ratio(drawn: np.ndarray, axis: int) -> np.ndarray:
            rows: np.ndarray = drawn.astype(np.int64)
            return nats[rows].sum(axis) / tokens[rows].sum(axis)

        return bootstrap_interval(np.arange(len(nats)), ratio, level, resamples, seed)


@torch.no_grad()
def exact_nll(
    model: Callable[..., Any],
    input_ids: torch.Tensor,
    mask_token_id: int | None = None,
    attention_mask: torch.Tensor | None = None,
    scored: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    batch_size: int = 64,
) -> Likelihood:
    r"""Negative log-likelihood by the chain rule, :math:`-\sum_j \log p(x_{o(j)} | x_{o(1)}, \dots, x_{o(j-1)})`.

    A masked model needs one pass a scored token, with all tokens that are later in the order under masks. What comes
    out is the likelihood of the sampler that writes one token at a time in that order; it is the same for every order
    only if the model's conditionals have a joint distribution in common. A causal model needs one pass.

    Args:
        model: masked or causal.
        input_ids: `(n, length)`, complete.
        mask_token_id: of a masked model; None for a causal one. No probability goes to it.
        attention_mask: `(n, length)`, 0 for padding; handed on to the model.
        scored: bool `(n, length)`, the positions that count; the others are given. Default: all but padding, and for a
            causal model all but padding and the first token, which nothing precedes.
        order: a permutation of the positions, `(length,)`; default left to right. Masked models only.
        batch_size: rows in one pass.

    Raises:
        ValueError: shapes do not fit, masks in what is scored, nothing to score in a row, or a causal model asked for
            its first token or for another order.
    """
    input_ids, attention_mask, scored = _checked(input_ids, attention_mask, scored, mask_token_id, batch_size)
    length = input_ids.shape[1]
    if mask_token_id is None:
        if order is not None:
            raise ValueError("`order` is given for a causal model, which has only one order; leave it out.")
        return _causal_nll(model, input_ids, attention_mask, scored, batch_size)
    rank = torch.arange(length, device=input_ids.device)
    if order is not None:
        if not torch.equal(torch.sort(torch.as_tensor(order).cpu()).values, torch.arange(length)):
            raise ValueError(f"`order` is {order!r}; it must hold 0 to {length - 1} once each.")
        rank = torch.argsort(torch.as_tensor(order, device=input_ids.device))
    row, position = scored.nonzero(as_tuple=True)
    nats = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    with tqdm(total=len(row), desc="Likelihood", unit="token", delay=2.0, leave=False) as bar:
        for rows, places in zip(row.split(batch_size), position.split(batch_size), strict=True):
            later = scored[rows] & (rank >= rank[places][:, None])
            losses = _masked_losses(model, input_ids[rows], attention_mask[rows], later, mask_token_id)
            nats.index_add_(0, rows, losses.gather(1, places[:, None]).squeeze(1))
            bar.update(len(rows))
    return Likelihood(nats, scored.sum(1))


@torch.no_grad()
def masked_nll_bound(
    model: Callable[..., Any],
    input_ids: torch.Tensor,
    mask_token_id: int,
    attention_mask: torch.Tensor | None = None,
    scored: torch.Tensor | None = None,
    samples: int | None = 64,
    seed: int = 0,
    batch_size: int = 64,
) -> Likelihood:
    r"""The bound that masked diffusion gives on the negative log-likelihood (its NELBO).

    With each of n scored tokens under a mask with probability t it is (the continuous-time NELBO of Sahoo et al.
    2024, arXiv 2406.07524; the lambda-DCE of Ou et al. 2024, arXiv 2406.03736)

    .. math::
        \int_0^1 \frac1t E_{M \sim t} \Big[ \sum_{i \in M} -\log p(x_i | x_{\bar M}) \Big] dt
        = \sum_{M \ne \emptyset} B(|M|, n - |M| + 1) \sum_{i \in M} -\log p(x_i | x_{\bar M})
        = E_{k \sim U\{1..n\}} \frac nk E_{|M| = k} \Big[ \sum_{i \in M} -\log p(x_i | x_{\bar M}) \Big]

    for any noise schedule. It is the mean over all orders of the chain rule's likelihood (Uria et al. 2014; Hoogeboom
    et al. 2022), so it bounds the likelihood of the sampler that unmasks one token at a time in random order, and is
    tight where the conditionals have a joint distribution in common.

    The middle form is what `samples=None` sums. The last is what is sampled: its k has the variance of t integrated
    out, which for the first form is infinite. The ratios t are evenly spaced with one random offset a sequence (low
    discrepancy; Kingma et al. 2021), and k = ceil(t n).

    Args:
        model: a masked model.
        input_ids: `(n, length)`, complete.
        mask_token_id: the mask; no probability goes to it.
        attention_mask: `(n, length)`, 0 for padding; handed on to the model.
        scored: bool `(n, length)`, the positions that count; the others are given and never under a mask. Default: all
            but padding.
        samples: masks drawn a sequence; None for all, of at most 16 scored positions, equally many in every row.
        seed: of the draws. Equal seeds give equal masks, for paired comparisons.
        batch_size: rows in one pass.

    Raises:
        ValueError: shapes do not fit, masks in what is scored, nothing to score in a row, `samples` is not positive,
            or too many masks to sum.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"`samples` is {samples!r}; it must be at least 1, or None for all masks.")
    input_ids, attention_mask, scored = _checked(input_ids, attention_mask, scored, mask_token_id, batch_size)
    count, device = scored.sum(1), input_ids.device
    if samples is None:
        masks, weights = _all_masks(scored, count)
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = len(input_ids), samples
        offset = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
        ratio = ((torch.arange(samples) + offset) / samples).to(device)
        hidden = torch.ceil(ratio * count[:, None]).long().clamp(min=1)  # (n, samples)
        keys = torch.rand(*shape, scored.shape[1], generator=generator).to(device)
        ranks = keys.masked_fill(~scored[:, None], 2.0).argsort(-1).argsort(-1)
        masks = ranks < hidden[..., None]
        weights = count[:, None].double() / hidden / samples
    nats = torch.zeros(len(input_ids), dtype=torch.float64, device=device)
    flat_masks, flat_weights = masks.flatten(0, 1), weights.flatten()
    every_row = torch.arange(len(input_ids), device=device).repeat_interleave(masks.shape[1])
    with tqdm(total=len(every_row), desc="Likelihood bound", unit="mask", delay=2.0, leave=False) as bar:
        for index in torch.arange(len(every_row), device=device).split(batch_size):
            rows = every_row[index]
            losses = _masked_losses(model, input_ids[rows], attention_mask[rows], flat_masks[index], mask_token_id)
            nats.index_add_(0, rows, flat_weights[index] * losses.sum(1))
            bar.update(len(rows))
    return Likelihood(nats, count)


def _all_masks(scored: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every mask but the empty one, `(n, masks, length)`, and its weight, `(n, masks)`."""
    n = int(count[0])
    if not bool((count == n).all()) or n > _MAX_ENUMERATED:
        raise ValueError(
            f"`samples` is None with {int(count.min())} to {int(count.max())} scored positions a row; all masks are summed "
            f"only for equally many in every row, at most {_MAX_ENUMERATED}."
        )
    device = scored.device
    chosen = (torch.arange(1, 2**n, device=device)[:, None] >> torch.arange(n, device=device)) & 1 == 1
    places = scored.nonzero()[:, 1].reshape(len(scored), 1, n).expand(-1, len(chosen), -1)
    masks = torch.zeros(len(scored), len(chosen), scored.shape[1], dtype=torch.bool, device=device)
    masks.scatter_(2, places, chosen.expand(len(scored), -1, -1))
    size = chosen.sum(1).double()
    beta = torch.exp(torch.lgamma(size) + torch.lgamma(n - size + 1) - math.lgamma(n + 1))
    return masks, beta.expand(len(scored), -1)


def _masked_losses(
    model: Callable[..., Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    masked: torch.Tensor,
    mask_token_id: int,
) -> torch.Tensor:
    """:math:`-\\log p(x_i | x_{\\bar M})` at masked positions, 0 elsewhere: `float64` `(batch, length)`."""
    logits = model(input_ids.masked_fill(masked, mask_token_id), attention_mask=attention_mask).logits.double()
    if logits.shape[-1] > mask_token_id:
        barred = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
        logits = logits.masked_fill(barred, -math.inf)
    return _cross_entropy(logits, input_ids).masked_fill(~masked, 0.0)


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)


def _causal_nll(
    model: Callable[..., Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    scored: torch.Tensor,
    batch_size: int,
) -> Likelihood:
    nats = []
    batches = zip(*(value.split(batch_size) for value in (input_ids, attention_mask, scored)), strict=True)
    for tokens, mask, counted in tqdm(
        batches, total=math.ceil(len(input_ids) / batch_size), desc="Likelihood", delay=2.0, leave=False
    ):
        logits = model(tokens, attention_mask=mask).logits[:, :-1].double()
        nats.append(_cross_entropy(logits, tokens[:, 1:]).masked_fill(~counted[:, 1:], 0.0).sum(1))
    return Likelihood(torch.cat(nats), scored.sum(1))


def _checked(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scored: torch.Tensor | None,
    mask_token_id: int | None,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(
            f"`input_ids` is {input_ids.dtype} of shape {tuple(input_ids.shape)}; it must hold integers, (n, length)."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be at least 1.")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ValueError(f"`attention_mask` has shape {tuple(real.shape)}; it must be {tuple(input_ids.shape)}.")
    nothing_before = real.cumsum(1) <= 1
    if scored is None:
        scored = real if mask_token_id is not None else real & ~nothing_before
    elif scored.shape != input_ids.shape or scored.dtype != torch.bool:
        raise ValueError(
            f"`scored` is {scored.dtype} of shape {tuple(scored.shape)}; it must be bool, {tuple(input_ids.shape)}."
        )
    elif bool((scored & ~real).any()):
        raise ValueError("`scored` has positions that are padding in `attention_mask`.")
    elif mask_token_id is None and bool((scored & nothing_before).any()):
        raise ValueError("`scored` has the first token of a sequence; a causal model does not predict it.")
    if not bool(scored.any(1).all()):
        raise ValueError("`scored` (by default: all but padding) leaves nothing to score in a row.")
    if mask_token_id is not None and bool((input_ids[scored] == mask_token_id).any()):
        raise ValueError(f"`input_ids` has the mask, {mask_token_id}, among the scored tokens; they must be complete.")
    return input_ids, attention_mask, scored


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How many of independent trials succeed.

    Attributes:
        value: the observed share.
        interval: 95 percent interval of the true one (Wilson 1927): of use also where all or none succeed.
        count: number of trials.
    """

    value: float
    interval: tuple[float, float]
    count: int


def validity(samples: torch.Tensor, language: _Language) -> Share:
    """Share of samples that the language has.

    Args:
        samples: tokens `(n, length)`; one with masks left is not valid.
        language: such as `diffusers_ext.oracles.EnumerableLanguage`.

    Raises:
        ValueError: no samples, or not of the language's length and vocabulary.
    """
    if not len(samples):
        raise ValueError("`samples` is empty; there is nothing to check.")
    valid = language.validity(samples)
    n, share = len(valid), float(valid.double().mean())
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Share(share, (max(0.0, middle - half), min(1.0, middle + half)), n)


def token_entropy(samples: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy in nats of the tokens of each sequence, `(n,)`: 0 where one token fills it.

    To be read beside the likelihood of samples under another model, which rewards repetition.

    Args:
        samples: tokens `(n, length)`.
        attention_mask: `(n, length)`, 0 for tokens that do not count.

    Raises:
        ValueError: another shape, or a row without tokens.
    """
    counted = torch.ones_like(samples) if attention_mask is None else attention_mask
    if samples.ndim != 2 or counted.shape != samples.shape or not bool(counted.bool().any(-1).all()):
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)} and `attention_mask` {tuple(counted.shape)}; they must be (n, "
            "length), with a token in every row."
        )
    weight = counted.bool().double() / counted.bool().sum(1, keepdim=True)
    same = (samples[:, :, None] == samples[:, None, :]).double()  # (n, length, length)
    share = (same * weight[:, None, :]).sum(-1)  # of each position's token
    return -(weight * torch.log(share.clamp(min=1e-300))).sum(1)


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRates:
    """Result of `tokens_per_second`.

    Attributes:
        rates: tokens a second by name, the baseline included, from the median time.
        speedups: rate over the baseline's by name; above 1 is faster.
        noise: the baseline against itself. A speed-up whose interval lies inside this one tells nothing.
        times: the measurement below.
    """

    rates: dict[str, float]
    speedups: dict[str, RatioEstimate]
    noise: RatioEstimate
    times: TimeRatios


def tokens_per_second(
    runs: Mapping[str, Callable[[], Any]],
    tokens: int | Mapping[str, int],
    baseline: str,
    repeats: int = 9,
    warmup: int = 1,
    **options: Any,
) -> TokenRates:
    """Generated tokens a second of several ways to generate, timed in alternation (`time_ratio`).

    Args:
        runs: functions without arguments by name, each generating once; at least one beside the baseline.
        tokens: how many tokens one run generates, over the whole batch, without prompt and padding; by name where they
            differ.
        baseline: name of the one that all are compared with.
        repeats, warmup, options: as in `time_ratio`.

    Raises:
        ValueError: a number of tokens is missing or not positive, or as `time_ratio`.
    """
    counts = dict(tokens) if isinstance(tokens, Mapping) else dict.fromkeys(runs, tokens)
    if set(counts) != set(runs) or not all(count > 0 for count in counts.values()):
        raise ValueError(f"`tokens` is {tokens!r}; it must be a positive number, or one for each of {', '.join(runs)}.")
    times = time_ratio(runs, baseline, repeats, warmup, **options)

    def faster(ratio: RatioEstimate, gain: float) -> RatioEstimate:
        return RatioEstimate.of([gain / value for value in ratio.rounds], [1.0] * len(ratio.rounds))

    return TokenRates(
        rates={name: counts[name] / seconds for name, seconds in times.seconds.items()},
        speedups={name: faster(ratio, counts[name] / counts[baseline]) for name, ratio in times.ratios.items()},
        noise=faster(times.noise, 1.0),
        times=times,
    )
