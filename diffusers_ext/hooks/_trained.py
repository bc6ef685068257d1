"""Parts that were trained for one model, and that a method's settings name by folder or Hub repository."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..schedulers._model_statistics import same_marks, weight_marks


def check_name(name: str, value: Any) -> None:
    """Raise `ValueError` unless a setting is a text that can name a folder or a Hub repository."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` is {value!r}; the name of a folder or of a Hub repository is needed.")


def config_of(part: type, name: str, value: str) -> dict[str, Any]:
    """The configuration of a saved part, without its weights.

    Args:
        part: its class.
        name: of the setting.
        value: folder or repository.

    Raises:
        ValueError: it is neither, or what is there is something else.
    """
    if not (Path(value).is_dir() or value.count("/") == 1):
        raise ValueError(f"`{name}` is {value!r}, which is neither a folder nor the name of a repository.")
    config = part.load_config(value)  # type: ignore[attr-defined]
    if config.get("_class_name") != part.__name__:
        raise ValueError(f"`{name}` {value!r} holds a {config.get('_class_name')}; a {part.__name__} is needed.")
    return config


def warn_of_other_weights(name: str, value: str, marks: torch.Tensor, module: nn.Module) -> None:
    """Warn where a part was trained for other weights than those of `module`, which are its `weight_marks`.

    It is no error: a part may well serve a model that was fine-tuned a little. Offloaded weights are not looked at.
    """
    offloaded = any(tensor.is_meta for tensor in module.parameters())
    if len(marks) and not offloaded and not same_marks(marks, weight_marks(module)):
        warnings.warn(
            f"`{name}` {value!r} was trained for other weights than those of this {type(module).__name__}: its pictures may "
            "be worse than they should be.",
            stacklevel=2,
        )
