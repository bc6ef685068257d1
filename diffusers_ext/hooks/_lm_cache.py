"""The cache of language models without causal attention: what recomputes, what is stored, when it is refreshed.

A step of a masked diffusion language model computes every token. Here a *rule* says which tokens a call computes
(`TokenRule.recompute`); the others are left out of every layer. What a call computes is stored, and replaces what was
there: keys and values of each layer, and the logits. Queries of the computed tokens meet the keys of all tokens, at their
true positions, under the mask that the model made for the whole sequence; logits of the tokens left out are the stored ones.
So a method is its rule and nothing else.

Where it goes is found from the structure: token embeddings (they see every token; the clock), a list of layers with one
attention each (the first one leaves tokens out), and the language-model head (it puts logits back). Keys and values are met
in transformers' attention interface: each attention module gets a copy of its config that names ours, nothing global is
changed, and the masks are made as before.

A call goes on with what is stored where the tokens so far are the same but for masks that became tokens, with the same mask
and positions; anything else begins anew, so that a new prompt never meets old keys. A sequence that grew at its end (the
windows of `LLaDA2Pipeline`) goes on. A pipeline that announces its runs and tells which sequence each row is
(`MaskedDiffusionPipeline`, `scheduler.current_block`) may leave rows out of a call. Stored at most: keys and values of each
layer and one row of logits, for each token of the batch; freed when an announced run ends, when the next run begins, or when
it is disabled. Calls that need gradients compute everything and store nothing. A bare model whose weights were changed in place
begins anew; weights that were replaced by others (another adapter, another module) are not noticed: disable the cache first.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _compat
from ..enabling import HookConfig
from ._plan import first_input, uninstall
from ._tokens import take
from ._values import is_count

_INTERFACE = "diffusers_ext_lm_cache"
_BACKENDS = ("sdpa", "eager")
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("Wqkv",), ("qkv_proj",), ("attn_qkv",))


# --- what a method says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCall:
    """One call of a language model, as a rule sees it before it decides. Of each row of the batch, `(B, L)`:

    Attributes:
        tokens: the token ids.
        masked: whether a token is the mask.
        prompt: whether it was there, and no mask, when the run began.
        changed: whether it is another one than in the row's call before, or new at the end; for an exact rule also whether
            it sees more or fewer tokens than then.
        step: calls of this run so far; never 0, since a run's first call computes everything.
        old_length: tokens of the call before; less than L where the sequence grew.
        visible: `(1 or B, L, L)`, whether token i sees token j; None where all see all, and for rules that are not exact.
        announced: the tokens that the next commit is going to settle, where somebody told (`announce_positions`).
        shifted: whether the logits of a token come from the token before it.
        block: number of the block that is decoded, where the pipeline tells.
        block_begin: `(B,)`, first token of that block in each row, where the pipeline tells.
        memory: kept for the rule until the run ends. Tensors in it have a row for each row of the batch: `(B, L)` or `(B,)`.
            Where rows were left out of calls, they find zeros.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    prompt: torch.Tensor
    changed: torch.Tensor
    step: int
    old_length: int
    visible: torch.Tensor | None
    announced: torch.Tensor | None
    shifted: bool
    block: int | None
    block_begin: torch.Tensor | None
    memory: dict[str, Any]

    @property
    def grew(self) -> bool:
        return self.tokens.shape[1] > self.old_length

    def sources(self, wanted: torch.Tensor) -> torch.Tensor:
        """The tokens to compute for fresh logits at `wanted`: themselves, and where logits are shifted those before."""
        if not self.shifted:
            return wanted
        wanted = wanted.clone()
        wanted[:, :-1] |= wanted[:, 1:].clone()
        return wanted


class TokenRule(Protocol):
    """Which tokens a call computes.

    Attributes:
        exact: the rule itself answers for tokens that changed in any way; otherwise a run only turns masks into tokens.
    """

    exact: bool

    def recompute(self, call: TokenCall) -> torch.Tensor | None:
        """`(B, L)` bool, or None for all. Rows may differ; a row without any keeps what it has."""
        ...


