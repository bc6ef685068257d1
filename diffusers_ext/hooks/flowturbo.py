"""The refiner steps of FlowTurbo (Zhao et al. 2024, arXiv 2409.18128): a light network for the late steps of a flow.

On the last steps of a run the blocks of the transformer rest, and a `VelocityRefiner` says by how much the velocity of the
step before changes. The scheduler stays as it is; the paper's is `FlowMatchPseudoCorrectorScheduler`. There the pair makes
pseudo-corrector steps of one refiner call each, where the paper's refiner steps are Heun steps of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import ModelHook
from torch import nn

from ..enabling import HookConfig
from ..models.velocity_refiner import VelocityRefiner, rotary_of_state, unsupported
from ._plan import CacheRun, Call, PlanBuilder, uninstall

_FULL, _REFINED = "full", "refined"
_CONDITIONING, _ROTARY, _VELOCITY = range(3)  # slots of a run's state


@dataclass
class FlowTurboConfig(HookConfig):
    """Settings of the refiner steps.

    Args:
        refiner: folder or Hub repository of the trained `VelocityRefiner` of this transformer. Give a repository where the
            pipeline is to be shared: a recipe holds this name, not the weights.
        n_refiner: how many of the last denoiser calls of a run the refiner makes. The first call is always the
            transformer's. 0 refines nothing.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "flowturbo"
    family: ClassVar[str] = "cache"

    refiner: str
    n_refiner: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.refiner, str) or not self.refiner:
            raise ValueError(f"`refiner` is {self.refiner!r}; the name of a folder or of a Hub repository is needed.")
        if isinstance(self.n_refiner, bool) or not isinstance(self.n_refiner, int) or self.n_refiner < 0:
            raise ValueError(f"`n_refiner` is {self.n_refiner!r}; it must be an integer of at least 0.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where a refiner can stand in for `module`, else the reason why not."""
        return unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := unsupported(module)) is not None:
            raise ValueError(f"FlowTurbo does not work on {type(module).__name__}: {reason}.")
        if not on_pipeline:
            raise ValueError(
                "The last steps are refined, which needs the number of steps: enable it on the pipeline, not on its model."
            )
        if not (Path(self.refiner).is_dir() or self.refiner.count("/") == 1):
            raise ValueError(f"`refiner` is {self.refiner!r}, which is neither a folder nor the name of a repository.")
        config = VelocityRefiner.load_config(self.refiner)
        for name, value in VelocityRefiner.config_for(module).items():
            if config.get(name) != value:
                raise ValueError(
                    f"`refiner` {self.refiner!r} has `{name}` {config.get(name)!r}, and this {type(module).__name__} needs "
                    f"{value}: it was trained for another transformer."
                )

    def apply(self, module: nn.Module) -> None:
        _apply(module, self)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_flowturbo(pipe: Any, config: FlowTurboConfig) -> None:
    """Let a refiner make the last denoiser calls of a pipeline.

    Raises:
        ValueError: the pipeline has no transformer of this kind, or the refiner was trained for another one.
    """
    from ..enabling import enable

    enable(pipe, config)


def remove_flowturbo(pipe: Any) -> None:
    """Take the refiner off; the pipeline is bit-equal to before."""
    from ..enabling import disable

    disable(pipe, FlowTurboConfig.key)


@dataclass
class _Plan:
    n_refiner: int

    def mode(self, call: Call) -> str:
        if call.num_steps is None:  # a model shared with a pipeline that FlowTurbo was not enabled on
            raise ValueError(
                "The last steps are refined, which needs their number: enable FlowTurbo on this pipeline too."
            )
        return _REFINED if call.step >= max(1, call.num_steps - self.n_refiner) else _FULL


class _BlockHook(ModelHook):
    """On a block: it rests on a refined step. The first sees what the refiner needs."""

    def __init__(self, run: CacheRun, is_first: bool) -> None:
        super().__init__()
        self.run, self.is_first = run, is_first

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.run.state
        if state.mode == _FULL:
            return self.fn_ref.original_forward(*args, **kwargs)
        if self.is_first:
            state.slots[_CONDITIONING].value = kwargs["temb"]
            state.slots[_ROTARY].value = kwargs.get("image_rotary_emb")
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]


class _NormHook(ModelHook):
    """On the last norm: it lets the embedded state through on a refined step."""

    def __init__(self, run: CacheRun) -> None:
        super().__init__()
        self.run = run

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) if self.run.state.mode == _FULL else args[0]


class _VelocityHook(ModelHook):
    """On the last layer, which gives the velocity: keeps it, or refines the one that is kept."""

    def __init__(self, run: CacheRun, refiner: VelocityRefiner) -> None:
        super().__init__()
        self.run, self.refiner = run, [refiner]  # in a list: a hook owns no modules

    def new_forward(self, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        state = self.run.state
        if state.mode == _FULL:
            velocity = self.fn_ref.original_forward(tokens)
        else:
            conditioning, rotary, velocity = (slot.value for slot in state.slots)
            refiner = self.refiner[0]
            if (refiner.device, refiner.dtype) != (tokens.device, tokens.dtype):  # the pipeline was moved
                refiner.to(device=tokens.device, dtype=tokens.dtype)
            velocity = velocity + refiner(tokens, velocity, conditioning, rotary_of_state(rotary, tokens.shape[1]))
        state.slots[_VELOCITY].value = velocity
        return velocity


def _apply(transformer: nn.Module, config: FlowTurboConfig) -> None:
    refiner = VelocityRefiner.from_pretrained(config.refiner).eval().requires_grad_(False)
    builder = PlanBuilder(transformer, config.key, _Plan(config.n_refiner))
    for _ in (_CONDITIONING, _ROTARY, _VELOCITY):
        builder.slot()
    blocks = [
        f"{name}.{i}"
        for name in ("transformer_blocks", "single_transformer_blocks")
        for i in range(len(getattr(transformer, name, [])))
    ]
    for i, name in enumerate(blocks):
        builder.hook(name, _BlockHook(builder.run, i == 0))
    builder.hook("norm_out", _NormHook(builder.run))
    builder.hook("proj_out", _VelocityHook(builder.run, refiner))
    embedder = "x_embedder" if isinstance(transformer, FluxTransformer2DModel) else "pos_embed"
    builder.install(embedder, "time_text_embed")
