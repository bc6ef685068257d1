"""The difference of two fine-tunes of one model as a file, and its sum with a third.

    delta = delta_weights(student, base)                       # what the training changed
    safetensors.torch.save_file(delta, "delta_weights.safetensors")
    merge_delta_weights(pipe.unet, "delta_weights.safetensors")   # onto another fine-tune of the same base

PeRFlow (Yan et al. 2024, arXiv 2405.07510, section 3.3) carries its acceleration to other fine-tunes in this way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


@torch.no_grad()
def delta_weights(model: nn.Module, base: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of `model` less those of `base`, by name, on the CPU in float32; tensors of whole numbers are left out.

    Raises:
        ValueError: the two have other tensors or shapes.
    """
    ours, theirs = model.state_dict(), base.state_dict()
    _same_layout("base", {name: value.shape for name, value in theirs.items()}, ours, "model")
    return {
        name: (value.float() - theirs[name].to(value.device).float()).cpu()
        for name, value in ours.items()
        if value.is_floating_point()
    }


@torch.no_grad()
def merge_delta_weights(
    model: nn.Module, delta: Mapping[str, torch.Tensor] | str | os.PathLike, scale: float = 1.0
) -> nn.Module:
    """Add `scale` times a difference of weights to a model, in place. To undo it, load the model again: sums round.

    Args:
        model: such as `pipe.unet`; of the same architecture as the two that the difference is of.
        delta: what `delta_weights` gave, or a safetensors file with it.
        scale: 1 adds all of it.

    Returns:
        The model.

    Raises:
        ValueError: there is no such file, or it is for a model of other tensors or shapes. Nothing is added then.
    """
    if isinstance(delta, (str, os.PathLike)):
        if not Path(delta).is_file():
            raise ValueError(f"`delta` is {str(delta)!r}, and there is no such file.")
        delta = load_file(delta)
    ours = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    _same_layout("delta", {name: value.shape for name, value in delta.items()}, ours, "model")
    for name, value in ours.items():
        value.copy_(value.float() + scale * delta[name].to(value.device).float())
    return model


def _same_layout(given: str, shapes: Mapping[str, torch.Size], wanted: Mapping[str, torch.Tensor], of: str) -> None:
    other = sorted(
        name
        for name in shapes.keys() | wanted.keys()
        if name not in shapes or name not in wanted or shapes[name] != wanted[name].shape
    )
    if other:
        raise ValueError(
            f"`{given}` does not have the tensors of `{of}`: {len(other)} are missing, too many, or of another shape, the "
            f"first is {other[0]!r}."
        )
