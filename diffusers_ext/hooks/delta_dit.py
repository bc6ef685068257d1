"""Δ-DiT (Chen et al. 2024, arXiv 2406.01125): leave out a range of a transformer's blocks, and add what they added last.

A full step stores what the front range of N_c blocks and the rear range of N_c blocks add to the states (Delta-Cache). A
cached step runs the other blocks on its own states: early in sampling, where outlines are formed, it leaves the rear range
out, and late, where details are, the front range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..enabling import HookConfig
from ._blocks import BlockPlan, block_names, unsupported
from ._plan import Call, PlanBuilder, uninstall
from ._values import is_count

_FULL, _FRONT, _REAR = "full", "front", "rear"
_OTHER = {_FRONT: _REAR, _REAR: _FRONT}


@dataclass
class DeltaDiTConfig(HookConfig):
    """Settings of Δ-DiT.

    Args:
        num_cached_blocks: N_c, the blocks that a cached step leaves out, 0 to L of the model's L. None takes three
            quarters of them, rounded down: the paper's 21 of 28. 0 computes everything.
        boundary: b, where the early stage ends: a step number (int), or a fraction of the steps (float in [0, 1]), which
            needs the number of steps, so it is enabled on a pipeline, not on a bare model. 0 has the late stage only,
            1.0 the early one only. The paper tunes it; 0.6 is about its 12 of 20 steps.
        interval: N, full steps are 0, N, 2N, ... of a run, counted from the end of `warmup`. 1 computes everything.
        early: "rear" leaves the rear range out early and the front range late, as the paper does; "front" the other way.
        continuation: an extension of ours, not of the paper. 0 adds the last delta as it is. 1 continues the line through
            the last two full steps' deltas, 2 the parabola through the last three, which are then all kept.
        warmup: an extension of ours as well: so many steps at the beginning are full.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "delta_dit"
    family: ClassVar[str] = "cache"

    num_cached_blocks: int | None = None
    boundary: float = 0.6
    interval: int = 2
    early: str = _REAR
    continuation: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.num_cached_blocks is not None and not is_count(self.num_cached_blocks):
            raise ValueError(
                f"`num_cached_blocks` is {self.num_cached_blocks!r}; it must be an integer of at least 0, or None."
            )
        if isinstance(self.boundary, float):
            allowed = 0 <= self.boundary <= 1
        else:
            allowed = is_count(self.boundary)
        if not allowed:
            raise ValueError(
                f"`boundary` is {self.boundary!r}; it must be a step number (an integer of at least 0) or a fraction of the "
                f"steps (a float in [0, 1])."
            )
        if not is_count(self.interval, 1):
            raise ValueError(f"`interval` is {self.interval!r}; it must be an integer of at least 1.")
        if self.early not in (_FRONT, _REAR):
            raise ValueError(f"`early` is {self.early!r}; allowed are 'front' and 'rear'.")
        if not is_count(self.continuation) or self.continuation > 2:
            raise ValueError(f"`continuation` is {self.continuation!r}; allowed are 0, 1 and 2.")
        if not is_count(self.warmup):
            raise ValueError(f"`warmup` is {self.warmup!r}; it must be an integer of at least 0.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where Δ-DiT works on `module`, else the reason why not."""
        return unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := unsupported(module)) is not None:
            raise ValueError(f"Δ-DiT (delta_dit) does not work on {type(module).__name__}: {reason}.")
        count = len(block_names(module))
        if self.num_cached_blocks is not None and self.num_cached_blocks > count:
            raise ValueError(
                f"`num_cached_blocks` is {self.num_cached_blocks}; this {type(module).__name__} has {count} blocks."
            )
        if isinstance(self.boundary, float) and not on_pipeline:
            raise ValueError(
                f"`boundary` is {self.boundary}, a fraction of the steps, which needs their number: enable it on the pipeline, "
                f"or give a step number (an integer)."
            )

    def apply(self, module: nn.Module) -> None:
        names = block_names(module)
        count = self.num_cached_blocks if self.num_cached_blocks is not None else 3 * len(names) // 4
        blocks = BlockPlan(PlanBuilder(module, self.key, _Plan(self)), _FULL)
        blocks.leave_out(_FRONT, names[:count], self.continuation)
        blocks.leave_out(_REAR, names[len(names) - count :], self.continuation)
        blocks.install()

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_delta_dit(module: nn.Module, config: DeltaDiTConfig) -> None:
    """Put Δ-DiT on a transformer with a list of blocks: `DiTTransformer2DModel`, PixArt, SD3, Flux, Wan and the like.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_delta_dit`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Args:
        module: the transformer.
        config: the settings; a bare model takes a `boundary` that is a step number.

    Raises:
        ValueError: the model is no transformer of this kind, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config)


def remove_delta_dit(module: nn.Module) -> None:
    """Take Δ-DiT off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, DeltaDiTConfig.key)


@dataclass(frozen=True)
class _Plan:
    """Which steps are full, and which range a cached one leaves out."""

    config: DeltaDiTConfig

    def mode(self, call: Call) -> str:
        first = max(
            self.config.warmup - 1, 0
        )  # the last step of the warm-up is the first that the interval counts from
        if call.step < first or (call.step - first) % self.config.interval == 0:
            return _FULL
        early = self.config.early
        return early if call.step < self._boundary(call.num_steps) else _OTHER[early]

    def _boundary(self, num_steps: int | None) -> int:
        boundary = self.config.boundary
        if not isinstance(boundary, float):
            return boundary
        if num_steps is None:  # a model shared with a pipeline that it was not enabled on
            raise ValueError(
                "A fraction as `boundary` needs the number of steps: enable Δ-DiT on this pipeline as well."
            )
        return math.floor(boundary * num_steps + 0.5)
