"""Guided diffusion of FlashDLM (Hu et al. 2025, arXiv 2505.21467): a second model decides how many drafted tokens to keep.

Each step the diffusion model drafts all masks of the block. A small autoregressive model reads text and draft once; the
longest run from the left that it agrees with becomes text. It says when, not what: it never writes a token of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.hooks import RemovableHandle

from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number

ACCEPTANCES = ("argmax", "topk", "threshold")


class GuidedUnmaskingScheduler(UnmaskingScheduler):
    """Unmasks from left to right as many drafted tokens as a verifier accepts, and always at least one a row.

        pipe.scheduler = GuidedUnmaskingScheduler()
        pipe.scheduler.guide(pipe.model, verifier)

    Prompts of a batch must not be filled up on the left. A block needs as many steps as it has tokens, so that the verifier
    may reject all; with fewer, the last step unmasks what is left. The draft is drawn at the pipeline's temperature.

    Args:
        block_length: tokens of a block, where a pipeline is not told; the verifier reads a block at a time.
        num_inference_steps: steps of a block, where nobody says.
        acceptance: a drafted token is accepted where it is the verifier's likeliest ("argmax"), one of its
            `acceptance_top_k` likeliest ("topk"), or more probable than `acceptance_threshold` ("threshold").
        acceptance_top_k: 1 or more; the authors take 5.
        acceptance_threshold: 0 to 1; the authors take 0.1.

    Raises:
        ValueError: a value is out of range.
    """

    verifier: Callable[..., Any] | None = None
    seen: torch.Tensor | None = None

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        acceptance: str = "argmax",
        acceptance_top_k: int = 5,
        acceptance_threshold: float = 0.1,
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        if acceptance not in ACCEPTANCES:
            raise ValueError(f"`acceptance` is {acceptance!r}; allowed are {', '.join(map(repr, ACCEPTANCES))}.")
        check_number("acceptance_top_k", acceptance_top_k, 1, whole=True)
        check_number("acceptance_threshold", acceptance_threshold, 0, 1)

    def guide(self, model: nn.Module, verifier: Callable[..., Any]) -> RemovableHandle:
        """Let `verifier` guide the unmasking of `model`, whose calls are watched for the text before the block.

        Args:
            model: the diffusion language model of the pipeline, called with `input_ids`.
            verifier: a causal language model with the same tokens, called as `verifier(input_ids=...).logits`.

        Returns:
            A handle; its `remove()` ends the watching.
        """
        self.verifier = verifier

        def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.seen = args[0] if args else kwargs["input_ids"]

        return model.register_forward_pre_hook(watch, with_kwargs=True)

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        if self.verifier is None or self.seen is None:
            raise ValueError("No verifier reads along: call `guide(pipe.model, verifier)` before the pipeline.")
        if now.is_last:
            return now.masked
        batch, block = now.sample.shape
        text = self.seen[:batch]
        if self.current_block is None:
            columns = torch.arange(text.shape[1] - block, text.shape[1], device=text.device).expand(batch, -1)
        else:
            columns = self.current_block.columns[:batch, :block]
        # Where a row's block is shorter, its last place is repeated; no mask is there.
        if not bool(((text.gather(1, columns) == now.sample) | ~now.masked).all()):
            raise ValueError(
                "The model that `guide` watches was last called with other tokens than those of this step."
            )
        agreed = self._agreed(text, columns, now) | ~now.masked
        accepted = agreed.long().cumprod(1).bool()
        leftmost = now.masked & (now.masked.long().cumsum(1) == 1)
        return now.masked & (accepted | leftmost)

    def _agreed(self, text: torch.Tensor, columns: torch.Tensor, now: UnmaskingStep) -> torch.Tensor:
        """Where the verifier accepts the draft, `(batch, block)`; of a text's first token it has nothing to say."""
        draft = text.clone()
        row, place = now.masked.nonzero(as_tuple=True)
        draft[row, columns[row, place]] = now.tokens[row, place]
        assert self.verifier is not None
        with torch.no_grad():
            logits = self.verifier(input_ids=draft[:, : int(columns.max()) + 1]).logits
        logits = logits.gather(1, (columns - 1).clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])).float()
        tokens, has_prefix = now.tokens, columns > 0
        if int(tokens[now.masked].max()) >= logits.shape[-1]:
            raise ValueError(
                f"The verifier has {logits.shape[-1]} tokens, and the draft has token {int(tokens.max())}."
            )
        tokens = tokens.masked_fill(~now.masked, 0)[..., None]
        acceptance = self.config.acceptance
        if acceptance == "argmax":
            return has_prefix & (logits.argmax(-1, keepdim=True) == tokens).squeeze(-1)
        if acceptance == "topk":
            count = min(self.config.acceptance_top_k, logits.shape[-1])
            return has_prefix & (logits.topk(count, -1).indices == tokens).any(-1)
        return has_prefix & (logits.softmax(-1).gather(-1, tokens).squeeze(-1) > self.config.acceptance_threshold)
