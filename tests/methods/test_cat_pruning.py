"""CAT Pruning, by the five proofs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

import diffusers_ext as dx
from diffusers_ext.hooks import cat_pruning
from diffusers_ext.hooks._plan import find_run
from diffusers_ext.hooks.cat_pruning import (
    Tokens,
    choose_tokens,
    cluster_scores,
    put_on,
    token_clusters,
    touching_clusters,
)
from diffusers_ext.metrics import count_macs
from tests.common import models
from tests.common.suite import CommonCase
from tests.transformers import TRANSFORMERS
from tests.unets import fill

# The first step that computes some tokens only is number 3 and later, unless it begins before step 0.
COMMON = CommonCase(
    settings=[{"start_step": 2, "keep_ratio": 0.5, "fresh_share": 0.5}],
    make=lambda model: dx.CATPruningConfig(start_step=-1, keep_ratio=0.5),
)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "cat_pruning.json").read_text())
SUPPORTED = (
    "AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "DiTTransformer2DModel", "FluxTransformer2DModel",
    "PixArtTransformer2DModel", "SD3Transformer2DModel",
)  # fmt: skip

exact = pytest.mark.proof("exact")


def pruning(**settings) -> dx.CATPruningConfig:
    return dx.CATPruningConfig(**{"start_step": -1, "keep_ratio": 0.3, **settings})


@contextlib.contextmanager
def products(model: nn.Module):
    """What every linear layer really computed, call after call, by name: its outputs."""
    seen: dict[str, list[torch.Tensor]] = {}
    names = {module.weight.data_ptr(): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = nn.functional.linear

    def watched(x, weight, bias=None):
        output = linear(x, weight, bias)
        seen.setdefault(names[weight.data_ptr()], []).append(output)
        return output

    nn.functional.linear = watched
    try:
        yield seen
    finally:
        nn.functional.linear = linear


def num_rows(seen: dict[str, list[torch.Tensor]]) -> dict[str, list[int]]:
    return {name: [output.shape[1] for output in outputs] for name, outputs in seen.items()}


def state_of(model: nn.Module):
    """The state of its last call."""
    return find_run(model, "cat_pruning").state


# --- tokens of 64 x 64, as the authors' code has them ----------------------------------------------------------------


def waves(seed: int, *shape: int) -> torch.Tensor:
    """Numbers by formula that look like noise."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(count * 12.9898 + 78.233 * (seed + 1)).mul(43758.5453).frac().reshape(shape).float()


def noises(step: int) -> torch.Tensor:
    """Noise of both halves, `(2, 4096, 4)`: each place moves at a speed of its own."""
    row, column = grid().float().unbind(1)
    speed = 0.2 + torch.sin(row / 9) ** 2 * torch.cos(column / 7) ** 2
    return waves(0, 2, 4096, 4) + (step * speed)[:, None] * waves(1, 2, 4096, 4) + 0.05 * waves(2 + step, 2, 4096, 4)


def grid(side: int = 64) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


def distinct_counts() -> torch.Tensor:
    """Counts of 4096 tokens of which no two are equal, halved once and one more for some."""
    return (torch.arange(4096) * 1583 % 4096).float() / 4096


def packed(tokens: torch.Tensor, number: int) -> str:
    """A set of tokens as hexadecimal digits."""
    bits = torch.zeros(number, dtype=torch.bool)
    bits[tokens.flatten()] = True
    return f"{int(''.join('1' if bit else '0' for bit in bits.tolist()), 2):x}"


def unpacked(digits: str, number: int) -> torch.Tensor:
    return torch.tensor([i for i, bit in enumerate(f"{int(digits, 16):0{number}b}") if bit == "1"])


# --- a small model with S given, as the authors' attention and feed-forward parts take it ------------------------------


