"""A hook as it should be (the middle of a U-Net is computed every N-th step only), and others with one fault each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from diffusers_ext.enabling import HookConfig, disable, enable
from diffusers_ext.hooks._plan import Action, Call, PlanBuilder, uninstall

from ._checks import check_number

PARTS = ("conv_in", "time_proj", "mid_block", "conv_out")


@dataclass
class PlantedHookConfig(HookConfig):
    """The middle block is computed on steps 0, N, 2N, ..., N = `interval`."""

    key: ClassVar[str] = "planted_hook"
    family: ClassVar[str | None] = "cache"

    interval: int = 2

    def __post_init__(self) -> None:
        check_number("interval", self.interval, 1, 1000, integer=True)

    def mode(self, call: Call) -> str:
        return "full" if call.step % self.interval == 0 else "cached"

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        missing = [name for name in PARTS if not isinstance(getattr(module, name, None), nn.Module)]
        return f"it has no {', '.join(missing)}" if missing else None

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"planted_hook does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: nn.Module) -> None:
        builder = PlanBuilder(module, self.key, self)
        builder.act("mid_block", {"full": Action.COMPUTE, "cached": Action.REUSE})
        builder.install("conv_in", "time_proj")

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_planted_hook(module: nn.Module, config: PlantedHookConfig) -> None:
    enable(module, config)


def remove_planted_hook(module: nn.Module) -> None:
    disable(module, "planted_hook")


# --- with faults -----------------------------------------------------------------------------------------------------


@dataclass
class ClampsItsSetting(PlantedHookConfig):
    """A wrong value becomes another one in silence."""

    def __post_init__(self) -> None:
        self.interval = min(max(1, self.interval), 2)


@dataclass
class TakesAnySetting(PlantedHookConfig):
    """A wrong value goes through."""

    def __post_init__(self) -> None:
        pass


@dataclass
class DoesNothing(PlantedHookConfig):
    """Every rule about runs holds for it, since it is not there."""

    def apply(self, module: nn.Module) -> None:
        pass

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        pass


@dataclass
class HalfApplies(PlantedHookConfig):
    """Notices while it is being put on that it does not fit."""

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        pass

    def apply(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if name in ("conv_norm_out", "pos_embed", "x_embedder", "bert"):
                child.register_forward_pre_hook(lambda *_: None)
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"planted_hook does not work on {type(module).__name__}: {reason}.")
        super().apply(module)


@dataclass
class FailsInUse(PlantedHookConfig):
    """Says nothing until it is called."""

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        pass

    def apply(self, module: nn.Module) -> None:
        if self.supports(module) is None:
            super().apply(module)


class _Wrapped(PlantedHookConfig):
    """Wraps the forward of `conv_out` by hand: `around(module, forward, x)`."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def apply(self, module: nn.Module) -> None:
        child, around = module.conv_out, self.around
        forward = child.forward
        child.forward = lambda x: around(child, forward, x)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        module.conv_out.__dict__.pop("forward", None)


@dataclass
class LeavesAForward(_Wrapped):
    """Off, the forward stays wrapped, and does nothing any more."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(x)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        pass


@dataclass
class LeavesAnEffect(_Wrapped):
    """Off, a weight is another one."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            module.bias += 1e-3
        return forward(x)


@dataclass
class SharesState(_Wrapped):
    """One counter for all models."""

    count: ClassVar[dict[str, int]] = {"calls": 0}

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        SharesState.count["calls"] += 1
        return forward(x) * (1 + 0.1 * (SharesState.count["calls"] % 4))


@dataclass
class NoticesNoRun(_Wrapped):
    """Counts on where the last run was broken off."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        calls = module.__dict__["planted_calls"] = module.__dict__.get("planted_calls", 0) + 1
        return forward(x) * (1 + 0.1 * (calls % 4))


@dataclass
class CopiesTheOriginal(_Wrapped):
    """A deep copy runs the original's weights: a closure is not copied."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * forward(x)


@dataclass
class Upcasts(_Wrapped):
    """Gives float32 whatever it gets."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(x).float() * 1.1


@dataclass
class BreaksTheGraph(_Wrapped):
    """Cannot be compiled."""

    @staticmethod
    def around(module: nn.Module, forward: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return forward(x) * 2
        return 1.1 * forward(x)


class _HalfOutput(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:])


@dataclass
class OnTheRoot(PlantedHookConfig):
    """On the root module, where accelerate loses it."""

    def apply(self, module: nn.Module) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(_HalfOutput(), "planted")

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        module._diffusers_hook.remove_hook("planted", recurse=False)
        del module._diffusers_hook
        module.__dict__.pop("forward", None)


@dataclass
class AnotherKey(PlantedHookConfig):
    """Its recipe names another method."""

    key: ClassVar[str] = "deepcache"


@dataclass
class LostInARecipe(PlantedHookConfig):
    """A setting that JSON does not hold."""

    steps: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = frozenset({self.interval})
