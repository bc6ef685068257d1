"""On and off: `enable`, `disable`, `status`, for every hook, guider and attention processor.

What is on is written on the module that carries it; a pipeline also keeps it as its recipe. A pipeline on which
something is enabled tells it when a run begins and ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from torch import nn

from . import _compat

T = TypeVar("T")
_RECORDS = "_diffusers_ext_enabled"


@dataclasses.dataclass
class HookConfig:
    """Base of the settings that `enable` takes: a dataclass of JSON values with the method's key.

    Attributes:
        key: the method.
        version: raised when the meaning of the settings changes; kept in recipes.
        family: methods of one family exclude each other on one module.
    """

    key: ClassVar[str]
    version: ClassVar[int] = 1
    family: ClassVar[str | None] = None

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where the method works on `module`, else the reason why not."""
        raise NotImplementedError

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        """Raise `ValueError` where these settings do not fit `module`. Changes nothing."""
        raise NotImplementedError

    def apply(self, module: nn.Module) -> None:
        """Put the method on; called after `check`."""
        raise NotImplementedError

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Take the method off; the module is bit-equal to before."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Enabled:
    """One method that is on: its key, the pipeline component that carries it (None on a bare model), its settings."""

    key: str
    component: str | None
    config: HookConfig


def enable(target: T, *configs: HookConfig, component: str | None = None) -> T:
    """Put methods on a pipeline or on one model, and return it.

    On a pipeline each method goes on every denoiser that it supports, or on `component` alone. Enabling a method that is
    on replaces it. All settings are checked before anything changes. Pipelines made with `from_pipe` share modules, and
    so share what is on.

    Args:
        target: a `DiffusionPipeline` or a model.
        configs: settings of the methods, for example `DeepCacheConfig(interval=3)`.
        component: name of the pipeline component to put them on.

    Raises:
        ValueError: no config is given, a method does not support the target, its settings do not fit, or it conflicts
            with one that is on.
    """
    if not configs:
        raise ValueError("`configs` is empty; give the settings of a method, for example `DeepCacheConfig()`.")
    return enable_on(target, [(component, config) for config in configs])


def enable_on(target: T, pairs: list[tuple[str | None, HookConfig]]) -> T:
    """As `enable`, with the component of each method on its own."""
    plan: list[tuple[nn.Module, HookConfig]] = []
    for component, config in pairs:
        if not isinstance(config, HookConfig):
            raise ValueError(f"`configs` holds {config!r}; allowed are instances of {_known_configs()}.")
        modules = _targets(target, config, component)
        for module in modules:
            config.check(module, on_pipeline=not isinstance(target, nn.Module))
            _refuse_conflicts(module, config, [other for m, other in plan if m is module])
        plan += [(module, config) for module in modules]
    for module, config in plan:
        _remove(module, config.key)
        config.apply(module)
        module.__dict__.setdefault(_RECORDS, {})[config.key] = config
    if not isinstance(target, nn.Module):
        _listen(target)
        _write_recipe(target)
    return target


def disable(target: T, key: str | None = None) -> T:
    """Take one method, or all of ours, off a pipeline or model; it is bit-equal to before. Returns it.

    Raises:
        ValueError: `key` is no method, or it is not on.
    """
    modules = _modules(target)
    if key is not None:
        from .registry import get_method

        get_method(key)
        if not any(key in _records(module) for module in modules.values()):
            raise ValueError(f"Method {key!r} is not on; on are {[entry.key for entry in status(target)]}.")
    for module in modules.values():
        for on in list(_records(module)):
            if key in (None, on):
                _remove(module, on)
    if not isinstance(target, nn.Module):
        if not status(target):
            _stop_listening(target)
        _write_recipe(target)
    return target


@contextlib.contextmanager
def enabled(target: T, *configs: HookConfig) -> Iterator[T]:
    """`with enabled(pipe, config) as pipe:` has methods on inside, and after it what was on before."""
    before = [(entry.component, entry.config) for entry in status(target)]
    enable(target, *configs)
    try:
        yield target
    finally:
        for config in configs:
            if any(entry.key == config.key for entry in status(target)):
                disable(target, config.key)
        replaced = {config.key for config in configs}
        enable_on(target, [(name, config) for name, config in before if config.key in replaced])


def status(target: Any) -> list[Enabled]:
    """What is on, in the order in which it was enabled on each component."""
    return [
        Enabled(key, name, config)
        for name, module in _modules(target).items()
        for key, config in _records(module).items()
    ]


