"""ProfilingDiT, by the proofs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffusers_ext as dx
from diffusers_ext.hooks import block_profile
from diffusers_ext.hooks._blocks import block_names
from diffusers_ext.hooks._plan import find_run
from diffusers_ext.hooks.block_profile import column_scores, principal_mask
from diffusers_ext.hooks.profiling_dit import full_steps
from tests.card_snippets import run_card
from tests.common import models
from tests.common.suite import CommonCase
from tests.recipes import check_recipe
from tests.transformers import TRANSFORMERS, block_deltas, predict_with
from tests.unets import fill

COMMON = CommonCase(
    settings=[
        {"cached_blocks": (0, 1), "warmup": 1, "interval": (2, 2)},
        {"cached_blocks": (1,), "warmup": 0, "interval": (3, 1)},
    ],
)
LISTS = [[2], [0], [1, 2], [0, 3, 4], [0, 2, 3, 5], [1, 2, 3, 4, 5]]  # of the reference runs
STEPS, WARMUP, INTERVAL = 14, 3, 4
GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "profiling_dit.json"
SUPPORTED = [name for name in TRANSFORMERS if dx.ProfilingDiTConfig.supports(TRANSFORMERS[name].make()) is None]

exact = pytest.mark.proof("exact")


def put_on(model, cached_blocks, warmup=1, interval=(2, 2)):
    return dx.enable(model, dx.ProfilingDiTConfig(cached_blocks, warmup, interval))


# --- exact: what is computed -----------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_an_empty_list_and_interval_1_are_bit_equal(name):
    model = TRANSFORMERS[name]
    plain = model.run(model.make(), 4)
    for cached, interval in (((), (3, 3)), ((0, 1), (1, 1))):
        found = model.run(put_on(model.make(), cached, 0, interval), 4)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_cached_step_equals_the_slow_derivation(name):
    """The deltas of the last full step, added by hand; on every architecture."""
    model, cached = TRANSFORMERS[name], (0, 1)
    bare = model.make()
    names = [block_names(bare)[i] for i in cached]
    deltas = block_deltas(bare, names, lambda: model.predict(bare, 1))
    expected = predict_with(bare, deltas, lambda: model.predict(bare, 2))
    plain = model.predict(bare, 2)
    found = model.run(put_on(bare, cached, warmup=1, interval=(2, 2)), 3)[2]  # full steps are 0, 1, 3
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)
    assert (expected - plain).abs().max() > 1e-3 * scale, "the test would not notice a cache that computes everything"


@exact
@pytest.mark.parametrize("cached", [(), (0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("warmup", "interval"), [(0, 2), (2, 3), (6, 6), (20, 2)])
def test_block_calls_match_the_formula(cached, warmup, interval):
    """Full steps times L, and the others times L less the cached."""
    model = TRANSFORMERS["FluxTransformer2DModel"]
    bare = put_on(model.make(), cached, warmup, (interval, interval))
    calls = []
    for name in block_names(bare):
        for leaf in bare.get_submodule(name).modules():
            if isinstance(leaf, nn.Linear):
                leaf.register_forward_hook(lambda *_, name=name: calls.append(name))
                break
    steps = 10
    model.run(bare, steps)
    full = sum(1 for step in range(steps) if step < warmup or (step - warmup) % interval == 0)
    assert len(calls) == full * 4 + (steps - full) * (4 - len(cached))


@exact
def test_a_run_of_neighbours_equals_each_of_them_alone():
    """Against `block_deltas`, which keeps each block's own; in float64."""
    model = TRANSFORMERS["WanTransformer3DModel"]
    bare = model.make().double()
    deltas = block_deltas(bare, block_names(bare), lambda: model.predict(bare, 0))
    expected = predict_with(bare, deltas, lambda: model.predict(bare, 1))
    found = model.run(put_on(bare, (0, 1, 2), 0, (2, 2)), 2)[1]
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()  # the model itself has parts in float32


@exact
def test_the_deltas_are_overwritten_and_not_added_up():
    """The paper writes C + D; its code has D, and so have we: after many steps the same delta is as good as after one."""
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make()
    put_on(bare, (0, 1, 2), 0, (2, 2))
    outputs = [model.predict(bare, 3) for _ in range(6)]
    torch.testing.assert_close(outputs[5], outputs[0], atol=1e-4, rtol=0)


