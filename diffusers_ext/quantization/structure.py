"""What is quantized, found from one run of the denoiser: layers in the order of use, where inputs are concatenated, units."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .attention import is_attention
from .layers import is_quantizable
from .recording import Call

_LISTS = re.compile(r"(\w+_)?(blocks|layers|resnets|attentions|convs|modules|downsamplers|upsamplers)")


@dataclass
class Structure:
    """What one run showed.

    Attributes:
        layers: names of the linear and convolution layers in the order in which they first ran.
        first, last: the first and the last of them whose input depends on the noisy sample.
        timewise: those whose input does not depend on the noisy sample.
        splits: name -> channels of the first of the two tensors that are concatenated into its input.
        attentions: names of the attention modules that ran.
        units: names of the modules whose weights are learnt together, in the order in which they first ran: blocks, and
            single layers outside of blocks.
    """

    layers: list[str] = field(default_factory=list)
    first: str = ""
    last: str = ""
    timewise: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)


def trace(model: nn.Module, call: Call) -> Structure:
    """Look at one call of the denoiser."""
    found, handles = Structure(), []
    layers = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    units = {name: module for name, module in _units(model, "") if any(_within(layer, name) for layer in layers)}
    order: list[str] = []
    depends: dict[str, bool] = {}

    def see_layer(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            depends[name] = depends.get(name, False) or given.requires_grad

        return hook

    def see(into: list[str], name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            if name not in into:
                into.append(name)

        return hook

    for name, module in model.named_modules():
        if name in layers:
            handles.append(module.register_forward_pre_hook(see_layer(name), with_kwargs=True))
        if name in units:
            handles.append(module.register_forward_pre_hook(see(order, name)))
        if is_attention(module):
            handles.append(module.register_forward_pre_hook(see(found.attentions, name)))
        if hasattr(module, "resnets") and "res_hidden_states_tuple" in _forward_names(module):
            handles.append(module.register_forward_pre_hook(_see_split(name, found.splits), with_kwargs=True))
    one = call.take(torch.zeros(1, dtype=torch.long))
    sample = one.kwargs[one.sample].detach().clone().requires_grad_(True)
    try:
        with frozen(model), torch.enable_grad():
            Call({**one.kwargs, one.sample: sample}, one.sample, one.step, one.timestep).run(model)
    finally:
        for handle in handles:
            handle.remove()
    found.layers = list(depends)
    of_sample = [name for name, yes in depends.items() if yes]
    found.timewise = [name for name, yes in depends.items() if not yes]
    if of_sample:
        found.first, found.last = of_sample[0], of_sample[-1]
    found.splits = {name: split for name, split in found.splits.items() if name in depends}
    found.units = order
    return found


def unit_of(name: str, units: list[str]) -> str:
    """The unit that a layer belongs to."""
    return next(unit for unit in units if _within(name, unit))


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules below `module` that hold no list of blocks, and are in none that holds none."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        lists = [
            part.rpartition(".")[2]
            for part, inner in child.named_modules()
            if isinstance(inner, nn.ModuleList) and len(inner)
        ]
        if isinstance(child, nn.ModuleList) or any(_LISTS.fullmatch(found) for found in lists):
            yield from _units(child, f"{path}.")
        else:
            yield path, child


def _forward_names(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__wrapped__", type(module).forward).__code__
    return code.co_varnames[: code.co_argcount]


def _see_split(block: str, splits: dict[str, int]) -> Any:
    """Notes what a block of a U-Net's up path concatenates: what comes from below, and a skip connection."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        channels = (args[0] if args else kwargs["hidden_states"]).shape[1]
        for i, resnet in enumerate(module.resnets):
            if not hasattr(resnet, "in_channels"):  # of blocks for video, which are made of two
                return
            if channels < resnet.in_channels:
                for layer in ("conv1", "conv_shortcut"):
                    splits[f"{block}.resnets.{i}.{layer}"] = channels
            channels = resnet.out_channels

    return hook


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter wants gradients."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
