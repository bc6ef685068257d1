r"""The masks of EcoDiff (Zhang et al. 2024, arXiv 2412.02852): one score for each attention head and feed-forward neuron.

A score :math:`\lambda` makes a mask :math:`m \in [0, 1]` by the hard concrete law: with :math:`u \sim U(0, 1)`,

.. math:: s = \sigma((\log(u + \epsilon) - \log(1 - u + \epsilon) + \lambda) / 0.83), \quad m = \min(\max(1.2 s - 0.1, 0), 1)

by which the unit's output is multiplied. `train_ecodiff` learns the scores, and `prune` removes the units with the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ._groups import HEADS, NEURONS, Group, find_groups
from .pruned import prune_model, pruned_class

BETA, LOW, HIGH = 0.83, -0.1, 1.1
Use = Callable[[Mapping[str, torch.Tensor] | None], None]


def hard_concrete(scores: torch.Tensor, u: torch.Tensor, eps: float) -> torch.Tensor:
    r"""Masks m of scores :math:`\lambda` and uniform numbers u, of one shape.

    Args:
        eps: 0.5 for SDXL, 0.1 for FLUX. It is part of the method: the larger, the nearer to 1 masks start.
    """
    s = torch.sigmoid((torch.log(u + eps) - torch.log(1 - u + eps) + scores) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


class EcoDiffMasks(ModelMixin, ConfigMixin):
    """Scores of the heads and neurons of one denoiser. Make it with `for_model`, or load what `train_ecodiff` made.

    Args:
        layers: names of the layers that are masked.
        kinds: what each has, `heads` or `neurons`.
        units: how many each has.
        initial: score of all.

    Attributes:
        scores: of all layers, one after the other, `(sum of units,)`.

    Raises:
        ValueError: the arguments do not fit together.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self, *, layers: Sequence[str] = ("attn",), kinds: Sequence[str] = (HEADS,), units: Sequence[int] = (1,),
        initial: float = 3.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
            raise ValueError(f"`layers` is {layers!r}; at least one name of a layer is needed, none twice.")
        if len(kinds) != len(layers) or not set(kinds) <= {HEADS, NEURONS}:
            raise ValueError(f"`kinds` is {kinds!r}; {HEADS!r} or {NEURONS!r} is needed for each of `layers`.")
        if len(units) != len(layers) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in units):
            raise ValueError(f"`units` is {units!r}; a whole number of at least 1 is needed for each of `layers`.")
        if isinstance(initial, bool) or not isinstance(initial, int | float) or not abs(initial) < float("inf"):
            raise ValueError(f"`initial` is {initial!r}; it must be a finite number.")
        self.scores = nn.Parameter(torch.full((sum(units),), float(initial)))

    @classmethod
    def for_model(cls, model: nn.Module, kinds: Sequence[str] = (HEADS, NEURONS), initial: float = 3.0) -> EcoDiffMasks:
        """Scores for a denoiser.

        Args:
            model: one that `prune_model` takes.
            kinds: what to mask.
            initial: score of all.

        Raises:
            ValueError: `model` cannot be pruned, or `kinds` names something else.
        """
        pruned_class(model)
        if isinstance(kinds, str) or not kinds or not set(kinds) <= {HEADS, NEURONS}:
            raise ValueError(f"`kinds` is {kinds!r}; allowed are {HEADS!r} and {NEURONS!r}, one or both.")
        groups = [group for group in find_groups(model) if group.kind in kinds and group.units]
        return cls(
            layers=[group.name for group in groups], kinds=[group.kind for group in groups],
            units=[group.units for group in groups], initial=initial,
        )  # fmt: skip

    def split(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """One number a unit, `(sum of units,)`, by layer."""
        return dict(zip(self.config.layers, values.split(list(self.config.units)), strict=True))

    def forward(self, u: torch.Tensor, eps: float = 0.5) -> dict[str, torch.Tensor]:
        """Masks by layer from uniform numbers `(sum of units,)`; see `hard_concrete`."""
        return self.split(hard_concrete(self.scores, u, eps))

    def groups(self, model: nn.Module) -> list[Group]:
        """The masked groups of a model.

        Raises:
            ValueError: they are not those that the scores are for.
        """
        found = {group.name: group for group in find_groups(model)}
        for name, kind, units in zip(self.config.layers, self.config.kinds, self.config.units, strict=True):
            group = found.get(name)
            if group is None or (group.kind, group.units) != (kind, units):
                raise ValueError(
                    f"`model` is a {type(model).__name__} that has no layer {name!r} with {units} {kind}; these scores are "
                    "for another one."
                )
        return [found[name] for name in self.config.layers]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Use]:
        """Inside, outputs of heads and neurons are multiplied by masks.

        Yields:
            A function that sets the masks by layer, `(units,)` each, of the calls from then on; None for no masks.

        Raises:
            ValueError: the scores are for another model.
        """
        parts: dict[str, list[tuple[int, Group]]] = {}
        for group in self.groups(model):
            for layer, first in group.readers:
                parts.setdefault(layer, []).append((first, group))
        scales: dict[str, torch.Tensor] = {}
        handles = []

        def masked(layer: str) -> Callable:
            def multiply(_module: nn.Module, args: tuple) -> tuple | None:
                scale = scales.get(layer)
                return None if scale is None else (args[0] * scale.to(args[0].dtype), *args[1:])

            return multiply

        def use(masks: Mapping[str, torch.Tensor] | None) -> None:
            scales.clear()
            for layer, ranges in parts.items() if masks is not None else ():
                assert masks is not None
                width, pieces, end = model.get_submodule(layer).in_features, [], 0
                for first, group in sorted(ranges, key=lambda part: part[0]):
                    mask = masks[group.name]
                    pieces += [mask.new_ones(first - end), mask.repeat_interleave(group.width)]
                    end = first + group.units * group.width
                scales[layer] = torch.cat([*pieces, pieces[-1].new_ones(width - end)])

        try:
            for layer in parts:
                handles.append(model.get_submodule(layer).register_forward_pre_hook(masked(layer)))
            yield use
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def kept(self, ratio: float, scope: str = "global") -> dict[str, list[int]]:
        """Numbers of the units that stay, by layer.

        Args:
            ratio: share of the heads, and share of the neurons, that go: those with the lowest scores, of equal ones the
                last. From 0 to below 1.
            scope: `global` ranks over the whole model, so that a layer may lose all; `local` within each layer.

        Raises:
            ValueError: an argument is out of range.
        """
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise ValueError(f"`ratio` is {ratio!r}; it must lie in [0, 1).")
        if scope not in ("global", "local"):
            raise ValueError(f"`scope` is {scope!r}; allowed are 'global' and 'local'.")
        scores = self.split(self.scores.float().cpu())
        kinds = dict(zip(self.config.layers, self.config.kinds, strict=True))
        ranked = [[name] for name in scores]
        if scope == "global":
            ranked = [[name for name in scores if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())]
        stays: dict[str, list[int]] = {}
        for names in ranked:
            joined = torch.cat([scores[name] for name in names])
            order = joined.sort(descending=True, stable=True).indices
            mask = torch.zeros(len(joined), dtype=torch.bool)
            mask[order[: len(joined) - int(ratio * len(joined) + 1e-9)]] = True
            for name, part in zip(names, mask.split([len(scores[name]) for name in names]), strict=True):
                stays[name] = part.nonzero()[:, 0].tolist()
        return stays

    def prune(self, target: Any, ratio: float, scope: str = "global") -> Any:
        """Remove the units with the lowest scores.

        Args:
            target: a pipeline, whose denoiser is replaced by a smaller copy, or a denoiser.
            ratio, scope: see `kept`.

        Returns:
            The pipeline, or a smaller copy of the denoiser.

        Raises:
            ValueError: an argument is out of range, or the scores are for another model; nothing has changed then.
        """
        kept = self.kept(ratio, scope)
        if isinstance(target, DiffusionPipeline):
            component = denoiser_name(target)
            setattr(target, component, self.prune(getattr(target, component), ratio, scope))
            return target
        pruned_class(target)
        self.groups(target)
        return prune_model(target, kept)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Name of the component that is called at each step.

    Raises:
        ValueError: there is none that can be pruned.
    """
    for name in ("transformer", "unet"):
        model = getattr(pipe, name, None)
        if model is not None:
            pruned_class(model)
            return name
    raise ValueError(f"`target` is a {type(pipe).__name__}; a pipeline with a U-Net or a transformer is needed.")
