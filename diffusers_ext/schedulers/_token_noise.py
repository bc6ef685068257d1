"""Noise of tokens: masks, and tokens that are changed into others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._unmasking import check_number


@dataclass(frozen=True)
class HybridNoise:
    r"""Masks plus uniform noise.

    Attributes:
        p_uniform: :math:`p_u`, the share of uniform noise at t = 1/2, where it is largest; below 1, 0 is masks alone.
        gamma: :math:`\gamma`, how steeply that share rises and falls; above 0, at most 2, beyond which tokens would have to
            become clean again.

    Raises:
        ValueError: one is out of its range.
    """

    p_uniform: float = 0.1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_number("p_uniform", self.p_uniform, 0, 1)
        check_number("gamma", self.gamma, 0, 2)
        if self.p_uniform == 1 or self.gamma == 0:
            raise ValueError(
                f"`p_uniform` is {self.p_uniform!r} and `gamma` {self.gamma!r}; the first must be below 1, the second above 0."
            )

    def uniform_over_masks(self, t: torch.Tensor) -> torch.Tensor:
        """The number c of a time."""
        scale = 2**self.gamma * self.p_uniform / (1 - self.p_uniform)
        return scale * (t * (1 - t)) ** (self.gamma / 2)

    def shares(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How much at times `t`, of any shape, in [0, 1], is kept, masked, and noise over all tokens: together 1."""
        c = self.uniform_over_masks(t)
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)

    def add(
        self, tokens: torch.Tensor, t: torch.Tensor, u: torch.Tensor, others: torch.Tensor, mask_token_id: int
    ) -> torch.Tensor:
        """Noisy tokens.

        Args:
            tokens: `(batch, length)`.
            t: `(batch,)`.
            u: `(batch, length)`, uniform on [0, 1): decides what happens to each token.
            others: `(batch, length)`, tokens drawn uniformly from all but the mask, for those that become noise.
            mask_token_id: the mask.
        """
        kept, masked, _ = (share[:, None] for share in self.shares(t.double()))
        noisy = torch.where(u < kept + masked, mask_token_id, others)
        return torch.where(u < kept, tokens, noisy)


def tokens_but_mask(numbers: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The tokens of numbers that count all tokens without the mask."""
    return numbers + (numbers >= mask_token_id).long()
