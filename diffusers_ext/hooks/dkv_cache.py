"""dKV-Cache (Ma et al. 2025, arXiv 2505.15781): delayed keys and values for masked diffusion language models.

The keys and values of a token change most in the step in which it is decoded, then settle. So a token goes into the cache
one step after it was decoded, and from then on is not computed until the next refresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ._lm_cache import MaskedLMCacheConfig, TokenCall, check_integer

_VARIANTS = ("decode", "greedy", "prefix", "prefix_decode")
_UNSEEN = 1 << 30  # age of tokens that were there when the run began


@dataclass
class DKVCacheConfig(MaskedLMCacheConfig):
    """Settings of dKV-Cache.

    Args:
        mask_token_id, shift_logits: as in `MaskedLMCacheConfig`: the mask token where the model's config has none, and
            whether the logits at a place predict the token after it.
        variant: which tokens a step computes.
            "decode": those still masked, and those decoded in the last `delay` steps (dKV-Cache-Decode).
            "greedy": those decoded in the last `delay` steps, those to be decoded now, and `window` masked neighbours of
            each of these (dKV-Cache-Greedy). It needs a sampler that knows beforehand what it decodes and says so with
            `announce_positions`; a call without an announcement computes everything.
            "prefix": all but the prompt, which is never refreshed (dKV-Cache-Prefill).
            "prefix_decode": as "decode", but refreshes leave the prompt out (dKV-Cache-PD).
        refresh_interval: N; the steps 0, 1, N, 2N, ... of a block compute everything. The authors take 2 to 16; 1 computes
            everything always. Has no meaning for "prefix".
        block_length: tokens of a block, 1 or more, counted from the first masked token of the run: steps are counted anew
            in each block. None: the whole sequence is one block. A sequence that grows at its end begins a block, and a
            pipeline that tells its blocks (`MaskedDiffusionPipeline`) needs no `block_length`.
        delay: steps after its decoding in which a token is computed, 0 or more; the paper's is 1.
        window: w of "greedy", 0 or more: masked neighbours computed beside each token to be decoded, nearest first, from
            left and right in turn.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "dkv_cache"

    variant: str = "decode"
    refresh_interval: int = 4
    block_length: int | None = None
    delay: int = 1
    window: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _VARIANTS:
            raise ValueError(f"`variant` is {self.variant!r}; allowed are {', '.join(map(repr, _VARIANTS))}.")
        check_integer("refresh_interval", self.refresh_interval, 1)
        check_integer("block_length", self.block_length, 1, optional=True)
        check_integer("delay", self.delay, 0)
        check_integer("window", self.window, 0)

    def rule(self) -> DelayedRule:
        return DelayedRule(self)


def apply_dkv_cache(module: nn.Module, config: DKVCacheConfig | None = None) -> None:
    """Put dKV-Cache on a masked language model of transformers, or one of ours.

    Raises:
        ValueError: the model is no such model, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config if config is not None else DKVCacheConfig())


def remove_dkv_cache(module: nn.Module) -> None:
    """Take dKV-Cache off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, DKVCacheConfig.key)


class DelayedRule:
    """Which tokens a step of dKV-Cache computes."""

    exact = False

    def __init__(self, config: DKVCacheConfig) -> None:
        self.config = config

    def recompute(self, call: TokenCall) -> torch.Tensor | None:
        config, memory = self.config, call.memory
        if "age" not in memory:
            memory.update(age=torch.where(call.prompt, _UNSEEN, 0), block=0, begin=0, origin=_first(~call.prompt))
        memory["age"] = torch.where(call.masked | call.changed, 0, memory["age"] + 1)
        block = call.block
        if block is None and config.block_length is not None:
            block = (_first(call.masked) - memory["origin"]) // config.block_length
        if call.grew or (block or 0) != memory["block"]:
            memory.update(block=block or 0, begin=call.step)
        step = call.step - memory["begin"]

        if config.variant == "prefix":
            return call.sources(~call.prompt)
        # The second step is full as well, so that the prompt is stored after the first tokens; "greedy" does not wait.
        if step == 0 or step % config.refresh_interval == 0 or (step == 1 and config.variant != "greedy"):
            return call.sources(~call.prompt) if config.variant == "prefix_decode" else None
        settling = ~call.masked & (memory["age"] < config.delay)
        if config.variant != "greedy":
            return call.sources(call.masked) | settling
        if call.announced is None:
            return None
        now = call.announced & call.masked
        wanted = with_neighbours(now | settling, now, call.masked, config.window)
        return call.sources(wanted & call.masked) | settling


def _first(where: torch.Tensor) -> int:
    """The first column in which any row is true; the number of columns where none is."""
    columns = where.any(0)
    return int(columns.int().argmax()) if bool(columns.any()) else where.shape[1]


def with_neighbours(chosen: torch.Tensor, centres: torch.Tensor, candidates: torch.Tensor, window: int) -> torch.Tensor:
    """`chosen`, and of each centre `window` more of the candidates: nearest first, the left one before the right one.

    Args:
        chosen, centres, candidates: bool, `(batch, length)`. Centres come one after another, from left to right; a
            candidate that is chosen already does not count.
        window: how many more for each centre.
    """
    if window == 0:
        return chosen
    chosen = chosen.clone()
    length = chosen.shape[1]
    places = torch.arange(length, device=chosen.device)
    most = int(centres.sum(1).max())
    order = torch.argsort(~centres, dim=1, stable=True)[:, :most]
    real = torch.arange(most, device=chosen.device) < centres.sum(1, keepdim=True)
    for j in range(most):
        offset = places - order[:, j : j + 1]
        rank = 2 * offset.abs() - (offset < 0).long()  # left 1, right 2, left 3, right 4, ...
        rank = rank.masked_fill(~candidates | chosen | ~real[:, j : j + 1], 2 * length + 1)
        nearest, index = rank.topk(min(window, length), largest=False)
        chosen |= torch.zeros_like(chosen).scatter(1, index, nearest <= 2 * length)
    return chosen
