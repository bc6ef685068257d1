"""Blocks of transformers under a plan: which there are, the states that pass through them, and steps that leave some out.

A *group* is a range of blocks that run one after the other. On a full step its *delta* is stored, what its blocks add to the
states together. On a step that leaves the group out, its blocks pass their inputs on and the last of them adds the delta: the
states of the step itself still go through, with all that the model adds between blocks. Blocks whose output nothing reads are left
out without a delta.

Everything is found from the structure of a model: lists of blocks from its children, the states from the arguments of a
block that come out of it again.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.embeddings import Timesteps
from torch import nn

from .. import _compat
from ._plan import CacheRun, PlanBuilder, Slot

_TRUNK = re.compile(r"(\w+_)?(blocks|layers)")
_ASIDE = re.compile(r"refiner|control|vace|adapter|caption|context_|injector|(^|_)(down|up|mid|motion|text|txt)_")
_TIMESTEP = ("timestep", "timesteps", "t", "time")
_SAMPLE = ("conv_in", "x_embedder", "img_in", "patch_embedding", "patch_embed", "pos_embed", "proj_in")


# --- structure -------------------------------------------------------------------------------------------------------


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's own `forward`, whatever wraps it now."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def block_lists(model: nn.Module) -> dict[str, list[str]]:
    """Names of the blocks of each list that the trunk of a transformer is made of, in the order of the lists.

    Lists aside of the trunk, such as those that refine the prompt before it, are left out. Empty for a model without.
    """
    found = {}
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList) or not _TRUNK.fullmatch(name) or _ASIDE.search(name):
            continue
        if len(child) and all(
            len(forward_parameters(block)) > 1 for block in child
        ):  # the states, and what else they need
            found[name] = [f"{name}.{i}" for i in range(len(child))]
    return found


def block_names(model: nn.Module) -> list[str]:
    """Names of all blocks of the trunk in the order in which they run; spatial and temporal blocks take turns."""
    lists = list(block_lists(model).values())
    if take_turns(model):
        return [name for pair in zip(*lists, strict=True) for name in pair]
    return [name for names in lists for name in names]


def take_turns(model: nn.Module) -> bool:
    """Whether spatial and temporal blocks, in a list each, run in turns, on states of different shapes."""
    lists = block_lists(model)
    return len(lists) == 2 and any("temporal" in name for name in lists) and len({*map(len, lists.values())}) == 1


def unsupported(model: nn.Module) -> str | None:
    """None where steps of `model` can leave blocks out, else the reason why not."""
    lists = block_lists(model)
    if not lists:
        return "it has no list of transformer blocks"
    if sum(map(len, lists.values())) < 2:
        return "it has one transformer block only"
    if _timesteps(model) is None:
        return "none of its parts takes the timesteps"
    return None


def _timesteps(model: nn.Module) -> str | None:
    """What `PlanBuilder.install` takes as `timesteps`: a part outside of the blocks, or else an argument of the blocks.

    In this order, since what blocks take by that name may be an embedding of the timesteps.
    """
    names = block_names(model)
    for name, module in model.named_modules():
        if not name or any(name == block or name.startswith(f"{block}.") for block in names):
            continue
        takes = (forward_parameters(module) or [""])[0]
        fourier = name.rpartition(".")[2] == "time_proj" and not isinstance(module, nn.Linear)
        if isinstance(module, Timesteps) or takes in _TIMESTEP or fourier:
            return name
    for parameter in _TIMESTEP:
        if parameter in forward_parameters(model.get_submodule(names[0])):
            return f":{parameter}"
    return None


def sample_module(model: nn.Module) -> str | None:
    """The child whose first input holds the values of the model's noisy input, in any order; None where none is known."""
    for name in _SAMPLE:
        child = getattr(model, name, None)
        if isinstance(child, nn.Module) and forward_parameters(child)[:1] in (
            ["x"],
            ["hidden_states"],
            ["latent"],
            ["input"],
        ):
            return name
    return None


