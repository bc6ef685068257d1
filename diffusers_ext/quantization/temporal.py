r"""Temporal features: what a denoiser computes from the timestep alone.

The layers that see nothing but the timestep are the *temporal block*; those of their outputs that other parts of the network
take are the temporal features :math:`e_{t,i}`. In a U-Net these are the outputs of the time projections of all residual
blocks; where a class, text or size embedding is added before them, and in transformers, those of the embedding itself.

A run of n steps needs n values of each feature, so a feature can be computed once, quantized and kept as a table
(`FeatureTable`), and a layer of the block can have grids for each timestep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .grids import grid_of
from .layers import QuantizedLayer, is_quantizable
from .observers import search, symmetric_range, weight_place
from .packing import pack, packed_shape, unpack
from .recording import Call
from .structure import frozen
from .timing import Clock, timestep_position

_TIMESTEP = "timestep"
_BETWEEN: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.nn.Identity(), F.silu, F.gelu, F.relu, F.mish)


# --- what the temporal block is --------------------------------------------------------------------------------------


def _marked(value: Any) -> Any:
    """All floating-point tensors, asking for gradients."""
    if torch.is_tensor(value):
        return value.detach().clone().requires_grad_(True) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _marked(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_marked(part) for part in value)
    return value


def one_row(call: Call) -> Call:
    """The first sample of a call."""
    return call.take(torch.zeros(1, dtype=torch.long))


def _input_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["input"]


def timestep_only(model: nn.Module, call: Call) -> list[str]:
    """Names of the linear layers whose input depends on the timestep alone, in the order of use.

    Gradients tell: all other floating-point inputs and what embeddings give ask for them. Layers that run more than once in
    a call are left out.
    """
    call = one_row(call)
    kwargs = {name: value if name == _TIMESTEP else _marked(value) for name, value in call.kwargs.items()}
    seen = _dependence(model, kwargs, embeddings=True)
    return [name for name, depends in seen.items() if depends == [False]]


def timestep_dependent(model: nn.Module, call: Call) -> set[str]:
    """Names of the linear layers whose input depends on the timestep, by gradients."""
    call = one_row(call)
    given = call.kwargs[_TIMESTEP]
    timestep = (given.float() if torch.is_tensor(given) else torch.tensor(float(given))).requires_grad_(True)
    seen = _dependence(model, {**call.kwargs, _TIMESTEP: timestep}, embeddings=False)
    return {name for name, depends in seen.items() if any(depends)}


def time_projections(model: nn.Module, call: Call, timewise: Sequence[str]) -> tuple[list[str], list[str]]:
    """The layers that see the timestep, maybe conditions, and not the noisy sample: the last ones of them, and all.

    Args:
        model: the denoiser.
        call: one of its calls.
        timewise: names of layers that do not see the noisy sample.
    """
    dependent = timestep_dependent(model, call)
    names = [name for name in timewise if name in dependent]
    return used_outside(model, call, names), names


def _dependence(model: nn.Module, kwargs: dict[str, Any], embeddings: bool) -> dict[str, list[bool]]:
    """Name of each linear layer that ran -> whether its input asked for gradients, each time.

    Args:
        kwargs: of the model; what asks for gradients among them is what layers may depend on.
        embeddings: whether what embeddings give does so as well.
    """
    seen: dict[str, list[bool]] = {}
    handles = []

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, []).append(_input_of(args, kwargs).requires_grad)

        return hook

    def mark(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True)

    for name, module in model.named_modules():
        if is_quantizable(module) and isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(see(name), with_kwargs=True))
        elif embeddings and isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(mark))
    try:
        with frozen(model), torch.enable_grad():
            model(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def used_outside(model: nn.Module, call: Call, names: Sequence[str]) -> list[str]:
    """Those of the layers `names` whose output the model's output takes by a way that goes through none of the others."""
    leaves: dict[str, torch.Tensor] = {}
    handles = []

    def cut(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            leaves[name] = output.detach().requires_grad_(True)
            return leaves[name]

        return hook

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(cut(name)))
    try:
        with frozen(model), torch.enable_grad():
            output = one_row(call).run(model)
    finally:
        for handle in handles:
            handle.remove()
    reached = _leaves(output[0])
    return [name for name in names if id(leaves[name]) in reached]


def _leaves(output: torch.Tensor) -> set[int]:
    """Identities of the tensors that the graph of an output starts from."""
    found, done, open_nodes = set(), set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in done:
            continue
        done.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_nodes += [parent for parent, _ in node.next_functions]
    return found


