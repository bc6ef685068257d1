"""The rows of all papers, the public names of the package, and their registration with diffusers.

Nothing here imports torch or diffusers until a class is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent
ENTRY_POINT_GROUP = "diffusers_ext.methods"
FORMS = (
    "scheduler", "pipeline", "hook", "guider", "latent_optimizer", "attn_processor", "adapter", "quantizer", "model",
    "trainer", "metric", "upstream", "none",
)  # fmt: skip

# Public name -> module that defines it.
LAZY_NAMES: dict[str, str] = {
    "AGDAdapter": "diffusers_ext.models.agd",
    "ARResidualEnergy": "diffusers_ext.schedulers.energy_reweighted",
    "ASCEDCallback": "diffusers_ext.hooks.asced",
    "AbsorbingDiffusionScheduler": "diffusers_ext.schedulers.absorbing",
    "AdaptiveBlockPolicy": "diffusers_ext.pipelines.adaptive_blocks",
    "AdaptiveCorrectionScheduler": "diffusers_ext.schedulers.adaptive_correction",
    "AdaptiveDiffusionConfig": "diffusers_ext.hooks.adaptive_diffusion",
    "AdaptiveDiffusionStats": "diffusers_ext.hooks.adaptive_diffusion",
    "AdaptiveSDEPipeline": "diffusers_ext.pipelines.adaptive_sde",
    "AscendingBlockPolicy": "diffusers_ext.pipelines.ascending_blocks",
    "AscendingStepScheduler": "diffusers_ext.schedulers.ascending_steps",
    "AvatarJudge": "diffusers_ext.metrics.judge",
    "BlockCausalCacheConfig": "diffusers_ext.hooks.block_causal_cache",
    "BlockPolicy": "diffusers_ext.pipelines._block_policy",
    "BlockProfile": "diffusers_ext.hooks.block_profile",
    "CATPruningConfig": "diffusers_ext.hooks.cat_pruning",
    "CacheRouter": "diffusers_ext.models.cache_router",
    "CalibratedDPMConfig": "diffusers_ext.hooks.calibrated_dpm",
    "DCSolverMultistepScheduler": "diffusers_ext.schedulers.dc_solver",
    "DDPDScheduler": "diffusers_ext.schedulers.ddpd",
    "DKVCacheConfig": "diffusers_ext.hooks.dkv_cache",
    "DPMSolverV3Scheduler": "diffusers_ext.schedulers.dpm_solver_v3",
    "DPMSolverV3Statistics": "diffusers_ext.schedulers._model_statistics",
    "DeepCacheConfig": "diffusers_ext.hooks.deepcache",
    "DeltaDiTConfig": "diffusers_ext.hooks.delta_dit",
    "EOSRejectionScheduler": "diffusers_ext.schedulers.ascending_steps",
    "EVODiffScheduler": "diffusers_ext.schedulers.evodiff",
    "EcoDiffMasks": "diffusers_ext.models.ecodiff",
    "Enabled": "diffusers_ext.enabling",
    "EnergyReweightedScheduler": "diffusers_ext.schedulers.energy_reweighted",
    "EnumerableLanguageModel": "diffusers_ext.oracles.language_model",
    "FPQuantDiffusion": "diffusers_ext.quantization.fp_quant_diffusion",
    "FashionJudge": "diffusers_ext.metrics.judge",
    "FastDiffScheduler": "diffusers_ext.schedulers.fastdiff",
    "FastForward": "diffusers_ext.training.fast_forward",
    "FasterDiffusionConfig": "diffusers_ext.hooks.faster_diffusion",
    "FirstHittingScheduler": "diffusers_ext.schedulers.first_hitting",
    "FlowMatchPseudoCorrectorScheduler": "diffusers_ext.schedulers.flowturbo",
    "FlowTurboConfig": "diffusers_ext.hooks.flowturbo",
    "FreeCacheConfig": "diffusers_ext.hooks.freecache",
    "GHVBScheduler": "diffusers_ext.schedulers.ghvb",
    "GIDDScheduler": "diffusers_ext.schedulers.gidd",
    "GaussianDenoiser": "diffusers_ext.oracles.gaussian",
    "GaussianMixtureDenoiser": "diffusers_ext.oracles.gaussian",
    "GaussianTeleport": "diffusers_ext.schedulers.gaussian_teleport",
    "GaussianTeleportScheduler": "diffusers_ext.schedulers.gaussian_teleport",
    "GrokfastEMA": "diffusers_ext.training.grokfast",
    "GrokfastMA": "diffusers_ext.training.grokfast",
    "GuidedUnmaskingScheduler": "diffusers_ext.schedulers.guided_unmasking",
    "HEXPipeline": "diffusers_ext.pipelines.hex",
    "HarmonicaConfig": "diffusers_ext.hooks.harmonica",
    "HeavyBallDPMSolverMultistepScheduler": "diffusers_ext.schedulers.ghvb",
    "HeavyBallUniPCMultistepScheduler": "diffusers_ext.schedulers.ghvb",
    "HyperScheduleScheduler": "diffusers_ext.schedulers.adaptive_correction",
    "InfillGuard": "diffusers_ext.metrics.infill_safety",
    "InfillSafetyProbe": "diffusers_ext.metrics.infill_safety",
    "InnerLoopFeedback": "diffusers_ext.models.inner_loop_feedback",
    "InnerLoopFeedbackConfig": "diffusers_ext.hooks.inner_loop_feedback",
    "LearnedParallelScheduler": "diffusers_ext.schedulers.learned_parallel",
    "LowRankMixtureDenoiser": "diffusers_ext.oracles.gaussian",
    "MRSamplerScheduler": "diffusers_ext.schedulers.mr_sampler",
    "MaskedDiffusionPipeline": "diffusers_ext.pipelines._masked_diffusion",
    "MaskedLanguageModel": "diffusers_ext.models.masked_language_model",
    "MeanRevertingPipeline": "diffusers_ext.pipelines.mean_reverting",
    "Method": "diffusers_ext.registry",
    "NCEEnergy": "diffusers_ext.models.nce_energy",
    "NoiseSchedulePredictor": "diffusers_ext.models.noise_schedule_predictor",
    "PTQ4DM": "diffusers_ext.quantization.ptq4dm",
    "PTQConfig": "diffusers_ext.quantization.config",
    "ParadigmsDDPMPipeline": "diffusers_ext.pipelines.paradigms",
    "ParadigmsDiTPipeline": "diffusers_ext.pipelines.paradigms",
    "ParadigmsFluxPipeline": "diffusers_ext.pipelines.paradigms",
    "ParadigmsPipeline": "diffusers_ext.pipelines.paradigms",
    "ParadigmsStableDiffusionPipeline": "diffusers_ext.pipelines.paradigms",
    "ParadigmsStableDiffusionXLPipeline": "diffusers_ext.pipelines.paradigms",
    "ParallelDecodeFilter": "diffusers_ext.schedulers._decode_filter",
    "PeRFlowScheduler": "diffusers_ext.schedulers.perflow",
    "PictureObjective": "diffusers_ext.search",
    "Pipeline": "diffusers_ext.loading",
    "PlannedDenoisingPipeline": "diffusers_ext.pipelines.planned_denoising",
    "PriorNoiseInjection": "diffusers_ext.hooks.faster_diffusion",
    "ProfilingDiTConfig": "diffusers_ext.hooks.profiling_dit",
    "PrunedDiTTransformer2DModel": "diffusers_ext.models.pruned",
    "PrunedFluxTransformer2DModel": "diffusers_ext.models.pruned",
    "PrunedSD3Transformer2DModel": "diffusers_ext.models.pruned",
    "PrunedUNet2DConditionModel": "diffusers_ext.models.pruned",
    "QDiffusion": "diffusers_ext.quantization.q_diffusion",
    "QuEST": "diffusers_ext.quantization.quest",
    "RectifiedFlowEulerScheduler": "diffusers_ext.schedulers.instaflow",
    "RunningConfidenceScheduler": "diffusers_ext.schedulers.running_confidence",
    "SelfCorrection": "diffusers_ext.pipelines.self_correction",
    "SolverSearch": "diffusers_ext.solver_search",
    "SpindleScheduler": "diffusers_ext.schedulers.spindle",
    "StreamBatchPipeline": "diffusers_ext.pipelines.stream_batch",
    "TFMQDM": "diffusers_ext.quantization.tfmq_dm",
    "TiUELoopfreeConfig": "diffusers_ext.hooks.tiue_loopfree",
    "TimeShiftConfig": "diffusers_ext.hooks.time_shift_sampler",
    "TimestepSearch": "diffusers_ext.search",
    "TimestepShiftLCMScheduler": "diffusers_ext.schedulers.nitrofusion",
    "UnifiedSolverScheduler": "diffusers_ext.schedulers.unified_solver",
    "UnmaskingScheduler": "diffusers_ext.schedulers._unmasking",
    "VelocityRefiner": "diffusers_ext.models.velocity_refiner",
    "WordFrequencies": "diffusers_ext.schedulers._spindle",
    "adaptive_diffusion_stats": "diffusers_ext.hooks.adaptive_diffusion",
    "allow_enable_cache": "diffusers_ext.upstream_caches",
    "announce_positions": "diffusers_ext.hooks._lm_cache",
    "apply_adaptive_diffusion": "diffusers_ext.hooks.adaptive_diffusion",
    "apply_block_causal_cache": "diffusers_ext.hooks.block_causal_cache",
    "apply_calibrated_dpm": "diffusers_ext.hooks.calibrated_dpm",
    "apply_cat_pruning": "diffusers_ext.hooks.cat_pruning",
    "apply_deepcache": "diffusers_ext.hooks.deepcache",
    "apply_delta_dit": "diffusers_ext.hooks.delta_dit",
    "apply_dkv_cache": "diffusers_ext.hooks.dkv_cache",
    "apply_faster_diffusion": "diffusers_ext.hooks.faster_diffusion",
    "apply_flowturbo": "diffusers_ext.hooks.flowturbo",
    "apply_freecache": "diffusers_ext.hooks.freecache",
    "apply_harmonica": "diffusers_ext.hooks.harmonica",
    "apply_inner_loop_feedback": "diffusers_ext.hooks.inner_loop_feedback",
    "apply_profiling_dit": "diffusers_ext.hooks.profiling_dit",
    "apply_time_shift_sampler": "diffusers_ext.hooks.time_shift_sampler",
    "apply_tiue_loopfree": "diffusers_ext.hooks.tiue_loopfree",
    "block_diffusion_loss": "diffusers_ext.training.train_sdar",
    "calibrate": "diffusers_ext.hooks.calibrated_dpm",
    "check_dc_ratios": "diffusers_ext.schedulers.dc_search",
    "cj_grpo_loss": "diffusers_ext.training.train_cj_grpo",
    "collect_statistics": "diffusers_ext.schedulers.collect",
    "convert_to_block_diffusion": "diffusers_ext.training.train_sdar",
    "delta_weights": "diffusers_ext.weight_deltas",
    "detect_artifacts": "diffusers_ext.hooks.asced",
    "disable": "diffusers_ext.enabling",
    "dmd_gradient": "diffusers_ext.training.train_disback",
    "ecodiff_loss": "diffusers_ext.training.train_ecodiff",
    "enable": "diffusers_ext.enabling",
    "enabled": "diffusers_ext.enabling",
    "fit_dc_ratios": "diffusers_ext.schedulers.dc_solver",
    "fit_parallel_filter": "diffusers_ext.training.parallel_filter",
    "get_method": "diffusers_ext.registry",
    "gidd_loss": "diffusers_ext.training.train_gidd",
    "guidance_distillation_loss": "diffusers_ext.training.train_guided_distillation",
    "head_hinge_loss": "diffusers_ext.training.train_nitrofusion",
    "high_frequency_promoting_loss": "diffusers_ext.training.train_hipa",
    "hitting_times": "diffusers_ext.schedulers.first_hitting",
    "load_masked_language_model": "diffusers_ext.models.public_checkpoints",
    "mdpo_loss": "diffusers_ext.training.train_mdpo",
    "merge_delta_weights": "diffusers_ext.weight_deltas",
    "methods": "diffusers_ext.registry",
    "mmd_loss": "diffusers_ext.training.train_mmd_ddm",
    "perflow_loss": "diffusers_ext.training.train_perflow",
    "planner_loss": "diffusers_ext.training.train_ddpd",
    "policy_loss": "diffusers_ext.training.train_sft_pg",
    "predict_dc_ratios": "diffusers_ext.schedulers.dc_solver",
    "prodiff_distillation_loss": "diffusers_ext.training.train_prodiff",
    "profile_blocks": "diffusers_ext.hooks.block_profile",
    "prune_model": "diffusers_ext.models.pruned",
    "push_to_hub": "diffusers_ext.hub",
    "quantization": "diffusers_ext.quantization",
    "reflow_loss": "diffusers_ext.training.train_instaflow",
    "remove_adaptive_diffusion": "diffusers_ext.hooks.adaptive_diffusion",
    "remove_block_causal_cache": "diffusers_ext.hooks.block_causal_cache",
    "remove_calibrated_dpm": "diffusers_ext.hooks.calibrated_dpm",
    "remove_cat_pruning": "diffusers_ext.hooks.cat_pruning",
    "remove_deepcache": "diffusers_ext.hooks.deepcache",
    "remove_delta_dit": "diffusers_ext.hooks.delta_dit",
    "remove_dkv_cache": "diffusers_ext.hooks.dkv_cache",
    "remove_faster_diffusion": "diffusers_ext.hooks.faster_diffusion",
    "remove_flowturbo": "diffusers_ext.hooks.flowturbo",
    "remove_freecache": "diffusers_ext.hooks.freecache",
    "remove_harmonica": "diffusers_ext.hooks.harmonica",
    "remove_inner_loop_feedback": "diffusers_ext.hooks.inner_loop_feedback",
    "remove_profiling_dit": "diffusers_ext.hooks.profiling_dit",
    "remove_time_shift_sampler": "diffusers_ext.hooks.time_shift_sampler",
    "remove_tiue_loopfree": "diffusers_ext.hooks.tiue_loopfree",
    "safe_categorical": "diffusers_ext.schedulers._unmasking",
    "save_pretrained": "diffusers_ext.hub",
    "search_dc_ratios": "diffusers_ext.schedulers.dc_search",
    "search_noise_schedule": "diffusers_ext.noise_schedule_search",
    "spindle_diffusion_loss": "diffusers_ext.training.train_diffusion_bert",
    "status": "diffusers_ext.enabling",
    "zoo_path": "diffusers_ext.registry",
}

# Names that diffusers' loader looks up in a component's library.
BASE_CLASSES: dict[str, str] = {
    "BaseGuidance": "diffusers.guiders.guider_utils",
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "OnnxRuntimeModel": "diffusers",
    "SchedulerMixin": "diffusers",
}

# Public classes that `DiffusionPipeline.from_pretrained` and `AutoModel` look up in the `diffusers` namespace.
PIPELINES_AND_MODELS: tuple[str, ...] = (
    "AGDAdapter",
    "AdaptiveSDEPipeline",
    "AvatarJudge",
    "CacheRouter",
    "DPMSolverV3Statistics",
    "EcoDiffMasks",
    "EnumerableLanguageModel",
    "FashionJudge",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GaussianTeleport",
    "HEXPipeline",
    "InnerLoopFeedback",
    "LowRankMixtureDenoiser",
    "MaskedDiffusionPipeline",
    "MaskedLanguageModel",
    "MeanRevertingPipeline",
    "NCEEnergy",
    "ParadigmsDDPMPipeline",
    "ParadigmsDiTPipeline",
    "ParadigmsFluxPipeline",
    "ParadigmsStableDiffusionPipeline",
    "ParadigmsStableDiffusionXLPipeline",
    "ParallelDecodeFilter",
    "NoiseSchedulePredictor",
    "PlannedDenoisingPipeline",
    "PrunedDiTTransformer2DModel",
    "PrunedFluxTransformer2DModel",
    "PrunedSD3Transformer2DModel",
    "PrunedUNet2DConditionModel",
    "StreamBatchPipeline",
    "VelocityRefiner",
    "WordFrequencies",
)


@dataclass(frozen=True)
class Method:
    """One paper.

    Attributes:
        key: name of the method in this package.
        title: title of the paper.
        area: one of the catalogue's areas.
        form: what it is to diffusers, one of `FORMS`.
        summary: what it does.
        arxiv: arXiv identifier, or None.
        entry: public names of this package, or dotted names of classes that diffusers or transformers already have.
        usage: how to call it.
        reason: why there is no system to build, for form `none`.
    """

    key: str
    title: str
    area: str
    form: str
    summary: str = ""
    arxiv: str | None = None
    entry: tuple[str, ...] = ()
    usage: str | None = None
    reason: str | None = None
    version: int = 1

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"`form` of method {self.key!r} is {self.form!r}; allowed are {', '.join(FORMS)}.")

    @property
    def module(self) -> str | None:
        """Dotted name of the module that defines the first entry, or None where there is none of ours."""
        if not self.entry or self.form == "upstream":
            return None
        name = self.entry[0]
        if name in LAZY_NAMES:
            return LAZY_NAMES[name]
        return name.rpartition(".")[0] or None

    @property
    def status(self) -> str:
        """`works`, `open`, `stale`, `upstream` or `none`: computed from the recorded proofs, never typed."""
        from .proofs import method_status

        return method_status(self)


def _row(table: dict[str, Any], source: str) -> Method:
    table = dict(table)
    upstream = table.pop("upstream", None)
    entry = table.pop("entry", upstream) or ()
    if isinstance(entry, str):
        entry = tuple(name.strip() for name in entry.split(","))
    try:
        return Method(entry=tuple(entry), **table)
    except TypeError as error:
        raise ValueError(f"Row {table.get('key')!r} of {source}: {error}") from error


@functools.lru_cache(maxsize=1)
def _catalogue() -> dict[str, Method]:
    rows: dict[str, Method] = {}
    for file in sorted((PACKAGE_DIR / "catalogue").glob("*.toml")):
        for table in tomllib.loads(file.read_text(encoding="utf-8"))["paper"]:
            row = _row(table, file.name)
            if row.key in rows:
                raise ValueError(f"Method key {row.key!r} of {file.name} is taken already.")
            rows[row.key] = row
    return rows


@functools.lru_cache(maxsize=1)
def _third_party() -> dict[str, Method]:
    """Rows that other installed packages bring through the entry-point group `diffusers_ext.methods`.

    Each entry point names a `Method` or an iterable of them. Its entries are dotted names, such as
    `my_package.hooks.MyConfig`.
    """
    rows: dict[str, Method] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        loaded = point.load()
        for row in [loaded] if isinstance(loaded, Method) else loaded:
            if not isinstance(row, Method):
                raise ValueError(
                    f"Entry point {point.value!r} of group {ENTRY_POINT_GROUP!r} gave {row!r}, not a `Method`."
                )
            if row.key in rows or row.key in _catalogue():
                raise ValueError(
                    f"Entry point {point.value!r} brings method {row.key!r}, and that key is taken already."
                )
            rows[row.key] = row
    return rows


def _all() -> dict[str, Method]:
    return {**_catalogue(), **_third_party()}


def areas() -> list[str]:
    """Names of the areas, sorted."""
    return sorted({row.area for row in _all().values()})


def methods(area: str | None = None) -> list[Method]:
    """All rows, or those of one area.

    Raises:
        ValueError: `area` is not one of `areas()`.
    """
    if area is not None and area not in areas():
        raise ValueError(f"`area` is {area!r}; allowed are {', '.join(areas())}.")
    return [row for row in _all().values() if area in (None, row.area)]


def get_method(key: str) -> Method:
    """The row of one method.

    Raises:
        ValueError: there is no method `key`; the message names the closest ones.
    """
    rows = _all()
    if key not in rows:
        close = difflib.get_close_matches(str(key), rows, n=3, cutoff=0.5)
        hint = (
            f" Did you mean {' or '.join(map(repr, close))}?" if close else " `diffusers-ext methods --all` lists them."
        )
        raise ValueError(f"There is no method {key!r}.{hint}")
    return rows[key]


def load_entry(name: str) -> Any:
    """The public object `name` of this package, or the dotted name that a third-party row gave."""
    if "." not in name:
        return getattr(importlib.import_module("diffusers_ext"), name)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def third_party_class(name: str) -> Any | None:
    """A class that a third-party row names, by its last part, so that diffusers finds it among our public names."""
    for row in _third_party().values():
        for entry in row.entry:
            if entry.rpartition(".")[2] == name:
                return load_entry(entry)
    return None


def zoo_path(name: str) -> Path:
    """Folder of an embedded checkpoint, loadable by stock `from_pretrained`.

    `avatars-sd` and its judge ship with the package; others need a source checkout.

    Raises:
        ValueError: there is no such checkpoint; the message names those that are there.
    """
    roots = [PACKAGE_DIR / "zoo", PACKAGE_DIR.parent / "benchmarks" / "zoo"]
    found = {
        folder.name: folder for root in reversed(roots) if root.is_dir() for folder in root.iterdir() if folder.is_dir()
    }
    if name not in found:
        raise ValueError(f"There is no checkpoint {name!r} here; there are {', '.join(sorted(found))}.")
    return found[name]


# --- registration with diffusers -------------------------------------------------------------------------------------

_LOADER = "diffusers.pipelines.pipeline_loading_utils"
_QUANTIZERS = "diffusers.quantizers.auto"


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for a module of diffusers to be imported, registers ours with it right after, and goes away."""

    def __init__(self, awaited: str, register_now: Callable[[], None]) -> None:
        self.awaited, self.register_now = awaited, register_now

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.register_now()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader serves this one import
        return spec


def register() -> None:
    """Make our classes loadable by stock `from_pretrained`; safe to call again."""
    for awaited, register_now in ((_QUANTIZERS, _register_quantizer), (_LOADER, _register_now)):
        if awaited in sys.modules:
            register_now()
        elif not any(isinstance(finder, _RegisterOnImport) and finder.awaited == awaited for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegisterOnImport(awaited, register_now))


def _register_now() -> None:
    from . import _compat

    _compat.register_library("diffusers_ext", PIPELINES_AND_MODELS, load_entry)
    importlib.import_module(_QUANTIZERS)  # every pipeline with a model imports it


def _register_quantizer() -> None:
    from .quantization.loader import register as register_quantizer

    register_quantizer()
