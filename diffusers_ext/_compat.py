"""Every use of a private name of diffusers, in one place. Written for diffusers 0.42."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def register_library(library: str, names: tuple[str, ...], load: Callable[[str], Any]) -> None:
    """Let diffusers' loader accept `library` in a `model_index.json`, and find `names` as `diffusers.<name>`."""
    loader = sys.modules["diffusers.pipelines.pipeline_loading_utils"]
    loader.LOADABLE_CLASSES[library] = dict(loader.LOADABLE_CLASSES["diffusers"])  # type: ignore[attr-defined]

    module = sys.modules["diffusers"]
    lazy_module = type(module)
    if getattr(lazy_module, "_diffusers_ext", False):
        return

    class _LazyModule(lazy_module):  # type: ignore[valid-type,misc]  # our classes are imported when asked for
        _diffusers_ext = True

        def __getattr__(self, name: str) -> Any:
            return load(name) if name in names else super().__getattr__(name)

    module.__class__ = _LazyModule


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside a compiled one."""
    return getattr(module, "_orig_mod", module)


def set_private_config(configured: Any, key: str, value: Any | None) -> None:
    """Set, or with None remove, a private key of a pipeline's or model's config."""
    from diffusers.configuration_utils import FrozenDict

    config = {k: v for k, v in configured.config.items() if k != key}
    if value is not None:
        config[key] = value
    configured._internal_dict = FrozenDict(config)


def pipeline_reading(read: Callable[[Any], dict[str, Any]], module: str) -> Any:
    """A `DiffusionPipeline` whose `from_pretrained` and `download` read every JSON file by `read(path)`.

    Its module is `module`: of a class named `DiffusionPipeline`, diffusers looks the real class up in the package where
    that name is from.
    """
    from diffusers import DiffusionPipeline

    def of_class(cls: type, json_file: Any) -> dict[str, Any]:
        return read(json_file)

    body = {"_dict_from_json_file": classmethod(of_class), "__module__": module}
    return type("DiffusionPipeline", (DiffusionPipeline,), body)


def lora_components(pipe: Any) -> tuple[str, ...]:
    """Names of the components that LoRA files of this pipeline's class may hold."""
    return tuple(getattr(pipe, "_lora_loadable_modules", ()))


# --- hooks -----------------------------------------------------------------------------------------------------------
# diffusers wraps a module's `forward` in a closure. `copy.deepcopy` does not copy closures, so a copy of a hooked model
# would run the hooks and weights of the original. The same chain as a partial of a plain function is copied right.


def _run_chain(fn_ref, module, *args, **kwargs):
    args, kwargs = fn_ref.pre_forward(module, *args, **kwargs)
    return fn_ref.post_forward(module, fn_ref.forward(*args, **kwargs))


def attach_hook(module: nn.Module, hook: Any, name: str) -> None:
    """Register a diffusers `ModelHook` so that `copy.deepcopy` of the module copies the hook as well."""
    from diffusers.hooks import HookRegistry

    inner = module.forward
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    chain = functools.partial(_run_chain, hook.fn_ref, module)
    module.forward = functools.update_wrapper(chain, inner)


def detach_hook(module: nn.Module, name: str) -> None:
    """Undo `attach_hook`, also where another library wrapped `forward` since."""
    registry = module._diffusers_hook
    hook = registry.hooks[name]
    fn_ref = hook.fn_ref
    inner = fn_ref.forward if fn_ref.original_forward is None else fn_ref.original_forward
    outer, outermost = module.__dict__.get("forward"), registry._hook_order[-1] == name
    registry.remove_hook(name, recurse=False)
    if outermost and not _is_chain(outer, fn_ref):  # accelerate wrapped it since: keep that, mend what it calls
        module.forward = outer
        if _is_chain(module.__dict__.get("_old_forward"), fn_ref):
            module._old_forward = inner
    # Whoever still holds the chain (a hook registered since, a compiled graph) now passes straight through.
    fn_ref.pre_forward, fn_ref.forward, fn_ref.post_forward = _pass_inputs, inner, _pass_output
    fn_ref.original_forward = None
    forward = module.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
        del module.__dict__["forward"]
    if not registry.hooks:
        del module.__dict__["_diffusers_hook"]


def block_output_order(block: type) -> tuple[str, str] | None:
    """Names of the two states that a transformer block returns, in order, where diffusers' registry knows its class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    for cls in block.__mro__:
        metadata = TransformerBlockRegistry._registry.get(cls)
        if metadata is not None:
            if metadata.return_encoder_hidden_states_index is None:
                return None
            names = metadata.hidden_states_argument_name, metadata.encoder_hidden_states_argument_name
            return names if metadata.return_hidden_states_index == 0 else names[::-1]
    return None


def has_hook(module: nn.Module, name: str) -> bool:
    """Whether hook `name` is registered, and a call of `module` still goes through its registry's hooks.

    accelerate puts back the forward that it had found when its own hook goes, and so drops hooks registered since.
    """
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None or name not in registry.hooks:
        return False
    forwards = (module.__dict__.get("forward"), module.__dict__.get("_old_forward"))
    return any(
        isinstance(forward, functools.partial) and forward.func.__module__ in (__name__, type(registry).__module__)
        for forward in forwards
    )


def _is_chain(forward: Any, fn_ref: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _run_chain and forward.args[0] is fn_ref


def _pass_inputs(module, *args, **kwargs):
    return args, kwargs


def _pass_output(module, output):
    return output


def announce_resets(root: nn.Module) -> None:
    """Give `root` the method by which pipelines reset stateful hooks at the end of a run. No hook goes on `root`."""
    if not hasattr(root, "_reset_stateful_cache"):
        root._reset_stateful_cache = types.MethodType(_reset_stateful_cache, root)
    refresh_hooks(root)


def retract_resets(root: nn.Module) -> None:
    method = root.__dict__.get("_reset_stateful_cache")
    if isinstance(method, types.MethodType) and method.__func__ is _reset_stateful_cache:
        del root.__dict__["_reset_stateful_cache"]
    refresh_hooks(root)


def _reset_stateful_cache(root: nn.Module) -> None:
    for module in root.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


def refresh_hooks(root: nn.Module) -> None:
    """Make cache contexts reach hooks that were registered after a first run."""
    for module in root.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            registry._child_registries_cache = None
