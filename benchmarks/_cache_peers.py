"""Caches of other people as `Variant`s: diffusers' own, and cache-dit's DBCache, each with a range of settings.

They work on transformers only; a U-Net's peer is the DeepCache package. Where a pipeline tells its transformer too little for them, it is told here: DiT's opens no
cache context, and none says which step it is, which SeaCache needs. MagCache's ratios are calibrated by its own calibration
run, on other seeds. TaylorSeer keeps its factors in float32, since bfloat16, its default, is no better anywhere here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_sea_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.cache_utils import CacheMixin
from torch import nn

import diffusers_ext as dx
from benchmarks._quality import Variant
from benchmarks._zoo import ZooModel
from diffusers_ext import _compat

CALIBRATION_SEED = 1000
_APPLY: dict[type, Callable[[nn.Module, Any], None]] = {
    FirstBlockCacheConfig: apply_first_block_cache,
    TaylorSeerCacheConfig: apply_taylorseer_cache,
    MagCacheConfig: apply_mag_cache,
    SeaCacheConfig: apply_sea_cache,
}


def _upstream(title: str, config: Any) -> Variant:
    return Variant(title, prepare=functools.partial(_with, config))


def _with(config: Any, pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a cache of diffusers on its transformer, and a transformer that knows step and context."""
    transformer = pipe.transformer
    _APPLY[type(config)](transformer, config)
    if isinstance(transformer, CacheMixin):
        _compat.refresh_hooks(transformer)
        transformer.cache_context = types.MethodType(functools.partial(_context, pipe), transformer)
    else:
        _compat.announce_resets(transformer)
        inner = transformer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            _set_cache_context(transformer, CacheContext("default", **_place(pipe)))
            return inner(*args, **kwargs)

        transformer.forward = forward
    return pipe


def _place(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Where in the run the scheduler is."""
    scheduler = pipe.scheduler
    step = getattr(scheduler, "step_index", None) or 0
    sigmas = getattr(scheduler, "sigmas", None)
    sigma = None if sigmas is None else float(sigmas[step])
    return {"step_index": step, "sigma": sigma, "num_inference_steps": len(scheduler.timesteps)}


@contextlib.contextmanager
def _context(pipe: DiffusionPipeline, transformer: nn.Module, name: str) -> Iterator[None]:
    _set_cache_context(transformer, CacheContext(name, **_place(pipe)))
    try:
        yield
    finally:
        _set_cache_context(transformer, None)


@functools.cache
def mag_ratios(model: str, steps: int, guidance_scale: float) -> tuple[float, ...]:
    """MagCache's ratios of a checkpoint, from its own calibration with one picture."""
    zoo = ZooModel(model)
    variant = _upstream("", MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with variant.on(zoo.pipe) as pipe, contextlib.redirect_stdout(io.StringIO()) as printed:
        zoo.generate(pipe, zoo.conditions(1), [CALIBRATION_SEED], steps, guidance_scale)
    # All that it tells is what it prints; of two contexts the first is the conditional one.
    ratios = json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1")))
    if len(ratios) != steps:
        raise ValueError(f"MagCache's calibration of {model!r} gave {len(ratios)} ratios; {steps} were expected.")
    return tuple(ratios)


def _latents(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What SeaCache looks at: packed latents as films of one frame, `(channels, 1, height, width)` each."""
    packed = kwargs["hidden_states"]
    side = math.isqrt(packed.shape[1])
    return list(packed.mT.unflatten(2, (1, side, side)))


def _db_cache(model: str, threshold: float, taylor: bool = False) -> Variant:
    def prepare(pipe: DiffusionPipeline) -> DiffusionPipeline:
        import cache_dit

        # Of its own: cache-dit changes what deep copies share.
        own = DiffusionPipeline.from_pretrained(dx.zoo_path(model))
        own.set_progress_bar_config(disable=True)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=4,
            enable_separate_cfg=model == "avatars-flow",  # its pipeline guides by a second call
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        cache_dit.enable_cache(own, cache_config=config, calibrator_config=calibrator)
        return own

    return Variant(f"{threshold:g}", prepare=prepare)


def _deepcache_package(interval: int) -> Variant:
    def prepare(pipe: DiffusionPipeline) -> DiffusionPipeline:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        return pipe

    return Variant(f"N{interval}", prepare=prepare)


def peers(model: str, steps: int, guidance_scale: float) -> dict[str, dict[str, Variant]]:
    """By name a curve of settings, from what changes little to what changes much.

    SeaCache is left out for DiT, whose scheduler has no noise levels to tell it. TaylorSeer's patterns miss the names of
    DiT's attention, so it is given them, and the feed-forward parts.
    """
    fewer = [Variant(f"{n} of {steps}", steps=n) for n in sorted({steps * k // 20 for k in (4, 6, 8, 10, 12, 15, 18)})]
    if model == "avatars-sd":
        curves = {"DeepCache package": [_deepcache_package(n) for n in (2, 3, 5, 10)], "fewer steps": fewer}
        return {name: {variant.title: variant for variant in curve} for name, curve in curves.items()}
    dit = model == "fashion-dit"
    taylor = functools.partial(
        TaylorSeerCacheConfig, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"] if dit else None,
    )  # fmt: skip
    ratios = list(mag_ratios(model, steps, guidance_scale))
    mag = functools.partial(MagCacheConfig, num_inference_steps=steps, mag_ratios=ratios)
    curves = {
        "FirstBlockCache": [_upstream(f"{x:g}", FirstBlockCacheConfig(threshold=x)) for x in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)],
        "TaylorSeer": [_upstream(f"N{n}", taylor(cache_interval=n)) for n in (2, 3, 4, 6)],
        "MagCache": [_upstream(f"{x:g}", mag(threshold=x)) for x in (0.03, 0.06, 0.12, 0.24, 0.5)],
        "SeaCache": [_upstream(f"{x:g}", SeaCacheConfig(threshold=x, raw_vision_callback=_latents)) for x in (0.1, 0.2, 0.3, 0.5)],
        "DBCache": [_db_cache(model, x) for x in (0.04, 0.08, 0.12, 0.24, 0.5)],
        "DBCache, TaylorSeer": [_db_cache(model, x, taylor=True) for x in (0.08, 0.12, 0.24, 0.5)],
        "fewer steps": fewer,
    }  # fmt: skip
    if dit:
        del curves["SeaCache"]
    return {name: {variant.title: variant for variant in curve} for name, curve in curves.items()}
