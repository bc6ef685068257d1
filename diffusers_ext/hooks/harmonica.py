"""HarmoniCa (Huang et al. 2024, arXiv 2410.01723): a learned table of which parts of a transformer run at which step.

The parts are the attention and feed-forward modules of its blocks. At a step a part either runs, and its output is stored, or
its stored output takes its place; norms, gates and what is between run always. `CacheRouter` is the table, and
`diffusers_ext.training.train_harmonica` learns it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.hooks import ModelHook
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from ..enabling import HookConfig
from ..models.cache_router import CacheRouter
from ._blocks import BlockPlan, block_names
from ._blocks import unsupported as no_blocks
from ._plan import CacheRun, Call, PlanBuilder, Slot, uninstall
from ._trained import check_name, config_of, warn_of_other_weights
from ._values import is_number

_FULL = "full"
_FEED_FORWARD = re.compile(r"FeedForward|MLP|Mlp|SwiGLU")
# The widest layer of blocks that join attention and feed-forward in one last projection.
_FIRST_LAYER = "proj_mlp"


@dataclass
class HarmonicaConfig(HookConfig):
    """Settings of HarmoniCa.

    Args:
        router: folder or Hub repository of the trained `CacheRouter` of this transformer and number of steps. Give a
            repository where the pipeline is to be shared: a recipe holds this name, not the weights.
        threshold: parts run where the router's share is over it; in [0, 1). The router is trained for 0.1.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "harmonica"
    family: ClassVar[str] = "cache"

    router: str
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_name("router", self.router)
        if not is_number(self.threshold, 0) or self.threshold >= 1:
            raise ValueError(f"`threshold` is {self.threshold!r}; it must be a number in [0, 1).")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where HarmoniCa works on `module`, else the reason why not."""
        return unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := unsupported(module)) is not None:
            raise ValueError(f"HarmoniCa does not work on {type(module).__name__}: {reason}.")
        config = config_of(CacheRouter, "router", self.router)
        if list(config["sublayers"]) != sublayer_names(module):
            raise ValueError(
                f"`router` {self.router!r} is for {len(config['sublayers'])} modules, from {config['sublayers'][0]!r} to "
                f"{config['sublayers'][-1]!r}; those of this {type(module).__name__} are others: it was trained for another "
                "transformer."
            )

    def apply(self, module: nn.Module) -> None:
        router = CacheRouter.from_pretrained(self.router)
        warn_of_other_weights("router", self.router, router.marks, module)
        route(module, router.table(self.threshold))

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_harmonica(module: nn.Module, config: HarmonicaConfig) -> None:
    """Put HarmoniCa on a transformer.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_harmonica`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model has no blocks with attention, or the router was trained for another one.
    """
    from ..enabling import enable

    enable(module, config)


def remove_harmonica(module: nn.Module) -> None:
    """Take HarmoniCa off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, HarmonicaConfig.key)


def sublayer_names(model: nn.Module) -> list[str]:
    """Names of the attention and feed-forward modules of all blocks, block by block.

    Of blocks that project attention and feed-forward together, the first layer of the feed-forward is one.
    """
    return [
        f"{block}.{name}"
        for block in block_names(model)
        for name, child in model.get_submodule(block).named_children()
        if isinstance(child, (Attention, AttentionModuleMixin))
        or _FEED_FORWARD.search(type(child).__name__)
        or name == _FIRST_LAYER
    ]


def unsupported(model: nn.Module) -> str | None:
    """None where the parts of `model` can be routed, else the reason why not."""
    if (reason := no_blocks(model)) is not None:
        return reason
    return None if sublayer_names(model) else "its blocks have no attention or feed-forward modules"


def new_router(model: nn.Module, steps: int, num_marks: int = 0) -> CacheRouter:
    """An untrained router for a transformer.

    Raises:
        ValueError: `unsupported` says why there is none.
    """
    if (reason := unsupported(model)) is not None:
        raise ValueError(f"`transformer` is a {type(model).__name__}: {reason}.")
    return CacheRouter(steps=steps, sublayers=sublayer_names(model), num_marks=num_marks)


class _Plan:
    """A mode for each different row of the table."""

    def __init__(self, table: Sequence[Sequence[bool]]) -> None:
        known: dict[tuple[bool, ...], str] = {}
        for i, row in enumerate(table):
            known.setdefault(tuple(row), _FULL if all(row) else f"as step {i}")
        self.rows = {mode: row for row, mode in known.items()}
        self.modes = [known[tuple(row)] for row in table]

    def mode(self, call: Call) -> str:
        first = 0
        if call.num_steps is not None:
            # Image-to-image takes the last of the scheduler's steps.
            timesteps = getattr(call.scheduler, "timesteps", None)
            planned = call.num_steps if timesteps is None else len(timesteps)
            if planned != len(self.modes) or call.num_steps > planned:
                raise ValueError(f"The router of HarmoniCa is for {len(self.modes)} denoiser calls, and this run has {planned}.")  # fmt: skip
            first = planned - call.num_steps
        if call.step == 0:
            return _FULL
        if first + call.step >= len(self.modes):
            raise ValueError(f"The router of HarmoniCa is for {len(self.modes)} denoiser calls, and this run has more.")
        return self.modes[first + call.step]


class Kept:
    """What one sublayer gave last, by its calls: some blocks call one feed-forward for the picture and again for the prompt."""

    def __init__(self) -> None:
        self.outputs: dict[int, Any] = {}
        self._step, self._place = -1, 0

    @classmethod
    def of(cls, slot: Slot) -> Kept:
        """What a slot of the run holds; made where it holds nothing yet."""
        if slot.value is None:
            slot.value = cls()
        return slot.value

    def place(self, step: int) -> int:
        """Which call of the sublayer in denoiser call `step` comes now, counted from 0."""
        self._step, self._place = step, self._place + 1 if step == self._step else 0
        return self._place


class _RoutedHook(ModelHook):
    """On one sublayer: runs it, or returns what it gave last."""

    def __init__(self, run: CacheRun, runs: dict[str, bool], slot: int) -> None:
        super().__init__()
        self.run, self.runs, self.slot = run, runs, slot

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.run.state
        kept = Kept.of(state.slots[self.slot])
        place = kept.place(state.step)
        if self.runs[state.mode]:
            kept.outputs[place] = self.fn_ref.original_forward(*args, **kwargs)
        return kept.outputs[place]


def route(model: nn.Module, table: torch.Tensor) -> None:
    """Put a table on a transformer.

    Args:
        table: bool `(steps, sublayers)`, whether a module runs, in the order of `sublayer_names`. The first step of a run
            runs all of them.
    """
    plan = _Plan(table.tolist())
    rows = {_FULL: (True,) * table.shape[1], **plan.rows}
    builder = PlanBuilder(model, HarmonicaConfig.key, plan)
    for i, name in enumerate(sublayer_names(model)):
        runs = {mode: row[i] for mode, row in rows.items()}
        if not all(runs.values()):
            builder.hook(name, _RoutedHook(builder.run, runs, builder.slot()))
    BlockPlan(builder).install()
