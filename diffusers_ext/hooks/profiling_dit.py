"""ProfilingDiT (Ma et al. 2025, arXiv 2504.03140): leave out the blocks that attend to the background.

Once per model, `block_profile.profile_blocks` measures how much of the foreground each block attends to (section 3.2). Then full steps
store what the background blocks add to the states, and the steps between add that and run the foreground blocks alone
(section 3.3).
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

_FULL, _CACHED = "full", "cached"


@dataclass
class ProfilingDiTConfig(HookConfig):
    """Settings of ProfilingDiT.

    Args:
        cached_blocks: numbers of the blocks that are left out on cached steps, counted from 0 in the order in which they
            run: `profile_blocks(...).background()`. None of them computes everything.
        warmup: s_0, the first steps, which are full, and step s_0 is.
        interval: `(T_max, T_min)`: from full step s the next is `max(1, round(T))` steps away, where T falls linearly from
            T_max at s_0 to T_min at the end (equation 15). Different ones need the number of steps, so they are enabled on
            a pipeline, not on a bare model. The paper states none; the authors' code takes every sixth step.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "profiling_dit"
    family: ClassVar[str] = "cache"

    cached_blocks: tuple[int, ...] = ()
    warmup: int = 6
    interval: tuple[int, int] = (6, 6)

    def __post_init__(self) -> None:
        for name in ("cached_blocks", "interval"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(map(is_count, value)):
                raise ValueError(f"`{name}` is {value!r}; it must be a tuple of integers of at least 0.")
            setattr(self, name, tuple(value))  # JSON has lists
        if len(set(self.cached_blocks)) < len(self.cached_blocks):
            raise ValueError(f"`cached_blocks` is {self.cached_blocks}; each block may be in it once.")
        if not is_count(self.warmup):
            raise ValueError(f"`warmup` is {self.warmup!r}; it must be an integer of at least 0.")
        if len(self.interval) != 2 or not self.interval[0] >= self.interval[1] >= 1:
            raise ValueError(f"`interval` is {self.interval}; it must be (T_max, T_min) with T_max >= T_min >= 1.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where ProfilingDiT works on `module`, else the reason why not."""
        return unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := unsupported(module)) is not None:
            raise ValueError(f"ProfilingDiT does not work on {type(module).__name__}: {reason}.")
        last = len(block_names(module)) - 1
        if self.cached_blocks and max(self.cached_blocks) > last:
            raise ValueError(
                f"`cached_blocks` is {self.cached_blocks}; this {type(module).__name__} has blocks 0 to {last}."
            )
        if self.interval[0] != self.interval[1] and not on_pipeline:
            raise ValueError(
                f"`interval` is {self.interval}, which changes over the run and needs the number of steps: enable it on the "
                f"pipeline, or give the same number twice."
            )

    def apply(self, module: nn.Module) -> None:
        names = block_names(module)
        blocks = BlockPlan(PlanBuilder(module, self.key, _Plan(self)), _FULL)
        blocks.leave_out(_CACHED, [names[i] for i in self.cached_blocks])
        blocks.install()

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_profiling_dit(module: nn.Module, config: ProfilingDiTConfig) -> None:
    """Put ProfilingDiT on a transformer with a list of blocks: Wan, HunyuanVideo, Flux, `DiTTransformer2DModel` and the like.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_profiling_dit`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model is no transformer of this kind, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config)


def remove_profiling_dit(module: nn.Module) -> None:
    """Take ProfilingDiT off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, ProfilingDiTConfig.key)


def full_steps(num_steps: int, warmup: int, interval: tuple[int, int]) -> list[int]:
    """Full steps of a run: the warmup, then s_0 and on by an interval that falls from T_max to T_min (equation 15)."""
    t_max, t_min = interval
    steps, step = list(range(min(warmup, num_steps))), warmup
    while step < num_steps:
        steps.append(step)
        length = t_max - (t_max - t_min) * (step - warmup) / (num_steps - warmup)
        step += max(1, math.floor(length + 0.5))
    return steps


@dataclass
class _Plan:
    """Which steps are full."""

    config: ProfilingDiTConfig
    _known: tuple[int, frozenset[int]] | None = None

    def mode(self, call: Call) -> str:
        step, warmup, (t_max, t_min) = call.step, self.config.warmup, self.config.interval
        if t_max == t_min:
            return _FULL if step < warmup or (step - warmup) % t_max == 0 else _CACHED
        if call.num_steps is None:  # a model shared with a pipeline that it was not enabled on
            raise ValueError(
                "An `interval` that changes needs the number of steps: enable it on this pipeline as well."
            )
        if self._known is None or self._known[0] != call.num_steps:
            self._known = (call.num_steps, frozenset(full_steps(call.num_steps, warmup, self.config.interval)))
        return _FULL if step in self._known[1] else _CACHED
