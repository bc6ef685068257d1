r"""EDLM (Xu et al. 2024, arXiv 2410.21357): whole texts are drawn, and an energy says which of them goes on.

A masked diffusion model draws the tokens of a step as if they did not depend on one another, :math:`p_\theta(x_0 | x_t)`. EDLM
corrects that by an energy of the whole text:

.. math::
    p(x_0 | x_t) \propto p_\theta(x_0 | x_t)\, e^{-E(x_0, x_t)}.

It is sampled by importance: k texts are drawn from :math:`p_\theta`, one of them is taken with a probability proportional to
:math:`e^{-E}`, and of its tokens those are kept that the step unmasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.hooks import RemovableHandle

from ._unmasking import (
    CurrentBlock,
    UnmaskingScheduler,
    UnmaskingStep,
    check_number,
    safe_categorical,
    tempered,
    without_mask,
)


class _Call(NamedTuple):
    """What the network was last called with: texts `(batch, length)`, which tokens are real, and the current block."""

    text: torch.Tensor
    real: torch.Tensor
    block: CurrentBlock | None


class EnergyReweightedScheduler(UnmaskingScheduler):
    """Ancestral steps of absorbing diffusion, whose tokens come from one of several drawn texts, chosen by their energy.

        pipe.scheduler = EnergyReweightedScheduler()
        pipe.scheduler.guide(pipe.model, ARResidualEnergy(causal_model, bos_token_id=1))
        pipe(..., num_inference_steps=16, step_cache=False)

    Between two states of the text the energy is asked once, about `num_candidates` texts a row, and only in steps that unmask
    something and whose time is in the window. The network is called in every step (`step_cache=False`). With blocks, the
    texts end where the first mask after the block is. `temperature=1` and no `top_p` or `top_k` are needed for the exact law;
    temperature 0 draws equal texts and is refused.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        num_candidates: k. With 1 no energy is needed, and samples are those of `AbsorbingDiffusionScheduler`.
        window_low, window_high: times, 1 (all masked) to 0, between which the energy is used. A block begins at 1.
        energy_temperature: the energy is divided by it.
        eps: the last time; the grid is uniform from 1 to it.

    Raises:
        ValueError: a value is out of range.
    """

    energy: Callable[..., torch.Tensor] | None = None
    last_call: _Call | None = None

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        num_candidates: int = 8,
        window_low: float = 0.6,
        window_high: float = 1.0,
        energy_temperature: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        check_number("num_candidates", num_candidates, 1, whole=True)
        check_number("window_low", window_low, 0, 1)
        check_number("window_high", window_high, 0, 1)
        check_number("energy_temperature", energy_temperature, 1e-6)
        check_number("eps", eps, 0, 0.5)

    def guide(self, model: nn.Module, energy: Callable[..., torch.Tensor]) -> RemovableHandle:
        """Weigh the texts of `model` by `energy`. The calls of `model` are watched for the text around the block.

        Args:
            model: the network of the pipeline, called with `input_ids` and `attention_mask` by name.
            energy: called as `energy(candidates, noisy, log_probability, attention_mask, mask_token_id)`: texts `(n, length)`
                without and with masks, the log-probability `(n,)` with which the network draws the tokens that are masked,
                which tokens count `(n, length)`, and the mask. It gives `(n,)` finite numbers, lower for better texts; only
                differences between texts of one row matter. `ARResidualEnergy` and `NCEEnergy` are such.

        Returns:
            A handle; its `remove()` ends the watching.
        """
        self.energy = energy

        def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            text = args[0] if args else kwargs["input_ids"]
            self.last_call = _Call(text, _real(kwargs.get("attention_mask"), text), self.current_block)

        return model.register_forward_pre_hook(watch, with_kwargs=True)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        self.times = torch.linspace(1, self.config.eps, num_inference_steps + 1, dtype=torch.float64).tolist()

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        if now.is_last:
            committed = now.masked
        else:
            committed = now.masked & (now.random() < 1 - self.times[now.step + 1] / self.times[now.step])
        time = self.times[min(now.step, len(self.times) - 1)]
        if self.config.num_candidates > 1 and self.config.window_low <= time <= self.config.window_high:
            self._reweigh(now, committed.any(1))
        return committed

    def _reweigh(self, now: UnmaskingStep, rows: torch.Tensor) -> None:
        """Put the chosen texts in the place of the drawn tokens, in `rows` `(batch,)`."""
        if self.energy is None:
            raise ValueError("There is no energy: call `guide(pipe.model, energy)` before the pipeline.")
        call, columns = self._around(now)
        count = self.config.num_candidates
        # All rows draw, needed or not: so a row with its own generator is the same in every batch.
        uniform = torch.stack([self._numbers(now), *(now.random() for _ in range(count - 1))])  # (k, batch, block)
        choice = now.random()[:, 0]
        number = int(rows.sum())
        if number == 0:
            return
        places = now.masked & rows[:, None]
        logits = tempered(without_mask(now.logits[places], now.mask_token_id), now.temperature, now.top_k, now.top_p)
        drawn = torch.stack([safe_categorical(logits, uniform=each[places]) for each in uniform])  # (k, masks)
        told = torch.log_softmax(logits, -1).gather(-1, drawn.T).T
        row, place = places.nonzero(as_tuple=True)
        log_probability = told.new_zeros(count, len(places)).index_add(1, row, told)
        texts = call.text.expand(count, -1, -1).clone()
        texts[:, row, columns[row, place]] = drawn
        with torch.no_grad():
            energy = self.energy(
                texts[:, rows].flatten(0, 1),
                call.text[rows].repeat(count, 1),
                log_probability[:, rows].flatten(),
                call.real[rows].repeat(count, 1),
                now.mask_token_id,
            )
        if energy.shape != (count * number,):
            raise ValueError(f"`energy` gave {tuple(energy.shape)} for {count * number} texts; it must be one a text.")
        weights = -energy.double().view(count, number).T / self.config.energy_temperature  # (rows, k)
        chosen = torch.zeros_like(rows, dtype=torch.long)
        chosen[rows] = safe_categorical(weights, uniform=choice[rows])
        tokens = now.sample.clone()
        tokens[row, place] = drawn.gather(0, chosen[row][None]).squeeze(0)
        now.use_tokens(tokens)

    def _numbers(self, now: UnmaskingStep) -> torch.Tensor:
        """The numbers by which the first text is drawn: those of a step without energy."""
        if now.for_tokens is None:
            raise ValueError("`temperature` is 0, at which all texts that are drawn are equal; it must be above 0.")
        return now.for_tokens

    def _around(self, now: UnmaskingStep) -> tuple[_Call, torch.Tensor]:
        """The texts that the rows of this step are part of, and the columns of their blocks."""
        call, (batch, block) = self.last_call, now.sample.shape
        if call is None:
            raise ValueError("The model that `guide` watches was not called; it must be that of the pipeline.")
        if call.block is not self.current_block or len(call.text) not in (batch, 2 * batch):
            raise ValueError(
                "The model was not called for all rows of this step; give `step_cache=False` to the pipeline."
            )
        call = _Call(call.text[:batch], call.real[:batch], call.block)
        if call.block is None:
            columns = torch.arange(call.text.shape[1] - block, call.text.shape[1], device=call.text.device)
            columns = columns.expand(batch, -1)
        else:
            columns = call.block.columns[:batch, :block]
        # Where a row's block is shorter, its last place is repeated; no mask is there.
        if not bool(((call.text.gather(1, columns) == now.sample) | ~now.masked).all()):
            raise ValueError(
                "The model that `guide` watches was last called with other tokens than those of this step."
            )
        return call, columns


def _real(mask: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor:
    """Which tokens of a text `(batch, length)` any other token sees, of the attention mask in all its forms."""
    if mask is None:
        return torch.ones_like(text, dtype=torch.bool)
    if mask.ndim == 2:
        return mask.bool()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0].any(1).expand(len(text), -1)


class ARResidualEnergy:
    r"""What the tokens' dependence is worth to a causal language model:

    .. math::
        E(x_0, x_t) = -\log p_{AR}(x_0) + \log p_\theta(x_0 | x_t).

    With it the sampled law is that of the causal model given all visible tokens, left and right, and no training is needed. The
    authors' default leaves visible tokens out of the first sum (`carry_over`); the law is then not a conditional of the causal
    model, and only their likelihood estimate needs it.

    Args:
        model: a causal language model with the same tokens, called as `model(input_ids=...).logits`.
        bos_token_id: put before every text, so that its first token counts; None where texts begin with such a token.
        rows_at_once: texts in one call of the model.

    Raises:
        ValueError: `rows_at_once` is no whole number above 0.
    """

    def __init__(self, model: Callable[..., Any], bos_token_id: int | None = None, rows_at_once: int = 64) -> None:
        check_number("rows_at_once", rows_at_once, 1, whole=True)
        self.model, self.bos_token_id, self.rows_at_once = model, bos_token_id, rows_at_once

    def __call__(
        self,
        candidates: torch.Tensor,
        noisy: torch.Tensor,
        log_probability: torch.Tensor,
        attention_mask: torch.Tensor,
        mask_token_id: int,
    ) -> torch.Tensor:
        """As `EnergyReweightedScheduler.guide` says; tokens after the first mask of `candidates` do not count.

        Raises:
            ValueError: a text has tokens that the model does not know.
        """
        known = ((candidates == mask_token_id) | ~attention_mask.bool()).cumsum(1) == 0
        ids = torch.where(known, candidates, 0)
        if self.bos_token_id is None:
            targets, counted = ids[:, 1:], known[:, 1:]
        else:
            targets, counted = ids, known
            ids = torch.cat([ids.new_full((len(ids), 1), self.bos_token_id), ids], 1)
        parts = []
        for rows, wanted in zip(ids.split(self.rows_at_once), targets.split(self.rows_at_once), strict=True):
            logits = self.model(input_ids=rows).logits[:, : wanted.shape[1]]
            if int(wanted.max()) >= logits.shape[-1]:
                raise ValueError(
                    f"The causal model has {logits.shape[-1]} tokens, and a text has token {int(wanted.max())}."
                )
            logits = logits if logits.dtype == torch.float64 else logits.float()
            parts.append(torch.log_softmax(logits, -1).gather(-1, wanted[..., None]).squeeze(-1))
        log_ar = torch.cat(parts).masked_fill(~counted, 0).double().sum(1)
        return log_probability - log_ar
