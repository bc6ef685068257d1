"""The plan of what is computed when: one clock a denoiser, one action a module and step.

A cache method says which *mode* each step has (`CachePlan.mode`, for example "full" or "cached") and what each hooked
module does in each mode (`Action`; blocks of transformers: `_blocks`). Everything else is here: counting steps, noticing a
new run, keeping what is stored apart by cache context, freeing it at the end of a run.

Steps are counted on a child module that runs once in every forward, never on the root: accelerate's offloading drops a
root hook that was registered after it. The counter is the one graph break under `torch.compile`; the hooks branch on the
mode alone, so a compiled model has one graph a mode, whatever the number of steps.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn

from .. import _compat


class Action(enum.Enum):
    """What a hooked module does in a step.

    COMPUTE: run, and store the output where another mode reuses it.
    REUSE: return the stored output.
    SKIP: return placeholders in the shapes of the output, which nothing that runs will read.
    PASS: return the first input in place of the output, which nothing that runs will read.
    """

    COMPUTE = "compute"
    REUSE = "reuse"
    SKIP = "skip"
    PASS = "pass"


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, as a plan sees it before it decides.

    Attributes:
        step: counted from 0 in its run and cache context.
        num_steps: length of the run, where a pipeline told it.
        sample: first input of the module that the steps are counted on. Of the module that `sample_module` finds, it holds
            the values of the model's input.
        scheduler: of the pipeline that runs, where one does.
        memory: kept for the plan until the run ends; empty at its first call.
    """

    step: int
    num_steps: int | None
    sample: torch.Tensor
    scheduler: Any
    memory: dict[str, Any]


class CachePlan(Protocol):
    """When each mode applies. A plan keeps what it learns in a run in `Call.memory`, never in itself."""

    def mode(self, call: Call) -> str:
        """Mode of a call."""
        ...


class Slot:
    """What one module left behind: its output, or only the shapes of it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.shapes: Any = None


class RunState(BaseState):
    """One run in one cache context."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.reset()

    def reset(self) -> None:
        self.step = -1
        self.mode = ""
        self.signature: tuple | None = None
        self.timestep: float | None = None
        self.memory: dict[str, Any] = {}
        self.slots = [Slot() for _ in range(self.num_slots)]


