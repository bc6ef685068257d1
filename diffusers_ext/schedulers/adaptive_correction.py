r"""The samplers of hybrid diffusion language models (Fathi et al. 2025, arXiv 2504.06416).

A model trained on noise that is masks and, a little, wrong tokens (`train_hdlm`) knows at visible places too which token
belongs there. The adaptive correction sampler uses that: in a step from time t to s every mask becomes a token with probability
:math:`1 - s/t`, and every visible token that is not given is drawn anew with probability :math:`\eta s/t`. One call of the
network serves both. Times may differ from place to place: a hyperschedule.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._hyperschedule import HYPERSCHEDULES, hyperschedule_levels, mask_rates
from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number


class AdaptiveCorrectionScheduler(UnmaskingScheduler):
    """Ancestral unmasking that draws a few visible tokens again in each step.

    For models trained with hybrid noise. In blocks, only tokens of the current block are drawn again. With `eta=0` it is
    `AbsorbingDiffusionScheduler`, bit for bit. `LLaDA2Pipeline` needs `temperature=1, editing_threshold=None,
    eos_early_stop=False`, and ends a block as soon as no masks are left.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        eta: share of the visible tokens that are drawn again in a step, before the factor s/t. The authors take 0.015 for
            whole texts and 0.01 in blocks.
        eps: the last time; the grid is uniform from 1 to it.

    Raises:
        ValueError: a value is out of range.
    """

    @register_to_config
    def __init__(
        self, *, block_length: int = 32, num_inference_steps: int = 32, eta: float = 0.015, eps: float = 1e-5
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        check_number("eta", eta, 0, 1)
        check_number("eps", eps, 0, 0.5)
        self.revises = eta > 0

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        length = self.config.block_length if block_length is None else block_length
        self.rates = self.unmask_probabilities(num_inference_steps, length).to(device)

    def unmask_probabilities(self, num_inference_steps: int, block_length: int) -> torch.Tensor:
        """Probability `(steps, 1 or block_length)` with which a mask becomes a token, by step and place; float64."""
        t = torch.linspace(1, self.config.eps, num_inference_steps + 1, dtype=torch.float64)
        rates = (t[:-1] - t[1:]) / t[:-1]
        rates[-1] = 1
        return rates[:, None]

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        if now.is_last:
            return now.masked
        return now.masked & (now.random() < self.rates[min(now.step, len(self.rates) - 1)])

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        if now.is_last or self.config.eta == 0:
            return after
        again = self.config.eta * (1 - self.rates[min(now.step, len(self.rates) - 1)])
        wrong = ~now.masked & ~now.given & (now.random() < again)
        return torch.where(wrong, now.draw(wrong), after)


class HyperScheduleScheduler(AdaptiveCorrectionScheduler):
    """The same with a time for each place: autoregressive, in blocks, in a sliding window, or all at once.

    The whole text is one block of the pipeline (`block_length=None`): the table of levels says what is settled when. It needs
    `num_steps(length)` steps; if there are more, they do nothing. `LLaDA2Pipeline` makes at most one step a token, which is too
    few for a sliding window. The network sees all of the text: its attention does not follow the table, and nothing is cached.

    Args:
        block_length: tokens of a text, where a pipeline is not told.
        num_inference_steps: steps, where nobody says.
        hyperschedule: "full", "block", "sliding" or "autoregressive".
        width: of a block or the window; the other two have no use for it.
        num_levels: levels from noise to settled, which are the steps of a block; "autoregressive" has no use for it.
        eta: as in `AdaptiveCorrectionScheduler`.

    Raises:
        ValueError: a value is out of range.
    """

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        hyperschedule: str = "block",
        width: int = 8,
        num_levels: int = 8,
        eta: float = 0.01,
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        if hyperschedule not in HYPERSCHEDULES:
            raise ValueError(
                f"`hyperschedule` is {hyperschedule!r}; allowed are {', '.join(map(repr, HYPERSCHEDULES))}."
            )
        check_number("width", width, 1, whole=True)
        check_number("num_levels", num_levels, 1, whole=True)
        check_number("eta", eta, 0, 1)
        self.revises = eta > 0

    def levels(self, length: int) -> torch.Tensor:
        """The table `(steps, length)` for a text."""
        config = self.config
        return hyperschedule_levels(config.hyperschedule, length, config.width, config.num_levels)

    def num_steps(self, length: int) -> int:
        """Steps that a text takes."""
        return len(self.levels(length))

    def unmask_probabilities(self, num_inference_steps: int, block_length: int) -> torch.Tensor:
        """Probability `(steps, block_length)` with which a mask becomes a token, by step and place; float64.

        Raises:
            ValueError: the table has more steps.
        """
        levels = self.levels(block_length)
        if len(levels) > num_inference_steps:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; {block_length} tokens take at least {len(levels)} with this "
                "hyperschedule."
            )
        worthless = 1 if self.config.hyperschedule == "autoregressive" else self.config.num_levels
        rates = mask_rates(levels, worthless)
        after = torch.cat([rates[1:], rates[-1:]])
        chance = torch.where(levels == worthless, 0.0, 1 - after / rates)
        return torch.where(levels == 0, 1.0, chance)
