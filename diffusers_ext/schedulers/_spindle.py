r"""The spindle noise schedule of DiffusionBERT (He et al. 2022, arXiv 2211.15029): rare tokens are masked earlier.

A token of word frequency w in a text survives until time t, from 0 to 1, with probability

.. math::
    \bar\alpha_t = 1 - t + \lambda \sin(\pi t) (w - \bar w),

:math:`\bar w` the mean of the text. With :math:`\lambda \le 1/\pi` it falls with t for every token, from 1 to 0.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

MAX_LAMBDA = 1 / math.pi


class WordFrequencies(ModelMixin, ConfigMixin):
    r"""Frequency w of each token, :math:`\log(n + 1)` of its count n over that of the most frequent: 0 to 1.

    Args:
        vocab_size: number of tokens, the mask included.

    Raises:
        ValueError: `vocab_size` is no whole number above 0.
    """

    frequency: torch.Tensor

    @register_to_config
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"`vocab_size` is {vocab_size!r}; allowed are whole numbers of at least 1.")
        self.register_buffer("frequency", torch.zeros(vocab_size))

    @classmethod
    def from_counts(cls, counts: torch.Tensor, pad_token_id: int | None = None) -> WordFrequencies:
        """From how often each token is in the data, `(vocabulary,)`; padding counts as unseen.

        Raises:
            ValueError: a count is negative, or all are 0.
        """
        logs = torch.log1p(counts.double())
        if pad_token_id is not None:
            logs[pad_token_id] = 0
        if counts.ndim != 1 or not bool((counts >= 0).all()) or not bool(logs.max() > 0):
            raise ValueError("`counts` must hold one number a token, none negative and not all 0.")
        made = cls(len(counts))
        made.frequency.copy_(logs / logs.max())
        return made

    def mean(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Mean `(batch, 1)` over the tokens `(batch, length)` of each text that `kept` is true for."""
        kept = kept.double()
        return (self.frequency.double()[tokens] * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def survival(t: torch.Tensor | float, centred: torch.Tensor, lam: float) -> torch.Tensor:
    """Probability that tokens are visible at time t; `centred` is w less its mean."""
    t = torch.as_tensor(t, dtype=torch.float64, device=centred.device)
    return 1 - t + lam * torch.sin(math.pi * t) * centred


def unmask_chance(s: torch.Tensor | float, t: torch.Tensor | float, centred: torch.Tensor, lam: float) -> torch.Tensor:
    r"""Probability that a token that is hidden at t is visible at s < t, :math:`(\bar\alpha_s - \bar\alpha_t) / (1 -
    \bar\alpha_t)`."""
    hidden = survival(t, centred, lam)
    return ((survival(s, centred, lam) - hidden) / (1 - hidden)).clamp(0, 1)  # beyond only by rounding
