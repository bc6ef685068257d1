"""Δ-DiT, by the proofs. Its authors published no code; the reference is a slow derivation here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DiTPipeline
from torch import nn

import diffusers_ext as dx
from diffusers_ext.hooks._blocks import block_names
from diffusers_ext.hooks._plan import find_run
from tests.card_snippets import run_card
from tests.common import models
from tests.common.suite import CommonCase
from tests.recipes import check_recipe
from tests.transformers import TRANSFORMERS, block_deltas, predict_with

COMMON = CommonCase(
    settings=[
        {"boundary": 1, "interval": 3},
        {"num_cached_blocks": 1, "boundary": 2, "interval": 2, "early": "front", "continuation": 1, "warmup": 3},
    ],
)
SUPPORTED = [name for name in TRANSFORMERS if dx.DeltaDiTConfig.supports(TRANSFORMERS[name].make()) is None]

exact = pytest.mark.proof("exact")


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_interval_1_and_no_cached_blocks_are_bit_equal(name):
    model = TRANSFORMERS[name]
    bare = model.make()
    plain = model.run(bare, 3)
    for config in (dx.DeltaDiTConfig(boundary=1, interval=1), dx.DeltaDiTConfig(num_cached_blocks=0, boundary=1)):
        dx.enable(bare, config)
        assert all(torch.equal(a, b) for a, b in zip(model.run(bare, 3), plain, strict=True))


def block_calls(bare: nn.Module) -> list[str]:
    """What is filled with the name of each block that really computes, which its last layer tells."""
    calls: list[str] = []
    for name in block_names(bare):
        layer = [leaf for leaf in bare.get_submodule(name).modules() if isinstance(leaf, nn.Linear)][-1]
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@exact
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
@pytest.mark.parametrize("cached", [0, 1, 3, 4])
def test_block_calls_match_the_formula(interval, cached):
    """F L + (T - F) (L - N_c), with F = ceil(T / N)."""
    model, steps, count = TRANSFORMERS["HunyuanVideoTransformer3DModel"], 8, 4
    bare = dx.enable(model.make(), dx.DeltaDiTConfig(cached, boundary=4, interval=interval))
    calls = block_calls(bare)
    model.run(bare, steps)
    full = math.ceil(steps / interval)
    assert len(calls) == full * count + (steps - full) * (count - cached)


@exact
def test_the_papers_setting_has_350_of_560_block_calls():
    """L = 28, N = 2, T = 20, N_c = 21, which None takes for 28 blocks: 1.6 times fewer."""
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make()
    bare.transformer_blocks = nn.ModuleList(copy.deepcopy(bare.transformer_blocks[i % 3]) for i in range(28))
    dx.enable(bare, dx.DeltaDiTConfig(boundary=12))
    calls = block_calls(bare)
    model.run(bare, 20)
    assert len(block_names(bare)) == 28 and len(calls) == 350 and 28 * 20 / 350 == 1.6


@exact
@pytest.mark.parametrize("early", ["rear", "front"])
def test_the_rear_is_left_out_early_and_the_front_late(early):
    """Or the other way, as an option; by the blocks that compute on each step."""
    model = TRANSFORMERS["FluxTransformer2DModel"]
    bare = dx.enable(model.make(), dx.DeltaDiTConfig(3, boundary=4, interval=2, early=early))
    calls, names = block_calls(bare), block_names(bare)
    for step in range(8):
        calls.clear()
        model.predict(bare, step)
        first = step < 4
        expected = names if step % 2 == 0 else names[:1] if first == (early == "rear") else names[-1:]
        assert calls == expected, step


@exact
@pytest.mark.parametrize(("boundary", "steps"), [(0.6, 20), (0.0, 6), (1.0, 6), (0.5, 7), (3, 8), (100, 6)])
def test_a_fraction_is_of_the_steps_of_the_pipeline(boundary, steps):
    stock = models.STOCKS["tiny-flux"]
    pipe = dx.enable(stock.make(), dx.DeltaDiTConfig(boundary=boundary))
    run, modes = find_run(pipe.transformer, "delta_dit"), []
    tick = run.tick

    def record(sample):
        tick(sample)
        modes.append(run.state.mode)

    run.tick = record
    stock.draw(pipe, steps)
    end = {(0.6, 20): 12, (0.0, 6): 0, (1.0, 6): 6, (0.5, 7): 4, (3, 8): 3, (100, 6): 6}[boundary, steps]
    assert modes == ["full" if k % 2 == 0 else "rear" if k < end else "front" for k in range(steps)]


@exact
@pytest.mark.parametrize("early", ["rear", "front"])
def test_where_the_inputs_repeat_the_delta_is_the_output(early):
    """h + (out - h): not bit-equal, and within rounding."""
    model = TRANSFORMERS["PixArtTransformer2DModel"]
    bare = dx.enable(model.make(), dx.DeltaDiTConfig(2, boundary=1, early=early))
    full, cached = (model.predict(bare, 0) for _ in range(2))
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=0)


@exact
@pytest.mark.parametrize(("continuation", "weights"), [(1, {2: -0.5, 4: 1.5}), (2, {0: 0.375, 2: -1.25, 4: 1.875})])
def test_with_continuation_a_polynomial_of_deltas_goes_on(continuation, weights):
    """An extension of ours; by the deltas of steps 0, 2 and 4, put together by hand for step 5."""
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make().double()
    names = block_names(bare)[1:]
    deltas = {step: block_deltas(bare, names, lambda step=step: model.predict(bare, step)) for step in (0, 2, 4)}
    going_on = {
        name: [
            sum(weight * deltas[step][name][state] for step, weight in weights.items())
            for state in range(len(deltas[4][name]))
        ]
        for name in names
    }
    constant = predict_with(bare, deltas[4], lambda: model.predict(bare, 5))
    expected = predict_with(bare, going_on, lambda: model.predict(bare, 5))
    found = model.run(dx.enable(bare, dx.DeltaDiTConfig(2, boundary=9, continuation=continuation)), 6)[5]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert (constant - expected).abs().max() > 1e-3


@exact
@pytest.mark.parametrize(
    ("warmup", "interval", "full"),
    [
        (0, 3, [0, 3, 6]),
        (1, 3, [0, 3, 6]),
        (3, 2, [0, 1, 2, 4, 6, 8]),
        (4, 5, [0, 1, 2, 3, 8]),
        (20, 2, list(range(9))),
    ],
)
def test_the_interval_counts_from_the_end_of_the_warmup(warmup, interval, full):
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make()
    count = len(block_names(bare))
    dx.enable(bare, dx.DeltaDiTConfig(count, boundary=9, interval=interval, warmup=warmup))
    calls, found = block_calls(bare), []
    for step in range(9):
        before = len(calls)
        model.predict(bare, step)
        found += [step] if len(calls) > before else []
    assert found == full


@exact
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cached_blocks": -1}, "`num_cached_blocks`"),
        ({"num_cached_blocks": 1.5}, "`num_cached_blocks`"),
        ({"boundary": 1.5}, "`boundary`"),
        ({"boundary": -1}, "`boundary`"),
        ({"boundary": True}, "`boundary`"),
        ({"interval": 0}, "`interval`"),
        ({"early": "middle"}, "`early`"),
        ({"continuation": 3}, "`continuation`"),
        ({"warmup": -1}, "`warmup`"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dx.DeltaDiTConfig(**arguments)


@exact
def test_settings_that_do_not_fit_the_model_are_refused():
    model = TRANSFORMERS["DiTTransformer2DModel"].make()
    with pytest.raises(ValueError, match="`num_cached_blocks` is 4; this DiTTransformer2DModel has 3 blocks"):
        dx.enable(model, dx.DeltaDiTConfig(4, boundary=1))
    with pytest.raises(ValueError, match="enable it on the pipeline, or give a step number"):
        dx.enable(model, dx.DeltaDiTConfig())
    with pytest.raises(ValueError, match="UNet2DConditionModel: it has no list of transformer blocks"):
        dx.enable(models.MODELS["UNet2DConditionModel"].make(), dx.DeltaDiTConfig(boundary=1))


@exact
def test_two_calls_a_step_have_a_cache_each():
    """True guidance calls the denoiser twice a step: each keeps the deltas of its own prompt."""
    model = TRANSFORMERS["FluxTransformer2DModel"]
    config = dx.DeltaDiTConfig(2, boundary=9)
    expected = [model.run(dx.enable(model.make(), config), 4, seed=seed) for seed in (0, 1)]
    bare = dx.enable(model.make(), config)
    for step in range(4):
        for seed, name in enumerate(("cond", "uncond")):
            with bare.cache_context(name):
                assert torch.equal(model.predict(bare, step, seed=seed), expected[seed][step])


# --- reference: a slow derivation ------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_run_equals_the_slow_derivation(name):
    """Six steps of deltas that are measured on and added to the unchanged model, block by block."""
    model, config = TRANSFORMERS[name], dx.DeltaDiTConfig(2, boundary=4, interval=3)
    plain, bare = model.make(), dx.enable(model.make(), config)
    names = block_names(plain)
    stored: dict = {}
    for step in range(6):
        found = model.predict(bare, step)
        if step % 3 == 0:
            stored = block_deltas(plain, names, lambda step=step: model.predict(plain, step))
            expected = model.predict(plain, step)
        else:
            left_out = names[-2:] if step < 4 else names[:2]
            deltas = {block: stored[block] for block in left_out}
            expected = predict_with(plain, deltas, lambda step=step: model.predict(plain, step))
        torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_recipe_brings_it_back(tmp_path):
    check_recipe(
        DiTPipeline.from_pretrained(dx.zoo_path("fashion-dit")),
        dx.DeltaDiTConfig(num_cached_blocks=5, boundary=0.5, interval=3, early="front", continuation=1),
        tmp_path,
        class_labels=[3, 7],
    )


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, scope = run_card("delta_dit")
    assert isinstance(scope["pipe"], DiTPipeline) and dx.status(scope["pipe"]) == []
    assert "2406.01125" in card