@dataclass
class LMCacheConfig(HookConfig):
    """Base of the settings of language-model caches; a subclass says by `rule` which tokens a call computes."""

    family: ClassVar[str | None] = "lm_cache"

    def rule(self) -> TokenRule:
        """A new rule with these settings."""
        raise NotImplementedError

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where the cache works on `module`, else the reason why not."""
        found = find_layout(module)
        return found if isinstance(found, str) else None

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"{self.key!r} does not work on {type(module).__name__}: {reason}.")
        rule = self.rule()
        vocabulary = _embeddings(module).weight.shape[0]  # type: ignore[union-attr,index]
        mask = self._mask(module)
        if mask is None and not rule.exact:
            raise ValueError(
                f"`mask_token_id` is None, and the config of this {type(module).__name__} has none; give the id of the "
                "mask token (`tokenizer.mask_token_id`)."
            )
        if mask is not None and mask >= vocabulary:
            raise ValueError(
                f"`mask_token_id` is {mask}; this {type(module).__name__} has tokens 0 to {vocabulary - 1}."
            )
        kinds = set(getattr(module.config, "layer_types", None) or ["one"])  # type: ignore[arg-type]
        if rule.exact and len(kinds) > 1:
            raise ValueError(
                f"{self.key!r} needs layers that all have the same mask; this {type(module).__name__} has {sorted(kinds)}."
            )
        if rule.exact and getattr(module.config, "time_conditioning", False):
            raise ValueError(
                f"{self.key!r} is not exact where each call has another time, as with this {type(module).__name__}."
            )

    def apply(self, module: nn.Module) -> None:
        _install(module, self.key, LMCacheRun(self.rule(), self._mask(module), self._is_shifted(module)))

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        _restore_configs(module)
        uninstall(module, cls.key)

    def _mask(self, module: nn.Module) -> int | None:
        return getattr(module.config, "mask_token_id", None)

    def _is_shifted(self, module: nn.Module) -> bool:
        return bool(getattr(module.config, "shift_logits", False))


@dataclass
class MaskedLMCacheConfig(LMCacheConfig):
    """Base of the settings of caches whose rule asks which tokens are masks.

    Args:
        mask_token_id: the mask token; None takes `mask_token_id` of the model's config.
        shift_logits: whether the logits at a place predict the token after it (Dream's own code), as told to
            `MaskedDiffusionPipeline`: fresh logits then need the token before as well. Models of this package tell it.
    """

    mask_token_id: int | None = None
    shift_logits: bool = False

    def __post_init__(self) -> None:
        check_integer("mask_token_id", self.mask_token_id, 0, optional=True)
        check_bool("shift_logits", self.shift_logits)

    def _mask(self, module: nn.Module) -> int | None:
        return super()._mask(module) if self.mask_token_id is None else self.mask_token_id

    def _is_shifted(self, module: nn.Module) -> bool:
        return self.shift_logits or super()._is_shifted(module)


def check_integer(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `least`, or, where `optional`, None."""
    if optional and value is None:
        return
    if not is_count(value, least):
        allowed = f"an integer of at least {least}" + (", or None" if optional else "")
        raise ValueError(f"`{name}` is {value!r}; it must be {allowed}.")


def check_bool(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; it must be True or False.")


def announce_positions(target: Any, positions: torch.Tensor) -> None:
    """Tell the language-model caches of `target` which tokens the commit after its next call will settle.

    For samplers that know it beforehand (a decoding order fixed in advance, from left to right). It holds for one call.

    Args:
        target: a model, or a pipeline.
        positions: bool, `(batch, length)`.

    Raises:
        ValueError: `positions` is not bool or has another number of dimensions.
    """
    from ..enabling import status

    if positions.dtype != torch.bool or positions.ndim != 2:
        raise ValueError(
            f"`positions` is {positions.dtype} of shape {tuple(positions.shape)}; it must be bool, (batch, length)."
        )
    for entry in status(target):
        if isinstance(entry.config, LMCacheConfig):
            model = target if entry.component is None else target.components[entry.component]
            run = run_of(_compat.unwrap(model), entry.key)
            run.announced = positions


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class _Store:
    """What the calls of one run left behind: of `len(names)` sequences, as long as the longest call."""

    names: list[int]
    tokens: torch.Tensor  # -1 where a sequence was not called with so many
    prompt: torch.Tensor
    seen: torch.Tensor  # how many tokens each sees
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    versions: tuple[int, ...]  # of the weights: each change in place counts one up
    step: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # (N, heads, L, head size) by layer
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None  # (N, L, vocabulary)
    memory: dict[str, Any] = field(default_factory=dict)

    def grow(self, length: int) -> None:
        """Make room for longer sequences."""

        def longer(x: torch.Tensor, dim: int, value: int = 0) -> torch.Tensor:
            shape = list(x.shape)
            shape[dim] = length - shape[dim]
            return torch.cat([x, x.new_full(shape, value)], dim)

        self.tokens, self.prompt, self.seen = longer(self.tokens, 1, -1), longer(self.prompt, 1), longer(self.seen, 1)
        self.keys = {layer: longer(x, 2) for layer, x in self.keys.items()}
        self.values = {layer: longer(x, 2) for layer, x in self.values.items()}
        self.logits = None if self.logits is None else longer(self.logits, 1)
        self.memory = {
            name: longer(x, 1) if torch.is_tensor(x) and x.ndim == 2 else x for name, x in self.memory.items()
        }

    def join(self, names: list[int], tokens: torch.Tensor, prompt: torch.Tensor) -> None:
        """Take sequences in that were in no call so far."""

        def more(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.new_zeros((len(names), *x.shape[1:]))])

        count, length = len(self.names), tokens.shape[1]
        if length > self.tokens.shape[1]:
            self.grow(length)
        self.names = [*self.names, *names]
        self.tokens, self.prompt, self.seen = more(self.tokens), more(self.prompt), more(self.seen)
        self.tokens[count:] = -1
        self.prompt[count:, :length] = prompt
        self.keys = {layer: more(x) for layer, x in self.keys.items()}
        self.values = {layer: more(x) for layer, x in self.values.items()}
        self.logits = None if self.logits is None else more(self.logits)
        self.memory = {name: more(x) if torch.is_tensor(x) else x for name, x in self.memory.items()}


@dataclass(frozen=True)
class _Part:
    """The part of what is stored that a call is about: some of the sequences, and their first tokens.

    Attributes:
        rows: `(B,)`, places in the store; None for all.
        length: L.
    """

    rows: torch.Tensor | None
    length: int

    def read(self, stored: torch.Tensor, dim: int | None = 1) -> torch.Tensor:
        """The part of a tensor whose tokens lie along `dim` (None: it has none); a view where all rows are called."""
        view = stored if dim is None else stored.narrow(dim, 0, self.length)
        return view if self.rows is None else view[self.rows]

    def write(self, stored: torch.Tensor, value: torch.Tensor, dim: int | None = 1) -> None:
        view = stored if dim is None else stored.narrow(dim, 0, self.length)
        view[slice(None) if self.rows is None else self.rows] = value


@dataclass(frozen=True)
class _Chosen:
    """The tokens that a call computes.

    Attributes:
        index: `(B, Q)`, ascending; rows that compute fewer than Q repeat their last.
        kept: `(B,)`, rows that compute nothing and keep what they have (their `index` is 0); None where there are none.
    """

    index: torch.Tensor
    kept: torch.Tensor | None

    def put(self, part: _Part, stored: torch.Tensor, fresh: torch.Tensor, dim: int) -> torch.Tensor:
        """Write `fresh`, of Q tokens along `dim`, into what is stored; returns all of the part."""
        shape = [1] * fresh.ndim
        shape[0], shape[dim] = self.index.shape
        index = self.index.view(shape).expand(fresh.shape)
        found = part.read(stored, dim)
        if self.kept is not None:
            kept = self.kept.view([-1] + [1] * (fresh.ndim - 1))
            fresh = torch.where(kept, found.gather(dim, index), fresh)
        found.scatter_(dim, index, fresh.to(found.dtype))
        if part.rows is not None:
            part.write(stored, found, dim)
        return found


class LMCacheRun:
    """What one model keeps between its calls, shared by all its hooks."""

    def __init__(self, rule: TokenRule, mask_token_id: int | None, shifted: bool) -> None:
        self.rule, self.mask_token_id, self.shifted = rule, mask_token_id, shifted
        self.num_layers = 0
        self.parameters: Callable[[], Iterable[nn.Parameter]] = tuple  # of the model
        self.scheduler: Any = None
        self.end()

    def begin(self, num_steps: int | None, scheduler: Any = None) -> None:
        """A pipeline starts a run, and will say when it ends."""
        self.end()
        self.scheduler = scheduler

    def end(self) -> None:
        """Forget everything."""
        self.scheduler = None
        self.store: _Store | None = None
        self.announced: torch.Tensor | None = None
        self._close()

    def _versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.parameters() if not p.is_inference())

    def _close(self) -> None:
        self.tokens: torch.Tensor | None = None
        self.part: _Part | None = None
        self.chosen: _Chosen | None = None
        self.is_open = False
        self.met = 0
        self.trimmed: dict[int, tuple[Any, Any]] = {}

    # A call goes: receive, open, (trim, attend) of each layer, close. One that is broken off is never closed.

    @torch.compiler.disable
    def receive(self, tokens: Any) -> None:
        """The token embeddings are about to run."""
        if self.is_open or self.tokens is not None:  # the call before was broken off
            self.store = None
        self._close()
        self.tokens = tokens

    @torch.compiler.disable
    def open(self, hidden: torch.Tensor, mask: Any, positions: torch.Tensor | None) -> None:
        """The first layer is about to run with all tokens: decide which ones it gets."""
        tokens, announced, self.announced = self.tokens, self.announced, None
        if tokens is None or tokens.shape != hidden.shape[:2]:
            raise RuntimeError(
                "A language-model cache needs the model to be called with `input_ids` of shape (batch, length), all in one "
                "call; disable the cache to call it with `inputs_embeds` or past keys."
            )
        if announced is not None and announced.shape != tokens.shape:
            raise ValueError(
                f"`positions` announced have shape {tuple(announced.shape)}, and the tokens {tuple(tokens.shape)}."
            )
        self.is_open = True
        if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in self.parameters())):
            self.store = None
            return
        block = getattr(self.scheduler, "current_block", None)
        names = list(range(len(tokens))) if block is None else block.rows.tolist()
        length, masked = tokens.shape[1], torch.zeros_like(tokens, dtype=torch.bool)
        if self.mask_token_id is not None:
            masked = tokens == self.mask_token_id
        old_length = 0 if self.store is None else self.store.tokens.shape[1]
        self.part = self._goes_on(names, tokens, masked, mask, positions, named=block is not None)
        store = self.store
        visible = _visible(mask) if self.rule.exact else None
        seen = torch.full_like(tokens, length) if visible is None else visible.sum(2).expand_as(tokens)
        if self.part is None or store is None:
            self.store = _Store(names, tokens.clone(), ~masked, seen.clone(), mask, positions, self._versions())
            self.part = _Part(None, length)
            return
        if length > store.tokens.shape[1]:
            store.grow(length)
        part, store.step = self.part, store.step + 1
        memory = {
            name: part.read(x, 1 if x.ndim == 2 else None) if torch.is_tensor(x) else x
            for name, x in store.memory.items()
        }
        changed = tokens != part.read(store.tokens)
        if self.rule.exact:
            changed |= seen != part.read(store.seen)
        call = TokenCall(
            tokens, masked, part.read(store.prompt), changed, store.step, old_length, visible, announced, self.shifted,
            getattr(block, "number", None), None if block is None else block.columns[:, 0], memory,
        )  # fmt: skip
        wanted = self.rule.recompute(call)
        if wanted is not None:
            wanted = wanted | (part.read(store.tokens) < 0)  # what no call had so far
        for name, value in memory.items():
            self._remember(name, value)
        part.write(store.tokens, tokens)
        part.write(store.seen, seen)
        store.mask, store.positions = mask, positions
        self.chosen = None if wanted is None else _choose(wanted)

    def _goes_on(
        self,
        names: list[int],
        tokens: torch.Tensor,
        masked: torch.Tensor,
        mask: Any,
        positions: torch.Tensor | None,
        named: bool,
    ) -> _Part | None:
        """Where these tokens go on with what is stored, or None. One wait for the device."""
        store, length = self.store, tokens.shape[1]
        if store is None or store.logits is None or tokens.device != store.tokens.device:
            return None
        if named:  # the pipeline tells when a run begins: mask and positions are what they were
            new = [i for i, name in enumerate(names) if name not in store.names]
            if len(new) == len(names):
                return None
            if new:
                store.join([names[i] for i in new], tokens[new], ~masked[new])
            rows = [store.names.index(name) for name in names]
            all_rows = names == store.names
            part = _Part(None if all_rows else torch.tensor(rows, device=tokens.device), length)
        elif names != store.names or length < store.tokens.shape[1]:
            return None
        else:
            part = _Part(None, length)
        old_length = min(length, store.tokens.shape[1])
        old = _Part(part.rows, old_length).read(store.tokens)
        same = torch.ones((), dtype=torch.bool, device=tokens.device)
        if not self.rule.exact:
            same = ((tokens[:, :old_length] == old) | (old == self.mask_token_id) | (old < 0)).all()
        if not named:
            if store.versions != self._versions():
                return None
            if (positions is None) != (store.positions is None):
                return None
            if positions is not None and store.positions is not None:
                same = same & _equal(positions[:, :old_length], store.positions)
            same = same & _same_mask(store.mask, mask, old_length)
        return part if bool(same) else None

    def _remember(self, name: str, value: Any) -> None:
        store, part = self.store, self.part
        assert store is not None and part is not None
        if not torch.is_tensor(value):
            store.memory[name] = value
            return
        if name not in store.memory:
            shape = store.tokens.shape[: value.ndim]
            store.memory[name] = value.new_zeros(shape)
        part.write(store.memory[name], value, 1 if value.ndim == 2 else None)

    @torch.compiler.disable
    def trim(self, name: str, value: Any) -> Any:
        """The rows of a layer's argument for the tokens that are computed."""
        if self.chosen is None or value is None:
            return value
        if isinstance(value, tuple):
            return tuple(self.trim(name, part) for part in value)
        if id(value) not in self.trimmed:  # the same mask and positions go to every layer
            self.trimmed[id(value)] = value, _take(value, self.chosen.index, name)
        return self.trimmed[id(value)][1]

    @torch.compiler.disable
    def attend(self, layer: int, module: nn.Module, attend: Any, query, key, value, attention_mask, **kwargs):
        """Attention of the computed tokens to all. `attend` is the model's own attention function."""
        self.met += 1
        store, part, chosen = self.store, self.part, self.chosen
        if store is None or part is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        if chosen is None:
            for stored, fresh in ((store.keys, key), (store.values, value)):
                if part.rows is None and part.length == store.tokens.shape[1]:
                    stored[layer] = fresh.detach().clone(memory_format=torch.contiguous_format)
                else:
                    part.write(stored[layer], fresh.detach(), 2)
            return attend(module, query, key, value, attention_mask, **kwargs)
        keys = chosen.put(part, store.keys[layer], key.detach(), 2)
        values = chosen.put(part, store.values[layer], value.detach(), 2)
        kwargs["is_causal"] = False
        return attend(module, query, keys, values, attention_mask, **kwargs)

    @torch.compiler.disable
    def close(self, logits: torch.Tensor) -> torch.Tensor:
        """The head has run: logits of all tokens."""
        if not self.is_open:
            return logits
        if self.met != self.num_layers:
            met, self.store = self.met, None
            self._close()
            raise RuntimeError(
                f"{met} of {self.num_layers} attentions went through transformers' attention interface; a language-model "
                "cache needs all of them to."
            )
        store, part, chosen = self.store, self.part, self.chosen
        if store is not None and part is not None:
            if chosen is not None:
                assert store.logits is not None
                logits = chosen.put(part, store.logits, logits.detach(), 1).clone()  # callers write into logits
            elif store.logits is None or (part.rows is None and part.length == store.tokens.shape[1]):
                store.logits = logits.detach().clone()
            else:
                part.write(store.logits, logits.detach(), 1)
        self._close()
        return logits


