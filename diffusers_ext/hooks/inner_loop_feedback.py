r"""Inner Loop Feedback (Gwilliam et al. 2025, arXiv 2501.13107): a learned block lets a step begin in the last blocks.

A full step runs all L blocks and keeps what comes out of block b. On a cheap step a trained block predicts from that the
features of this step, block `resume` takes them for its input, and the rest of the transformer runs as always. So a cheap step
costs 1 + (L - resume + 1) blocks. No code was published; this is a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..enabling import HookConfig
from ..models.inner_loop_feedback import InnerLoopFeedback, no_feedback
from ._blocks import BlockPlan, Streams, block_names
from ._plan import CachePlan, CacheRun, Call, PlanBuilder, uninstall
from ._trained import check_name, config_of, warn_of_other_weights
from ._values import is_count

FULL, CHEAP = "full", "cheap"


@dataclass
class InnerLoopFeedbackConfig(HookConfig):
    """Settings of Inner Loop Feedback.

    Args:
        feedback: folder or Hub repository of the trained `InnerLoopFeedback` of this transformer, which also says where it
            sits. Give a repository where the pipeline is to be shared: a recipe holds this name, not the weights.
        interval: full steps are 0, N, 2N, ... of a run. 1 computes everything.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "inner_loop_feedback"
    family: ClassVar[str] = "cache"

    feedback: str
    interval: int = 2

    def __post_init__(self) -> None:
        check_name("feedback", self.feedback)
        if not is_count(self.interval, 1):
            raise ValueError(f"`interval` is {self.interval!r}; it must be an integer of at least 1.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where a feedback module can serve `module`, else the reason why not."""
        return no_feedback(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := no_feedback(module)) is not None:
            raise ValueError(f"{self.key} does not work on {type(module).__name__}: {reason}.")
        config = config_of(InnerLoopFeedback, "feedback", self.feedback)
        wanted = InnerLoopFeedback.config_for(module)
        if any(config.get(name) != value for name, value in wanted.items()):
            raise ValueError(
                f"`feedback` {self.feedback!r} was trained for another transformer than this {type(module).__name__}: for a "
                f"{config.get('transformer')} of another configuration."
            )

    def apply(self, module: nn.Module) -> None:
        feedback = InnerLoopFeedback.from_pretrained(self.feedback).eval().requires_grad_(False)
        warn_of_other_weights("feedback", self.feedback, feedback.marks, module)
        install(module, feedback, _Plan(self.interval), self.key)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_inner_loop_feedback(module: nn.Module, config: InnerLoopFeedbackConfig) -> None:
    """Put Inner Loop Feedback on a transformer.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_inner_loop_feedback`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model is no transformer of this kind, or the feedback module was trained for another one.
    """
    from ..enabling import enable

    enable(module, config)


def remove_inner_loop_feedback(module: nn.Module) -> None:
    """Take Inner Loop Feedback off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, InnerLoopFeedbackConfig.key)


@dataclass(frozen=True)
class _Plan:
    interval: int

    def mode(self, call: Call) -> str:
        return FULL if call.step % self.interval == 0 else CHEAP


class _BlockHook(ModelHook):
    """On a block: it passes its inputs on in a cheap step where it lies before `resume`.

    Args:
        slot: of the features after block b.
        is_source: it is block b.
        feedback: of block `resume`.
        early: it lies before `resume`.
    """

    def __init__(
        self, run: CacheRun, streams: Streams, slot: int, is_source: bool, feedback: nn.Module | None, early: bool
    ) -> None:
        super().__init__()
        self.run, self.streams, self.slot, self.is_source, self.early = run, streams, slot, is_source, early
        self.feedback = [feedback]  # in a list: a hook owns no modules

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, inputs = self.run.state, self.streams.inputs(args, kwargs)
        if state.mode == CHEAP and self.early:
            return self.streams.write({name: inputs[name] for name in self.streams.roles})
        feedback = self.feedback[0]
        if state.mode == CHEAP and feedback is not None:
            features = state.slots[self.slot].value
            _check_shapes(features, inputs, type(module).__name__)
            main = inputs[self.streams.main]
            if (feedback.device, feedback.dtype) != (main.device, main.dtype):  # the pipeline was moved
                feedback.to(device=main.device, dtype=main.dtype)
            return self.fn_ref.original_forward(**{**inputs, **feedback(features, inputs)})
        output = self.fn_ref.original_forward(*args, **kwargs)
        if state.mode != CHEAP:
            states = self.streams.read(inputs, output)
            if self.is_source and state.mode == FULL:
                state.slots[self.slot].value = {name: value for name, value in states.items() if value is not None}
        return output


def _check_shapes(features: dict[str, torch.Tensor], inputs: dict[str, Any], block: str) -> None:
    for name, value in features.items():
        found = getattr(inputs.get(name), "shape", None)
        if found != value.shape:
            raise ValueError(
                f"The features that {block} is to go on with have `{name}` of shape {tuple(value.shape)}, and it takes "
                f"{found and tuple(found)}: a module with `block` and `resume` in one list of blocks is needed."
            )


def install(module: nn.Module, feedback: InnerLoopFeedback, plan: CachePlan, key: str) -> CacheRun:
    """Put a feedback module on a transformer.

    Args:
        plan: its modes are FULL, CHEAP, and others that run everything and keep nothing.
        key: that the hooks are known by.
    """
    builder, names = PlanBuilder(module, key, plan), block_names(module)
    source, resume, slot = feedback.config.block - 1, feedback.config.resume - 1, builder.slot()
    for i, name in enumerate(names[: max(source, resume) + 1]):
        streams = Streams(module.get_submodule(name))
        serves = feedback if i == resume else None
        builder.hook(name, _BlockHook(builder.run, streams, slot, i == source, serves, i < resume))
    return BlockPlan(builder).install()
