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
    from .hooks._lm_cache import announce_positions
    from .hooks.adaptive_diffusion import (
        AdaptiveDiffusionConfig,
        AdaptiveDiffusionStats,
        adaptive_diffusion_stats,
        apply_adaptive_diffusion,
        remove_adaptive_diffusion,
    )
    from .hooks.asced import ASCEDCallback, detect_artifacts
    from .hooks.block_causal_cache import BlockCausalCacheConfig, apply_block_causal_cache, remove_block_causal_cache
    from .hooks.block_profile import BlockProfile, profile_blocks
    from .hooks.calibrated_dpm import CalibratedDPMConfig, apply_calibrated_dpm, calibrate, remove_calibrated_dpm
    from .hooks.cat_pruning import CATPruningConfig, apply_cat_pruning, remove_cat_pruning
    from .hooks.deepcache import DeepCacheConfig, apply_deepcache, remove_deepcache
    from .hooks.delta_dit import DeltaDiTConfig, apply_delta_dit, remove_delta_dit
    from .hooks.dkv_cache import DKVCacheConfig, apply_dkv_cache, remove_dkv_cache
    from .hooks.faster_diffusion import (
        FasterDiffusionConfig,
        PriorNoiseInjection,
        apply_faster_diffusion,
        remove_faster_diffusion,
    )
    from .hooks.flowturbo import FlowTurboConfig, apply_flowturbo, remove_flowturbo
    from .hooks.freecache import FreeCacheConfig, apply_freecache, remove_freecache
    from .hooks.harmonica import HarmonicaConfig, apply_harmonica, remove_harmonica
    from .hooks.inner_loop_feedback import (
        InnerLoopFeedbackConfig,
        apply_inner_loop_feedback,
        remove_inner_loop_feedback,
    )
    from .hooks.profiling_dit import ProfilingDiTConfig, apply_profiling_dit, remove_profiling_dit
    from .hooks.time_shift_sampler import TimeShiftConfig, apply_time_shift_sampler, remove_time_shift_sampler
    from .hooks.tiue_loopfree import TiUELoopfreeConfig, apply_tiue_loopfree, remove_tiue_loopfree
    from .hub import push_to_hub, save_pretrained
    from .loading import Pipeline
    from .metrics.infill_safety import InfillGuard, InfillSafetyProbe
    from .metrics.judge import AvatarJudge, FashionJudge
    from .models.agd import AGDAdapter
    from .models.cache_router import CacheRouter
    from .models.ecodiff import EcoDiffMasks
    from .models.inner_loop_feedback import InnerLoopFeedback
    from .models.masked_language_model import MaskedLanguageModel
    from .models.nce_energy import NCEEnergy
    from .models.noise_schedule_predictor import NoiseSchedulePredictor
    from .models.pruned import (
        PrunedDiTTransformer2DModel,
        PrunedFluxTransformer2DModel,
        PrunedSD3Transformer2DModel,
        PrunedUNet2DConditionModel,
        prune_model,
    )
    from .models.public_checkpoints import load_masked_language_model
    from .models.velocity_refiner import VelocityRefiner
    from .noise_schedule_search import search_noise_schedule
    from .oracles.gaussian import GaussianDenoiser, GaussianMixtureDenoiser, LowRankMixtureDenoiser
    from .oracles.language_model import EnumerableLanguageModel
    from .pipelines._block_policy import BlockPolicy
    from .pipelines._masked_diffusion import MaskedDiffusionPipeline
    from .pipelines.adaptive_blocks import AdaptiveBlockPolicy
    from .pipelines.adaptive_sde import AdaptiveSDEPipeline
    from .pipelines.ascending_blocks import AscendingBlockPolicy
    from .pipelines.hex import HEXPipeline
    from .pipelines.mean_reverting import MeanRevertingPipeline
    from .pipelines.paradigms import (
        ParadigmsDDPMPipeline,
        ParadigmsDiTPipeline,
        ParadigmsFluxPipeline,
        ParadigmsPipeline,
        ParadigmsStableDiffusionPipeline,
        ParadigmsStableDiffusionXLPipeline,
    )
    from .pipelines.planned_denoising import PlannedDenoisingPipeline
    from .pipelines.self_correction import SelfCorrection
    from .pipelines.stream_batch import StreamBatchPipeline
    from .quantization import quantization
    from .quantization.config import PTQConfig
    from .quantization.fp_quant_diffusion import FPQuantDiffusion
    from .quantization.ptq4dm import PTQ4DM
    from .quantization.q_diffusion import QDiffusion
    from .quantization.quest import QuEST
    from .quantization.tfmq_dm import TFMQDM
    from .registry import Method, get_method, methods, zoo_path
    from .schedulers._decode_filter import ParallelDecodeFilter
    from .schedulers._model_statistics import DPMSolverV3Statistics
    from .schedulers._spindle import WordFrequencies
    from .schedulers._unmasking import UnmaskingScheduler, safe_categorical
    from .schedulers.absorbing import AbsorbingDiffusionScheduler
    from .schedulers.adaptive_correction import AdaptiveCorrectionScheduler, HyperScheduleScheduler
    from .schedulers.ascending_steps import AscendingStepScheduler, EOSRejectionScheduler
    from .schedulers.collect import collect_statistics
    from .schedulers.dc_search import check_dc_ratios, search_dc_ratios
    from .schedulers.dc_solver import DCSolverMultistepScheduler, fit_dc_ratios, predict_dc_ratios
    from .schedulers.ddpd import DDPDScheduler
    from .schedulers.dpm_solver_v3 import DPMSolverV3Scheduler
    from .schedulers.energy_reweighted import ARResidualEnergy, EnergyReweightedScheduler
    from .schedulers.evodiff import EVODiffScheduler
    from .schedulers.fastdiff import FastDiffScheduler
    from .schedulers.first_hitting import FirstHittingScheduler, hitting_times
    from .schedulers.flowturbo import FlowMatchPseudoCorrectorScheduler
    from .schedulers.gaussian_teleport import GaussianTeleport, GaussianTeleportScheduler
    from .schedulers.ghvb import GHVBScheduler, HeavyBallDPMSolverMultistepScheduler, HeavyBallUniPCMultistepScheduler
    from .schedulers.gidd import GIDDScheduler
    from .schedulers.guided_unmasking import GuidedUnmaskingScheduler
    from .schedulers.instaflow import RectifiedFlowEulerScheduler
    from .schedulers.learned_parallel import LearnedParallelScheduler
    from .schedulers.mr_sampler import MRSamplerScheduler
    from .schedulers.nitrofusion import TimestepShiftLCMScheduler
    from .schedulers.perflow import PeRFlowScheduler
    from .schedulers.running_confidence import RunningConfidenceScheduler
    from .schedulers.spindle import SpindleScheduler
    from .schedulers.unified_solver import UnifiedSolverScheduler
    from .search import PictureObjective, TimestepSearch
    from .solver_search import SolverSearch
    from .training.fast_forward import FastForward
    from .training.grokfast import GrokfastEMA, GrokfastMA
    from .training.parallel_filter import fit_parallel_filter
    from .training.train_cj_grpo import cj_grpo_loss
    from .training.train_ddpd import planner_loss
    from .training.train_diffusion_bert import spindle_diffusion_loss
    from .training.train_disback import dmd_gradient
    from .training.train_ecodiff import ecodiff_loss
    from .training.train_gidd import gidd_loss
    from .training.train_guided_distillation import guidance_distillation_loss
    from .training.train_hipa import high_frequency_promoting_loss
    from .training.train_instaflow import reflow_loss
    from .training.train_mdpo import mdpo_loss
    from .training.train_mmd_ddm import mmd_loss
    from .training.train_nitrofusion import head_hinge_loss
    from .training.train_perflow import perflow_loss
    from .training.train_prodiff import prodiff_distillation_loss
    from .training.train_sdar import block_diffusion_loss, convert_to_block_diffusion
    from .training.train_sft_pg import policy_loss
    from .upstream_caches import allow_enable_cache
    from .weight_deltas import delta_weights, merge_delta_weights


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
    "PTQ4DM",
    "TFMQDM",
    "AGDAdapter",
    "ARResidualEnergy",
    "ASCEDCallback",
    "AbsorbingDiffusionScheduler",
    "AdaptiveBlockPolicy",
    "AdaptiveCorrectionScheduler",
    "AdaptiveDiffusionConfig",
    "AdaptiveDiffusionStats",
    "AdaptiveSDEPipeline",
    "AscendingBlockPolicy",
    "AscendingStepScheduler",
    "AvatarJudge",
    "BlockCausalCacheConfig",
    "BlockPolicy",
    "BlockProfile",
    "CATPruningConfig",
    "CacheRouter",
    "CalibratedDPMConfig",
    "DCSolverMultistepScheduler",
    "DDPDScheduler",
    "DKVCacheConfig",
    "DPMSolverV3Scheduler",
    "DPMSolverV3Statistics",
    "DeepCacheConfig",
    "DeltaDiTConfig",
    "EOSRejectionScheduler",
    "EVODiffScheduler",
    "EcoDiffMasks",
    "Enabled",
    "EnergyReweightedScheduler",
    "EnumerableLanguageModel",
    "FPQuantDiffusion",
    "FashionJudge",
    "FastDiffScheduler",
    "FastForward",
    "FasterDiffusionConfig",
    "FirstHittingScheduler",
    "FlowMatchPseudoCorrectorScheduler",
    "FlowTurboConfig",
    "FreeCacheConfig",
    "GHVBScheduler",
    "GIDDScheduler",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GaussianTeleport",
    "GaussianTeleportScheduler",
    "GrokfastEMA",
    "GrokfastMA",
    "GuidedUnmaskingScheduler",
    "HEXPipeline",
    "HarmonicaConfig",
    "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler",
    "HyperScheduleScheduler",
    "InfillGuard",
    "InfillSafetyProbe",
    "InnerLoopFeedback",
    "InnerLoopFeedbackConfig",
    "LearnedParallelScheduler",
    "LowRankMixtureDenoiser",
    "MRSamplerScheduler",
    "MaskedDiffusionPipeline",
    "MaskedLanguageModel",
    "MeanRevertingPipeline",
    "Method",
    "NCEEnergy",
    "NoiseSchedulePredictor",
    "PTQConfig",
    "ParadigmsDDPMPipeline",
    "ParadigmsDiTPipeline",
    "ParadigmsFluxPipeline",
    "ParadigmsPipeline",
    "ParadigmsStableDiffusionPipeline",
    "ParadigmsStableDiffusionXLPipeline",
    "ParallelDecodeFilter",
    "PeRFlowScheduler",
    "PictureObjective",
    "Pipeline",
    "PlannedDenoisingPipeline",
    "PriorNoiseInjection",
    "ProfilingDiTConfig",
    "PrunedDiTTransformer2DModel",
    "PrunedFluxTransformer2DModel",
    "PrunedSD3Transformer2DModel",
    "PrunedUNet2DConditionModel",
    "QDiffusion",
    "QuEST",
    "RectifiedFlowEulerScheduler",
    "RunningConfidenceScheduler",
    "SelfCorrection",
    "SolverSearch",
    "SpindleScheduler",
    "StreamBatchPipeline",
    "TiUELoopfreeConfig",
    "TimeShiftConfig",
    "TimestepSearch",
    "TimestepShiftLCMScheduler",
    "UnifiedSolverScheduler",
    "UnmaskingScheduler",
    "VelocityRefiner",
    "WordFrequencies",
    "adaptive_diffusion_stats",
    "allow_enable_cache",
    "announce_positions",
    "apply_adaptive_diffusion",
    "apply_block_causal_cache",
    "apply_calibrated_dpm",
    "apply_cat_pruning",
    "apply_deepcache",
    "apply_delta_dit",
    "apply_dkv_cache",
    "apply_faster_diffusion",
    "apply_flowturbo",
    "apply_freecache",
    "apply_harmonica",
    "apply_inner_loop_feedback",
    "apply_profiling_dit",
    "apply_time_shift_sampler",
    "apply_tiue_loopfree",
    "block_diffusion_loss",
    "calibrate",
    "check_dc_ratios",
    "cj_grpo_loss",
    "collect_statistics",
    "convert_to_block_diffusion",
    "delta_weights",
    "detect_artifacts",
    "disable",
    "dmd_gradient",
    "ecodiff_loss",
    "enable",
    "enabled",
    "fit_dc_ratios",
    "fit_parallel_filter",
    "get_method",
    "gidd_loss",
    "guidance_distillation_loss",
    "head_hinge_loss",
    "high_frequency_promoting_loss",
    "hitting_times",
    "load_masked_language_model",
    "mdpo_loss",
    "merge_delta_weights",
    "methods",
    "mmd_loss",
    "perflow_loss",
    "planner_loss",
    "policy_loss",
    "predict_dc_ratios",
    "prodiff_distillation_loss",
    "profile_blocks",
    "prune_model",
    "push_to_hub",
    "quantization",
    "reflow_loss",
    "remove_adaptive_diffusion",
    "remove_block_causal_cache",
    "remove_calibrated_dpm",
    "remove_cat_pruning",
    "remove_deepcache",
    "remove_delta_dit",
    "remove_dkv_cache",
    "remove_faster_diffusion",
    "remove_flowturbo",
    "remove_freecache",
    "remove_harmonica",
    "remove_inner_loop_feedback",
    "remove_profiling_dit",
    "remove_time_shift_sampler",
    "remove_tiue_loopfree",
    "safe_categorical",
    "save_pretrained",
    "search_dc_ratios",
    "search_noise_schedule",
    "spindle_diffusion_loss",
    "status",
    "zoo_path",
]

registry.register()