def sd3_inputs(step: int) -> dict[str, torch.Tensor]:
    """Both halves of a call, 64 tokens."""
    return {
        "hidden_states": (waves(3, 1, 4, 8, 8) + 0.2 * step * waves(4, 1, 4, 8, 8)).repeat(2, 1, 1, 1),
        "encoder_hidden_states": waves(5, 2, 3, 16),
        "pooled_projections": waves(6, 2, 16),
        "timestep": torch.full((2,), 900.0 - 40 * step),
    }


def given_tokens(step: int) -> torch.Tensor:
    """S of a step: 19 of 64."""
    return ((torch.arange(19) * 7 + 11 * step) % 64).sort().values


def given_noise(step: int, noise: torch.Tensor) -> list[float]:
    """A few numbers of the fresh noise of the conditional half."""
    noise = noise.double()
    return [noise.mean().item(), noise.std().item(), *noise[::9, 0].tolist()]


# --- exact: what a step computes --------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_all_tokens_is_bit_equal(name):
    model = TRANSFORMERS[name].make()
    plain = TRANSFORMERS[name].run(model, 4)
    dx.apply_cat_pruning(model, pruning(keep_ratio=1.0))
    assert all(torch.equal(a, b) for a, b in zip(TRANSFORMERS[name].run(model, 4), plain, strict=True))
    assert state_of(model).mode == "some"


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_late_start_is_bit_equal(name):
    model = TRANSFORMERS[name].make()
    plain = TRANSFORMERS[name].run(model, 4)
    dx.enable(model, pruning(start_step=0))
    found = TRANSFORMERS[name].run(model, 4)
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [True] * 3 + [False]
    dx.enable(model, pruning(start_step=1))
    assert all(torch.equal(a, b) for a, b in zip(TRANSFORMERS[name].run(model, 4), plain, strict=True))


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_row_is_put_where_it_belongs(name):
    """Of the same input again and again, stored rows are as good as fresh ones, whatever the tokens."""
    model = TRANSFORMERS[name].make()
    plain = TRANSFORMERS[name].predict(model)
    for keep_ratio in (0.3, 0.5):
        dx.enable(model, pruning(keep_ratio=keep_ratio))
        for _ in range(4):
            torch.testing.assert_close(TRANSFORMERS[name].predict(model), plain, rtol=1e-5, atol=1e-5)


@exact
def test_masks_get_the_same_rows():
    """Chroma's pipeline masks the prompt out for every query."""
    chroma = TRANSFORMERS["ChromaTransformer2DModel"]
    model, mask = chroma.make(), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 1:3] = False
    call = {**chroma.call(model), "attention_mask": mask, "return_dict": False}
    with torch.no_grad():
        plain = model(**call)[0]
        assert (plain - chroma.predict(model)).abs().max() > 1e-2, "the mask matters"
        dx.enable(model, pruning())
        for _ in range(4):
            torch.testing.assert_close(model(**call)[0], plain, rtol=1e-5, atol=1e-5)


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_of_every_layer(name):
    """All image tokens in `start_step + 3` steps and |S| in the others; of text all, always."""
    model, steps, start = TRANSFORMERS[name].make(), 5, 0
    with products(model) as seen:
        TRANSFORMERS[name].predict(model)
    plain = {name: rows[0] for name, rows in num_rows(seen).items()}
    tokens = plain[cat_pruning._tokens.noise_module(model)]
    dx.enable(model, pruning(start_step=start))
    with products(model) as seen:
        TRANSFORMERS[name].run(model, steps)
    found, budget, checked = num_rows(seen), max(1, int(0.3 * tokens)), 0
    for layer, rows in found.items():
        parts = layer.split(".")
        inside = len(parts) > 2 and parts[0].endswith("blocks") and "norm" not in parts[2]
        aside = parts[2:3] == ["ff_context"] or parts[-1].startswith(("add_", "to_add")) or "context" in layer
        to_text = "attn2.to_k" in layer or "attn2.to_v" in layer
        if inside and not aside and not to_text:
            text = plain[layer] - tokens
            assert rows == [text + tokens] * (start + 3) + [text + budget] * (steps - start - 3), layer
            checked += 1
        else:
            assert set(rows) == {plain[layer]}, layer
    assert checked >= 5 * len(cat_pruning._blocks.block_names(model))  # Q, K, V and two more at least


