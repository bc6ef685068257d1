r"""The feedback module of Inner Loop Feedback (Gwilliam et al. 2025, arXiv 2501.13107): one block that looks a step ahead.

:math:`\hat h(t') = h_b(t) + s\, g(h_b(t), t', c)` predicts, from what came out of block b at an earlier step, what a
transformer's features are at this one. g is a block of the transformer, copied with all its settings, and s a number that
starts at 0. No code was published; the formula is a reconstruction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ..hooks._blocks import Streams, block_names, forward_parameters, take_turns, unsupported


class InnerLoopFeedback(ModelMixin, ConfigMixin):
    """The feedback module of one transformer. Make it with `from_transformer`; untrained, it passes features on.

    Args:
        transformer: name of the transformer's class in diffusers.
        transformer_config: its configuration.
        block: b, whose output is kept on a full step; blocks count from 1.
        resume: the block that a cheap step goes on with.
        num_marks: numbers in the fingerprint of the transformer's weights; 0 for none.

    Attributes:
        copied: g.
        scale: s.

    Raises:
        ValueError: an argument is out of range, or blocks of this transformer cannot be copied.
    """

    _supports_gradient_checkpointing = False
    marks: torch.Tensor

    @register_to_config
    def __init__(
        self,
        *,
        transformer: str,
        transformer_config: dict[str, Any],
        block: int = 1,
        resume: int = 2,
        num_marks: int = 0,
    ) -> None:
        super().__init__()
        kind = getattr(diffusers, transformer, None) if isinstance(transformer, str) else None
        if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
            raise ValueError(f"`transformer` is {transformer!r}; the name of a model class of diffusers is needed.")
        with torch.device("meta"):
            model = kind.from_config(dict(transformer_config))  # type: ignore[attr-defined]
        names = _check(model, block, resume)
        self.copied = model.get_submodule(names[resume - 1]).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*self.copied.parameters(), *self.copied.buffers()):
                tensor.zero_()
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("marks", torch.zeros(num_marks))
        self.streams = Streams(self.copied)

    @classmethod
    def config_for(cls, transformer: nn.Module) -> dict[str, Any]:
        """The arguments that say which transformer a module is for."""
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}  # type: ignore[union-attr,operator]
        return {"transformer": type(transformer).__name__, "transformer_config": json.loads(json.dumps(config))}

    @classmethod
    def from_transformer(
        cls, transformer: nn.Module, block: int, resume: int, marks: torch.Tensor | None = None
    ) -> InnerLoopFeedback:
        """An untrained module: the block `resume`, weights and all, and s = 0.

        Args:
            marks: fingerprint of the transformer's weights.

        Raises:
            ValueError: the transformer has no such blocks, or its blocks cannot be copied.
        """
        names = _check(transformer, block, resume)
        size = {"block": block, "resume": resume, "num_marks": 0 if marks is None else len(marks)}
        made = cls(**cls.config_for(transformer), **size)
        made.copied.load_state_dict(transformer.get_submodule(names[resume - 1]).state_dict())
        if marks is not None:
            made.marks.copy_(marks)
        return made

    def forward(self, features: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        r""":math:`\hat h(t')` of each state.

        Args:
            features: :math:`h_b(t)`, the states after block b by name of the argument, as `hidden_states`.
            inputs: arguments of block `resume` at this step: its conditions, and states that are not used.
        """
        given = {**inputs, **features}
        after = self.streams.read(given, self.copied(**given))
        return {
            name: value if after.get(name) is None else value + self.scale * after[name]
            for name, value in features.items()
        }


def no_feedback(transformer: nn.Module) -> str | None:
    """None where blocks of `transformer` can be copied and left out, else the reason why not."""
    if (reason := unsupported(transformer)) is not None:
        return reason
    if take_turns(transformer):
        return "its spatial and temporal blocks take turns, on states of different shapes"
    names = block_names(transformer)
    if any("skip" in forward_parameters(transformer.get_submodule(name)) for name in names):
        return "its late blocks read what comes out of early ones"
    for name in names:
        block = transformer.get_submodule(name)
        lost = {key for key, _ in block.named_buffers()} - set(block.state_dict())
        if lost:
            return f"its block {name} has {', '.join(sorted(lost))}, which is not saved"
    if not isinstance(getattr(diffusers, type(transformer).__name__, None), type):
        return "its class is none of diffusers"
    return None


def _check(transformer: nn.Module, block: int, resume: int) -> list[str]:
    """Names of the blocks, where b and resume are among them."""
    if (reason := no_feedback(transformer)) is not None:
        raise ValueError(f"`transformer` is a {type(transformer).__name__}: {reason}.")
    names = block_names(transformer)
    for name, value, least in (("block", block, 1), ("resume", resume, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= len(names):
            raise ValueError(
                f"`{name}` is {value!r}; this {type(transformer).__name__} allows {least} to {len(names)}."
            )
    return names
