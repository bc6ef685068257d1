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
    from .hooks.asced import ASCEDCallback, detect_artifacts
    from .hooks.calibrated_dpm import CalibratedDPMConfig, apply_calibrated_dpm, calibrate, remove_calibrated_dpm
    from .hooks.deepcache import DeepCacheConfig, apply_deepcache, remove_deepcache
    from .hooks.flowturbo import FlowTurboConfig, apply_flowturbo, remove_flowturbo
    from .hooks.time_shift_sampler import TimeShiftConfig, apply_time_shift_sampler, remove_time_shift_sampler
    from .hub import push_to_hub, save_pretrained
    from .loading import Pipeline
    from .metrics.judge import AvatarJudge, FashionJudge
    from .models.velocity_refiner import VelocityRefiner
    from .oracles.gaussian import GaussianDenoiser, GaussianMixtureDenoiser, LowRankMixtureDenoiser
    from .oracles.language_model import EnumerableLanguageModel
    from .pipelines.adaptive_sde import AdaptiveSDEPipeline
    from .pipelines.mean_reverting import MeanRevertingPipeline
    from .registry import Method, get_method, methods, zoo_path
    from .schedulers._model_statistics import DPMSolverV3Statistics
    from .schedulers.collect import collect_statistics
    from .schedulers.dc_search import check_dc_ratios, search_dc_ratios
    from .schedulers.dc_solver import DCSolverMultistepScheduler, fit_dc_ratios, predict_dc_ratios
    from .schedulers.dpm_solver_v3 import DPMSolverV3Scheduler
    from .schedulers.evodiff import EVODiffScheduler
    from .schedulers.flowturbo import FlowMatchPseudoCorrectorScheduler
    from .schedulers.gaussian_teleport import GaussianTeleport, GaussianTeleportScheduler
    from .schedulers.ghvb import GHVBScheduler, HeavyBallDPMSolverMultistepScheduler, HeavyBallUniPCMultistepScheduler
    from .schedulers.mr_sampler import MRSamplerScheduler
    from .schedulers.unified_solver import UnifiedSolverScheduler
    from .search import PictureObjective, TimestepSearch
    from .solver_search import SolverSearch


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
    "ASCEDCallback",
    "AdaptiveSDEPipeline",
    "AvatarJudge",
    "CalibratedDPMConfig",
    "DCSolverMultistepScheduler",
    "DPMSolverV3Scheduler",
    "DPMSolverV3Statistics",
    "DeepCacheConfig",
    "EVODiffScheduler",
    "Enabled",
    "EnumerableLanguageModel",
    "FashionJudge",
    "FlowMatchPseudoCorrectorScheduler",
    "FlowTurboConfig",
    "GHVBScheduler",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GaussianTeleport",
    "GaussianTeleportScheduler",
    "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler",
    "LowRankMixtureDenoiser",
    "MRSamplerScheduler",
    "MeanRevertingPipeline",
    "Method",
    "PictureObjective",
    "Pipeline",
    "SolverSearch",
    "TimeShiftConfig",
    "TimestepSearch",
    "UnifiedSolverScheduler",
    "VelocityRefiner",
    "apply_calibrated_dpm",
    "apply_deepcache",
    "apply_flowturbo",
    "apply_time_shift_sampler",
    "calibrate",
    "check_dc_ratios",
    "collect_statistics",
    "detect_artifacts",
    "disable",
    "enable",
    "enabled",
    "fit_dc_ratios",
    "get_method",
    "methods",
    "predict_dc_ratios",
    "push_to_hub",
    "remove_calibrated_dpm",
    "remove_deepcache",
    "remove_flowturbo",
    "remove_time_shift_sampler",
    "save_pretrained",
    "search_dc_ratios",
    "status",
    "zoo_path",
]

registry.register()
