r"""RCR of MDPO (He et al. 2025, arXiv 2508.13148): early tokens that the model was not sure of are revised.

Every step draws all masks that are left and writes their confidences down. Of all tokens that were ever drawn, those of the
lowest confidence become masks again, as many as the schedule leaves at this step. A token that was kept keeps the confidence
that it was drawn with, and goes back once later ones are surer.
"""

from __future__ import annotations

import itertools
import math

import torch
from diffusers.configuration_utils import register_to_config

from ._unmasking import CONFIDENCES, UnmaskingScheduler, UnmaskingStep, the_highest


class RunningConfidenceScheduler(UnmaskingScheduler):
    r"""Commits as many tokens a step as are due, and chooses among all that were drawn so far.

    With quotas :math:`n_i`, step i leaves :math:`\sum_{j > i} n_j` masks, as many as without the rule; no call of the model is
    added. Tokens of the prompt and of other blocks are never masked. In `LLaDA2Pipeline` pass `editing_threshold=None`.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        schedule: "linear" has equal quotas; "cosine" leaves :math:`\lfloor L \cos(\pi (i + 1) / (2 S)) \rfloor` of L masks
            after step i of S, few tokens first.
        confidence: as in `UnmaskingScheduler`.
    """

    revises = True
    running: torch.Tensor | None = None  # (rows of the run, block) float64, infinite where nothing was drawn

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        schedule: str = "linear",
        confidence: str = "probability",
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        for name, value, allowed in (
            ("schedule", schedule, ("linear", "cosine")),
            ("confidence", confidence, CONFIDENCES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(map(repr, allowed))}.")

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        self.running = None

    def quotas(self, block_length: int, num_inference_steps: int) -> list[int]:
        if self.config.schedule == "linear":
            return super().quotas(block_length, num_inference_steps)
        turn = math.pi / (2 * num_inference_steps)
        left = [math.floor(block_length * math.cos(turn * step)) for step in range(num_inference_steps)] + [0]
        return [before - after for before, after in itertools.pairwise(left)]

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        return now.masked

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(now.sample), device=now.sample.device)
        if self.current_block is not None:
            rows = self.current_block.rows[: len(now.sample)]
        if self.running is None or now.step == 0:  # `LLaDA2Pipeline` sets timesteps once for all blocks
            size = (int(rows.max()) + 1, now.sample.shape[1])
            self.running = torch.full(size, math.inf, dtype=torch.float64, device=now.sample.device)
        running = torch.where(now.masked, self.confidence(now), self.running[rows])
        self.running[rows] = running
        if now.is_last:
            return after
        drawn = running.isfinite()
        assert self.due is not None
        kept = the_highest(running, drawn, sum(self.due[: now.step + 1]))
        return torch.where(drawn & ~kept, now.mask_token_id, after)