def _records(module: nn.Module) -> dict[str, HookConfig]:
    return module.__dict__.get(_RECORDS, {})


def _remove(module: nn.Module, key: str) -> None:
    records = _records(module)
    if key in records:
        type(records[key]).remove(module)
        del records[key]
        if not records:
            del module.__dict__[_RECORDS]


def _modules(target: Any) -> dict[str | None, nn.Module]:
    """The models of a pipeline by component name, compiled ones unwrapped."""
    if isinstance(target, nn.Module):
        return {None: _compat.unwrap(target)}
    if not hasattr(target, "components"):
        raise ValueError(f"`target` is {type(target).__name__}; a DiffusionPipeline or a torch.nn.Module is needed.")
    return {name: _compat.unwrap(part) for name, part in target.components.items() if isinstance(part, nn.Module)}


def _targets(target: Any, config: HookConfig, component: str | None) -> list[nn.Module]:
    modules = _modules(target)
    if component is not None or isinstance(target, nn.Module):
        if component not in modules:
            names = sorted(name for name in modules if name)
            raise ValueError(f"`component` is {component!r}; {type(target).__name__} has the models {names}.")
        return [modules[component]]
    found = [module for module in modules.values() if config.supports(module) is None]
    if not found:
        denoisers = [name for name in modules if name and name.startswith(("unet", "transformer", "prior", "decoder"))]
        names = denoisers or [name for name in modules if name]
        reasons = "; ".join(
            f"{name} ({type(modules[name]).__name__}): {config.supports(modules[name])}" for name in names
        )
        raise ValueError(
            f"{type(config).__name__} does not work on {type(target).__name__}: {reasons or 'it has no models'}."
        )
    return found


def _refuse_conflicts(module: nn.Module, config: HookConfig, planned: list[HookConfig]) -> None:
    if config.family is None:
        return
    for other in [*_records(module).values(), *planned]:
        if other.family == config.family and other.key != config.key:
            raise ValueError(
                f"{config.key!r} cannot be on together with {other.key!r} on one {type(module).__name__}: both decide what is "
                f"computed when. Disable {other.key!r} first."
            )
    if config.family == "cache" and getattr(module, "is_cache_enabled", False):
        raise ValueError(
            f"{config.key!r} cannot be on together with {type(module._cache_config).__name__}: call `disable_cache` first."
        )


def _known_configs() -> str:
    def leaves(cls: type) -> list[str]:
        below: list[type] = type.__subclasses__(cls)
        return [name for subclass in below for name in leaves(subclass)] if below else [cls.__name__]

    return ", ".join(leaves(HookConfig))


def _write_recipe(pipe: Any) -> None:
    from .recipe import RECIPE_KEY, collect

    _compat.set_private_config(pipe, RECIPE_KEY, collect(pipe))


# --- when a run begins and ends --------------------------------------------------------------------------------------
# Every diffusers pipeline calls `self.progress_bar` once, right before its denoising loop, and leaves it at the end or
# by an exception. Timesteps alone do not tell a new run: after an abort at t = 850, image-to-image may start at t = 400.


def _listen(pipe: Any) -> None:
    pipe.progress_bar = types.MethodType(_progress_bar, pipe)  # on the instance; a deep copy gets its own


def _stop_listening(pipe: Any) -> None:
    method = pipe.__dict__.get("progress_bar")
    if isinstance(method, types.MethodType) and method.__func__ is _progress_bar:
        del pipe.__dict__["progress_bar"]


def _progress_bar(pipe: Any, iterable: Any = None, total: int | None = None, **kwargs: Any) -> Any:
    from .hooks._plan import find_run

    bar = type(pipe).progress_bar(pipe, iterable, total, **kwargs)
    num_steps = len(iterable) if hasattr(iterable, "__len__") else total
    runs = [find_run(module, key) for module in _modules(pipe).values() for key in _records(module)]
    return _Run(bar, [run for run in runs if run is not None], num_steps, getattr(pipe, "scheduler", None))


class _Run:
    """A pipeline's progress bar that also marks the run."""

    def __init__(self, bar: Any, runs: list, num_steps: int | None, scheduler: Any) -> None:
        self._bar, self._runs = bar, runs
        for run in runs:
            run.begin(num_steps, scheduler)

    def _end(self) -> None:
        for run in self._runs:
            run.end()

    def __enter__(self) -> _Run:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._end()
        return self._bar.__exit__(*exception)

    def __iter__(self) -> Iterator:
        try:
            yield from self._bar
        finally:
            self._end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
