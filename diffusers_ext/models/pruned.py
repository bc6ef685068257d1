"""Stock denoisers with fewer attention heads and feed-forward neurons in each layer than their configuration says.

The configuration of the stock class has one number of heads for all layers. These classes have one argument more, `remaining`,
with the number that each cut layer is left with, and are otherwise the stock class: `isinstance` holds, pipelines take them, and
`save_pretrained` and `from_pretrained` work. `prune_model` makes them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from ._groups import cut


def _init_with_remaining(base: type) -> Callable[..., None]:
    """The constructor of a stock class with `remaining` as one more argument, which the configuration keeps."""

    def __init__(self: Any, *args: Any, remaining: Mapping[str, int] | None = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        counts = dict(remaining or {})
        cut(self, {name: range(count) for name, count in counts.items()})
        self.register_to_config(remaining=counts)

    stock = inspect.signature(base.__init__)  # type: ignore[misc]
    added = inspect.Parameter("remaining", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = stock.replace(parameters=[*stock.parameters.values(), added])  # type: ignore[attr-defined]
    return __init__


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel`, cut. `remaining`: by name of a layer, how many heads or neurons it has."""

    __init__ = _init_with_remaining(UNet2DConditionModel)


class PrunedDiTTransformer2DModel(DiTTransformer2DModel):
    """`DiTTransformer2DModel`, cut. `remaining`: by name of a layer, how many heads or neurons it has."""

    __init__ = _init_with_remaining(DiTTransformer2DModel)


class PrunedSD3Transformer2DModel(SD3Transformer2DModel):
    """`SD3Transformer2DModel`, cut. `remaining`: by name of a layer, how many heads or neurons it has."""

    __init__ = _init_with_remaining(SD3Transformer2DModel)


class PrunedFluxTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel`, cut. `remaining`: by name of a layer, how many heads or neurons it has."""

    __init__ = _init_with_remaining(FluxTransformer2DModel)


_CLASSES: dict[type, type] = {
    DiTTransformer2DModel: PrunedDiTTransformer2DModel,
    FluxTransformer2DModel: PrunedFluxTransformer2DModel,
    SD3Transformer2DModel: PrunedSD3Transformer2DModel,
    UNet2DConditionModel: PrunedUNet2DConditionModel,
}


def pruned_class(model: Any) -> type:
    """The class that `prune_model` makes of a model.

    Raises:
        ValueError: there is none.
    """
    if type(model) in _CLASSES:
        return _CLASSES[type(model)]
    if type(model) in _CLASSES.values():
        return type(model)
    names = ", ".join(cls.__name__ for cls in _CLASSES)
    raise ValueError(f"`model` is a {type(model).__name__}; allowed are {names}.")


def prune_model(model: ModelMixin, kept: Mapping[str, Sequence[int]]) -> Any:
    """A copy of a model without some of its heads and neurons; they are really gone.

    A layer that loses everything returns the bias of its output layer.

    Args:
        model: a `UNet2DConditionModel`, `DiTTransformer2DModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel`, or one
            that is pruned already.
        kept: by name of an attention or feed-forward layer, numbers of the heads or neurons that stay, rising. Layers that
            are not named keep all.

    Returns:
        A `PrunedUNet2DConditionModel` or its like, with weights of its own.

    Raises:
        ValueError: `model` is something else, has a method on, offloading, a LoRA or quantized weights, or `kept` does not
            fit it.
    """
    cls = pruned_class(model)
    if getattr(model, "peft_config", None) or getattr(model, "is_quantized", False):
        raise ValueError(
            "`model` has a LoRA or quantized weights; fuse or unload the LoRA, or load it in full precision."
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or {"_diffusers_hook", "_hf_hook"} & set(vars(module)):
            raise ValueError(f"`model` has a hook at {name or 'its root'}; switch off methods and offloading first.")
    small: Any = copy.deepcopy(model)
    cut(small, kept)
    small.__class__ = cls
    before = small.config.get("remaining") or {}
    small.register_to_config(remaining={**before, **{name: len(units) for name, units in kept.items()}})
    return small
