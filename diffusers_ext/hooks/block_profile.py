"""How much of the foreground each block of a transformer attends to (ProfilingDiT, arXiv 2504.03140, section 3.2).

Attention is seen where torch computes it, `scaled_dot_product_attention`, so that any attention module of any model can be
profiled; the maps are computed beside the run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from ..enabling import status
from ._blocks import block_names, unsupported

_QUERIES = 1024  # rows of an attention map that are held at once
_ATTENTION = nn.functional.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
MaskFn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BlockProfile:
    """How much of the foreground each block of a model attends to.

    Attributes:
        ratios: R_i of block i, in [0, 1]: the share of the foreground's tokens that it attends to more than to the mean
            token of the picture, averaged over pictures and steps (equation 6).
    """

    ratios: tuple[float, ...]

    def background(self, tau: float | None = None) -> tuple[int, ...]:
        """Numbers of the blocks with R_i below tau, for `ProfilingDiTConfig`. None takes the mean of all R_i."""
        tau = sum(self.ratios) / len(self.ratios) if tau is None else tau
        return tuple(i for i, ratio in enumerate(self.ratios) if ratio < tau)

    def foreground(self, tau: float | None = None) -> tuple[int, ...]:
        """Numbers of the other blocks."""
        background = self.background(tau)
        return tuple(i for i in range(len(self.ratios)) if i not in background)


@torch.no_grad()
def profile_blocks(
    pipe: Any, calls: Sequence[Mapping[str, Any]], mask_fn: MaskFn | None = None, component: str = "transformer"
) -> BlockProfile:
    """Measure how much of the foreground each block attends to, once per model.

    Args:
        pipe: a pipeline whose denoiser has a list of transformer blocks, with no cache on.
        calls: keyword arguments of the calls to profile, such as `{"prompt": ..., "num_inference_steps": 20}`.
        mask_fn: marks the foreground of what the denoiser predicts: `(batch, channels, [frames,] height, width) -> bool
            (batch, [frames,] height, width)`, or `(batch, tokens, channels) -> bool (batch, tokens)`. The paper has SAM2
            mark it on the first three principal components. None takes `principal_mask`.
        component: name of the denoiser.

    Returns:
        R_i of each block, numbered in the order in which they run.

    Raises:
        ValueError: `calls` is empty, a cache is on, the denoiser cannot be profiled (a block computes no attention of the
            picture with itself by `scaled_dot_product_attention`), or what `mask_fn` gives does not fit the picture.
    """
    denoiser = getattr(pipe, component, None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(f"`component` is {component!r}; {type(pipe).__name__} has no such model.")
    if (reason := unsupported(denoiser)) is not None:
        raise ValueError(f"`pipe` has the denoiser {type(denoiser).__name__}, which cannot be profiled: {reason}.")
    if not calls:
        raise ValueError("`calls` is empty; give the keyword arguments of at least one call of the pipeline.")
    on = [entry.key for entry in status(pipe) if entry.config.family == "cache"]
    if on:
        raise ValueError(f"`pipe` has {on[0]!r} on, which leaves blocks out: disable it first.")
    profiler = _Profiler(denoiser, mask_fn or principal_mask)
    with profiler.watching():
        for call in tqdm(calls, desc="Profiling", unit="call"):
            pipe(**call)
    if profiler.count == 0:
        raise ValueError("`mask_fn` marked no foreground on any picture.")
    return BlockProfile(tuple(total / profiler.count for total in profiler.totals))


def principal_mask(prediction: torch.Tensor) -> torch.Tensor:
    """The foreground of a prediction: of the two sides of its first principal component over the channels, the one that
    the border has less of. A stand-in of ours for a segmentation model.

    Args:
        prediction: as `profile_blocks` hands it to `mask_fn`. A sequence is taken for a square picture.

    Raises:
        ValueError: a sequence is not that of a square picture.
    """
    places = prediction.movedim(1, -1) if prediction.ndim > 3 else prediction
    side = math.isqrt(places.shape[1])
    if places.ndim == 3 and side * side != places.shape[1]:
        raise ValueError(f"`prediction` has {places.shape[1]} tokens, which is no square picture: give a `mask_fn`.")
    grid = places.shape[1:-1] if places.ndim > 3 else (side, side)
    flat = places.flatten(1, -2).double()
    flat = flat - flat.mean(1, keepdim=True)
    component = torch.linalg.eigh(flat.mT @ flat).eigenvectors[..., -1:]
    above = (flat @ component)[..., 0] > 0
    border = torch.zeros(grid, dtype=torch.bool, device=above.device)
    border[..., [0, -1], :] = border[..., :, [0, -1]] = True
    of_border = above[:, border.flatten()].double().mean(1) > above.double().mean(1)
    return (above ^ of_border[:, None]).reshape(places.shape[:-1])


def column_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """How much the picture's tokens attend to each of them: the mean over queries and heads.

    The paper's equation 5 averages over keys, which gives the same number for all; its text means the queries.

    Args:
        query: `(batch, heads, tokens, width)`.
        key: as the queries; of fewer heads, each serves several.
        places: numbers of the picture's `n` tokens among all.
        mask: as `scaled_dot_product_attention` takes it.
        scale: likewise.

    Returns:
        `(batch, n)`.
    """
    batch, heads, tokens, width = query.shape
    key = key.repeat_interleave(heads // key.shape[1], 1).float()
    total = torch.zeros(batch, len(places), device=query.device)
    for rows in places.split(_QUERIES):
        logits = query[:, :, rows].float() @ key.mT * (width**-0.5 if scale is None else scale)
        if mask is not None:
            part = mask.expand(*mask.shape[:-2], tokens, tokens)[..., rows, :]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
        total += logits.softmax(-1)[..., places].sum((1, 2))
    return total / (heads * len(places))


def _on_tokens(mask: torch.Tensor, count: int) -> torch.Tensor:
    """A mask `(batch, [frames,] height, width)` or `(batch, tokens)` on `count` tokens: where most of a patch is marked."""
    places = mask[0].numel()
    patch = math.isqrt(max(1, places // count))
    if mask.ndim > 2 and patch > 1:
        pooled = nn.functional.avg_pool2d(mask.flatten(0, -3)[:, None].float(), patch)
        mask = pooled.reshape(len(mask), -1) >= 0.5
    mask = mask.flatten(1)
    if mask.shape[1] != count:
        raise ValueError(
            f"`mask_fn` gives masks of {places} places, which do not fit the {count} tokens of the picture."
        )
    return mask.bool()


class _Profiler(TorchFunctionMode):
    """Sums R_i over all pictures and calls of the denoiser.

    Of each block the first attention is looked at. The picture's tokens in it are those whose keys in the first block
    change when the noisy input does: elsewhere a prompt stands before or after them.
    """

    def __init__(self, denoiser: nn.Module, mask_fn: MaskFn) -> None:
        super().__init__()
        self.denoiser, self.mask_fn = denoiser, mask_fn
        self.names = block_names(denoiser)
        self.totals, self.count = [0.0] * len(self.names), 0
        self.places: torch.Tensor | None = None
        self._block: int | None = None  # which runs now, until it has computed its first attention
        self._scores: dict[int, torch.Tensor] = {}
        self._keys: list[torch.Tensor] | None = None  # of the first block, while its tokens are looked for

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after),
        ]
        for i, name in enumerate(self.names):
            block = self.denoiser.get_submodule(name)
            handles.append(block.register_forward_pre_hook(lambda *_, i=i: setattr(self, "_block", i)))
            handles.append(block.register_forward_hook(lambda *_: setattr(self, "_block", None)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _ATTENTION and self._block is not None:
            block, self._block = self._block, None
            self._look(block, {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})
        return func(*args, **kwargs)

    def _look(self, block: int, given: dict[str, Any]) -> None:
        query, key = given["query"], given["key"]
        if self._keys is not None:
            self._keys += [key] if block == 0 else []
        elif self.places is not None and query.shape[2] == key.shape[2] > int(self.places[-1]):
            mask, scale = given.get("attn_mask"), given.get("scale")
            self._scores[block] = column_scores(query, key, self.places, mask, scale)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the first call, call the denoiser with two noisy inputs, and see which keys change."""
        if self.places is not None or self._keys is not None:
            return
        positional, named = list(args), dict(kwargs)
        given: Any = positional if positional else named
        name = 0 if positional else next(iter(named))
        sample, self._keys = given[name], []
        try:
            self.denoiser(*positional, **named)
            given[name] = [part.flip(-1) + 1 for part in sample] if isinstance(sample, list) else sample.flip(-1) + 1
            self.denoiser(*positional, **named)
        finally:
            keys, self._keys = self._keys, None
        changes = [(a != b).any(3).any(1).any(0).nonzero()[:, 0] for a, b in zip(keys[:1], keys[-1:], strict=True)]
        if not changes or not len(changes[0]):
            raise self._refusal(0)
        self.places = changes[0]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.places is None:
            return
        scores, self._scores = self._scores, {}
        prediction = torch.stack(output[0]) if isinstance(output[0], list) else output[0]
        foreground = _on_tokens(self.mask_fn(prediction), len(self.places))
        there = foreground.any(1)
        for i in range(len(self.names)):
            if i not in scores or len(scores[i]) != len(foreground):
                raise self._refusal(i)
            marked = (scores[i] > scores[i].mean(1, keepdim=True)) & foreground
            self.totals[i] += float((marked.sum(1)[there] / foreground.sum(1)[there]).sum())
        self.count += int(there.sum())

    def _refusal(self, block: int) -> ValueError:
        return ValueError(
            f"`pipe` has the denoiser {type(self.denoiser).__name__}, whose block {self.names[block]} computes no attention of "
            f"a whole picture with itself that torch sees."
        )
