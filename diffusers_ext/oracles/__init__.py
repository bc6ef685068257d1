"""Models whose answers are known exactly. Names are imported when first used.

- Denoisers of Gaussian data, Gaussian mixtures and mixtures of low-rank Gaussians, called as a `UNet2DModel` is, so that
  any scheduler runs on them; `sampler_error` says how far it ends from the exact solution.
- `EnumerableLanguage`, a small language with all its probabilities, and `EnumerableLanguageModel`, its exact masked
  language model; `unmasking_law` gives the distribution that unmasking with a model leads to.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gaussian import GaussianDenoiser, GaussianMixtureDenoiser, LowRankMixtureDenoiser
    from .language import EnumerableLanguage
    from .language_model import EnumerableLanguageModel
    from .solvers import SamplerError, convergence_order, sampler_error
    from .unmasking import TotalVariation, total_variation, unmasking_law

_MODULES = {
    "EnumerableLanguage": "language",
    "EnumerableLanguageModel": "language_model",
    "GaussianDenoiser": "gaussian",
    "GaussianMixtureDenoiser": "gaussian",
    "LowRankMixtureDenoiser": "gaussian",
    "SamplerError": "solvers",
    "TotalVariation": "unmasking",
    "convergence_order": "solvers",
    "sampler_error": "solvers",
    "total_variation": "unmasking",
    "unmasking_law": "unmasking",
}

__all__ = [
    "EnumerableLanguage",
    "EnumerableLanguageModel",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "LowRankMixtureDenoiser",
    "SamplerError",
    "TotalVariation",
    "convergence_order",
    "sampler_error",
    "total_variation",
    "unmasking_law",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
