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
    from .hooks.adaptive_diffusion import (
        AdaptiveDiffusionConfig,
        AdaptiveDiffusionStats,
        adaptive_diffusion_stats,
        apply_adaptive_diffusion,
        remove_adaptive_diffusion,
    )
    from .hooks.asced import ASCEDCallback, detect_artifacts
    from .hooks.block_profile import BlockProfile, profile_blocks
    from .hooks.calibrated_dpm import CalibratedDPMConfig, apply_calibrated_dpm, calibrate, remove_calibrated_dpm
    from .hooks.cat_pruning import CATPruningConfig, apply_cat_pruning, remove_cat_pruning
    from .hooks.deepcache import DeepCacheConfig, apply_deepcache, remove_deepcache
    from .hooks.delta_dit import DeltaDiTConfig, apply_delta_dit, remove_delta_dit
    from .hooks.faster_diffusion import (
        FasterDiffusionConfig,
        PriorNoiseInjection,
        apply_faster_diffusion,
        remove_faster_diffusion,
    )
    from .hooks.flowturbo import FlowTurboConfig, apply_flowturbo, remove_flowturbo
    from .hooks.harmonica import HarmonicaConfig, apply_harmonica, remove_harmonica
    from .hooks.inner_loop_feedback import (
        InnerLoopFeedbackConfig,
        apply_inner_loop_feedback,
        remove_inner_loop_feedback,
    )
    from .hooks.profiling_dit import ProfilingDiTConfig, apply_profiling_dit, remove_profiling_dit
    from .hooks.time_shift_sampler import TimeShiftConfig, apply_time_shift_sampler, remove_time_shift_sampler
    from .hub import push_to_hub, save_pretrained
    from .loading import Pipeline
    from .metrics.judge import AvatarJudge, FashionJudge
    from .models.cache_router import CacheRouter
    from .models.inner_loop_feedback import InnerLoopFeedback
    from .models.noise_schedule_predictor import NoiseSchedulePredictor
    from .models.velocity_refiner import VelocityRefiner
    from .noise_schedule_search import search_noise_schedule
    from .oracles.gaussian import GaussianDenoiser, GaussianMixtureDenoiser, LowRankMixtureDenoiser
    from .oracles.language_model import EnumerableLanguageModel
    from .pipelines.adaptive_sde import AdaptiveSDEPipeline
    from .pipelines.mean_reverting import MeanRevertingPipeline
    from .pipelines.paradigms import (
        ParadigmsDDPMPipeline,
        ParadigmsDiTPipeline,
        ParadigmsFluxPipeline,
        ParadigmsPipeline,
        ParadigmsStableDiffusionPipeline,
        ParadigmsStableDiffusionXLPipeline,
    )
    from .pipelines.stream_batch import StreamBatchPipeline
    from .registry import Method, get_method, methods, zoo_path
    from .schedulers._model_statistics import DPMSolverV3Statistics
    from .schedulers.collect import collect_statistics
    from .schedulers.dc_search import check_dc_ratios, search_dc_ratios
    from .schedulers.dc_solver import DCSolverMultistepScheduler, fit_dc_ratios, predict_dc_ratios
    from .schedulers.dpm_solver_v3 import DPMSolverV3Scheduler
    from .schedulers.evodiff import EVODiffScheduler
    from .schedulers.fastdiff import FastDiffScheduler
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
    "AdaptiveDiffusionConfig",
    "AdaptiveDiffusionStats",
    "AdaptiveSDEPipeline",
    "AvatarJudge",
    "BlockProfile",
    "CATPruningConfig",
    "CacheRouter",
    "CalibratedDPMConfig",
    "DCSolverMultistepScheduler",
    "DPMSolverV3Scheduler",
    "DPMSolverV3Statistics",
    "DeepCacheConfig",
    "DeltaDiTConfig",
    "EVODiffScheduler",
    "Enabled",
    "EnumerableLanguageModel",
    "FashionJudge",
    "FastDiffScheduler",
    "FasterDiffusionConfig",
    "FlowMatchPseudoCorrectorScheduler",
    "FlowTurboConfig",
    "GHVBScheduler",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GaussianTeleport",
    "GaussianTeleportScheduler",
    "HarmonicaConfig",
    "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler",
    "InnerLoopFeedback",
    "InnerLoopFeedbackConfig",
    "LowRankMixtureDenoiser",
    "MRSamplerScheduler",
    "MeanRevertingPipeline",
    "Method",
    "NoiseSchedulePredictor",
    "ParadigmsDDPMPipeline",
    "ParadigmsDiTPipeline",
    "ParadigmsFluxPipeline",
    "ParadigmsPipeline",
    "ParadigmsStableDiffusionPipeline",
    "ParadigmsStableDiffusionXLPipeline",
    "PictureObjective",
    "Pipeline",
    "PriorNoiseInjection",
    "ProfilingDiTConfig",
    "SolverSearch",
    "StreamBatchPipeline",
    "TimeShiftConfig",
    "TimestepSearch",
    "UnifiedSolverScheduler",
    "VelocityRefiner",
    "adaptive_diffusion_stats",
    "apply_adaptive_diffusion",
    "apply_calibrated_dpm",
    "apply_cat_pruning",
    "apply_deepcache",
    "apply_delta_dit",
    "apply_faster_diffusion",
    "apply_flowturbo",
    "apply_harmonica",
    "apply_inner_loop_feedback",
    "apply_profiling_dit",
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
    "profile_blocks",
    "push_to_hub",
    "remove_adaptive_diffusion",
    "remove_calibrated_dpm",
    "remove_cat_pruning",
    "remove_deepcache",
    "remove_delta_dit",
    "remove_faster_diffusion",
    "remove_flowturbo",
    "remove_harmonica",
    "remove_inner_loop_feedback",
    "remove_profiling_dit",
    "remove_time_shift_sampler",
    "save_pretrained",
    "search_dc_ratios",
    "search_noise_schedule",
    "status",
    "zoo_path",
]

registry.register()
