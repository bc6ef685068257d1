"""The filter of Learn2PD (Bao et al. 2025, arXiv 2509.25188): from the confidences of a block, which tokens are final."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn


class ParallelDecodeFilter(ModelMixin, ConfigMixin):
    """One logit for each place of a block: whether the token that is likeliest there now is the one of the final text.

    Args:
        block_length: places of a block.
        hidden_size: width of the hidden layer; None is logistic regression.

    Raises:
        ValueError: a size is no whole number above 0.
    """

    @register_to_config
    def __init__(self, block_length: int = 32, hidden_size: int | None = None) -> None:
        super().__init__()
        for name, value in (("block_length", block_length), ("hidden_size", 1 if hidden_size is None else hidden_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers of at least 1.")
        if hidden_size is None:
            self.layers: nn.Module = nn.Linear(block_length, block_length)
        else:
            self.layers = nn.Sequential(
                nn.Linear(block_length, hidden_size), nn.ReLU(), nn.Linear(hidden_size, block_length)
            )

    def forward(self, confidence: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, places)` of confidences `(batch, places)`; fewer places than a block's are filled up with 1."""
        missing = self.config.block_length - confidence.shape[1]
        return self.layers(nn.functional.pad(confidence, (0, missing), value=1.0))[:, : confidence.shape[1]]
