"""Learn2PD (Bao et al. 2025, arXiv 2509.25188): a learned filter says which tokens can be committed at once.

A threshold on the confidence commits too few tokens where the model is right and unsure, and wrong ones where it is sure. The
filter, a tiny network, sees the confidences of the whole block, visible tokens included, and was trained on which of the
likeliest tokens turned out to be those of the final text (`fit_parallel_filter`).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._carried import CarriesStatistics
from ._decode_filter import ParallelDecodeFilter
from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number, the_highest, without_mask


class LearnedParallelScheduler(CarriesStatistics, UnmaskingScheduler):
    """Commits what a filter accepts, and always the surest tokens that are due.

        scheduler = LearnedParallelScheduler.from_config(pipe.scheduler.config, statistics=filter)

    One step a token (the default of `MaskedDiffusionPipeline`) leaves it to the filter how many steps a block takes. The
    filter is saved with the scheduler.

    Args:
        block_length: tokens of a block, where a pipeline is not told; at most those of the filter.
        num_inference_steps: steps of a block, where nobody says.
        accept_threshold: probability above which the filter's yes counts; 1 accepts nothing. The authors take 0.96.
    """

    statistics_class = ParallelDecodeFilter

    @register_to_config
    def __init__(
        self, *, block_length: int = 32, num_inference_steps: int = 32, accept_threshold: float = 0.96
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        check_number("accept_threshold", accept_threshold, 0, 1)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        self.require_statistics()
        super().set_timesteps(num_inference_steps, device, block_length)
        length = self.config.block_length if block_length is None else block_length
        most = self.statistics.config.block_length
        if length > most:
            raise ValueError(f"`block_length` is {length}; the filter was made for at most {most}.")
        self.statistics.to(device)

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        with torch.no_grad():
            accepted = torch.sigmoid(self.statistics(highest_confidence(now))) > self.config.accept_threshold
        return (now.masked & accepted) | the_highest(self.confidence(now), now.masked, now.quota)


def highest_confidence(now: UnmaskingStep) -> torch.Tensor:
    """Probability of the likeliest token at every place of the block, `(batch, block)` float32."""
    return torch.softmax(without_mask(now.logits, now.mask_token_id), -1).amax(-1).float()
