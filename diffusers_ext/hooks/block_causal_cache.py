"""The exact cache of models in which early tokens do not see later ones: block-causal, prefix and causal masks.

A token's states depend on nothing but the tokens it sees, so one that sees no changed token need not be computed again. In
a block-causal model (BD3-LM, SDAR, LLaDA2) finished blocks are computed once more after their last token settled, and never
again. SDAR's inference (arXiv 2510.06303) stores keys and values of finished blocks in an extra pass; here the first step
of the next block does that, so it costs no pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ._lm_cache import LMCacheConfig, TokenCall


@dataclass
class BlockCausalCacheConfig(LMCacheConfig):
    """Settings of the exact cache: none.

    What a token sees is read from the mask with which the layers are called. Tokens may change in any way (decoded, edited,
    masked again). Where all tokens see all others, rows of the batch in which nothing changed are left out and nothing
    else: it is right, and gains nothing.
    """

    key: ClassVar[str] = "sdar"

    def rule(self) -> VisibleChangeRule:
        return VisibleChangeRule()


def apply_block_causal_cache(module: nn.Module, config: BlockCausalCacheConfig | None = None) -> None:
    """Put the exact cache on a language model of transformers, or one of ours, that is called with a mask.

    Raises:
        ValueError: the model is no such model, or its layers have different masks.
    """
    from ..enabling import enable

    enable(module, config if config is not None else BlockCausalCacheConfig())


def remove_block_causal_cache(module: nn.Module) -> None:
    """Take the cache off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, BlockCausalCacheConfig.key)


class VisibleChangeRule:
    """A call computes every token that changed, or sees one that did, over however many layers."""

    exact = True

    def recompute(self, call: TokenCall) -> torch.Tensor:
        reached = call.changed
        if call.visible is None:
            return reached.any(1, keepdim=True).expand_as(reached)
        while True:  # once for block-causal masks, which are transitive, and once more to see that
            further = reached | (call.visible & reached[:, None, :]).any(2)
            if torch.equal(further, reached):
                return reached
            reached = further