@exact
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((14, 3, (4, 4)), [0, 1, 2, 3, 7, 11]),
        ((50, 6, (6, 6)), [*range(6), 6, 12, 18, 24, 30, 36, 42, 48]),  # the authors' default
        ((50, 6, (12, 2)), [*range(6), 6, 18, 27, 34, 40, 44, 47]),
        ((4, 6, (6, 6)), [0, 1, 2, 3]),
        ((5, 0, (1, 1)), [0, 1, 2, 3, 4]),
    ],
)
def test_full_steps(arguments, expected):
    assert full_steps(*arguments) == expected


@exact
@settings(max_examples=200, deadline=None)
@given(num_steps=st.integers(1, 100), warmup=st.integers(0, 20), data=st.data())
def test_full_steps_come_closer_together(num_steps, warmup, data):
    t_min = data.draw(st.integers(1, 10))
    t_max = data.draw(st.integers(t_min, 20))
    steps = full_steps(num_steps, warmup, (t_max, t_min))
    assert steps[: min(warmup, num_steps)] == list(range(min(warmup, num_steps)))
    gaps = [b - a for a, b in zip(steps[warmup:], steps[warmup + 1 :], strict=False)]
    assert all(a >= b for a, b in itertools.pairwise(gaps)) and all(t_min <= gap <= t_max for gap in gaps)
    assert steps[-1] < num_steps and (num_steps <= warmup or num_steps - steps[-1] <= t_max)


@exact
def test_a_falling_interval_counts_the_steps_of_the_pipeline():
    stock = models.STOCKS["tiny-flux"]
    pipe = dx.enable(stock.make(), dx.ProfilingDiTConfig((1,), 2, (4, 1)))
    run, modes = find_run(pipe.transformer, "profiling_dit"), []
    tick = run.tick

    def record(sample):
        tick(sample)
        modes.append(run.state.mode)

    run.tick = record
    stock.draw(pipe, 12)
    assert [i for i, mode in enumerate(modes) if mode == "full"] == full_steps(12, 2, (4, 1))