@contextlib.contextmanager
def noted_timesteps(model: nn.Module) -> Iterator[list[float]]:
    """Inside, the timesteps that a denoiser is called with are noted."""
    times, position = list[float](), timestep_position(type(model))

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs[_TIMESTEP] if _TIMESTEP in kwargs else args[position]
        times.append(float(torch.as_tensor(given).flatten()[0]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield times
    finally:
        handle.remove()


# --- the block by itself ---------------------------------------------------------------------------------------------


class TemporalBlock(nn.Module):
    """The layers of a denoiser that see the timestep alone, run by themselves for any of the sampler's timesteps.

    Args:
        model: the denoiser, in full precision.
        call: one of its calls.
        calls: calls of one timestep, which tell whether a layer really gets the same for all samples.
        layers: names that may belong to the block; the attribute `layers` tells what they stand for while the block runs.
        times: all timesteps of the sampler, falling.

    Attributes:
        names: of the layers, in the order of use.
        features: those whose output the rest of the network takes.
        sources: name -> layer that the input comes from, or None, and what is between.
        inputs: name -> `(times, channels)`, in full precision.
        targets: feature -> `(times, channels)`, in full precision.

    Raises:
        ValueError: no layer depends on the timestep alone.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], layers: Mapping[str, nn.Module], times: Sequence[float]
    ) -> None:
        super().__init__()
        self.layers, self.clock = layers, Clock(times)
        names = [name for name in timestep_only(model, calls[0]) if name in layers]
        names = _constant(model, [call for call in calls if call.timestep == calls[0].timestep], names)
        self.features = used_outside(model, calls[0], names)
        if not self.features:
            raise ValueError(
                f"`temporal` needs layers that depend on the timestep alone, and {type(model).__name__} has none."
            )
        self.inputs, outputs = _captured(model, calls[0], names, times)
        self.targets = {name: outputs[name] for name in self.features}
        self.names = names
        self.sources = {name: _source(self.inputs[name], outputs, names[:i]) for i, name in enumerate(names)}

    def _input(self, name: str, rows: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source, between = self.sources[name]
        return self.inputs[name][rows] if source is None else between(outputs[source])

    def forward(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The features at the timesteps number `rows`, each `(rows, channels)`."""
        self.clock.index = rows
        outputs: dict[str, torch.Tensor] = {}
        for name in self.names:
            outputs[name] = self.layers[name](self._input(name, rows, outputs))
        return [outputs[name] for name in self.features]

    def all_rows(self) -> torch.Tensor:
        return torch.arange(len(self.clock.times), device=self.inputs[self.names[0]].device)

    @torch.no_grad()
    def place_inputs(self, how: str, factors: Sequence[float], power: float, symmetric: bool) -> None:
        """Finite set calibration: for every timestep the grid of what a layer gets there, from those before it."""
        rows = self.clock.index = self.all_rows()
        outputs: dict[str, torch.Tensor] = {}
        for name in self.names:
            layer: Any = self.layers[name]
            x, grid = self._input(name, rows, outputs), layer.input_grid
            low, high = x.float().amin(1), x.float().amax(1)
            if symmetric:
                low, high = symmetric_range(low, high)
            if how == "search":
                place = search(x.float(), grid, grid.places(low, high, factors), power)
            else:
                place = grid.fit(low, high)
            layer.input_place, layer.clock, layer.inputs_on = place[:, None], self.clock, True
            outputs[name] = layer(x)

    @torch.no_grad()
    def errors(self) -> dict[str, torch.Tensor]:
        """Feature -> `(times,)`, distance of what the layers give to full precision."""
        found = self(self.all_rows())
        return {
            name: (now - self.targets[name]).float().norm(dim=1) for name, now in zip(self.features, found, strict=True)
        }


@torch.no_grad()
def _constant(model: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> list[str]:
    """Those layers that get one and the same input for all samples of calls at one timestep, and nothing before them differs.

    What gradients cannot tell, an integer that no embedding looks up, is seen here.
    """
    first: dict[str, torch.Tensor] = {}
    wrong: set[str] = set()

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rows = _input_of(args, kwargs).detach().flatten(0, -2)
            if not torch.allclose(rows, first.setdefault(name, rows[:1]), rtol=1e-4, atol=1e-4):
                wrong.add(name)

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(see(n), with_kwargs=True) for n in names]
    try:
        for call in calls:
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in names if name not in wrong]


@torch.no_grad()
def _captured(
    model: nn.Module, call: Call, names: Sequence[str], times: Sequence[float]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What layers get and give at each timestep, each `(times, channels)`."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            inputs[name].append(_input_of(args, kwargs).flatten(0, -2)[0].clone())
            outputs[name].append(output.flatten(0, -2)[0].clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(see(name), with_kwargs=True) for name in names]
    call = one_row(call)
    given = call.kwargs[_TIMESTEP]
    try:
        for time in tqdm(times, desc="Temporal features", unit="step", delay=2.0, leave=False):
            now = torch.full_like(given, time) if torch.is_tensor(given) else type(given)(time)
            model(**{**call.kwargs, _TIMESTEP: now})
    finally:
        for handle in handles:
            handle.remove()
    return {n: torch.stack(rows) for n, rows in inputs.items()}, {n: torch.stack(rows) for n, rows in outputs.items()}


def _source(
    inputs: torch.Tensor, outputs: Mapping[str, torch.Tensor], before: Sequence[str]
) -> tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]:
    """The earlier layer that an input comes from, and the activation function between the two."""
    for name in before:
        if outputs[name].shape == inputs.shape:
            for between in _BETWEEN:
                if torch.allclose(between(outputs[name]), inputs, rtol=1e-5, atol=1e-6):
                    return name, between
    return None, _BETWEEN[0]


# --- features as tables ----------------------------------------------------------------------------------------------


class FeatureTable(nn.Module):
    """Stands for a layer whose output is a temporal feature: quantized vectors, one for each timestep.

    Its tensors are made as empty ones; `filled` and loading fill them.

    Args:
        times: number of timesteps.
        channels: of the feature.
        bits: of the codes; each vector has a scale of its own.
        layer: computes the feature where the table is not chosen or does not have the timestep; None where the table has
            all that is asked for.
        clock: tells the timestep.
        device: of the tensors.

    Attributes:
        chosen: `(times,)`, whether the table is nearer to full precision than `layer`; without a layer, all.
    """

    codes: torch.Tensor
    weight_place: torch.Tensor
    chosen: torch.Tensor

    def __init__(
        self,
        times: int,
        channels: int,
        bits: int,
        layer: QuantizedLayer | None,
        clock: Clock,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.layer, self.clock = (times, channels), bits, layer, clock
        self.grid = grid_of("int", bits)
        shape, dtype = packed_shape(self.shape, bits)
        self.register_buffer("codes", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("weight_place", torch.empty((self.grid.numbers, 1, times), device=device))
        self.register_buffer("chosen", torch.ones(times, dtype=torch.bool, device=device))

    @classmethod
    @torch.no_grad()
    def filled(cls, vectors: torch.Tensor, bits: int, layer: QuantizedLayer | None, clock: Clock) -> FeatureTable:
        """The table of vectors `(times, channels)`."""
        table = cls(len(vectors), vectors.shape[1], bits, layer, clock, vectors.device)
        table.weight_place = weight_place(vectors, table.grid, 0, "minmax", [1.0], 2.0)
        table.codes = pack(table.grid.encode(vectors, table.weight_place[:, 0, :, None]), bits)
        return table

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The vectors number `index`, `(n, channels)`, in float32."""
        codes = unpack(self.codes[index], (len(index), self.shape[1]), self.bits)
        return self.grid.decode(codes, self.weight_place[:, 0, index, None])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        index = self.clock.index.to(self.codes.device)
        found = self.rows(index).to(input.dtype)
        count, rows = len(index), input.shape[0]
        if rows % count:
            raise ValueError(f"A layer got {rows} rows in a call with {count} timesteps; a multiple of them is needed.")
        shape = (rows, *[1] * (input.ndim - 2), self.shape[1])
        size = (*input.shape[:-1], self.shape[1])
        found = found.repeat_interleave(rows // count, 0).reshape(shape).expand(size)
        if self.layer is None:
            return found
        right = self.chosen[index] & self.clock.known.to(index.device)
        right = right.repeat_interleave(rows // count).reshape(-1, *[1] * (input.ndim - 1))
        return torch.where(right, found, self.layer(input))

    def extra_repr(self) -> str:
        return f"{self.shape}, bits={self.bits}"


class SkippedLayer(nn.Module):
    """Stands for a layer whose output nothing uses any more: zeros of its shape."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.new_zeros(1).expand(*input.shape[:-1], self.out_features)
