"""The blocks of ascending step sizes (Yang et al. 2025, arXiv 2509.23924, section 3.2)."""

from __future__ import annotations

import torch

from ._block_policy import BlockPolicy


class AscendingBlockPolicy(BlockPolicy):
    r"""Sizes and steps for `AscendingStepScheduler`: :math:`S = \lfloor \log_2 L \rfloor` steps for L tokens.

    Of n blocks the last n - 1 are decoded in one step each, :math:`2^{S-n+1}, \ldots, 2^{S-2}` and what is left of about
    :math:`2^{S-1}` tokens long, and the first takes the other steps: 128 tokens in 4 blocks are 15, 16, 32 and 65. A batch
    takes prompts that leave equally many tokens to decode.

    Args:
        block_num: n, at least 1 and at most S; 1 decodes everything in one block.

    Raises:
        ValueError: `block_num` is no whole number above 0.
    """

    def __init__(self, block_num: int = 1) -> None:
        if not isinstance(block_num, int) or block_num < 1:
            raise ValueError(f"`block_num` is {block_num!r}; allowed are whole numbers of at least 1.")
        self.block_num = block_num

    def sizes(self, total: int) -> list[int]:
        """Lengths of the blocks of `total` tokens.

        Raises:
            ValueError: `total` has too few tokens for so many blocks.
        """
        steps, number = total.bit_length() - 1, self.block_num
        if number == 1:
            return [total]
        if number > steps:
            raise ValueError(f"`block_num` is {number}; {total} tokens take at most {max(steps, 1)} blocks.")
        middle = [2**power for power in range(steps - number + 1, steps - 1)]
        first = 2 ** (steps - number + 1) - 1
        return [first, *middle, total - first - sum(middle)]

    def lengths(
        self, number: int, remaining: torch.Tensor, total: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        if bool((total != total[0]).any()):
            raise ValueError(f"`block_policy` has rows of {total.tolist()} tokens to decode; it takes equally many.")
        return remaining.clamp(max=self.sizes(int(total[0]))[number])

    def steps(self, number: int, length: int, num_inference_steps: int | None) -> int:
        if num_inference_steps is not None:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; `AscendingBlockPolicy` sets it, leave it."
            )
        if number > 0:
            return 1
        return max(1, (length if self.block_num == 1 else length + 1).bit_length() - 1)
