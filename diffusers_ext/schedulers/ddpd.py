r"""Planned denoising (DDPD, Liu et al. 2024, arXiv 2410.06264): a planner says which tokens are noise, a denoiser redraws them.

A text begins as uniformly random tokens. The planner gives each position d the logit :math:`\ell_d` of the probability that
its token is noise. In each step one position is chosen, in proportion to that probability (the Gillespie rule) or to the odds
(a softmax of the logits, which is sharper and the authors' default); whether the others are noise is drawn, too, and those
that are go under a mask before the denoiser draws a token for the chosen one. So a position may be drawn again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput

from ._unmasking import check_number, check_step, draw_uniform, safe_categorical, tempered, the_highest, without_mask

SELECTIONS = ("softmax", "proportional")


@dataclass
class DDPDSchedulerOutput(BaseOutput):
    """Output of `DDPDScheduler.step`.

    Attributes:
        prev_sample: `(batch, length)`, the tokens after the step.
    """

    prev_sample: torch.Tensor


class Plan(NamedTuple):
    """What one step does.

    Attributes:
        chosen: `(batch, length)` bool, positions that get a new token.
        masked: `(batch, length)` bool, positions under a mask for the denoiser; all that are chosen are among them.
        noise: `(batch,)` float64, how many positions are noise by the planner's estimate.
    """

    chosen: torch.Tensor
    masked: torch.Tensor
    noise: torch.Tensor


class DDPDScheduler(SchedulerMixin, ConfigMixin):
    """Chooses positions by a planner, and writes what a denoiser draws there.

    The loop with a planner that is not told the time is not exact, however good the networks are: many more steps than tokens
    drift towards likely texts that are alike.

    Args:
        selection: "softmax" chooses positions by the planner's odds, "proportional" by its probabilities.
        positions_per_step: positions that a step chooses, without repetition. One is the method; with more, tokens are drawn
            as if they did not depend on one another.
        tolerance: a text of which the planner thinks that fewer positions than this are noise is done.
        num_inference_steps: steps, where nobody says.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        selection: str = "softmax",
        positions_per_step: int = 1,
        tolerance: float = 1e-3,
        num_inference_steps: int = 256,
    ) -> None:
        if selection not in SELECTIONS:
            raise ValueError(f"`selection` is {selection!r}; allowed are {' and '.join(map(repr, SELECTIONS))}.")
        check_number("positions_per_step", positions_per_step, 1, whole=True)
        check_number("tolerance", tolerance, 0)
        self.set_timesteps(num_inference_steps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a run.

        Args:
            num_inference_steps: steps that choose positions; one more redraws all that is still noise.
            device: of `timesteps`, which count the steps that are left.

        Raises:
            ValueError: no whole number above 0.
        """
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, -1, -1, device=device)

    def plan(
        self,
        planner_logits: torch.Tensor,
        free: torch.Tensor | None = None,
        final: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Plan:
        """Where to draw, and what the denoiser must not see.

        Args:
            planner_logits: `(batch, length)`, of "this token is noise".
            free: `(batch, length)` bool, positions that may change; None is all.
            final: whether this is the last step, which draws all that is noise and forces nothing.
            generator: one, or one a row.

        Raises:
            ValueError: `planner_logits` is not `(batch, length)`, or `free` has another shape.
        """
        if planner_logits.ndim != 2 or (free is not None and free.shape != planner_logits.shape):
            raise ValueError(
                f"`planner_logits` has shape {tuple(planner_logits.shape)}, `free` {None if free is None else tuple(free.shape)}; "
                "both must be (batch, length)."
            )
        logits = planner_logits.double()
        free = torch.ones_like(logits, dtype=torch.bool) if free is None else free
        probability = torch.sigmoid(logits) * free
        noise = probability.sum(-1)
        busy = (noise >= self.config.tolerance)[:, None]
        shape, device = tuple(logits.shape), logits.device
        masked = (draw_uniform(shape, generator, device) < probability) & busy
        if final:
            return Plan(masked, masked, noise)
        score = logits if self.config.selection == "softmax" else torch.nn.functional.logsigmoid(logits)
        gumbel = -torch.log(-torch.log(draw_uniform(shape, generator, device)))  # 53 bits: nothing rare is lost
        chosen = the_highest(score + gumbel, free & busy, self.config.positions_per_step)
        return Plan(chosen, masked | chosen, noise)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        plan: Plan,
        mask_token_id: int,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPDSchedulerOutput | tuple[torch.Tensor]:
        """Write new tokens at the chosen positions.

        Args:
            model_output: logits `(batch, length, vocabulary)` of the denoiser for `sample` under the plan's masks.
            timestep: not used; the process has no time.
            sample: tokens `(batch, length)`, without masks.
            plan: of `plan`.
            mask_token_id: the mask, which is never drawn.
            temperature: 0 takes the likeliest token.
            top_p, top_k: restrict the draws.
            generator: one, or one a row.
            return_dict: False gives a tuple.

        Raises:
            ValueError: an argument is out of its range.
        """
        check_step(model_output, sample, temperature, top_p, "auto")
        uniform = draw_uniform(tuple(sample.shape), generator, sample.device)
        logits = without_mask(model_output[plan.chosen], mask_token_id)
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = safe_categorical(tempered(logits, temperature, top_k, top_p), uniform=uniform[plan.chosen])
        after = sample.clone()
        after[plan.chosen] = drawn
        return DDPDSchedulerOutput(prev_sample=after) if return_dict else (after,)
