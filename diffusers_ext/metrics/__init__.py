"""Measures and judges. Names are imported when first used, so that the light ones do not pull in torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attributes import ATTRIBUTES, CLASSES, balanced_accuracy, parse_caption
    from .distances import psnr, rmse, to_tensor
    from .intervals import bootstrap_interval
    from .judge import AvatarJudge
    from .macs import CallCounter, count_macs
    from .timing import RatioEstimate, TimeRatios, time_ratio

_MODULES = {
    "ATTRIBUTES": "attributes",
    "AvatarJudge": "judge",
    "CLASSES": "attributes",
    "CallCounter": "macs",
    "RatioEstimate": "timing",
    "TimeRatios": "timing",
    "balanced_accuracy": "attributes",
    "bootstrap_interval": "intervals",
    "count_macs": "macs",
    "parse_caption": "attributes",
    "psnr": "distances",
    "rmse": "distances",
    "time_ratio": "timing",
    "to_tensor": "distances",
}

__all__ = [
    "ATTRIBUTES",
    "CLASSES",
    "AvatarJudge",
    "CallCounter",
    "RatioEstimate",
    "TimeRatios",
    "balanced_accuracy",
    "bootstrap_interval",
    "count_macs",
    "parse_caption",
    "psnr",
    "rmse",
    "time_ratio",
    "to_tensor",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
