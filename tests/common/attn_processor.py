"""What every attention processor must do: the rules of `hook.py`, and nothing of diffusers' process-wide state is touched.

Its row names a config derived from `HookConfig`, whose `enable` sets the processors of a model and whose `disable` puts
the very objects back that were there.
"""

from __future__ import annotations

import copy

from diffusers.models import attention_dispatch

import diffusers_ext as dx
from diffusers_ext.enabling import HookConfig

from . import hook
from .models import World
from .suite import Case, Suite, is_class_of, require
from .traces import require_unchanged, trace

SUITE = Suite("attn_processor", "a config derived from HookConfig", is_class_of(HookConfig))
SUITE.include(hook.SUITE)
SUITE.pack = hook.SUITE.pack


@SUITE.rule()
def global_backend(case: Case, world: World) -> None:
    """The active attention backend of the process, and other models, stay as they are."""
    registry = attention_dispatch._AttentionBackendRegistry
    for model, config in hook.on_models(case, world, first=True):
        before, bystander = registry.get_active_backend(), world.model(model)
        marks = trace(bystander)
        changed = dx.enable(world.model(model), copy.deepcopy(config))
        model.run(changed, 2)
        require(
            registry.get_active_backend() == before, f"on {model.name} it switches the attention backend of the process"
        )
        require_unchanged(bystander, marks, "after enabling it on another model")
        dx.disable(changed)
        require(
            registry.get_active_backend() == before,
            f"off {model.name} it switches the attention backend of the process",
        )


@SUITE.rule()
def processors(case: Case, world: World) -> None:
    """On, some processors are others than before; off, each is the object that was there."""
    for model, config in hook.on_models(case, world, first=True):
        one = world.model(model)
        before = dict(one.attn_processors)
        dx.enable(one, copy.deepcopy(config))
        require(
            any(one.attn_processors[name] is not before[name] for name in before), f"{model.name}: no processor is set"
        )
        dx.disable(one)
        wrong = [name for name in before if one.attn_processors.get(name) is not before[name]]
        require(not wrong, f"{model.name}: other processors than before at {wrong}")
