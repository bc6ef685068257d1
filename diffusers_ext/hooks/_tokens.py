"""Steps of a transformer that compute some of its image tokens only.

On a `STORE` step the keys and values of each self-attention and what each attention and feed-forward part puts out (before
its gate) are stored. On a `SOME` step these modules get the chosen rows of their inputs, so that all their projections run
on as many rows; fresh keys and values, and fresh outputs, are put into the stored ones, which are what the model goes on
with. The queries of the chosen tokens meet the keys of all. Norms, gates, residuals and text run on all tokens.

No attention is written anew: hooks on an attention module, its `to_k` and `to_v`, and on the feed-forward gather and put
rows, and the model's own attention processor works between them. Rotary embeddings have a row for each token, and there are
fewer queries than keys: they are applied where queries and keys leave their norms.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from . import _blocks
from ._plan import CacheRun, PlanBuilder, RunState, first_input

FULL, STORE, SOME = "full", "store", "some"
_ATTENTION, _ASIDE = ("attn", "attn1", "attn2"), ("ff_context", "act_mlp")
_SINGLE = {"attn", "proj_mlp", "proj_out"}
_ROTATED = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_KNOWN = {"self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "args", "kwargs"}


# --- rows ------------------------------------------------------------------------------------------------------------


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `(B, S)` of `(B, L, C)`."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def put(x: torch.Tensor, rows: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """`(B, L, C)` with `fresh` in its rows `(B, S)`."""
    return x.scatter(1, rows[..., None].expand(-1, -1, x.shape[-1]), fresh)


def choose_rows(state: RunState, rows: torch.Tensor, num_tokens: int) -> None:
    """From the next step on, `SOME` steps compute these image tokens: `(B, S)`, ascending, of `num_tokens`."""
    state.memory.update(rows=rows, num_tokens=num_tokens)


def rows_of(state: RunState, length: int) -> torch.Tensor:
    """The rows to compute in a sequence: of image tokens, or of all text tokens and then image tokens."""
    rows: torch.Tensor = state.memory["rows"]
    text = length - state.memory["num_tokens"]
    if text == 0:
        return rows
    return torch.cat([torch.arange(text, device=rows.device).expand(len(rows), -1), rows + text], dim=1)


def _rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys `(B, L, heads, D)` by tables `(L, D)`, or `(B, L, D)` where rows differ in the batch."""
    if table[0].ndim == 2:
        return apply_rotary_emb(x, table, sequence_dim=1)
    flat = (table[0].flatten(0, 1), table[1].flatten(0, 1))
    return apply_rotary_emb(x.flatten(0, 1)[None], flat, sequence_dim=1).view_as(x)


# --- hooks -----------------------------------------------------------------------------------------------------------


class _RowsHook(ModelHook):
    """On a module that treats each row by itself.

    Args:
        gather: whether it gets whole sequences, of which it computes some rows; else it gets these rows already.
        slot: where its whole output is stored; None where what follows wants the fresh rows alone.
    """

    def __init__(self, run: CacheRun, gather: bool, slot: int | None) -> None:
        super().__init__()
        self.run, self.gather, self.slot = run, gather, slot

    def new_forward(self, module, *args, **kwargs):
        if self.run.state.mode not in (STORE, SOME):
            return self.fn_ref.original_forward(*args, **kwargs)
        args, kwargs = self.gathered(args, kwargs)
        return self.stored(self.fn_ref.original_forward(*args, **kwargs))

    def gathered(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments, in a `SOME` step with the chosen rows of the first."""
        state = self.run.state
        if state.mode != SOME or not self.gather:
            return args, kwargs
        x = first_input(args, kwargs)
        x = take(x, rows_of(state, x.shape[1]))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def stored(self, output: torch.Tensor) -> torch.Tensor:
        """The whole output, fresh rows in it."""
        state = self.run.state
        if self.slot is None:
            return output
        slot = state.slots[self.slot]
        if state.mode == SOME:
            output = put(slot.value, rows_of(state, slot.value.shape[1]), output)
        slot.value = output
        return output


class _AttentionHook(_RowsHook):
    """On an attention module. `keys` is the slot of its stored keys, or None where it attends to the text."""

    def __init__(self, run: CacheRun, slot: int | None, keys: int | None) -> None:
        super().__init__(run, gather=True, slot=slot)
        self.keys = keys

    def new_forward(self, module, *args, **kwargs):
        state = self.run.state
        mask = kwargs.get("attention_mask") if self.keys is not None else None
        if mask is not None and (mask.ndim != 4 or mask.shape[-2] != mask.shape[-1]):
            raise ValueError(
                f"`attention_mask` of a self-attention has the shape {tuple(mask.shape)}; where some tokens are computed it "
                "must have a row and a column for each token."
            )
        if state.mode not in (STORE, SOME):
            return self.fn_ref.original_forward(*args, **kwargs)
        length = first_input(args, kwargs).shape[1]
        args, kwargs = self.gathered(args, kwargs)
        if state.mode == SOME and mask is not None:
            rows = rows_of(state, mask.shape[-2])[:, None, :, None]
            kwargs["attention_mask"] = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        tables = kwargs.get("image_rotary_emb")
        if state.mode == SOME and tables is not None:
            kwargs["image_rotary_emb"] = None
            state.memory["rotary"] = self._tables(tables, length)
        try:
            output = self.fn_ref.original_forward(*args, **kwargs)
        finally:
            state.memory.pop("rotary", None)
        if self.keys is not None and state.slots[self.keys].value is None:
            raise RuntimeError(
                f"An attention processor, {type(module.processor).__name__}, went past `to_k`: projections are fused, or "
                "it is not the one that was there when the method was enabled. Disable it, then enable it again."
            )
        if torch.is_tensor(output):
            return self.stored(output)
        if len(output) > 2:
            raise RuntimeError("An attention module has more than two outputs: take the IP-Adapter off.")
        return (self.stored(output[0]), *output[1:])

    def _tables(self, tables: tuple, length: int) -> dict[str, tuple]:
        """Of the norms of chosen queries, of all keys, and of text that is projected apart and comes first."""
        text = tables[0].shape[0] - length
        rows = rows_of(self.run.state, length) + text
        queries, keys, apart = (
            tuple(table[part] for table in tables) for part in (rows, slice(text, None), slice(0, text))
        )
        return {"norm_q": queries, "norm_k": keys, "norm_added_q": apart, "norm_added_k": apart}


class _RotaryHook(ModelHook):
    """On a norm of queries or keys, by name."""

    def __init__(self, run: CacheRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name

    def post_forward(self, module, output):
        tables = self.run.state.memory.get("rotary")
        return output if tables is None else _rotate(output, tables[self.name])


class LookHook(ModelHook):
    """Sees the first input of a module, from its call until `clear`."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def pre_forward(self, module, *args, **kwargs):
        self.value = first_input(args, kwargs)
        return args, kwargs

    def clear(self) -> None:
        self.value = None

    def reset_state(self, module):
        self.clear()
        return module


# --- structure -------------------------------------------------------------------------------------------------------


def noise_module(model: nn.Module) -> str | None:
    """The last linear layer, which turns tokens into noise."""
    names = [name for name, child in model.named_children() if name.startswith("proj_out") and _is_linear(child)]
    return names[-1] if names else None


def unsupported(model: nn.Module) -> str | None:
    """None where steps of `model` can compute some image tokens only, else the reason why not."""
    if not _blocks.block_lists(model):
        return "it has no list of transformer blocks"
    for name in _blocks.block_names(model):
        block = model.get_submodule(name)
        if (reason := _unsupported_block(block)) is not None:
            return f"its block {type(block).__name__} {reason}"
    if (reason := _blocks.unsupported(model)) is not None:
        return reason
    if any("temporal" in name for name in _blocks.block_lists(model)):
        return "its blocks attend to space and to time in turns"
    places = getattr(model, "pos_embed", None)
    if not hasattr(places, "axes_dim") and not isinstance(getattr(places, "patch_size", None), int):
        return "it has no `pos_embed` that says where in the picture a token is"
    if noise_module(model) is None or _blocks.sample_module(model) is None:
        return "it is not known which of its parts take the sample and give the noise"
    return None


def _is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear)  # adapters wrap a layer


