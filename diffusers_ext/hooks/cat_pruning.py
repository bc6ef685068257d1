"""CAT Pruning (Cheng et al. 2025, arXiv 2502.00433): compute a share of the image tokens on most steps.

After some full steps, each step computes the tokens whose predicted noise moved most since then, taken from the clusters of
tokens that moved most, and with them those that were left out for longest. The other tokens keep what attention and
feed-forward parts gave them last, and their noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from diffusers.hooks import ModelHook
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ..enabling import HookConfig
from . import _blocks, _tokens
from ._plan import CacheRun, Call, PlanBuilder, RunState, uninstall
from ._tokens import FULL, SOME, STORE, LookHook, choose_rows, put, rows_of, take
from ._values import is_count, is_number

_REFERENCE = "reference"
_LLOYD_STEPS, _NOISE_WEIGHT = 20, 0.05


@dataclass
class CATPruningConfig(HookConfig):
    """Settings of CAT Pruning.

    Args:
        start_step: t_0, counted from 0. The noise of step `start_step + 1` is what later noise is compared with, and step
            `start_step + 3` is the first that computes some tokens only; -1 and more.
        keep_ratio: share of the image tokens that a step computes, above 0. 1 computes all.
        num_clusters: of the tokens, by place and noise; at most as many as there are tokens are made.
        fresh_share: share of the computed tokens that is taken by how far their noise moved; the others are those that were
            left out for longest. 0 to 1.
        decay: of the count of how often a token was computed, at each step, 0 to 1. At 0.5 or less, tokens that were left
            out take turns; at 1 it counts all steps.
        seed: of the order in which tokens that were left out for equally long are taken.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "cat_pruning"
    family: ClassVar[str] = "cache"

    start_step: int = 5
    keep_ratio: float = 0.3
    num_clusters: int = 20
    fresh_share: float = 0.25
    decay: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("start_step", -1), ("num_clusters", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_count(value, least):
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        for name in ("keep_ratio", "fresh_share", "decay"):
            value = getattr(self, name)
            if not is_number(value, 0, 1) or (name == "keep_ratio" and value == 0):
                lowest = "above 0" if name == "keep_ratio" else "at least 0"
                raise ValueError(f"`{name}` is {value!r}; it must be a number, {lowest} and at most 1.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where CAT Pruning works on `module`, else the reason why not."""
        return _tokens.unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := _tokens.unsupported(module)) is not None:
            raise ValueError(f"CAT Pruning does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: nn.Module) -> None:
        put_on(module, self, choose_tokens)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_cat_pruning(module: nn.Module, config: CATPruningConfig | None = None) -> None:
    """Put CAT Pruning on a transformer in the layout of SD3, PixArt, DiT or Flux.

    With guidance, both halves of a call compute the same tokens, chosen from the conditional half; an unconditional call of
    its own takes those of the conditional call before it. Each picture of a batch has tokens of its own. Adapters are
    loaded before. A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run
    call `remove_cat_pruning`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model is no transformer of this kind.
    """
    from ..enabling import enable

    enable(module, config if config is not None else CATPruningConfig())


def remove_cat_pruning(module: nn.Module) -> None:
    """Take CAT Pruning off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, CATPruningConfig.key)


# --- which tokens (section 3) ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """What is known of the N image tokens of P pictures when those of the next step are chosen.

    Attributes:
        change: `(P, N, C)`, noise less that of the reference step. Its norm is the relative magnitude d.
        labels: `(P, N)`, their clusters, 0 to K - 1.
        neighbours: `(P, K, K)`, which clusters touch or are the same.
        order: `(N,)`, a permutation: the order of tokens that were left out for equally long.
        counts: `(P, N)`, how often each was computed in steps that computed some, older ones counting less; None before the
            first of these steps.
    """

    change: torch.Tensor
    labels: torch.Tensor
    neighbours: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor | None = None

    def counted(self, chosen: torch.Tensor, decay: float) -> torch.Tensor:
        """Counts after a step that computed `chosen`, `(P, S)`."""
        counts = self.labels.new_zeros(self.labels.shape, dtype=torch.float32) if self.counts is None else self.counts
        return (decay * counts).scatter_add(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))


def token_clusters(noise: torch.Tensor, places: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Labels `(P, N)` of tokens by K-means on `0.05 noise + place`; the row counts in one half of the channels.

    Lloyd's algorithm, begun at tokens that lie far from each other: no random numbers.

    Args:
        noise: `(P, N, C)`.
        places: `(N, 2)`, rows and columns, each in [0, 1).
        num_clusters: K; at most N are made.
    """
    channels = noise.shape[-1]
    place = places.repeat_interleave(torch.tensor([channels // 2, channels - channels // 2]).to(places.device), dim=1)
    x = _NOISE_WEIGHT * noise.float() + place.float()
    centres = x.new_empty(len(x), 0, channels)
    nearest = (x - x.mean(1, keepdim=True)).norm(dim=-1)
    for _ in range(min(num_clusters, x.shape[1])):
        centre = x.gather(1, nearest.argmax(1)[:, None, None].expand(-1, 1, channels))
        away = torch.cdist(x, centre)[..., 0]
        nearest = torch.minimum(nearest, away) if centres.shape[1] else away
        centres = torch.cat([centres, centre], dim=1)
    for _ in range(_LLOYD_STEPS):
        members = nn.functional.one_hot(torch.cdist(x, centres).argmin(-1), centres.shape[1]).to(x.dtype)
        sizes = members.sum(1)[..., None]
        centres = torch.where(sizes > 0, members.transpose(1, 2) @ x / sizes.clamp(min=1), centres)
    return torch.cdist(x, centres).argmin(-1)


def touching_clusters(labels: torch.Tensor, grid: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """`(P, K, K)`: clusters of which two tokens are next to each other in a row or column, or which are the same.

    Args:
        labels: `(P, N)`.
        grid: `(N, 2)`, rows and columns, counted from 0.
        num_clusters: K.
    """
    row, column = grid.unbind(1)
    size = int(row.max()) + 1, int(column.max()) + 1
    found = torch.eye(num_clusters + 1, dtype=torch.bool, device=labels.device).repeat(len(labels), 1, 1)
    picture = torch.full((len(labels), *size), num_clusters, device=labels.device)  # no token: a cluster of its own
    picture[:, row, column] = labels
    batch = torch.arange(len(labels), device=labels.device)[:, None, None]
    for one, other in ((picture[:, 1:], picture[:, :-1]), (picture[:, :, 1:], picture[:, :, :-1])):
        found[batch, one, other] = found[batch, other, one] = True
    return found[:, :num_clusters, :num_clusters]


def choose_tokens(tokens: Tokens, budget: int, fresh_share: float) -> torch.Tensor:
    """Tokens of the next step, `(P, budget)`, ascending.

    The first time, from the cluster of the highest score on, the `budget // 10` tokens of each that moved most. Later, with
    q = int(budget // 5 * fresh_share), 3q of the first cluster, 2q of the second and q of each other, and from the second on
    half as many of its tokens that were left out for longest, until these are `budget * fresh_share`; the rest of the budget
    are the tokens left out for longest of all. Where the two overlap, the next of these fill the budget up.

    Budgets under 20, which the paper does not have, take at least one token of a cluster. The authors' code cuts the last
    cluster's tokens off by their place in the picture, and does not fill up; here those that moved least go.
    """
    moved = tokens.change.norm(dim=-1)
    place, stalest = _places(tokens), _staleness(tokens)
    by_change = _rank_in_clusters(-moved, tokens.labels)
    if tokens.counts is None:
        wanted = by_change < max(1, budget // 10)
        chosen = _through_clusters(place, by_change, wanted, budget, budget)
    else:
        size = _sizes(tokens).gather(1, tokens.labels)
        quota = torch.minimum(max(1, int(budget // 5 * fresh_share)) * (3 - place).clamp(min=1), size)
        wanted, by_age = by_change < quota, _rank_in_clusters(stalest, tokens.labels)
        stale = (place > 0) & (by_age < quota // 2)
        rank = torch.where(wanted, by_change, tokens.labels.shape[1] + by_age)
        fresh = budget * fresh_share
        chosen = _through_clusters(place, rank, wanted | stale, fresh, int(fresh))
        chosen |= stalest < int(budget * (1 - fresh_share))
    return stalest.masked_fill(chosen, -1).argsort(dim=1, stable=True)[:, :budget].sort(1).values


def cluster_scores(tokens: Tokens) -> torch.Tensor:
    """`(P, K)`: norm of the largest change in each channel; the first time, of twice its mean and its largest value over
    the clusters that touch. -1 for clusters without tokens."""
    index = tokens.labels[..., None].expand_as(tokens.change)
    shape = (*tokens.neighbours.shape[:2], tokens.change.shape[-1])
    largest = tokens.change.new_zeros(shape).scatter_reduce(1, index, tokens.change, "amax", include_self=False)
    if tokens.counts is None:
        near = tokens.neighbours.to(largest.dtype)
        mean = near @ largest / near.sum(-1, keepdim=True)
        masked = largest[:, None].masked_fill(~tokens.neighbours[..., None], -torch.inf)
        largest = 2 * mean + masked.amax(2)
    return largest.norm(dim=-1).masked_fill(_sizes(tokens) == 0, -1.0)


def _sizes(tokens: Tokens) -> torch.Tensor:
    """`(P, K)`: tokens of each cluster."""
    return nn.functional.one_hot(tokens.labels, tokens.neighbours.shape[-1]).sum(1)


def _places(tokens: Tokens) -> torch.Tensor:
    """`(P, N)`: place of each token's cluster, from the highest score."""
    by_score = cluster_scores(tokens).argsort(dim=1, descending=True, stable=True)
    return by_score.argsort(1).gather(1, tokens.labels)


def _staleness(tokens: Tokens) -> torch.Tensor:
    """`(P, N)`: place of each token, from the one left out for longest."""
    if tokens.counts is None:
        return tokens.order.argsort().expand_as(tokens.labels)
    return tokens.order[tokens.counts[:, tokens.order].argsort(dim=1, stable=True)].argsort(1)


def _rank_in_clusters(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(P, N)`: place of each token among those of its cluster, from the smallest value."""
    order = values.argsort(dim=1, stable=True)
    order = order.gather(1, labels.gather(1, order).argsort(dim=1, stable=True))
    sorted_labels = labels.gather(1, order).contiguous()
    rank = torch.arange(labels.shape[1], device=labels.device) - torch.searchsorted(sorted_labels, sorted_labels)
    return torch.zeros_like(labels).scatter(1, order, rank)


def _through_clusters(
    place: torch.Tensor, rank: torch.Tensor, wanted: torch.Tensor, limit: float, count: int
) -> torch.Tensor:
    """Wanted tokens of one cluster after the other until there are more than `limit`; of these the first `count`."""
    number = torch.zeros_like(place).scatter_add(1, place, wanted.to(place.dtype))
    wanted = wanted & ((number.cumsum(1) - number).gather(1, place) <= limit)
    width = 2 * place.shape[1]
    key = (place * width + rank).masked_fill(~wanted, width * width)
    return wanted & (key.argsort(dim=1, stable=True).argsort(1) < count)


# --- hooks -----------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """Full steps, the last two of which store, then steps that compute some tokens."""

    config: CATPruningConfig

    def mode(self, call: Call) -> str:
        after = call.step - self.config.start_step
        return {1: _REFERENCE, 2: STORE}.get(after, FULL if after < 1 else SOME)


class _NoiseHook(ModelHook):
    """On the last layer, which runs on all tokens: keeps the noise of tokens left out, and chooses those of the next step.

    Args:
        sample: sees the model's noisy input.
        places: sees the latents, where the model cuts them into patches of `patch_size`, or else where the tokens are.
        conditional: which half of a call with guidance is the conditional one, 0 or 1.
        choose: as `choose_tokens`.
    """

    def __init__(
        self,
        run: CacheRun,
        config: CATPruningConfig,
        sample: LookHook,
        places: LookHook,
        patch_size: int | None,
        conditional: int,
        choose: Callable[[Tokens, int, float], torch.Tensor],
    ) -> None:
        super().__init__()
        self.run, self.config, self.sample, self.places = run, config, sample, places
        self.patch_size, self.conditional, self.choose = patch_size, conditional, choose

    def new_forward(self, module, *args, **kwargs):
        fresh = kept = self.fn_ref.original_forward(*args, **kwargs)
        state = self.run.state
        if state.mode == _REFERENCE:
            state.memory["reference"] = fresh
        elif state.mode in (STORE, SOME):
            if state.mode == SOME:
                rows = rows_of(state, fresh.shape[1])
                kept = put(state.memory["noise"], rows, take(fresh, rows))
            state.memory["noise"] = kept
            self._choose(state, fresh)
        self.sample.clear()
        self.places.clear()
        return kept

    @torch.compiler.disable
    def _choose(self, state: RunState, noise: torch.Tensor) -> None:
        """Choose the tokens of the next step; this stands outside of compiled graphs."""
        memory, config = state.memory, self.config
        if "halves" not in memory:
            memory["halves"] = _has_equal_halves(self.sample.value)
        if memory["halves"]:
            noise, reference = (x.chunk(2)[self.conditional] for x in (noise, memory["reference"]))
        else:
            reference = memory["reference"]
        change = (noise - reference).float()
        if "tokens" not in memory:
            tokens = self._first_seen(noise, change)
        else:
            tokens = memory["tokens"]
            tokens = replace(tokens, change=change, counts=tokens.counted(memory["chosen"], config.decay))
        chosen = self._leaders_choice(state, len(change))
        if chosen is None:
            chosen = self.choose(tokens, max(1, int(config.keep_ratio * change.shape[1])), config.fresh_share)
        memory.update(tokens=tokens, chosen=chosen)
        choose_rows(state, chosen.repeat(2, 1) if memory["halves"] else chosen, change.shape[1])

    def _first_seen(self, noise: torch.Tensor, change: torch.Tensor) -> Tokens:
        number, device = noise.shape[1], noise.device
        if self.patch_size is None:
            grid = self.places.value[-number:, -2:].long()
            grid = grid - grid.amin(0)
        else:
            height, width = (side // self.patch_size for side in self.places.value.shape[-2:])
            grid = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        labels = token_clusters(noise, grid / (grid.amax(0) + 1), self.config.num_clusters)
        neighbours = touching_clusters(labels, grid, min(self.config.num_clusters, number))
        order = torch.randperm(number, generator=torch.Generator().manual_seed(self.config.seed))
        return Tokens(change, labels, neighbours, order.to(device))

    def _leaders_choice(self, state: RunState, num_pictures: int) -> torch.Tensor | None:
        """What the conditional call of this step chose, where this is the unconditional call, and came after it."""
        manager, context = self.run.manager, self.run.manager.context
        if "uncond" not in context.name:
            return None
        manager.set_context(replace(context, name=context.name.replace("uncond", "cond")))
        leader: RunState = manager.get_state()
        manager.set_context(context)
        chosen = leader.memory.get("chosen")
        return chosen if leader.step == state.step and chosen is not None and len(chosen) == num_pictures else None


def _has_equal_halves(sample: torch.Tensor) -> bool:
    """Whether a batch is one of guidance, with every noisy picture twice."""
    return len(sample) % 2 == 0 and torch.equal(*sample.chunk(2))


def put_on(model: nn.Module, config: CATPruningConfig, choose: Callable[[Tokens, int, float], torch.Tensor]) -> None:
    """Put the hooks on; `choose` is `choose_tokens`, or another choice to compare it with."""
    builder = PlanBuilder(model, config.key, _Plan(config))
    sample, noise = _blocks.sample_module(model), _tokens.noise_module(model)
    assert sample is not None and noise is not None  # `unsupported` says so before
    looks = {name: LookHook() for name in (sample, "pos_embed")}
    for name, look in looks.items():
        builder.hook(name, look)
    # DiTPipeline puts the unconditional half last, pipelines with prompts put it first
    conditional = 0 if any(isinstance(module, LabelEmbedding) for module in model.modules()) else 1
    patch_size = getattr(model.pos_embed, "patch_size", None)
    seen = looks[sample], looks["pos_embed"]
    builder.hook(noise, _NoiseHook(builder.run, config, *seen, patch_size, conditional, choose))
    _tokens.install(builder)