def groups_of(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Blocks in groups that one delta serves: runs of neighbours in one list.

    Each is a group of its own where a model reads what comes out of single blocks (long skip connections), or where
    blocks of two lists take turns.
    """
    wanted = set(names)
    chosen = [name for name in block_names(model) if name in wanted]
    alone = take_turns(model) or any("skip" in forward_parameters(model.get_submodule(name)) for name in chosen)
    groups: list[list[str]] = []
    for name in chosen:
        parent, _, number = name.rpartition(".")
        if groups and not alone and groups[-1][-1] == f"{parent}.{int(number) - 1}":
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


# --- states ----------------------------------------------------------------------------------------------------------


class Streams:
    """The states that pass through one block: arguments that come out of it again.

    Args:
        block: its first argument is the main state. Which others come out again is seen when it first runs.

    Attributes:
        main: name of the main state.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = type(block).__name__
        self._parameters = forward_parameters(block)
        self.main = self._parameters[0]
        self._order = _compat.block_output_order(type(block))
        self._roles: list[str] | None = None
        self._form: type = tuple

    def inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}

    def read(self, inputs: Mapping[str, Any], output: Any) -> dict[str, torch.Tensor | None]:
        """The states of an output.

        Raises:
            TypeError: it cannot be told which part of the output is which state.
        """
        parts = [output] if torch.is_tensor(output) else list(output)
        if self._roles is None:
            self._form, self._roles = type(output), self._assign(inputs, parts)
        return dict(zip(self._roles, parts, strict=True))

    def write(self, states: Mapping[str, torch.Tensor | None]) -> Any:
        """An output with these states."""
        parts = [states[role] for role in self._roles or ()]
        return parts[0] if issubclass(self._form, torch.Tensor) else self._form(parts)

    @property
    def roles(self) -> list[str]:
        """Names of the states in the order of the output, known once the block has run."""
        return list(self._roles or ())

    def _assign(self, inputs: Mapping[str, Any], parts: Sequence[Any]) -> list[str]:
        if len(parts) == 1:
            return [self.main]
        if self._order is not None and len(parts) == 2:
            return [self._order[i] for i in range(2)]
        states = [name for name, value in inputs.items() if torch.is_tensor(value) and name.endswith(self.main)]
        shapes = [None if part is None else part.shape for part in parts]
        fits = [
            names
            for names in itertools.permutations(states, len(parts))
            if all(shape in (None, inputs[name].shape) for name, shape in zip(names, shapes, strict=True))
        ]
        if len(fits) != 1:
            raise TypeError(
                f"{self.block} returns states of shapes {shapes}, and takes {states}: it cannot be told which is which. "
                f"Register it with diffusers' `TransformerBlockRegistry`."
            )
        return list(fits[0])


# --- what is stored --------------------------------------------------------------------------------------------------


class Deltas:
    """What a group added to the states on its last full steps.

    Args:
        order: of the polynomial in the step number that continues them; 0 takes the last one as it is.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._steps: list[int] = []
        self._values: list[dict[str, torch.Tensor]] = []

    def begin(self, step: int) -> None:
        """A full step: what follows is added up."""
        keep = max(0, len(self._steps) - self.order)
        self._steps, self._values = [*self._steps[keep:], step], [*self._values[keep:], {}]

    def add(self, before: Mapping[str, Any], after: Mapping[str, torch.Tensor | None]) -> None:
        """One block's part in it."""
        total = self._values[-1]
        for name, value in after.items():
            if value is not None:
                delta = value - before[name]
                total[name] = total[name] + delta if name in total else delta

    def at(self, step: int, name: str) -> torch.Tensor | None:
        """The delta of a state continued to a step; None where nothing was added to that state."""
        if name not in self._values[-1]:
            return None
        if len(self._steps) == 1:
            return self._values[-1][name]
        weights = lagrange(self._steps, step)
        return sum(weight * value[name] for weight, value in zip(weights, self._values, strict=True))  # type: ignore[return-value]


