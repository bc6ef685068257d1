r"""The first-hitting sampler of masked diffusion (Zheng et al. 2024, arXiv 2409.02908).

Going back in time, each position changes once, and between changes nothing happens. So only the changes are simulated: of n
masks left, one of them chosen uniformly becomes a token, drawn from what the network says of the state before. The law of
the result is that of ancestral sampling in infinitely many steps, in as many network calls as there are tokens. The time of
a change is needed only by networks that are told the time; `hitting_times` has them.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number, draw_uniform, the_highest


class FirstHittingScheduler(UnmaskingScheduler):
    """Unmasks positions in uniformly random order: exact samples of the model, one token a step.

    With fewer steps than tokens, several hitting times in a row share one network call (section 3.2 of the paper), and the
    samples are no longer exact. `temperature=1` and no `top_p` or `top_k` are needed for exact ones; `LLaDA2Pipeline` needs
    `temperature=1, editing_threshold=None, eos_early_stop=False` and one block of as many steps as tokens.

    Args:
        block_length: tokens of a block, where a pipeline is not told. In shorter blocks than the text, the order is random
            in each block and the blocks come from left to right.
        num_inference_steps: steps of a block, where nobody says.
    """

    @register_to_config
    def __init__(self, *, block_length: int = 32, num_inference_steps: int = 32) -> None:
        self.prepare(block_length, num_inference_steps)

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        return the_highest(now.random(), now.masked, now.quota)


def hitting_times(
    num_masks: int, num_samples: int = 1, generator: torch.Generator | None = None, device: str = "cpu"
) -> torch.Tensor:
    r"""Times at which n = L, L - 1, ..., 1 masks become one less, for the schedule :math:`\alpha_t = 1 - t`.

    :math:`t_{n-1} = t_n u^{1/n}` from :math:`t_L = 1` (proposition 3.1): the order statistics of L uniform numbers. For
    another schedule :math:`\alpha`, the times are those at which :math:`1 - \alpha` has these values.

    Args:
        num_masks: L.
        num_samples: how many runs.
        generator: of the numbers.
        device: of the result.

    Returns:
        `(num_samples, num_masks)`, float64, falling.

    Raises:
        ValueError: a number is not at least 1.
    """
    check_number("num_masks", num_masks, 1, whole=True)
    check_number("num_samples", num_samples, 1, whole=True)
    uniform = 1 - draw_uniform((num_samples, num_masks), generator, device)  # above 0
    masks = torch.arange(num_masks, 0, -1, dtype=torch.float64, device=device)
    return (uniform.log() / masks).cumsum(-1).exp()
