"""Attention heads and feed-forward neurons of a denoiser, and how to cut them out.

A unit is a head of an attention layer or a hidden neuron of a feed-forward layer. The channels that a unit makes are rows of some
linear layers, its writers, and columns of others, its readers. To multiply those columns' inputs by 0 and to remove rows and
columns gives the same output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import nn

HEADS, NEURONS = "heads", "neurons"


@dataclass(frozen=True)
class Group:
    """The units of one layer.

    Attributes:
        name: of the layer in the model.
        kind: `heads` or `neurons`.
        units: how many there are.
        width: channels of a unit.
        writers: linear layers whose rows make the channels, and how often all channels stand there, one after the other.
        readers: linear layers whose columns take the channels, and the first of these columns.
    """

    name: str
    kind: str
    units: int
    width: int
    writers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]

    def channels(self, units: Sequence[int]) -> torch.Tensor:
        """Numbers of the channels of some units."""
        first = torch.as_tensor(list(units), dtype=torch.long, device="cpu") * self.width
        return (first[:, None] + torch.arange(self.width, device="cpu")).flatten()


class EmptyAttention(nn.Module):
    """An attention layer that lost all heads: it gives the biases of its output layers.

    Args:
        attention: the layer.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        out, added = getattr(attention, "to_out", None), getattr(attention, "to_add_out", None)
        self.width = 0 if out is None else out[0].out_features
        self.added_width = 0 if added is None else added.out_features
        self.bias = None if out is None else out[0].bias
        self.added_bias = None if added is None else added.bias
        self.joint = attention.added_kv_proj_dim is not None  # whether it answers for the encoder's states too

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = _constant(hidden_states, self.width, self.bias)
        if not self.joint or encoder_hidden_states is None:
            return given
        return given, _constant(encoder_hidden_states, self.added_width, self.added_bias)


def _constant(states: torch.Tensor, width: int, bias: torch.Tensor | None) -> torch.Tensor:
    shape = (*states.shape[:-1], width)
    return states.new_zeros(shape) if bias is None else bias.to(states.dtype).expand(shape)


def find_groups(model: nn.Module) -> list[Group]:
    """The groups of a model in the order of its modules.

    Raises:
        ValueError: a layer cannot be cut: LoRA or quantized weights, fused projections, or a processor with weights.
    """
    groups = []
    for name, module in model.named_modules():
        if isinstance(module, Attention | FluxAttention):
            if isinstance(module, Attention) and (module.residual_connection or module.rescale_output_factor != 1):
                continue  # of a convolutional block
            groups.append(_heads(model, name, module))
        elif isinstance(module, FeedForward):
            copies = 2 if isinstance(module.net[0], GEGLU | SwiGLU) else 1
            writer, reader = f"{name}.net.0.proj", f"{name}.net.2"
            groups.append(Group(name, NEURONS, module.net[2].in_features, 1, ((writer, copies),), ((reader, 0),)))
        elif isinstance(module, FluxSingleTransformerBlock):
            first, writer = _inner(module.attn), f"{name}.proj_mlp"
            count = module.proj_mlp.out_features
            groups.append(Group(writer, NEURONS, count, 1, ((writer, 1),), ((f"{name}.proj_out", first),)))
    for group in groups:
        for layer in (name for name, _ in (*group.writers, *group.readers)):
            if type(model.get_submodule(layer)) is not nn.Linear:
                kind = type(model.get_submodule(layer)).__name__
                raise ValueError(f"`model` has a {kind} at {layer}; only plain linear layers can be cut.")
    return groups


def _inner(attention: nn.Module) -> int:
    """Width of what an attention layer hands on."""
    return attention.width if isinstance(attention, EmptyAttention) else attention.to_q.out_features


def _heads(model: nn.Module, name: str, attention: Any) -> Group:
    if attention.fused_projections or isinstance(attention.processor, nn.Module):
        raise ValueError(f"`model` has fused projections, or weights in its attention processor, at {name}.")
    writers = [
        part for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj") if _has(attention, part)
    ]
    readers = [(f"{name}.{part}", 0) for part in ("to_out.0", "to_add_out") if _has(attention, part.partition(".")[0])]
    if not readers:  # of a block that adds up attention and feed-forward
        readers = [(f"{name.rpartition('.')[0]}.proj_out", 0)]
    width = attention.to_q.out_features // attention.heads
    return Group(name, HEADS, attention.heads, width, tuple((f"{name}.{part}", 1) for part in writers), tuple(readers))


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def cut(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Remove all units of some groups but those of the given numbers, in place.

    Args:
        kept: by name of the group, numbers of the units that stay, rising.

    Raises:
        ValueError: there is no such group, or no such unit.
    """
    groups = {group.name: group for group in find_groups(model)}
    for name, units in kept.items():
        if name not in groups:
            raise ValueError(
                f"`kept` names {name!r}, which is no layer of this {type(model).__name__} that can be cut."
            )
        allowed = range(groups[name].units)
        if any(unit not in allowed for unit in units) or sorted(set(units)) != list(units):
            raise ValueError(
                f"`kept` of {name!r} is {list(units)}; allowed are rising numbers from 0 to {allowed.stop - 1}."
            )
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for name, units in kept.items():
        group, size = groups[name], groups[name].units * groups[name].width
        channels = group.channels(units)
        for layer, copies in group.writers:
            rows[layer] = torch.cat([channels + copy * size for copy in range(copies)])
        for layer, first in group.readers:
            stays = columns.setdefault(
                layer, torch.ones(model.get_submodule(layer).in_features, dtype=torch.bool, device="cpu")
            )
            stays[first : first + size] = False
            stays[first + channels] = True
    for layer in {*rows, *columns}:
        stays = columns.get(layer)
        _slice(model.get_submodule(layer), rows.get(layer), None if stays is None else stays.nonzero()[:, 0])
    for name, units in kept.items():
        if groups[name].kind == HEADS:
            _tell(model, name, len(units), groups[name].width)


def _slice(layer: Any, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    weight, bias = layer.weight.detach(), layer.bias
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        layer.out_features = len(rows)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[rows.to(bias.device)], requires_grad=bias.requires_grad)
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
        layer.in_features = len(columns)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)


def _tell(model: nn.Module, name: str, heads: int, width: int) -> None:
    """Let an attention layer know how many heads it has."""
    attention: Any = model.get_submodule(name)
    if heads == 0:
        model.set_submodule(name, EmptyAttention(attention))
        return
    attention.heads, attention.inner_dim = heads, heads * width
    if isinstance(attention, Attention):
        attention.inner_kv_dim, attention.sliceable_head_dim = heads * width, heads
