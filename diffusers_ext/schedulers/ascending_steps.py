r"""EOSER and ASS (Yang et al. 2025, arXiv 2509.23924): few steps of full-sequence decoding that do not end too early.

Decoded all at once, a masked language model is soon sure of the end of text and fills it in from the back, which leaves no
room for an answer. *EOS early rejection* multiplies the confidence of a position whose token is end-of-text by
:math:`\gamma_i`, which rises from :math:`\gamma_{min}` in the first step i = 0 to :math:`\gamma_{max}` in the last of S. The
token stays; it only waits.

*Ascending step sizes* commit :math:`2^i` tokens in step i, few while little is known and many at the end, so that L tokens
take :math:`\lfloor \log_2 L \rfloor` steps.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number


class EOSRejectionScheduler(UnmaskingScheduler):
    r"""Commits the surest tokens, end-of-text last: :math:`\gamma_i = \gamma_{min} + (\gamma_{max} - \gamma_{min}) i / (S - 1)`.

    In `LLaDA2Pipeline` pass `threshold=2.0, editing_threshold=None`; its own commit far more than is due.

    Args:
        eos_token_id: end of text.
        block_length: tokens of a block, where a pipeline is not told; for full-sequence decoding all of them.
        num_inference_steps: steps of a block, where nobody says.
        threshold: confidence, after the multiplication, from which a token is committed beyond the quota.
        gamma_min, gamma_max: factors of the first and the last step, 0 to 1; both 1 leave the confidence as it is.
    """

    @register_to_config
    def __init__(
        self,
        *,
        eos_token_id: int,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float | None = None,
        gamma_min: float = 0.4,
        gamma_max: float = 1.0,
    ) -> None:
        check_number("eos_token_id", eos_token_id, 0, whole=True)
        self.take_over(block_length, num_inference_steps, threshold, eos_token_id, gamma_min, gamma_max)

    def take_over(
        self,
        block_length: int,
        num_inference_steps: int,
        threshold: float | None,
        eos_token_id: int | None,
        gamma_min: float,
        gamma_max: float,
    ) -> None:
        """Check the arguments of the constructor."""
        self.prepare(block_length, num_inference_steps)
        if threshold is not None:
            check_number("threshold", threshold, -float("inf"))
        if eos_token_id is not None:
            check_number("eos_token_id", eos_token_id, 0, whole=True)
        check_number("gamma_min", gamma_min, 0, 1)
        check_number("gamma_max", gamma_max, gamma_min, 1)

    def progress(self, step: int, num_steps: int) -> float:
        """How far the factor has risen in a step, 0 to 1."""
        return step / (num_steps - 1)

    def gamma(self, step: int, num_steps: int) -> float:
        """The factor of a step, counted from 0."""
        low, high = self.config.gamma_min, self.config.gamma_max
        if num_steps == 1:
            return high
        return low + (high - low) * self.progress(min(step, num_steps - 1), num_steps)

    def confidence(self, now: UnmaskingStep) -> torch.Tensor:
        sure = now.probability(now.tokens, now.masked)  # a factor below 1 lowers no negative confidence
        return torch.where(now.tokens == self.config.eos_token_id, sure * self.gamma(now.step, now.num_steps), sure)


class AscendingStepScheduler(EOSRejectionScheduler):
    r"""Commits :math:`2^i` tokens in step i, and what is left in the last.

    A block of L tokens takes :math:`\lfloor \log_2 L \rfloor` steps, or fewer with a larger last one:
    `num_inference_steps` says, or `AscendingBlockPolicy` does. The factor of end-of-text rises with the tokens that are
    decoded, :math:`\gamma_{min} + (\gamma_{max} - \gamma_{min}) (2^{i+1} - 1) / 2^S`, if `eos_token_id` is given.

    Args:
        block_length, num_inference_steps, threshold, gamma_max: as in `EOSRejectionScheduler`.
        eos_token_id: end of text; None rejects nothing.
        gamma_min: the factor where the rise begins.
    """

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 5,
        threshold: float | None = None,
        eos_token_id: int | None = None,
        gamma_min: float = 0.01,
        gamma_max: float = 1.0,
    ) -> None:
        self.take_over(block_length, num_inference_steps, threshold, eos_token_id, gamma_min, gamma_max)

    def progress(self, step: int, num_steps: int) -> float:
        return (2 ** (step + 1) - 1) / 2**num_steps

    def confidence(self, now: UnmaskingStep) -> torch.Tensor:
        if self.config.eos_token_id is None:
            return now.probability(now.tokens, now.masked)
        return super().confidence(now)

    def quotas(self, block_length: int, num_inference_steps: int) -> list[int]:
        last = block_length - (2 ** (num_inference_steps - 1) - 1)
        if last < 1:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; {block_length} tokens take at most "
                f"{block_length.bit_length()} steps that double. `AscendingBlockPolicy` gives each block its number."
            )
        return [2**step for step in range(num_inference_steps - 1)] + [last]