def _unsupported_block(block: nn.Module) -> str | None:
    parts = {name: child for name, child in block.named_children() if name not in _ASIDE and "norm" not in name}
    attentions = {name: child for name, child in parts.items() if name in _ATTENTION}
    rest = parts.keys() - attentions.keys()
    if rest not in ({"ff"}, _SINGLE - {"attn"}):
        return f"has the parts {', '.join(sorted(rest)) or 'none'}, where a feed-forward `ff` is expected"
    if "ff" in rest and any("Conv" in type(part).__name__ for part in block.ff.modules()):  # type: ignore[union-attr,operator]
        return "has a feed-forward part that mixes tokens"
    if getattr(block, "_chunk_size", None) is not None:
        return "has a feed-forward part that runs in chunks; call `set_chunk_feed_forward(None)`"
    if not attentions:
        return "has no attention"
    for name, attention in attentions.items():
        if not all(_is_linear(getattr(attention, part, None)) for part in ("to_q", "to_k", "to_v")):
            return f"has no projections `to_q`, `to_k` and `to_v` in `{name}`"
        if getattr(attention, "fused_projections", False):
            return "has fused projections; call `unfuse_qkv_projections()`"
        processor = attention.processor
        takes = inspect.signature(type(processor).__call__).parameters.keys()
        if not takes <= _KNOWN and type(processor) is not FluxAttnProcessor:
            return f"has an attention, {type(processor).__name__}, that also takes {', '.join(sorted(takes - _KNOWN))}"
    return None


def install(builder: PlanBuilder) -> CacheRun:
    """Put the hooks of a method on, whose plan has the modes `FULL`, `STORE` and `SOME`, and others that are full."""
    run, root = builder.run, builder.root
    for name in _blocks.block_names(root):
        block = root.get_submodule(name)
        single = hasattr(block, "proj_mlp")
        for part in _ATTENTION:
            if getattr(block, part, None) is not None:
                _hook_attention(builder, f"{name}.{part}", whole=not single)
        if single:  # attention and feed-forward share their output projection
            builder.hook(f"{name}.proj_mlp", _RowsHook(run, gather=True, slot=None))
            builder.hook(f"{name}.proj_out", _RowsHook(run, gather=False, slot=builder.slot()))
        else:
            builder.hook(f"{name}.ff", _RowsHook(run, gather=True, slot=builder.slot()))
    return _blocks.BlockPlan(builder).install()


def _hook_attention(builder: PlanBuilder, name: str, whole: bool) -> None:
    run, attention = builder.run, builder.root.get_submodule(name)
    keys = None
    if not getattr(attention, "is_cross_attention", False):
        keys = builder.slot()
        builder.hook(f"{name}.to_k", _RowsHook(run, gather=False, slot=keys))
        builder.hook(f"{name}.to_v", _RowsHook(run, gather=False, slot=builder.slot()))
    if isinstance(attention.processor, FluxAttnProcessor):
        for norm in _ROTATED:
            if getattr(attention, norm, None) is not None:
                builder.hook(f"{name}.{norm}", _RotaryHook(run, norm))
    builder.hook(name, _AttentionHook(run, builder.slot() if whole else None, keys))