@exact
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cached_blocks": (1, 1)}, "`cached_blocks`"),
        ({"cached_blocks": (-1,)}, "`cached_blocks`"),
        ({"cached_blocks": "all"}, "`cached_blocks`"),
        ({"warmup": -1}, "`warmup`"),
        ({"interval": (2, 3)}, "`interval`"),
        ({"interval": (2,)}, "`interval`"),
        ({"interval": 6}, "`interval`"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dx.ProfilingDiTConfig(**arguments)


@exact
def test_settings_that_do_not_fit_the_model_are_refused():
    model = TRANSFORMERS["DiTTransformer2DModel"].make()
    with pytest.raises(ValueError, match=r"`cached_blocks` is .*; this DiTTransformer2DModel has blocks 0 to 2"):
        dx.enable(model, dx.ProfilingDiTConfig((3,)))
    with pytest.raises(ValueError, match="needs the number of steps"):
        dx.enable(model, dx.ProfilingDiTConfig((1,), 6, (6, 2)))
    with pytest.raises(ValueError, match="UNet2DConditionModel: it has no list of transformer blocks"):
        dx.enable(models.MODELS["UNet2DConditionModel"].make(), dx.ProfilingDiTConfig((1,)))


# --- exact: the profile ----------------------------------------------------------------------------------------------


def attention(query, key, mask, scale) -> torch.Tensor:
    """The map, one number at a time."""
    batch, heads, tokens, _ = query.shape
    found = torch.zeros(batch, heads, tokens, tokens)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                row = [float(query[b, h, i] @ key[b, h * key.shape[1] // heads, j]) * scale for j in range(tokens)]
                row = [value if mask is None or mask[i, j] else -math.inf for j, value in enumerate(row)]
                total = sum(math.exp(value) for value in row)
                found[b, h, i] = torch.tensor([math.exp(value) / total for value in row])
    return found


@exact
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_column_scores_are_means_over_queries(monkeypatch, masked, key_heads):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 7, 3, generator=generator), torch.randn(2, key_heads, 7, 3, generator=generator)
    places = torch.tensor([2, 3, 4, 6])
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    expected = attention(query, key, mask, 3**-0.5)[:, :, places][..., places].mean((1, 2))
    torch.testing.assert_close(column_scores(query, key, places, mask), expected)
    added = None if mask is None else torch.zeros(7, 7).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(column_scores(query, key, places, added), expected)
    monkeypatch.setattr(block_profile, "_QUERIES", 3)  # in parts
    torch.testing.assert_close(column_scores(query, key, places, mask), expected)


class _Looking(nn.Module):
    """A block whose picture tokens all attend to the tokens `target` of the picture."""

    def __init__(self, target: torch.Tensor, prompt: int) -> None:
        super().__init__()
        self.target, self.prompt = target, prompt

    def forward(self, hidden_states, encoder_hidden_states):
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)[:, None]
        bias = torch.zeros(tokens.shape[2])
        bias[self.prompt :][self.target] = 5.0
        out = nn.functional.scaled_dot_product_attention(tokens * 1e-3, tokens, tokens, attn_mask=bias[None])
        return hidden_states + 0 * out[:, 0, self.prompt :]


class _LookingModel(nn.Module):
    def __init__(self, targets, prompt: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Looking(target, prompt) for target in targets)
        self.time_proj = nn.Identity()

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        self.time_proj(timestep)
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class _LookingPipe:
    def __init__(self, targets, prompt: int) -> None:
        self.transformer = _LookingModel(targets, prompt)
        self.components = {"transformer": self.transformer}

    def __call__(self, steps: int) -> None:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            states, prompt = torch.randn(2, 6, 4, generator=generator), torch.ones(2, 3, 4)
            self.transformer(states, torch.tensor(9 - step), encoder_hidden_states=prompt)


@exact
def test_blocks_that_attend_to_known_tokens_have_known_ratios():
    """Six tokens of a picture behind three of a prompt; the foreground are the first two."""
    where = [[0, 1], [0], [2, 3], [4], [0, 1, 5]]
    pipe = _LookingPipe([torch.tensor(target) for target in where], prompt=3)
    foreground = torch.zeros(2, 6, dtype=torch.bool)
    foreground[:, :2] = True
    before = {path: set(vars(module)) for path, module in pipe.transformer.named_modules()}
    hooks = [dict(module._forward_hooks) for module in pipe.transformer.modules()]
    profile = dx.profile_blocks(pipe, [{"steps": 2}, {"steps": 1}], lambda prediction: foreground)
    assert profile.ratios == (1.0, 0.5, 0.0, 0.0, 1.0)
    assert profile.background() == (2, 3) and profile.foreground() == (0, 1, 4)
    assert profile.background(tau=0.6) == (1, 2, 3)
    assert {path: set(vars(module)) for path, module in pipe.transformer.named_modules()} == before
    assert [dict(module._forward_hooks) for module in pipe.transformer.modules()] == hooks


@exact
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("DiTTransformer2DModel", range(16)),
        ("FluxTransformer2DModel", range(3, 7)),  # behind the prompt
        ("SD3Transformer2DModel", range(64)),  # before it
        ("AuraFlowTransformer2DModel", range(11, 27)),  # behind the prompt and eight registers
        ("HunyuanVideoTransformer3DModel", range(32)),
        ("WanTransformer3DModel", range(32)),
    ],
)
def test_the_tokens_of_the_picture_are_found(name, places):
    model = TRANSFORMERS[name]
    bare = model.make()
    profiler = block_profile._Profiler(bare, principal_mask)
    with profiler.watching():
        plain = model.predict(bare)
    assert profiler.places.tolist() == list(places)
    assert profiler.count == 2 and all(0 <= total <= 2 for total in profiler.totals)
    assert torch.equal(model.predict(bare), plain)


