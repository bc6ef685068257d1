"""`model.enable_cache` with our configs: only where it is allowed, as `dx.enable`, beside diffusers' own, and taken back."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, ModelMixin, UNet2DConditionModel
from diffusers.models.cache_utils import CacheMixin

import diffusers_ext as dx

from .common.models import MODELS
from .common.traces import require_unchanged, trace

NAMES = ("enable_cache", "disable_cache", "is_cache_enabled")
CONFIGS = {
    "UNet2DConditionModel": dx.DeepCacheConfig(interval=2),
    "UNet2DModel": dx.FasterDiffusionConfig([0, 2]),
    "DiTTransformer2DModel": dx.ProfilingDiTConfig((0, 1), warmup=0, interval=(2, 2)),
    "SD3Transformer2DModel": dx.ProfilingDiTConfig((0,), warmup=0, interval=(2, 2)),
    "FluxTransformer2DModel": dx.ProfilingDiTConfig((1, 2), warmup=0, interval=(2, 2)),
}


@pytest.fixture
def allowed():
    before = {cls: dict(vars(cls)) for cls in (ModelMixin, CacheMixin)}
    dx.allow_enable_cache()
    yield
    dx.allow_enable_cache(False)
    assert {cls: dict(vars(cls)) for cls in before} == before, "nothing of diffusers is another than before"


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nothing_is_changed_unless_it_is_allowed():
    assert not hasattr(UNet2DConditionModel, "enable_cache")
    with pytest.raises(ValueError, match="is not supported"):
        MODELS["FluxTransformer2DModel"].make().enable_cache(dx.DeltaDiTConfig())
    with pytest.raises(ValueError, match="`allow` is 1"):
        dx.allow_enable_cache(1)
    dx.allow_enable_cache(False)  # what is not there is taken back in silence


def test_every_model_of_diffusers_finds_ours_before_its_own():
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith(("Model", "Model2D", "Model3D"))]
    caches = [
        cls for cls in classes if isinstance(cls, type) and issubclass(cls, CacheMixin) and issubclass(cls, ModelMixin)
    ]
    assert len(caches) > 20
    assert all(cls.__mro__.index(ModelMixin) < cls.__mro__.index(CacheMixin) for cls in caches)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_as_enable_and_off_it_is_bit_equal(name, allowed):
    model, config = MODELS[name], CONFIGS[name]
    one, other = model.make(), model.make()
    plain, before = model.run(one, 4), trace(one)
    expected = model.run(dx.enable(other, copy.deepcopy(config)), 4)
    assert not one.is_cache_enabled
    one.enable_cache(copy.deepcopy(config))
    assert one.is_cache_enabled and [entry.config for entry in dx.status(one)] == [config]
    assert equal(model.run(one, 4), expected) and not equal(expected, plain)
    copied = copy.deepcopy(one)
    one.disable_cache()
    assert not one.is_cache_enabled and not dx.status(one)
    require_unchanged(one, before, "after enable_cache and disable_cache")
    assert equal(model.run(one, 4), plain)
    assert copied.is_cache_enabled and equal(model.run(copied, 4), expected), "a copy has its own"


def test_what_enable_and_disable_do_shows(allowed):
    unet = MODELS["UNet2DConditionModel"].make()
    before = trace(unet)
    unet.enable_cache(dx.DeepCacheConfig())
    dx.disable(unet)
    assert not unet.is_cache_enabled, "taken off elsewhere"
    unet.enable_cache(dx.FasterDiffusionConfig([0]))
    with pytest.raises(ValueError, match="already been enabled with FasterDiffusionConfig"):
        unet.enable_cache(dx.DeepCacheConfig())
    with pytest.raises(ValueError, match="cannot be on together"):
        dx.enable(unet, dx.DeepCacheConfig())
    unet.disable_cache()
    dx.enable(unet, dx.DeepCacheConfig())
    with pytest.raises(ValueError, match="cannot be on together with 'deepcache'"):
        unet.enable_cache(dx.FasterDiffusionConfig([0]))
    assert not unet.is_cache_enabled
    dx.disable(unet)
    unet.disable_cache()  # nothing is on
    require_unchanged(unet, before, "after all of it")


def test_caches_of_diffusers_work_as_without_it(allowed):
    model = MODELS["FluxTransformer2DModel"]

    def cached(one):
        one.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with one.cache_context("cond"):
            return model.run(one, 3)

    one = model.make()
    found = cached(one)
    assert one.is_cache_enabled
    with pytest.raises(ValueError, match="call `disable_cache` first"):
        one.enable_cache(dx.ProfilingDiTConfig((1,)))
    with pytest.raises(ValueError, match="already been enabled"):
        one.enable_cache(FirstBlockCacheConfig())
    one.disable_cache()
    assert not one.is_cache_enabled
    dx.allow_enable_cache(False)
    assert equal(found, cached(model.make()))
    dx.allow_enable_cache()
    one.enable_cache(dx.ProfilingDiTConfig((1,)))
    with pytest.raises(ValueError, match="'profiling_dit' is on: disable it before FirstBlockCacheConfig"):
        one.enable_cache(FirstBlockCacheConfig())


def test_what_is_no_cache_of_ours_or_needs_a_pipeline_is_refused(allowed):
    unet = MODELS["UNet2DConditionModel"].make()
    before = trace(unet)
    for config, message in (
        (FirstBlockCacheConfig(), "takes caches of diffusers_ext only"),
        (dx.TimeShiftConfig(), "which is no cache"),
        (dx.FasterDiffusionConfig(), "`key_steps` is 'paper'"),
        (dx.DeltaDiTConfig(), "does not work on UNet2DConditionModel"),
    ):
        with pytest.raises(ValueError, match=message):
            unet.enable_cache(config)
        assert not unet.is_cache_enabled and not dx.status(unet)
    require_unchanged(unet, before, "after what was refused")


def test_methods_of_others_are_left_alone(monkeypatch):
    monkeypatch.setattr(ModelMixin, "enable_cache", lambda self, config: None, raising=False)
    with pytest.raises(ValueError, match="`ModelMixin` has enable_cache from elsewhere"):
        dx.allow_enable_cache()
    assert not any(name in vars(ModelMixin) for name in NAMES[1:])