@exact
def test_multiply_accumulates_of_a_step():
    """Of a DiT of width D with N tokens, a token left out saves 12 D^2 + 2 N D a block."""
    dit = TRANSFORMERS["DiTTransformer2DModel"]
    model, width = dit.make(), 8
    full = count_macs(dit.predict, model, 0, 1)
    tokens, blocks = 16, len(model.transformer_blocks)
    for keep_ratio in (0.25, 0.5):
        dx.enable(model, pruning(keep_ratio=keep_ratio))
        dit.run(model, 2, batch=1)
        found = count_macs(dit.predict, model, 2, 1)
        assert full - found == blocks * tokens * (1 - keep_ratio) * (12 * width**2 + 2 * tokens * width)


def expected_rows(state, length: int) -> torch.Tensor:
    """Chosen image tokens; in a sequence that begins with text, all of that too."""
    chosen, text = state.memory["rows"], length - state.memory["num_tokens"]
    return torch.tensor([[*range(text), *(text + j for j in row)] for row in chosen.tolist()])


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_stored_is_fresh_where_computed_and_old_elsewhere(name):
    model = TRANSFORMERS[name].make()
    dx.enable(model, pruning(keep_ratio=0.5))
    block = cat_pruning._blocks.block_names(model)[-1]
    attention = next(part for part in ("attn", "attn1") if hasattr(model.get_submodule(block), part))
    layers = [f"{block}.{attention}.{part}" for part in ("to_k", "to_v")]
    if hasattr(model.get_submodule(block), "proj_mlp"):
        layers.append(f"{block}.proj_out")
    hooks = [model.get_submodule(layer)._diffusers_hook.hooks["diffusers_ext.cat_pruning"] for layer in layers]
    TRANSFORMERS[name].run(model, 2)
    for step in range(2, 4):
        state = state_of(model)
        before = [state.slots[hook.slot].value.clone() for hook in hooks]
        rows = [expected_rows(state, value.shape[1]) for value in before]
        with products(model) as seen:
            TRANSFORMERS[name].predict(model, step)
        for layer, hook, old, index in zip(layers, hooks, before, rows, strict=True):
            stored, (fresh,) = state.slots[hook.slot].value, seen[layer]
            assert torch.equal(cat_pruning.take(stored, index), fresh) and not torch.equal(stored, old)
            assert torch.equal(stored, cat_pruning.put(old, index, fresh))


@exact
def test_noise_of_tokens_left_out_is_that_of_the_step_before():
    dit = TRANSFORMERS["DiTTransformer2DModel"]
    model = dit.make()
    dx.enable(model, pruning())
    before = dit.run(model, 2)[-1]
    for step in range(2, 7):
        chosen = state_of(model).memory["rows"]
        after = dit.predict(model, step)
        changed = (after != before).reshape(2, 4, 4, 2, 4, 2).any(dim=(1, 3, 5)).flatten(1)
        expected = torch.zeros(2, 16, dtype=torch.bool).scatter(1, chosen, True)
        assert torch.equal(changed, expected)
        before = after


# --- exact: which tokens ----------------------------------------------------------------------------------------------


def some_tokens(seed: int, side: int, clusters: int, pictures: int = 2, counted: bool = True) -> Tokens:
    generator, number = torch.Generator().manual_seed(seed), side * side
    labels = torch.randint(clusters, (pictures, number), generator=generator)
    return Tokens(
        torch.randn(pictures, number, 3, generator=generator),
        labels,
        touching_clusters(labels, grid(side), clusters),
        torch.randperm(number, generator=generator),
        torch.rand(pictures, number, generator=generator).round(decimals=1) if counted else None,
    )