@exact
def test_profiling_changes_no_picture():
    stock = models.STOCKS["tiny-dit"]
    pipe = stock.make()
    plain = stock.draw(pipe, 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dx.profile_blocks(pipe, [{**stock.call(2), "generator": torch.Generator().manual_seed(0)}])
    assert torch.equal(torch.rand(3), expected), "it draws no random numbers of its own"
    assert torch.equal(stock.draw(pipe, 3), plain)


@exact
def test_the_principal_mask_finds_a_square():
    picture = torch.full((2, 4, 8, 8), -1.0)
    picture[:, :, 2:6, 3:6] = torch.tensor([3.0, -2.0, 1.0, 5.0])[:, None, None]
    picture[1] *= -1
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[:, 2:6, 3:6] = True
    noise = 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(principal_mask(picture + noise), expected)
    film = (picture + noise)[:, :, None].expand(-1, -1, 3, -1, -1)
    assert torch.equal(principal_mask(film), expected[:, None].expand(-1, 3, -1, -1))
    sequence = (picture + noise).flatten(2).mT
    assert torch.equal(principal_mask(sequence), expected.flatten(1))
    with pytest.raises(ValueError, match="no square picture"):
        principal_mask(sequence[:, :63])


@exact
def test_what_cannot_be_profiled_is_refused():
    stock = models.STOCKS["tiny-dit"]
    pipe = stock.make()
    call = stock.call(1)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`calls` is empty"):
        dx.profile_blocks(pipe, [])
    with pytest.raises(ValueError, match="`component` is 'unet'"):
        dx.profile_blocks(pipe, [call], component="unet")
    with pytest.raises(ValueError, match="do not fit the 16 tokens"):
        dx.profile_blocks(pipe, [call], lambda prediction: torch.ones(len(prediction), 7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="no foreground"):
        dx.profile_blocks(pipe, [call], lambda prediction: torch.zeros(len(prediction), 8, 8, dtype=torch.bool))
    dx.enable(pipe, dx.ProfilingDiTConfig((1,)))
    with pytest.raises(ValueError, match="'profiling_dit' on"):
        dx.profile_blocks(pipe, [call])
    sana = TRANSFORMERS["SanaTransformer2DModel"]
    linear = SimpleNamespace(transformer=sana.make(), components={})
    with pytest.raises(ValueError, match="no attention of a whole picture with itself"), torch.no_grad():
        with block_profile._Profiler(linear.transformer, principal_mask).watching():
            sana.predict(linear.transformer)


# --- reference -------------------------------------------------------------------------------------------------------


def wan() -> WanTransformer3DModel:
    """Six blocks of formula weights."""
    return fill(
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
            ffn_dim=16, num_layers=6, rope_max_seq_len=16,
        )
    )  # fmt: skip


def golden_run(model, tell=lambda step: None) -> list[list[float]]:
    """The loop that made the golden numbers: Euler steps; a few numbers of each latent."""
    latents = torch.sin(torch.arange(4 * 2 * 8 * 8, dtype=torch.float64)).float().reshape(1, 4, 2, 8, 8)
    states = torch.cos(torch.arange(3 * 8, dtype=torch.float64)).float().reshape(1, 3, 8)
    numbers = []
    with torch.no_grad():
        for step in range(STEPS):
            tell(step)
            time = torch.tensor([900.0 - 60 * step])
            latents = latents - 0.1 * model(latents, time, states, return_dict=False)[0]
            first = latents.flatten()[:3].tolist()
            numbers.append([latents.double().mean().item(), latents.double().std().item(), *first])
    return numbers


@pytest.mark.proof("reference")
@pytest.mark.parametrize("number", range(len(LISTS)))
def test_equals_the_authors_cache(number):
    golden = json.loads(GOLDEN_FILE.read_text())["runs"]
    plain = golden_run(wan())
    numbers = golden_run(put_on(wan(), LISTS[number], WARMUP, (INTERVAL, INTERVAL)))
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(golden[number]), rtol=1e-4, atol=1e-5)
    assert (torch.tensor(plain) - torch.tensor(golden[number])).abs().max() > 1e-3


@pytest.mark.proof("reference")
def test_a_run_that_starts_at_block_0_works_where_the_authors_code_fails():
    """There the delta of such a run is the output less that of block -1. Ours is of the input of the stack."""
    numbers = golden_run(put_on(wan(), (0, 1, 2), WARMUP, (INTERVAL, INTERVAL)))
    assert torch.tensor(numbers).isfinite().all()


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_recipe_brings_it_back(tmp_path):
    check_recipe(
        DiTPipeline.from_pretrained(dx.zoo_path("fashion-dit")),
        dx.ProfilingDiTConfig((1, 2, 5), warmup=1, interval=(3, 2)),
        tmp_path,
        class_labels=[3, 7],
    )


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, scope = run_card("profiling_dit")
    assert isinstance(scope["pipe"], DiTPipeline) and dx.status(scope["pipe"]) == []
    assert "2504.03140" in card
