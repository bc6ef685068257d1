"""diffusers' own way to switch caches, `model.enable_cache(config)`, for our caches as well; only where it is asked for.

    dx.allow_enable_cache()                                   # once in a program
    pipe.transformer.enable_cache(dx.DeltaDiTConfig())        # and pipe.unet.enable_cache(dx.DeepCacheConfig())
    pipe.transformer.disable_cache()
    dx.allow_enable_cache(False)                              # diffusers as it was

diffusers knows its configs one by one, and has the methods on some transformers alone. While this is allowed, all models of
diffusers have `enable_cache`, `disable_cache` and `is_cache_enabled`, which hand what is not ours on to diffusers' own. They
are put beside those, as names of `ModelMixin`: no function of diffusers is replaced, and models keep their classes.
"""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from .enabling import HookConfig, disable, enable, status

_CONFIG = "_cache_config"  # to _compat: diffusers' own attribute
_NAMES = ("enable_cache", "disable_cache", "is_cache_enabled")


def allow_enable_cache(allow: bool = True) -> None:
    """Let `model.enable_cache` take our caches, on every model of diffusers, those without such a method included.

    A config is put on the model as `diffusers_ext.enable(model, config)` does it: settings that need a pipeline are refused,
    and no recipe is written. At most one cache is on a model, ours or diffusers'.

    Args:
        allow: False takes it back. What is on stays on; `diffusers_ext.disable` takes it off.

    Raises:
        ValueError: `allow` is neither True nor False, or another library gave `ModelMixin` methods of these names.
    """
    if not isinstance(allow, bool):
        raise ValueError(f"`allow` is {allow!r}; allowed are True and False.")
    ours = {"enable_cache": _enable_cache, "disable_cache": _disable_cache, "is_cache_enabled": _IS_ENABLED}
    there = {name: vars(ModelMixin)[name] for name in _NAMES if name in vars(ModelMixin)}
    if foreign := [name for name, value in there.items() if value is not ours[name]]:
        raise ValueError(
            f"`ModelMixin` has {', '.join(foreign)} from elsewhere; enable caches by `diffusers_ext.enable`."
        )
    for name, value in ours.items():
        if allow:
            setattr(ModelMixin, name, value)
        elif name in there:
            delattr(ModelMixin, name)


def _ours(model: nn.Module) -> HookConfig | None:
    """Our cache that `enable_cache` put on a model, where it is still on."""
    config = vars(model).get(_CONFIG)
    if isinstance(config, HookConfig) and any(entry.config is config for entry in status(model)):
        return config
    return None


def _enable_cache(self: Any, config: Any) -> None:
    """Put a cache on: one of diffusers', or a config of `diffusers_ext` of family "cache".

    Raises:
        ValueError: a cache is on, or this one does not fit the model.
    """
    if not isinstance(config, HookConfig):
        if not isinstance(self, CacheMixin):
            raise ValueError(
                f"`config` is a {type(config).__name__}; {type(self).__name__} takes caches of diffusers_ext only, such as "
                "`DeepCacheConfig`."
            )
        if caches := [entry.key for entry in status(self) if entry.config.family == "cache"]:
            raise ValueError(f"{caches[0]!r} is on: disable it before {type(config).__name__}.")
        _forget(self)
        CacheMixin.enable_cache(self, config)
        return
    if config.family != "cache":
        raise ValueError(f"`config` is a {type(config).__name__}, which is no cache; use `diffusers_ext.enable`.")
    if (on := _ours(self)) is not None:
        raise ValueError(f"Caching has already been enabled with {type(on).__name__}; call `disable_cache` first.")
    _forget(self)
    enable(self, config)
    setattr(self, _CONFIG, config)


def _disable_cache(self: Any) -> None:
    """Take the cache off that `enable_cache` put on."""
    config = _ours(self)
    if config is not None:
        _forget(self)
        disable(self, config.key)
    elif isinstance(self, CacheMixin):
        _forget(self)
        CacheMixin.disable_cache(self)


def _is_cache_enabled(self: Any) -> bool:
    """Whether `enable_cache` put a cache on this model that is still on."""
    config = getattr(self, _CONFIG, None)
    return _ours(self) is not None if isinstance(config, HookConfig) else config is not None


def _forget(model: nn.Module) -> None:
    """Drop the note of one of our caches."""
    if isinstance(vars(model).get(_CONFIG), HookConfig):
        delattr(model, _CONFIG)


_IS_ENABLED = property(_is_cache_enabled)