def _choose(wanted: torch.Tensor) -> _Chosen | None:
    counts = wanted.sum(1)
    least, most = torch.stack([counts.min(), counts.max()]).tolist()  # the shape of what follows: waits for the device
    if least == wanted.shape[1]:
        return None
    most = max(most, 1)  # layers get no empty sequence
    index = torch.argsort(~wanted, dim=1, stable=True)[:, :most]
    last = index.gather(1, (counts - 1).clamp(min=0)[:, None])
    places = torch.arange(most, device=wanted.device)
    index = torch.where(places < counts[:, None], index, torch.where(counts[:, None] > 0, last, 0))
    return _Chosen(index, counts == 0 if least == 0 else None)


def _take(value: torch.Tensor, index: torch.Tensor, name: str) -> torch.Tensor:
    batch = len(index)
    if name == "attention_mask":  # (1 or B, heads, L or 1, L)
        if value.ndim != 4:
            raise RuntimeError(f"A layer got a mask of shape {tuple(value.shape)}; four dimensions are known.")
        if value.shape[2] == 1:
            return value
        value = value.expand(batch, -1, -1, -1)
        return value.gather(2, index[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))
    if value.ndim == 2:  # position ids
        return value.expand(batch, -1).gather(1, index)
    return take(value.expand(batch, -1, -1), index)


