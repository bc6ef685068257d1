"""All that a method could leave behind on a model or a pipeline, and in what two such traces differ."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from .suite import require


def trace(target: Any) -> dict[str, Any]:
    """Marks of a model or a pipeline by name: classes, attributes, hooks, forwards, processors, configs, weights.

    A scheduler counts with its class and its config; what it keeps of a run is its own business.
    """
    if isinstance(target, nn.Module):
        return dict(_model(target))
    marks: dict[str, Any] = {"attributes": frozenset(vars(target)), "config": _plain(target.config)}
    for name, part in target.components.items():
        marks[f"{name}: class"] = type(part)
        if isinstance(part, nn.Module):
            marks |= {f"{name}.{key}": value for key, value in _model(part)}
        elif hasattr(part, "register_to_config"):
            marks[f"{name}: config"] = _plain(part.config)
    return marks


def _model(model: nn.Module):
    if hasattr(model, "config"):
        yield "config", _plain(model.config)
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        yield f"{path}: class", type(module)
        yield f"{path}: attributes", frozenset(vars(module))
        yield f"{path}: torch hooks", [list(found) for found in hooks]
        yield f"{path}: forward", vars(module).get("forward")
        yield f"{path}: training", module.training
        if "processor" in vars(module) or "processor" in module._modules:
            yield f"{path}: processor", _Same(module.processor)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{path}: bits", digest(tensor)
        yield f"{path}: kind", (tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad, tensor.grad is None)


class _Same:
    """Equal to the same object only. It keeps the object, so that its place is not taken by another."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __repr__(self) -> str:
        return f"{type(self.it).__name__} at {id(self.it):#x}"


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else config.to_dict()


def digest(tensor: torch.Tensor) -> str:
    """Hash of the bits of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy() if flat.numel() else b"").hexdigest()


def require_unchanged(target: Any, before: dict[str, Any], when: str) -> None:
    """`target` has the trace `before`; `when` says what happened in between."""
    after = trace(target)
    for key in [*before, *(after.keys() - before.keys())]:
        old, new = before.get(key, "nothing"), after.get(key, "nothing")
        if isinstance(old, frozenset) and isinstance(new, frozenset):
            left, gone = sorted(new - old), sorted(old - new)
            require(old == new, f"{when}, {type(target).__name__} has {key} left {left}, gone {gone}")
        require(old == new, f"{when}, {type(target).__name__} differs in {key!r}: {new!r} instead of {old!r}")
