"""Self-correction of GIDD (von Rütte et al. 2025, arXiv 2503.04482): a finished text, improved token by token.

A network that was trained with uniform noise says at visible places, too, which token fits there. At a fixed low noise level
each step draws a token for every place, sharply, and puts in place the surest that differ from the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..schedulers._unmasking import check_number, draw_uniform, safe_categorical, the_highest, without_mask
from ._block_policy import FixedBlocks
from ._masked_diffusion import MaskedDiffusionPipeline, _Decoder, _Text


@dataclass
class SelfCorrectionOutput(BaseOutput):
    """Output of `SelfCorrection`, of `n` texts.

    Attributes:
        sequences: int64 `(n, length)`, the corrected texts, filled up on the right.
        num_changes: for each, tokens that are others than before.
        accuracy: for each, the share of tokens that the network itself found likeliest, in the last step.
        num_calls: for each, calls of the network.
    """

    sequences: torch.Tensor
    num_changes: list[int]
    accuracy: list[float]
    num_calls: list[int]


class SelfCorrection:
    """Changes tokens of finished texts to those that the network finds surest.

        corrected = dx.SelfCorrection(pipe)(output.sequences).sequences

    A text is done when a step changes nothing, or when for more than `patience` steps the share of tokens that the network
    finds likeliest has not been higher than before.

    Args:
        pipe: whose network, tokenizer and attention are used; the scheduler is not. The network must have been trained with
            uniform noise (`train_gidd`): what others say of visible tokens was never trained.
        temperature: of the draws, above 0.
        time: noise level in [0, 1] that a network conditioned on the time is told.
        tokens_per_step: places that change in a step, at most.
        max_steps: steps at most.
        patience: see above.

    Raises:
        ValueError: an argument is out of its range, or the network is block-causal.
    """

    def __init__(
        self,
        pipe: MaskedDiffusionPipeline,
        temperature: float = 0.1,
        time: float = 0.01,
        tokens_per_step: int = 1,
        max_steps: int = 128,
        patience: int = 32,
    ) -> None:
        check_number("temperature", temperature, 0)
        if temperature == 0:
            raise ValueError("`temperature` is 0; it must be above.")
        check_number("time", time, 0, 1)
        check_number("tokens_per_step", tokens_per_step, 1, whole=True)
        check_number("max_steps", max_steps, 1, whole=True)
        check_number("patience", patience, 0, whole=True)
        if pipe.config.attention == "block_causal":
            raise ValueError("`pipe` has a block-causal network, which does not look at what follows a block.")
        self.pipe, self.temperature, self.time = pipe, temperature, time
        self.tokens_per_step, self.max_steps, self.patience = tokens_per_step, max_steps, patience

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor | list[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        prompt_length: int | Sequence[int] = 0,
        mask_token_id: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SelfCorrectionOutput:
        """Correct texts.

        Args:
            input_ids: tokens `(n, length)`, or a list of `(length,)`.
            attention_mask: `(n, length)`, 0 for padding in `input_ids`.
            prompt_length: how many tokens at the beginning of each text are not to change; one number, or one a text.
            mask_token_id: None takes that of the tokenizer, or the model.
            generator: one, or a list of one a text, by which a text is the same in every batch of equally long ones.

        Raises:
            ValueError: a text has masks, or nothing that may change, or an argument does not fit the texts.
        """
        pipe = self.pipe
        mask = pipe._token("mask_token_id", mask_token_id)
        if mask is None:
            raise ValueError("`mask_token_id` is None, and neither the tokenizer nor the model has one.")
        rows = pipe._rows(None, None, input_ids, attention_mask, False, False)
        if any(mask in row for row in rows):
            raise ValueError("`input_ids` has masks; only finished texts can be corrected.")
        given = [prompt_length] * len(rows) if isinstance(prompt_length, int) else list(prompt_length)
        if len(given) != len(rows) or not all(0 <= count < len(row) for count, row in zip(given, rows, strict=False)):
            raise ValueError(
                f"`prompt_length` is {prompt_length!r}; it must leave tokens of each of {len(rows)} texts."
            )
        if isinstance(generator, list) and len(generator) != len(rows):
            raise ValueError(f"`generator` has {len(generator)} generators for {len(rows)} texts; one each is needed.")

        text = _Text(rows, 0, mask, pipe._token("eos_token_id", None), pipe._execution_device)
        before = text.tokens
        decoder = _Decoder(pipe, text, FixedBlocks(), None, 1.0, step_cache=False)  # one block: the whole text
        decoder.lengths = text.end
        decoder._columns(before.shape[1])
        if decoder.time is not None:
            decoder.time = lambda step: self.time
        free = decoder.inside & (text.places >= torch.tensor(given, device=before.device)[:, None])

        running = torch.ones_like(text.finished)
        best = torch.zeros(len(rows), dtype=torch.float64, device=before.device)
        accuracy, waited = best.clone(), torch.zeros_like(text.end)
        with pipe.progress_bar(total=self.max_steps) as bar:
            try:
                for step in range(self.max_steps):
                    now = running.nonzero().squeeze(1)
                    if not len(now):
                        break
                    logits = without_mask(decoder._call(now, step), mask)
                    text.calls[now] += 1
                    source = [generator[i] for i in now.tolist()] if isinstance(generator, list) else generator
                    after = self._corrected(logits, text.tokens[now], free[now], source)
                    right = (after == logits.argmax(-1)) & free[now]
                    accuracy[now] = right.sum(1).double() / free[now].sum(1)
                    better = accuracy > best
                    best = torch.where(better, accuracy, best)
                    waited = torch.where(better, 0, waited + 1)
                    given_up = waited[now] > self.patience
                    changed = (after != text.tokens[now]).any(1)
                    text.tokens = text.tokens.index_put((now,), torch.where(given_up[:, None], text.tokens[now], after))
                    running[now] = changed & ~given_up
                    bar.update()
            finally:
                pipe.scheduler.__dict__.pop("current_block", None)
        pipe.maybe_free_model_hooks()
        changes = (text.tokens != before).sum(1)
        return SelfCorrectionOutput(text.tokens, changes.tolist(), accuracy.tolist(), text.calls.tolist())

    def _corrected(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        free: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Tokens `(m, length)` after one step: the surest of the draws that differ from what is there."""
        sharp = torch.log_softmax(logits / self.temperature, -1)
        drawn = safe_categorical(sharp, uniform=draw_uniform(tuple(tokens.shape), generator, tokens.device))
        surest = sharp.gather(-1, drawn[..., None]).squeeze(-1)
        return torch.where(the_highest(surest, free & (drawn != tokens), self.tokens_per_step), drawn, tokens)
