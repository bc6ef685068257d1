"""FreeCache (Hu et al. 2025, arXiv 2505.21467): freeze what lies before the block that is being decoded.

Tokens being decoded attend little to masks after them, and keys and values of settled text before them hardly move. So a
step computes the current block and what follows it; all before it comes from the cache, and the work shrinks as the text
grows. The paper's other half, a verifier that decides how many drafted tokens are unmasked, is `GuidedUnmaskingScheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ._lm_cache import MaskedLMCacheConfig, TokenCall, check_bool, check_integer


@dataclass
class FreeCacheConfig(MaskedLMCacheConfig):
    """Settings of FreeCache.

    Args:
        mask_token_id, shift_logits: as in `MaskedLMCacheConfig`: the mask token where the model's config has none, and
            whether the logits at a place predict the token after it.
        block_length: tokens of a block, 1 or more, counted from each row's first masked token of the run; where a
            sequence grows at its end, from there. A row's current block is that of its first masked token. A pipeline that
            tells its blocks (`MaskedDiffusionPipeline`) needs no `block_length`.
        recompute_finished: compute a finished block once more, in the first step of the block after it. The authors freeze
            it as it was in its last step, which still saw the tokens of that step as masks. With block-causal attention
            (blocks of this length) the cache is exact if this is true.
        window: None, or freeze by tokens instead of blocks: a step computes from `window` tokens before the first masked
            token on. The authors take 128. `block_length` and `recompute_finished` then have no meaning.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "freecache"

    block_length: int = 32
    recompute_finished: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("block_length", self.block_length, 1)
        check_integer("window", self.window, 0, optional=True)
        check_bool("recompute_finished", self.recompute_finished)

    def rule(self) -> FrozenPrefixRule:
        return FrozenPrefixRule(self)


def apply_freecache(module: nn.Module, config: FreeCacheConfig | None = None) -> None:
    """Put FreeCache on a masked language model of transformers, or one of ours.

    Raises:
        ValueError: the model is no such model, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config if config is not None else FreeCacheConfig())


def remove_freecache(module: nn.Module) -> None:
    """Take FreeCache off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, FreeCacheConfig.key)


class FrozenPrefixRule:
    """Which tokens a step of FreeCache computes: from one place in each row on."""

    exact = False

    def __init__(self, config: FreeCacheConfig) -> None:
        self.config = config

    def recompute(self, call: TokenCall) -> torch.Tensor:
        config, memory = self.config, call.memory
        length = call.tokens.shape[1]
        first = _first_in_row(call.masked)  # (B,); L in rows that are done
        if config.window is not None:
            begin = (first - config.window).clamp(min=0)
        else:
            if call.grew:
                memory["origin"] = call.old_length
            if call.block_begin is not None:
                begin = call.block_begin.to(first)
            else:
                origin = memory["origin"] if "origin" in memory else _first_in_row(~call.prompt)
                blocks = torch.div(first - origin, config.block_length, rounding_mode="floor")
                begin = (origin + blocks * config.block_length).clamp(min=0)
            begin = torch.where(first == length, length, begin)
            if config.recompute_finished:  # the block before as well, in the step in which it became one
                before = memory["begin"] if "begin" in memory else _first_in_row(~call.prompt)
                begin, memory["begin"] = torch.minimum(begin, before), begin
        places = torch.arange(length, device=first.device)
        return call.sources(places >= begin[:, None])


def _first_in_row(where: torch.Tensor) -> torch.Tensor:
    """The first true column of each row, `(B,)`; the number of columns where none is."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])
