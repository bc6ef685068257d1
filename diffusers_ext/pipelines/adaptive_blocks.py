r"""AdaBlock (Lu et al. 2025, arXiv 2509.26432): blocks that end where a step of the text ends.

Semi-autoregressive decoding with blocks of one size cuts sentences and lines anywhere. Here, when a block begins at g, the
model's likeliest tokens are looked at in a window of the next W places; of those that are delimiters (a line break, say) the
one with the highest confidence is where the block ends, if that confidence is at least :math:`\tau_D`; else the block has the
usual size (algorithm 1 of the paper). The same pass is also the first of the block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._block_policy import BlockPolicy


class AdaptiveBlockPolicy(BlockPolicy):
    r"""Ends blocks at delimiters that the model is sure of.

        policy = AdaptiveBlockPolicy(tokenizer.convert_tokens_to_ids(["\n"]))
        pipe.scheduler = UnmaskingScheduler(threshold=0.9)
        pipe(prompt, gen_length=256, block_policy=policy, temperature=0.0)

    The paper commits in each step all tokens of a confidence of at least 0.9, and the surest: `UnmaskingScheduler` with
    `threshold=0.9`, one step a token. The model must see the masks after a block, so that `attention="block_causal"` does
    not go with it.

    Args:
        delimiter_ids: tokens that end a step of the text.
        delimiter_threshold: :math:`\tau_D`, the confidence from which a delimiter ends a block. The paper takes 0.3 for
            LLaDA and 0.5 for Dream; infinity for blocks of `default`.
        window: share of all tokens to be generated that is looked at.
        default: length of a block where no delimiter ends it.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        delimiter_ids: Sequence[int],
        delimiter_threshold: float = 0.3,
        window: float = 0.25,
        default: int = 32,
    ) -> None:
        if isinstance(delimiter_ids, str) or not all(isinstance(token, int) for token in delimiter_ids):
            raise ValueError(f"`delimiter_ids` is {delimiter_ids!r}; a list of token ids is needed.")
        if not delimiter_threshold >= 0:
            raise ValueError(f"`delimiter_threshold` is {delimiter_threshold!r}; numbers of at least 0 are allowed.")
        if not 0 < window <= 1:
            raise ValueError(f"`window` is {window!r}; allowed are numbers above 0, up to 1.")
        if not isinstance(default, int) or default < 1:
            raise ValueError(f"`default` is {default!r}; allowed are whole numbers of at least 1.")
        self.delimiter_ids, self.delimiter_threshold = list(delimiter_ids), delimiter_threshold
        self.share, self.default = window, default

    def window(self, gen_length: int) -> int:
        if math.isinf(self.delimiter_threshold) or not self.delimiter_ids:
            return 0
        return max(int(self.share * gen_length), self.default)  # blocks of the usual size too

    def lengths(
        self, number: int, remaining: torch.Tensor, total: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        usual = remaining.clamp(max=self.default)
        if logits is None:
            return usual
        places = torch.arange(logits.shape[1], device=logits.device)
        width = torch.minimum((self.share * total).long(), remaining)
        confidence, token = torch.softmax(logits, -1).max(-1)
        delimiters = torch.tensor(self.delimiter_ids, device=logits.device)
        ends = torch.isin(token, delimiters) & (places < width[:, None])
        confidence, place = confidence.masked_fill(~ends, -1.0).max(-1)
        return torch.where(confidence >= self.delimiter_threshold, place + 1, usual)
