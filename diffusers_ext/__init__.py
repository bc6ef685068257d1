"""Research papers on diffusion models as parts that plug into Hugging Face diffusers.

Importing this package is light: listing methods imports neither torch nor diffusers. Classes are imported when first
used. Registration with diffusers happens at once where diffusers' loader is already imported, else when it first is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import registry

__version__ = "0.1.0"

_LAZY = registry.LAZY_NAMES

if TYPE_CHECKING:
    from .enabling import Enabled, disable, enable, enabled, status
    from .hooks.deepcache import DeepCacheConfig, apply_deepcache, remove_deepcache
    from .hub import push_to_hub, save_pretrained
    from .loading import Pipeline
    from .metrics.judge import AvatarJudge, FashionJudge
    from .oracles.gaussian import GaussianDenoiser, GaussianMixtureDenoiser, LowRankMixtureDenoiser
    from .oracles.language_model import EnumerableLanguageModel
    from .registry import Method, get_method, methods, zoo_path


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in registry.BASE_CLASSES:  # diffusers' loader looks its base classes up by name in a component's library
        value = getattr(importlib.import_module(registry.BASE_CLASSES[name]), name)
    else:
        value = registry.third_party_class(name)
        if value is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "AvatarJudge",
    "DeepCacheConfig",
    "Enabled",
    "EnumerableLanguageModel",
    "FashionJudge",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "LowRankMixtureDenoiser",
    "Method",
    "Pipeline",
    "apply_deepcache",
    "disable",
    "enable",
    "enabled",
    "get_method",
    "methods",
    "push_to_hub",
    "remove_deepcache",
    "save_pretrained",
    "status",
    "zoo_path",
]

registry.register()
