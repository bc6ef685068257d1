"""The distribution that unmasking leads to, without sampling, and how far samples are from a language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .language import EnumerableLanguage

_MAX_STATES = 2**17
_BATCH = 4096
_MAX_OUTCOMES = 2**22


@torch.no_grad()
def unmasking_law(
    model: Callable[..., Any], language: EnumerableLanguage, unmask_probabilities: Sequence[float] | None = None
) -> torch.Tensor:
    r"""The exact distribution of strings that a masked language model unmasks, over all partly masked states.

    One token at a time: a masked position is chosen uniformly, and its token drawn from the model. This is any-order
    autoregression (Uria et al. 2014), the first-hitting sampler (Zheng et al. 2024, arXiv 2409.02908) and the limit of
    ancestral sampling in infinitely many steps; with exact conditionals it gives the language itself.

    In steps: at step n every masked position is unmasked with probability r_n, on its own, and its token drawn from the
    model given the state before the step. Ancestral sampling from time t to s with :math:`\alpha_t = 1 - t` has
    r = (t - s) / t (Sahoo et al. 2024, arXiv 2406.07524; Ou et al. 2024, arXiv 2406.03736).

    Args:
        model: gives `model(input_ids).logits` `(batch, length, at least V)`; those of the mask are left out.
        language: says length, vocabulary and mask.
        unmask_probabilities: r_n of each step, the last 1; None for one token at a time.

    Returns:
        Probabilities of all `V ** length` strings, those outside the language included, in the order of
        `language.codes`: `float64`, `(V ** length,)`.

    Raises:
        ValueError: more than about a hundred thousand partly masked strings, or `unmask_probabilities` is not a list of
            numbers from 0 to 1 that ends with 1.
    """
    size, length = language.num_symbols, language.length
    if (size + 1) ** length > _MAX_STATES:
        raise ValueError(
            f"`language` has {(size + 1) ** length} partly masked strings; at most {_MAX_STATES} are allowed."
        )
    if unmask_probabilities is not None and (
        not len(unmask_probabilities)
        or not all(0 <= rate <= 1 for rate in unmask_probabilities)
        or unmask_probabilities[-1] != 1
    ):
        raise ValueError(
            f"`unmask_probabilities` is {unmask_probabilities!r}; it must be numbers from 0 to 1, the last 1."
        )
    places = (size + 1) ** torch.arange(length - 1, -1, -1)
    states = torch.arange((size + 1) ** length)[:, None] // places % (size + 1)  # (N, L), masks included
    masked = states == language.mask_token_id
    probabilities = torch.cat(
        [torch.softmax(model(batch).logits[..., :size].double(), -1) for batch in states.split(_BATCH)]
    )
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1  # all masked
    if unmask_probabilities is None:
        law = _one_at_a_time(law, masked, probabilities, places)
    else:
        for rate in tqdm(unmask_probabilities, desc="Unmasking", unit="step", delay=2.0, leave=False):
            law = _step(law, states, masked, probabilities, rate)
    return law[~masked.any(1)]


def _one_at_a_time(
    law: torch.Tensor, masked: torch.Tensor, probabilities: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    size = probabilities.shape[-1]
    count = masked.sum(1)
    for left in range(masked.shape[1], 0, -1):
        rows = (count == left).nonzero().squeeze(1)
        row, position = masked[rows].nonzero(as_tuple=True)
        row = rows[row]
        # The mask is digit V; a symbol in its place makes the number smaller.
        reached = row[:, None] - (size - torch.arange(size)) * places[position][:, None]
        weight = law[row, None] / left * probabilities[row, position]
        law = law.index_add(0, reached.flatten(), weight.flatten())
        law[rows] = 0
    return law


def _step(
    law: torch.Tensor, states: torch.Tensor, masked: torch.Tensor, probabilities: torch.Tensor, rate: float
) -> torch.Tensor:
    size, length = probabilities.shape[-1], states.shape[1]
    new = torch.zeros_like(law)
    reached = (law > 0).nonzero().squeeze(1)
    for rows in reached.split(max(1, _MAX_OUTCOMES // len(law))):
        drawn = torch.nn.functional.pad(rate * probabilities[rows], (0, 1), value=1 - rate)
        stays = torch.nn.functional.one_hot(states[rows], size + 1).double()
        factors = torch.where(masked[rows][..., None], drawn, stays)  # (n, L, V + 1)
        outcomes = law[rows][:, None]
        for position in range(length):
            outcomes = (outcomes[:, :, None] * factors[:, position, None]).flatten(1)
        new += outcomes.sum(0)
    return new


@dataclass(frozen=True)
class TotalVariation:
    """Result of `total_variation`.

    Attributes:
        value: distance of the sample's frequencies to the language, 0 to 1.
        noise: what as many independent draws from the language itself have on average. A sampler is as good as exact
            where `value` is about this.
        invalid: share of strings outside the language, which counts fully.
    """

    value: float
    noise: float
    invalid: float


def total_variation(tokens: torch.Tensor, language: EnumerableLanguage) -> TotalVariation:
    r"""Total variation distance of samples to a language, :math:`\frac12 \sum_x |\hat p(x) - p(x)|`.

    Its own noise is the mean absolute deviation of a binomial count, :math:`E|X - np| = 2 k \binom{n}{k} p^k
    (1-p)^{n-k+1}` with :math:`k = \lfloor np \rfloor + 1` (de Moivre 1730), summed over the strings.

    Args:
        tokens: complete strings `(n, length)`.
        language: with at most a million strings.

    Raises:
        ValueError: no samples, another shape, masks, or too large a language.
    """
    codes = language.codes(tokens.cpu())
    if not len(codes):
        raise ValueError("`tokens` is empty; there is nothing to compare.")
    strings, log_p = language.strings()
    known, p, n = language.codes(strings), log_p.exp(), len(codes)
    where = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    valid = known[where] == codes
    counts = torch.bincount(where[valid], minlength=len(known)).double()
    invalid = 1 - float(valid.double().mean())
    k = torch.floor(n * p).clamp(max=n - 1) + 1  # below n + 1 where p = 1
    count = torch.tensor(float(n), dtype=torch.float64)
    log_choices = torch.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    rest = torch.xlogy(count - k + 1, 1 - p)
    deviation = 2 * torch.exp(torch.log(k) + log_choices + k * torch.log(p) + rest) / n
    return TotalVariation(float((counts / n - p).abs().sum() + invalid) / 2, float(deviation.sum()) / 2, invalid)
