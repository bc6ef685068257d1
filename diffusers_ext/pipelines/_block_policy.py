"""How long the blocks are that a masked diffusion language model is decoded in, from left to right."""

from __future__ import annotations

import torch


class BlockPolicy:
    """Decides the length of each block when it begins, and its number of steps.

    Blocks of the rows of a batch begin together and may differ in length; a row that is done waits, at no cost, for the
    longest. A policy keeps nothing of a run.
    """

    def window(self, gen_length: int) -> int:
        """How many places from a block's beginning on it wants to see logits of; no block is longer. 0: none.

        The pass that gives them is also the one of the block's first step, so that it costs nothing.

        Args:
            gen_length: tokens to be generated, or, for infilling, from the first mask to the end; the most of all rows.
        """
        return 0

    def lengths(
        self, number: int, remaining: torch.Tensor, total: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        """Lengths `(rows,)` of the next block.

        Args:
            number: blocks before this one.
            remaining: `(rows,)`, places that are left in each row, at least 1.
            total: `(rows,)`, of which `remaining` are left: from the first block's beginning on.
            logits: `(rows, window, vocabulary)` from the beginning of the block, float64, that of the mask -inf; None for a
                window of 0. Places beyond `remaining` have no meaning.
        """
        raise NotImplementedError

    def steps(self, number: int, length: int, num_inference_steps: int | None) -> int:
        """Steps of the block, whose longest row has `length` tokens: what the caller asks for, or one a token."""
        return length if num_inference_steps is None else num_inference_steps


class FixedBlocks(BlockPolicy):
    """Blocks of one length; the last one takes what is left.

    Args:
        block_length: None puts everything into one block.
    """

    def __init__(self, block_length: int | None = None) -> None:
        self.block_length = block_length

    def lengths(
        self, number: int, remaining: torch.Tensor, total: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        return remaining if self.block_length is None else remaining.clamp(max=self.block_length)