def lagrange(nodes: Sequence[int], point: int) -> list[float]:
    """Weights of the values at `nodes` in the value at `point` of the polynomial through them."""
    weights = []
    for i, node in enumerate(nodes):
        weight = 1.0
        for j, other in enumerate(nodes):
            if i != j:
                weight *= (point - other) / (node - other)
        weights.append(weight)
    return weights


# --- hooks -----------------------------------------------------------------------------------------------------------


class _Group:
    """A group with its place in the run's slots."""

    def __init__(self, slot: int, names: Sequence[str], order: int) -> None:
        self.slot, self.first, self.last, self.order = slot, names[0], names[-1], order

    def deltas(self, slots: Sequence[Slot]) -> Deltas:
        slot = slots[self.slot]
        if slot.value is None:
            slot.value = Deltas(self.order)
        return slot.value


class _BlockHook(ModelHook):
    """On one block: stores its part of the deltas of its groups, and leaves it out where its mode says so."""

    def __init__(self, run: CacheRun, name: str, streams: Streams, full: str) -> None:
        super().__init__()
        self.run, self.name, self.streams, self.full = run, name, streams, full
        self.groups: list[_Group] = []
        self.out: dict[str, _Group | None] = {}  # mode -> the group that is left out with its delta, or None without

    def new_forward(self, module, *args, **kwargs):
        state = self.run.state
        inputs = self.streams.inputs(args, kwargs)
        if state.mode not in self.out:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if state.mode == self.full:
                states = self.streams.read(inputs, output)
                for group in self.groups:
                    deltas = group.deltas(state.slots)
                    if self.name == group.first:
                        deltas.begin(state.step)
                    deltas.add(inputs, states)
            return output
        states = {name: inputs[name] for name in self.streams.roles}
        left_out = self.out[state.mode]
        if not states or (left_out is not None and state.slots[left_out.slot].value is None):
            raise RuntimeError(f"The plan leaves block {self.name!r} out before a full step.")
        if left_out is not None and self.name == left_out.last:
            deltas = left_out.deltas(state.slots)
            for name, value in states.items():
                if (delta := deltas.at(state.step, name)) is not None:
                    states[name] = value + delta
        return self.streams.write(states)


class BlockPlan:
    """Which blocks each mode leaves out. Methods call `leave_out`, then `install`.

    Args:
        builder: of the method.
        full: the mode that computes everything.
    """

    def __init__(self, builder: PlanBuilder, full: str = "full") -> None:
        self.builder, self.full = builder, full
        self._hooks: dict[str, _BlockHook] = {}
        self._groups: dict[tuple[tuple[str, ...], int], _Group] = {}

    def leave_out(self, mode: str, names: Iterable[str], order: int | None = 0) -> None:
        """Leave blocks out in a mode.

        Args:
            mode: a mode other than the full one.
            names: of the blocks.
            order: their deltas are added, continued over the steps by a polynomial of this order; None adds nothing, for
                blocks whose output nothing reads.
        """
        for names_of_group in groups_of(self.builder.root, names):
            group = None if order is None else self._group(names_of_group, order)
            for name in names_of_group:
                hook = self._hook(name)
                hook.out[mode] = group
                if group is not None and group not in hook.groups:
                    hook.groups.append(group)

    def install(self) -> CacheRun:
        """Register everything; steps are counted on the first block."""
        root = self.builder.root
        for name, hook in self._hooks.items():
            self.builder.hook(name, hook)
        timesteps = _timesteps(root)
        assert timesteps is not None  # `unsupported` says so before
        return self.builder.install(block_names(root)[0], timesteps)

    def _group(self, names: Sequence[str], order: int) -> _Group:
        key = (tuple(names), order)
        if key not in self._groups:
            self._groups[key] = _Group(self.builder.slot(), names, order)
        return self._groups[key]

    def _hook(self, name: str) -> _BlockHook:
        if name not in self._hooks:
            block = self.builder.root.get_submodule(name)
            self._hooks[name] = _BlockHook(self.builder.run, name, Streams(block), self.full)
        return self._hooks[name]