@exact
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("fresh_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("side", "budget"), [(2, 1), (7, 14), (8, 64), (16, 77)])
def test_the_budget_is_kept(side, budget, fresh_share, counted):
    for clusters in (1, 3, 20):
        chosen = choose_tokens(some_tokens(clusters, side, clusters, counted=counted), budget, fresh_share)
        assert chosen.shape == (2, budget) and (chosen.diff(dim=1) > 0).all()
        assert chosen.min() >= 0 and chosen.max() < side * side


def slow_choice(tokens: Tokens, picture: int, budget: int, fresh_share: float) -> list[int]:
    """The rule for steps after the first choice, token by token."""
    moved = tokens.change[picture].norm(dim=-1).tolist()
    counts, order = tokens.counts[picture].tolist(), tokens.order.tolist()
    stalest = sorted(range(len(moved)), key=lambda j: (counts[j], order.index(j)))
    members: dict[int, list[int]] = {}
    for j, label in enumerate(tokens.labels[picture].tolist()):
        members.setdefault(label, []).append(j)
    score = {k: tokens.change[picture][js].amax(0).norm().item() for k, js in members.items()}
    fresh: list[int] = []
    for i, k in enumerate(sorted(members, key=lambda k: -score[k])):
        quota = min(max(1, int(budget // 5 * fresh_share)) * max(1, 3 - i), len(members[k]))
        top = sorted(members[k], key=lambda j: -moved[j])[:quota]
        old = sorted(members[k], key=stalest.index)[: quota // 2 if i else 0]
        fresh += top + [j for j in old if j not in top]
        if len(fresh) > budget * fresh_share:
            break
    chosen = fresh[: int(budget * fresh_share)]
    chosen += [j for j in stalest[: int(budget * (1 - fresh_share))] if j not in chosen]
    chosen += [j for j in stalest if j not in chosen][: budget - len(chosen)]
    return sorted(chosen)


@exact
@pytest.mark.parametrize(("side", "budget"), [(4, 5), (8, 19), (8, 40), (12, 60)])
def test_the_rule_token_by_token(side, budget):
    for seed in range(6):
        for share in (0.0, 0.25, 0.5, 1.0):
            tokens = some_tokens(seed, side, 1 + 3 * seed)
            expected = [slow_choice(tokens, picture, budget, share) for picture in (0, 1)]
            assert choose_tokens(tokens, budget, share).tolist() == expected


@exact
@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.6])
def test_every_token_is_computed_after_some_steps(keep_ratio):
    """Of the tokens left out, int(0.75 |S|) take turns: none waits longer than the others need."""
    number, budget = 144, int(keep_ratio * 144)
    tokens = some_tokens(0, 12, 8, counted=False)
    longest = -(-number // int(0.75 * budget))
    waiting = torch.zeros(2, number, dtype=torch.long)
    for step in range(3 * longest):
        chosen = choose_tokens(tokens, budget, 0.25)
        waiting = (waiting + 1).scatter(1, chosen, 0)
        assert waiting.max() < longest
        change = torch.randn(2, number, 3, generator=torch.Generator().manual_seed(step))
        tokens = dataclasses.replace(tokens, change=change, counts=tokens.counted(chosen, 0.5))


@exact
def test_counts_halve_and_grow():
    tokens = some_tokens(0, 2, 1, pictures=1, counted=False)
    for chosen, expected in (([0, 2], [1, 0, 1, 0]), ([2, 3], [0.5, 0, 1.5, 1]), ([0, 1], [1.25, 1, 0.75, 0.5])):
        tokens = dataclasses.replace(tokens, counts=tokens.counted(torch.tensor([chosen]), 0.5))
        assert tokens.counts.tolist() == [expected]


@exact
def test_clusters_that_touch_and_their_scores():
    labels = torch.tensor([[0, 0, 1, 2, 2, 1, 3, 3, 3]])
    near = touching_clusters(labels, grid(3), 5)  # the fifth has no tokens
    pairs = {(i, j) for i, j in near[0].nonzero().tolist() if i < j}
    assert pairs == {(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)} and near[0].diagonal().all()
    change = torch.arange(9.0)[None, :, None] * torch.tensor([1.0, -1.0])
    tokens = Tokens(change, labels, near, torch.arange(9))
    largest = torch.tensor([[1.0, 0], [5, -2], [4, -3], [8, -6]])
    first = []
    for k in range(4):
        beside = largest[near[0, k, :4]]
        first.append((2 * beside.mean(0) + beside.amax(0)).norm().item())
    torch.testing.assert_close(cluster_scores(tokens), torch.tensor([[*first, -1]]))
    later = dataclasses.replace(tokens, counts=torch.zeros(1, 9))
    torch.testing.assert_close(cluster_scores(later), torch.tensor([[*largest.norm(dim=1).tolist(), -1]]))


@exact
def test_clusters_follow_places_and_noise():
    where = grid(8)
    noise = torch.zeros(1, 64, 4)
    halves = token_clusters(noise, where / torch.tensor([8, 1000]), 2)[0].reshape(8, 8)
    assert len(halves[:4].unique()) == len(halves[4:].unique()) == 1 and halves[0, 0] != halves[7, 0]
    noise[:, ::2] = 100
    apart = token_clusters(noise, where / 8, 2)[0]
    assert len(apart[::2].unique()) == len(apart[1::2].unique()) == 1 and apart[0] != apart[1]
    assert token_clusters(noise[:, :3], where[:3] / 8, 20).unique().tolist() == [0, 1, 2]
    both = token_clusters(torch.cat([noise, waves(0, 1, 64, 4)]), where / 8, 5)
    assert torch.equal(both[1:], token_clusters(waves(0, 1, 64, 4), where / 8, 5)), "each picture by itself"


@exact
@pytest.mark.parametrize(("name", "conditional"), [("SD3Transformer2DModel", 1), ("DiTTransformer2DModel", 0)])
def test_guidance_shares_the_tokens_of_the_conditional_half(name, conditional):
    """StableDiffusion3Pipeline has the conditional half last, DiTPipeline first."""
    stock = TRANSFORMERS[name]
    both, alone = stock.make(), stock.make()
    dx.enable(both, pruning())
    dx.enable(alone, pruning())
    for step in range(6):
        call = {**stock.call(both, step, batch=4), "return_dict": False}
        call["hidden_states"] = stock.call(both, step, batch=2)["hidden_states"].repeat(2, 1, 1, 1)
        part = {key: value.chunk(2)[conditional] if torch.is_tensor(value) else value for key, value in call.items()}
        with torch.no_grad():
            found, expected = both(**call)[0], alone(**part)[0]
        torch.testing.assert_close(found.chunk(2)[conditional], expected, rtol=1e-5, atol=1e-5)
    rows = state_of(both).memory["rows"]
    assert rows.shape[0] == 4 and torch.equal(rows[:2], rows[2:]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[:2], state_of(alone).memory["rows"])


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_picture_is_the_same_alone_and_in_a_batch(name):
    stock = TRANSFORMERS[name]
    together, alone = stock.make(), stock.make()
    dx.enable(together, pruning(keep_ratio=0.5))
    dx.enable(alone, pruning(keep_ratio=0.5))
    for step in range(4):
        call = stock.call(together, step, batch=3)
        one = {key: value[1:2] if torch.is_tensor(value) and len(value) == 3 and "ids" not in key else value
               for key, value in call.items()}  # fmt: skip
        with torch.no_grad():
            found, expected = together(**call, return_dict=False)[0], alone(**one, return_dict=False)[0]
        torch.testing.assert_close(found[1:2], expected, rtol=1e-5, atol=1e-5)


def flux_pipe() -> FluxPipeline:
    pipe = models.STOCKS["tiny-flux"].make()
    pipe.transformer = fill(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(steps: int = 6, **more) -> dict:
    return {
        "prompt_embeds": waves(0, 1, 3, 8), "pooled_prompt_embeds": waves(1, 1, 8), "height": 128, "width": 64,
        "num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0),
        "negative_prompt_embeds": waves(2, 1, 3, 8), "negative_pooled_prompt_embeds": waves(3, 1, 8),
        "true_cfg_scale": 2.0, **more,
    }  # fmt: skip


@exact
def test_an_unconditional_call_of_its_own_takes_the_tokens_of_the_conditional_one():
    pipe, rows, noises_seen = flux_pipe(), [], []
    number = 32  # of a picture of 8 x 4 tokens

    def choose(tokens, budget, share):
        noises_seen.append(tokens.change)
        return choose_tokens(tokens, budget, share)

    dx.enable(pipe, pruning())
    put = cat_pruning.choose_tokens
    run = find_run(pipe.transformer, "cat_pruning")
    hook = pipe.transformer.proj_out._diffusers_hook.hooks["diffusers_ext.cat_pruning"]
    assert hook.choose is put
    hook.choose = choose
    pipe.transformer.register_forward_hook(
        lambda *_: rows.append(
            (run.manager.context.name, run.state.memory.get("chosen"), run.state.memory.get("num_tokens"))
        )
    )
    pipe(**flux_call())
    assert [name for name, _, _ in rows] == ["cond", "uncond"] * 6
    assert len(noises_seen) == 5, "chosen once a step, from step 1 on"
    for (_, cond, count), (_, uncond, _) in list(zip(rows[::2], rows[1::2], strict=True))[1:]:
        assert torch.equal(cond, uncond) and count == number and cond.shape == (1, int(0.3 * number))


@exact
def test_the_grid_of_packed_tokens():
    """Of 8 x 4 tokens, neighbours in a column are 4 apart."""
    pipe = flux_pipe()
    dx.enable(pipe, pruning(num_clusters=32))
    hook = pipe.transformer.proj_out._diffusers_hook.hooks["diffusers_ext.cat_pruning"]
    found = []
    hook.choose = lambda tokens, budget, share: found.append(tokens) or choose_tokens(tokens, budget, share)
    pipe(**flux_call(3))
    near, labels = found[0].neighbours[0], found[0].labels[0]
    assert sorted(labels.tolist()) == list(range(32)), "each token is a cluster"
    for one in range(32):
        for other in range(32):
            row, column = abs(one // 4 - other // 4), abs(one % 4 - other % 4)
            assert near[labels[one], labels[other]] == (row + column <= 1)
    assert hook.places.value is None and hook.sample.value is None
    assert find_run(pipe.transformer, "cat_pruning").state.memory == {}


# --- exact: refusals, runs, other libraries ---------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", sorted(TRANSFORMERS.keys() - set(SUPPORTED)))
def test_other_transformers_are_refused(name):
    model = TRANSFORMERS[name].make()
    before = {path: set(module.__dict__) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"CAT Pruning does not work on {name}: it"):
        dx.enable(model, pruning())
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == before


@exact
def test_what_a_model_is_set_to_is_refused():
    dit = TRANSFORMERS["DiTTransformer2DModel"]
    model = dit.make()
    model.transformer_blocks[1].set_chunk_feed_forward(2, 1)
    with pytest.raises(ValueError, match="runs in chunks"):
        dx.enable(model, pruning())
    model = TRANSFORMERS["SD3Transformer2DModel"].make()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections"):
        dx.enable(model, pruning())
    model.unfuse_qkv_projections()


@exact
def test_projections_fused_later_are_noticed():
    sd3 = TRANSFORMERS["SD3Transformer2DModel"]
    model = sd3.make()
    dx.enable(model, pruning())
    model.fuse_qkv_projections()
    sd3.predict(model)
    with pytest.raises(RuntimeError, match="went past `to_k`"):
        sd3.predict(model, 1)


@exact
def test_masks_among_image_tokens_that_cannot_be_cut_are_refused():
    pixart = TRANSFORMERS["PixArtTransformer2DModel"]
    model = pixart.make()
    dx.enable(model, pruning())
    with pytest.raises(ValueError, match="`attention_mask` of a self-attention has the shape"):
        model(**pixart.call(model), attention_mask=torch.ones(2, 16))


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": -2}, "`start_step` is -2"),
        ({"start_step": 1.5}, "`start_step` is 1.5"),
        ({"keep_ratio": 0}, "`keep_ratio` is 0; it must be a number, above 0"),
        ({"keep_ratio": 1.1}, "`keep_ratio` is 1.1"),
        ({"num_clusters": 0}, "`num_clusters` is 0"),
        ({"fresh_share": -0.1}, "`fresh_share` is -0.1"),
        ({"decay": float("nan")}, "`decay` is nan"),
        ({"decay": True}, "`decay` is True"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dx.CATPruningConfig(**options)


@exact
def test_the_seed_orders_tokens_that_wait_for_equally_long():
    dit = TRANSFORMERS["DiTTransformer2DModel"]
    chosen = []
    for seed in (0, 0, 1):
        model = dit.make()
        dx.enable(model, pruning(seed=seed, fresh_share=0.0))
        dit.run(model, 4)
        chosen.append(state_of(model).memory["rows"])
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


@exact
def test_adapters_loaded_before():
    from peft import LoraConfig

    sd3 = TRANSFORMERS["SD3Transformer2DModel"]
    model = sd3.make()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"], init_lora_weights=False))
    plain = sd3.predict(model)
    dx.enable(model, pruning())
    for _ in range(4):
        torch.testing.assert_close(sd3.predict(model), plain, rtol=1e-5, atol=1e-5)


@exact
@pytest.mark.slow
def test_compiled_graphs_do_not_grow_with_runs():
    from torch._dynamo.testing import CompileCounterWithBackend

    dit = TRANSFORMERS["DiTTransformer2DModel"]
    model = dit.make()
    dx.enable(model, pruning())
    expected = dit.run(model, 6)
    torch._dynamo.reset()
    try:
        counter = CompileCounterWithBackend("eager")
        compiled, graphs = torch.compile(model, backend=counter), []
        for _ in range(3):
            for found, wanted in zip(dit.run(compiled, 6), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            graphs.append(counter.frame_count)
    finally:
        torch._dynamo.reset()
    assert graphs[1] == graphs[2]


# --- reference -------------------------------------------------------------------------------------------------------


def their_tokens(call: int, counts: torch.Tensor | None = None) -> Tokens:
    """What is known at the end of a call of the authors' code, with their clusters."""
    labels = torch.tensor([[ord(letter) - 97 for letter in GOLDEN["choices"]["labels"]]])
    change = (noises(call) - noises(6))[1:]
    return Tokens(change, labels, touching_clusters(labels, grid(), 20), torch.arange(4096), counts)


def their(call: int, name: str) -> set[int]:
    return set(unpacked(GOLDEN["choices"]["calls"][str(call)][name], 4096).tolist())


@pytest.mark.proof("reference")
def test_the_first_choice_is_the_authors():
    """With the sum over neighbours that their code asks for; see the maker of the numbers."""
    tokens = their_tokens(7)
    theirs = GOLDEN["choices"]["calls"]["7"]
    assert cluster_scores(tokens)[0].argsort(descending=True).tolist() == theirs["clusters"]
    assert set(choose_tokens(tokens, 1228, 0.25)[0].tolist()) == their(7, "chosen")


@pytest.mark.proof("reference")
def test_later_choices_are_the_authors():
    """But for two things that the row lists and the docstring states: they cut the last cluster off by place, where here
    the tokens that moved least go, and choose fewer than the budget where fresh and stale tokens overlap."""
    counts = 0.5 * distinct_counts()[None]
    counts = counts.scatter_add(1, unpacked(GOLDEN["choices"]["calls"]["8"]["chosen"], 4096)[None], torch.ones(1, 4096))
    tokens = their_tokens(9, counts)
    theirs = GOLDEN["choices"]["calls"]["9"]
    assert cluster_scores(tokens)[0].argsort(descending=True).tolist() == theirs["clusters"]
    ours, stale = set(choose_tokens(tokens, 1228, 0.25)[0].tolist()), their(9, "stale")
    candidates = [set(unpacked(part, 4096).tolist()) for part in theirs["candidates"]]
    assert len(ours) == 1228 > theirs["number"] == len(their(9, "chosen"))
    assert stale <= ours and candidates[0] <= ours, "the stalest, and the first cluster's, are the same"
    assert their(9, "chosen") <= stale | candidates[0] | candidates[1]
    fresh = ours - stale - candidates[0]
    filled = fresh - candidates[1]
    rest = counts[0].clone()
    rest[list(ours - filled)] = torch.inf
    assert filled == set(rest.argsort()[: len(filled)].tolist()), "what is filled up is the next stalest"
    moved = tokens.change[0].norm(dim=-1)
    dropped = candidates[1] - ours
    assert max(moved[list(dropped)]) < moved[list(candidates[1])].max()


@pytest.mark.proof("reference")
def test_clusters_are_as_tight_as_theirs():
    """scikit-learn's K-means, which the authors take, begins at random; the sums of squares are alike."""
    noise = noises(7)[1:]
    labels = token_clusters(noise, grid() / 64, 20)[0]
    places = (grid() / 64).repeat_interleave(2, dim=1)
    features = 0.05 * noise[0] + places
    centres = torch.stack([features[labels == k].mean(0) for k in range(20)])
    inertia = (features - centres[labels]).square().sum().item()
    assert inertia <= 1.1 * GOLDEN["choices"]["inertia"]


@pytest.mark.proof("reference")
def test_attention_and_feed_forward_with_given_tokens():
    """Numbers of the authors' modules in a small SD3: fresh noise of all tokens in calls that compute 19 of 64."""
    model = models.sd3()
    calls = iter(range(8, 13))
    put_on(model, dx.CATPruningConfig(), lambda tokens, budget, share: given_tokens(next(calls))[None])
    with torch.no_grad(), products(model) as seen:
        for call in range(12):
            model(**sd3_inputs(call))
    for call, numbers in GOLDEN["given"].items():
        found = given_noise(int(call), seen["proj_out"][int(call)][1])
        torch.testing.assert_close(torch.tensor(found), torch.tensor(numbers), rtol=1e-5, atol=1e-5)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_recipe_brings_it_back(tmp_path):
    pipe = dx.Pipeline.from_pretrained(dx.zoo_path("fashion-dit"))
    pipe.set_progress_bar_config(disable=True)
    config = dx.CATPruningConfig(start_step=0, keep_ratio=0.4)
    dx.enable(pipe, config)
    dx.save_pretrained(pipe, tmp_path)
    again = dx.Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert [entry.config for entry in dx.status(again)] == [config]

    def draw(one):
        return one(
            class_labels=[3], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np"
        )

    pruned = draw(pipe).images
    assert (draw(again).images == pruned).all() and (draw(dx.disable(pipe)).images != pruned).any()


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("cat_pruning")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2502.00433" in card
    for snippet in snippets:
        names: dict = {"pipe": dx.Pipeline.from_pretrained(dx.zoo_path("fashion-dit"))}
        exec(compile(snippet, "card", "exec"), names)
        assert dx.status(names["pipe"]) == []