class CacheRun:
    """The clock of one denoiser under one plan, shared by all its hooks."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.num_slots = 0
        self.num_steps: int | None = None
        self.scheduler: Any = None
        self.announced = False
        self.timesteps: Any = None
        self.state = RunState(0)
        self.manager = StateManager(RunState)

    def begin(self, num_steps: int | None, scheduler: Any = None) -> None:
        """A pipeline starts a run of `num_steps` denoiser calls: forget everything, and trust it to say when it ends."""
        self.end()
        self.num_steps, self.scheduler, self.announced = num_steps, scheduler, True

    def end(self) -> None:
        """Forget everything; a run that nobody announced begins with the next call."""
        self.manager.reset()
        self.state, self.timesteps = RunState(0), None
        self.num_steps, self.scheduler, self.announced = None, None, False

    @torch.compiler.disable
    def tick(self, sample: torch.Tensor) -> None:
        """Count one denoiser call, before any hooked module runs."""
        if self.manager._context is None:  # most UNet pipelines open no cache context
            self.manager.set_context(CacheContext("default"))
        state = self.manager.get_state()
        signature = (sample.shape, sample.dtype, sample.device)
        timestep = None if self.announced else self._timestep()
        went_back = timestep is not None and state.timestep is not None and timestep > state.timestep
        if state.signature != signature or went_back:
            state.reset()
        state.signature, state.timestep = signature, timestep
        state.step += 1
        state.mode = self.plan.mode(Call(state.step, self.num_steps, sample, self.scheduler, state.memory))
        self.state, self.timesteps = state, None

    def _timestep(self) -> float | None:
        """Value of the timestep, which only goes up in a new run. On a GPU reading it waits for the device."""
        if self.timesteps is None or not torch.is_tensor(self.timesteps):
            return self.timesteps
        return float(self.timesteps.flatten()[0])


class _ClockHook(ModelHook):
    """On a child that runs once a call, before all that is hooked. `timestep` is the argument that has it, if any has."""

    _is_stateful = True

    def __init__(self, run: CacheRun, timestep: str | None = None) -> None:
        super().__init__()
        self.run, self.timestep = run, timestep
        self.manager = run.manager = StateManager(RunState, init_args=(run.num_slots,))

    def pre_forward(self, module, *args, **kwargs):
        if self.timestep is not None:
            self.run.timesteps = kwargs.get(self.timestep)
        self.run.tick(first_input(args, kwargs))
        return args, kwargs

    def reset_state(self, module):
        self.run.end()
        return module


class _TimestepHook(ModelHook):
    """On the child whose first input is the timesteps."""

    def __init__(self, run: CacheRun) -> None:
        super().__init__()
        self.run = run

    def pre_forward(self, module, *args, **kwargs):
        self.run.timesteps = first_input(args, kwargs)
        return args, kwargs


class _ActionHook(ModelHook):
    """Does what the plan says for one module."""

    def __init__(self, run: CacheRun, actions: dict[str, Action], slot: int, consumer: nn.Module | None) -> None:
        super().__init__()
        self.run, self.actions, self.slot = run, actions, slot
        self.consumer = [consumer]  # in a list: a hook owns no modules
        self.stores_value = Action.REUSE in actions.values()

    def new_forward(self, module, *args, **kwargs):
        state = self.run.state
        action = self.actions[state.mode]
        if action is Action.COMPUTE:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self.stores_value:
                state.slots[self.slot].value = self._protect(output)
            else:
                state.slots[self.slot].shapes = _shapes(output)
            return output
        slot = state.slots[self.slot]
        if action is Action.REUSE:
            return self._protect(slot.value)
        first = first_input(args, kwargs)
        if action is Action.PASS:
            return (first,) if isinstance(slot.shapes, list) else first
        return _placeholders(slot.shapes, first)

    def _protect(self, output):
        """A copy where the consumer writes into its input: FreeU scales the backbone features in place."""
        consumer = self.consumer[0]
        if consumer is not None and _is_freeu_on(consumer):
            return output.clone() if torch.is_tensor(output) else tuple(part.clone() for part in output)
        return output


class _TrimHook(ModelHook):
    """On an up block whose first layers pass: their inputs get no channels, so that joining them costs nothing."""

    def __init__(self, run: CacheRun, mode: str, num_passed: int) -> None:
        super().__init__()
        self.run, self.mode, self.num_passed = run, mode, num_passed

    def pre_forward(self, module, *args, **kwargs):
        if self.run.state.mode != self.mode:
            return args, kwargs
        skips = kwargs["res_hidden_states_tuple"] if len(args) < 2 else args[1]
        kept = len(skips) - self.num_passed  # layers take from the end
        channels = 1 if _is_freeu_on(module) else 0  # its Fourier transform takes no empty tensors
        trimmed = skips[:kept] + tuple(skip[:, :channels] for skip in skips[kept:])
        named = {"hidden_states": trimmed[-1], "res_hidden_states_tuple": trimmed}
        return (), {
            **dict(zip(("hidden_states", "res_hidden_states_tuple", "temb"), args, strict=False)),
            **kwargs,
            **named,
        }


def first_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _is_freeu_on(block: nn.Module) -> bool:
    return getattr(block, "b1", None) is not None


def _shapes(output):
    if torch.is_tensor(output):
        return output.shape
    if isinstance(output, tuple):
        return [_shapes(part) for part in output]
    raise TypeError(f"A skipped module returned {type(output).__name__}; tensors and tuples of them are supported.")


def _placeholders(shapes, like: torch.Tensor):
    """Tensors nobody reads. The first is writable, since a T2I adapter adds to it in place; the rest take no memory."""
    if not isinstance(shapes, list):
        return like.new_empty(shapes)
    zero = like.new_zeros(())
    return tuple(
        like.new_empty(part) if i == 0 else tuple(zero.expand(shape) for shape in part) if isinstance(part, list) else zero.expand(part)
        for i, part in enumerate(shapes)
    )  # fmt: skip


class PlanBuilder:
    """Puts the hooks of one cache method on a denoiser, and takes them off again."""

    def __init__(self, root: nn.Module, key: str, plan: CachePlan) -> None:
        self.root, self.key, self.run = root, f"diffusers_ext.{key}", CacheRun(plan)
        self._hooks: list[tuple[nn.Module, ModelHook, str]] = []

    def slot(self) -> int:
        """Number of a new place in `RunState.slots`."""
        self.run.num_slots += 1
        return self.run.num_slots - 1

    def hook(self, name: str, hook: ModelHook) -> None:
        """Module `name` has a hook of the method's own, which finds mode and slots in `run.state`."""
        self._hooks.append((self.root.get_submodule(name), hook, self.key))

    def act(self, name: str, actions: dict[str, Action], consumer: nn.Module | None = None) -> None:
        """Module `name` does `actions[mode]`; `consumer` is the module that reads a reused output."""
        self.hook(name, _ActionHook(self.run, actions, self.slot(), consumer))

    def trim(self, name: str, mode: str, num_passed: int) -> None:
        """The first `num_passed` layers of up block `name` pass in `mode`."""
        self.hook(name, _TrimHook(self.run, mode, num_passed))

    def install(self, clock: str, timesteps: str) -> CacheRun:
        """Register everything.

        Args:
            clock: module that runs once a call, before all that is hooked; of one that is hooked, it runs before that.
            timesteps: module that runs before `clock`, with the timesteps as first input; or, of `clock` itself, the name
                of an argument, as ":name".
        """
        argument = timesteps[1:] if timesteps.startswith(":") else None
        if argument is None:
            self.hook(timesteps, _TimestepHook(self.run))
        self._hooks.append((self.root.get_submodule(clock), _ClockHook(self.run, argument), f"{self.key}.clock"))
        for module, hook, name in self._hooks:
            _compat.attach_hook(module, hook, name)
        _compat.announce_resets(self.root)
        return self.run


def find_run(root: nn.Module, key: str) -> CacheRun | None:
    """The run of cache method `key` on `root`, or None where it is off.

    Raises:
        RuntimeError: another library took hooks of the method off, so that the model would compute something else.
    """
    name = f"diffusers_ext.{key}"
    run, lost = None, []
    for path, module in _compat.unwrap(root).named_modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook_name in (name, f"{name}.clock"):
            if registry is not None and hook_name in registry.hooks:
                if not _compat.has_hook(module, hook_name):
                    lost.append(path)
                elif hook_name.endswith(".clock"):
                    run = registry.hooks[hook_name].run
    if lost:
        raise RuntimeError(
            f"Hooks of {key!r} on {', '.join(lost[:3])} were taken off by another library (accelerate's `remove_all_hooks` "
            f"does that). Call `diffusers_ext.disable(..., {key!r})`, then enable it again."
        )
    return run


def uninstall(root: nn.Module, key: str) -> None:
    """Take all hooks of cache method `key` off; the model is bit-equal to before."""
    root = _compat.unwrap(root)
    name = f"diffusers_ext.{key}"
    for module in root.modules():
        for hook_name in (name, f"{name}.clock"):
            if (registry := module.__dict__.get("_diffusers_hook")) is not None and hook_name in registry.hooks:
                _compat.detach_hook(module, hook_name)
    _compat.retract_resets(root)
