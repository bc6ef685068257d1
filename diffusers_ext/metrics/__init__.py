"""Measures and judges. Names are imported when first used, so that the light ones do not pull in torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attributes import ATTRIBUTES, CLASSES, balanced_accuracy, parse_caption
    from .distances import psnr, rmse, to_tensor
    from .distributions import DistanceDifference, SetDistance, distance_difference, frechet_distance, kernel_distance
    from .efficientnet import EfficientNetLite0
    from .intervals import bootstrap_interval
    from .judge import AvatarJudge, FashionJudge
    from .macs import CallCounter, count_macs
    from .memory import bytes_on_disk, peak_memory
    from .spectrum import high_frequency_energy_ratio, high_frequency_share
    from .text import (
        Likelihood,
        Share,
        TokenRates,
        exact_nll,
        masked_nll_bound,
        token_entropy,
        tokens_per_second,
        validity,
    )
    from .timing import RatioEstimate, TimeRatios, time_ratio

_MODULES = {
    "ATTRIBUTES": "attributes",
    "AvatarJudge": "judge",
    "CLASSES": "attributes",
    "CallCounter": "macs",
    "DistanceDifference": "distributions",
    "EfficientNetLite0": "efficientnet",
    "FashionJudge": "judge",
    "Likelihood": "text",
    "RatioEstimate": "timing",
    "SetDistance": "distributions",
    "Share": "text",
    "TimeRatios": "timing",
    "TokenRates": "text",
    "balanced_accuracy": "attributes",
    "bootstrap_interval": "intervals",
    "bytes_on_disk": "memory",
    "count_macs": "macs",
    "distance_difference": "distributions",
    "exact_nll": "text",
    "frechet_distance": "distributions",
    "high_frequency_energy_ratio": "spectrum",
    "high_frequency_share": "spectrum",
    "kernel_distance": "distributions",
    "masked_nll_bound": "text",
    "parse_caption": "attributes",
    "peak_memory": "memory",
    "psnr": "distances",
    "rmse": "distances",
    "time_ratio": "timing",
    "to_tensor": "distances",
    "token_entropy": "text",
    "tokens_per_second": "text",
    "validity": "text",
}

__all__ = [
    "ATTRIBUTES",
    "CLASSES",
    "AvatarJudge",
    "CallCounter",
    "DistanceDifference",
    "EfficientNetLite0",
    "FashionJudge",
    "Likelihood",
    "RatioEstimate",
    "SetDistance",
    "Share",
    "TimeRatios",
    "TokenRates",
    "balanced_accuracy",
    "bootstrap_interval",
    "bytes_on_disk",
    "count_macs",
    "distance_difference",
    "exact_nll",
    "frechet_distance",
    "high_frequency_energy_ratio",
    "high_frequency_share",
    "kernel_distance",
    "masked_nll_bound",
    "parse_caption",
    "peak_memory",
    "psnr",
    "rmse",
    "time_ratio",
    "to_tensor",
    "token_entropy",
    "tokens_per_second",
    "validity",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