def _visible(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(1)


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return (a == b).all()


def _same_mask(old: Any, new: Any, length: int) -> torch.Tensor | bool:
    """Whether the first `length` tokens see the same of each other as before. None: all see all."""
    if old is None and new is None:
        return True
    if old is None or new is None:
        seen = _visible(new if old is None else old)
        assert seen is not None
        return seen[:, :length, :length].all()
    return _equal(new[:, :, :length, :length], old)


# --- hooks -----------------------------------------------------------------------------------------------------------


class _ClockHook(ModelHook):
    """On the token embeddings, which see every token."""

    _is_stateful = True

    def __init__(self, run: LMCacheRun) -> None:
        super().__init__()
        self.run = run

    def pre_forward(self, module, *args, **kwargs):
        self.run.receive(first_input(args, kwargs))
        return args, kwargs

    def reset_state(self, module):
        self.run.end()
        return module


class _LayerHook(ModelHook):
    """On each layer: its arguments for the tokens that are computed. The first layer gets all tokens, and so decides."""

    _names = ("attention_mask", "position_embeddings", "position_ids")

    def __init__(self, run: LMCacheRun, layer: int, arguments: tuple[str, ...]) -> None:
        super().__init__()
        self.run, self.layer, self.arguments = run, layer, arguments

    @torch.compiler.disable
    def pre_forward(self, module, *args, **kwargs):
        named = dict(zip(self.arguments, args, strict=False))
        hidden = kwargs.pop("hidden_states") if not args else args[0]
        given = {name: named.get(name, kwargs.get(name)) for name in self._names}
        if self.layer == 0:
            rotary = given["position_embeddings"]
            positions = rotary[0] if isinstance(rotary, tuple) else given["position_ids"]
            self.run.open(hidden, given["attention_mask"], positions)
            hidden = self.run.trim("hidden_states", hidden)
        args = tuple(self.run.trim(n, v) if n in given else v for n, v in zip(self.arguments, args, strict=False))
        kwargs = {n: self.run.trim(n, v) if n in given else v for n, v in kwargs.items()}
        return (hidden, *args[1:]), kwargs


class _HeadHook(ModelHook):
    def __init__(self, run: LMCacheRun) -> None:
        super().__init__()
        self.run = run

    def post_forward(self, module, output):
        return self.run.close(output)


def _attention(module, query, key, value, attention_mask=None, **kwargs):
    """The attention function that a copied config names. It finds its run there."""
    run, layer, config = module.config.diffusers_ext_lm_cache
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return run.attend(layer, module, attend, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_INTERFACE, _attention)


def _install(root: nn.Module, key: str, run: LMCacheRun) -> None:
    layout = find_layout(root)
    assert isinstance(layout, Layout)
    run.num_layers, run.parameters = len(layout.layers), _compat.unwrap(root).parameters
    name = f"diffusers_ext.{key}"
    _compat.attach_hook(layout.embeddings, _ClockHook(run), f"{name}.clock")
    for i, (layer, attention) in enumerate(zip(layout.layers, layout.attentions, strict=True)):
        arguments = tuple(p.name for p in inspect.signature(type(layer).forward).parameters.values())[1:]
        _compat.attach_hook(layer, _LayerHook(run, i, arguments), name)
        original: Any = attention.config
        attention.config = copy.copy(original)
        attention.config._attn_implementation_internal = _INTERFACE  # to _compat
        attention.config.diffusers_ext_lm_cache = (run, i, original)
    _compat.attach_hook(layout.head, _HeadHook(run), name)
    _compat.announce_resets(root)


def _restore_configs(root: nn.Module) -> None:
    for module in _compat.unwrap(root).modules():
        ours = getattr(module.__dict__.get("config"), "diffusers_ext_lm_cache", None)
        if ours is not None:
            module.config = ours[2]


def run_of(root: nn.Module, key: str) -> LMCacheRun:
    """The run of language-model cache `key`, which is on, on `root`."""
    hooks = _embeddings(root).__dict__["_diffusers_hook"].hooks
    return hooks[f"diffusers_ext.{key}.clock"].run


# --- structure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The modules of a language model that are hooked."""

    embeddings: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    head: nn.Module


def find_layout(model: nn.Module) -> Layout | str:
    """The layout of a language model without causal attention, or the reason why a cache cannot go on it."""
    embeddings = _embeddings(model)
    if embeddings is None:
        return "it is no language model (it has no token embeddings that `get_input_embeddings` returns)"
    head = _call(model, "get_output_embeddings")
    if not isinstance(head, nn.Module):
        return "it has no language-model head that `get_output_embeddings` returns"
    if not any(getattr(module, "_supports_attention_backend", False) for module in model.modules()):
        return "its attention does not go through transformers' attention interface"
    found = [layers for layers in map(_layers, model.modules()) if layers]
    if len(found) != 1:
        return f"it has {len(found)} lists of layers with one attention each, and one is needed"
    layers, attentions = zip(*found[0], strict=True)
    for attention in attentions:
        if getattr(attention, "is_causal", False):
            return "its attention is causal: a token never sees a later one, and its own cache is exact"
        backend = getattr(attention.config, "_attn_implementation", None)
        if backend not in (*_BACKENDS, _INTERFACE):
            return (
                f"its attention is {backend!r}; load it with `attn_implementation` {' or '.join(map(repr, _BACKENDS))}"
            )
    return Layout(embeddings, layers, attentions, head)


def _call(model: nn.Module, name: str) -> Any:
    function = getattr(model, name, None)
    try:
        return function() if callable(function) else None
    except (NotImplementedError, AttributeError):  # how transformers says that there are none
        return None


def _embeddings(model: nn.Module) -> nn.Module | None:
    found = _call(_compat.unwrap(model), "get_input_embeddings")
    return found if isinstance(found, nn.Module) else None


def _layers(module: nn.Module) -> list[tuple[nn.Module, nn.Module]] | None:
    """The layers of a list, each with its attention, where that is what it is."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    found = [(layer, list(_attentions(layer))) for layer in module]
    return [(layer, own[0]) for layer, own in found] if all(len(own) == 1 for _, own in found) else None


def _attentions(layer: nn.Module) -> Iterator[nn.Module]:
    for module in layer.modules():
        named = any(all(isinstance(getattr(module, n, None), nn.Module) for n in names) for names in _PROJECTIONS)
        if named and hasattr(module, "config"):
            yield module
