"""dKV-Cache, by the five proofs, and with it the mechanism of all language-model caches."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import LlamaConfig, LlamaForCausalLM

import diffusers_ext as dx
from diffusers_ext.hooks._lm_cache import run_of
from diffusers_ext.hooks.dkv_cache import with_neighbours
from tests.common.models import MASK as BERT_MASK
from tests.common.models import masked_language_model
from tests.common.suite import CommonCase
from tests.language_models import (
    CHECKPOINTS,
    MASK,
    computed,
    generate,
    hashed,
    logits,
    masked_tokens,
    prompts,
    slow_logits,
    tiny,
    unmasked,
)

COMMON = CommonCase(
    settings=[{"mask_token_id": BERT_MASK, "refresh_interval": 8, "delay": 0}, {"variant": "prefix", "mask_token_id": BERT_MASK}],
    skips={"compiled": "it breaks the graph at each layer; `compiled_eagerly` holds it to the same numbers"},
)  # fmt: skip
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dkv_cache.json").read_text())

exact = pytest.mark.proof("exact")


def bert():
    return hashed(masked_language_model(), 1.5)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_refreshing_each_step_is_bit_equal_to_no_cache(name):
    model = tiny(name)
    tokens, calls = generate(model, prompts())
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=1))
    again, cached = generate(model, prompts())
    assert torch.equal(tokens, again)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(calls, cached, strict=True))


@exact
@pytest.mark.parametrize("variant", ["decode", "prefix", "prefix_decode"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_cached_step_in_which_nothing_was_settled_equals_a_full_one(name, variant):
    """Rotary positions of scattered tokens with it. GIDD's time does not change either."""
    model, tokens = tiny(name).double(), masked_tokens()
    tokens = unmasked(tokens, 6, 9)
    full = logits(model, tokens)
    dx.enable(model, dx.DKVCacheConfig(variant=variant))
    counts = computed(model)
    for _ in range(4):
        torch.testing.assert_close(logits(model, tokens), full, rtol=0, atol=1e-10)
    # Of Dream the tokens before masks as well: 3, 6 and 9.
    assert counts[0] == 12 and counts[-1] == (9 if model.config.shift_logits else 6)


@exact
def test_what_is_computed_when():
    """Full at steps 0, 1 and each N; else the masked tokens and those settled in the step before (delay 1)."""
    model = tiny("llada")
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=4))
    counts = computed(model)
    generate(model, prompts(1, 4), gen_length=8, block_length=8)
    masks = [8 - step for step in range(8)]
    assert counts == [12, 12, masks[2] + 1, masks[3] + 1, 12, masks[5] + 1, masks[6] + 1, masks[7] + 1]
    for delay, more in ((0, 0), (2, 2)):
        dx.enable(model, dx.DKVCacheConfig(refresh_interval=8, delay=delay))
        counts.clear()
        generate(model, prompts(1, 4), gen_length=8, block_length=8)
        assert counts == [12, 12, *(count + more for count in masks[2:])]
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=4, block_length=4))
    counts.clear()
    generate(model, prompts(1, 4), gen_length=8, block_length=4)
    assert counts == [12, 12, 7, 6, 12, 12, 3, 2]


@exact
@torch.no_grad()
def test_equals_a_forward_written_out_with_stored_keys_and_values():
    model, plain = tiny("llada").double(), tiny("llada").double()
    first = masked_tokens(prompt=4)
    states = [first, unmasked(first, 5), unmasked(first, 5, 9), unmasked(first, 5, 9, 11), unmasked(first, 5, 9, 11, 4)]
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
    stored = previous = None
    for step, tokens in enumerate(states):
        settled = torch.zeros_like(tokens, dtype=torch.bool) if step == 0 else tokens != states[step - 1]
        fresh = torch.ones_like(settled) if step < 2 else (tokens == MASK) | settled
        expected, stored = slow_logits(plain, tokens, fresh, stored)
        found = logits(model, tokens)
        # transformers has norms and rotary angles in float32.
        torch.testing.assert_close(found[fresh], expected[fresh], rtol=0, atol=1e-5)
        assert previous is None or torch.equal(found[~fresh], previous[~fresh])
        previous = found


@exact
def test_rows_of_a_batch_do_not_know_of_each_other():
    """Rows settle different numbers of tokens, one none at all and one everything; each is as it is alone."""
    model = tiny("llada").double()
    first = masked_tokens(3)
    states = [first, unmasked(first, 5)]
    rows = [unmasked(states[1][:1], 7, 8), states[1][1:2], unmasked(states[1][2:], 4, 6, 7, 8, 9, 10, 11)]
    states += [torch.cat(rows), torch.cat([unmasked(rows[0], 9), unmasked(rows[1], 4), rows[2]])]
    states += [states[-1]]
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
    together = [logits(model, tokens) for tokens in states]
    for row in range(3):
        model = tiny("llada").double()
        dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
        for tokens, expected in zip(states, together, strict=True):
            torch.testing.assert_close(
                logits(model, tokens[row : row + 1]), expected[row : row + 1], rtol=0, atol=1e-10
            )


@exact
@pytest.mark.parametrize("make", [lambda: tiny("llada"), lambda: tiny("sdar"), lambda: tiny("mdlm"), bert])
def test_padding_is_not_seen(make):
    """A padded row gives what it gives without its padding, at the same positions."""
    model = make().double()
    mask = BERT_MASK if hasattr(model, "bert") else MASK
    short = torch.full((1, 8), mask)
    short[:, :4] = torch.tensor([3, 5, 7, 9])
    long = torch.nn.functional.pad(short, (0, 4), value=1)
    seen = torch.tensor([[1] * 8 + [0] * 4])
    dx.enable(model, dx.DKVCacheConfig(mask_token_id=mask, refresh_interval=10))
    found = [logits(model, unmasked(long, *range(4, 4 + n)), attention_mask=seen)[:, :8] for n in range(4)]
    other = make().double()
    dx.enable(other, dx.DKVCacheConfig(mask_token_id=mask, refresh_interval=10))
    alone = [logits(other, unmasked(short, *range(4, 4 + n))) for n in range(4)]
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@exact
def test_other_positions_masks_and_prompts_begin_anew():
    model = tiny("llada")
    first = masked_tokens()
    ones = torch.ones_like(first)
    seen, places = ones.clone(), torch.arange(12)[None]
    seen[0, 0] = 0
    goes_on = unmasked(first, 8, 9, 10)
    following = [
        (goes_on, ones, places + 3),  # at other positions
        (goes_on, seen, places),  # with padding
        (unmasked(goes_on, 2, value=9), ones, places),  # another prompt
        (unmasked(goes_on, 3, value=MASK), ones, places),  # a token became a mask
        (first, ones, places),  # the same prompt again
        (goes_on[:1], ones[:1], places),  # another batch
        (goes_on[:, :11], ones[:, :11], places[:, :11]),  # a shorter sequence
    ]
    for tokens, mask, positions in following:
        plain = logits(model, tokens, attention_mask=mask, position_ids=positions)
        with dx.enabled(model, dx.DKVCacheConfig(refresh_interval=10)):
            for step in range(3):
                logits(model, unmasked(first, *range(8, 8 + step)), attention_mask=ones, position_ids=places)
            assert torch.equal(logits(model, tokens, attention_mask=mask, position_ids=positions), plain)
    with dx.enabled(model, dx.DKVCacheConfig(refresh_interval=10)):  # and without any of this it does go on
        for step in range(3):
            logits(model, unmasked(first, *range(8, 8 + step)), attention_mask=ones, position_ids=places)
        counts = computed(model)
        logits(model, goes_on, attention_mask=ones, position_ids=places)
        assert counts[0] < 12


@exact
def test_nothing_outlives_a_call_that_was_broken_off():
    model = tiny("llada")
    first = masked_tokens()
    tokens = unmasked(first, 5)
    plain = logits(model, tokens)
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
    for _ in range(3):
        logits(model, first)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.network.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model, tokens)
    handle.remove()
    assert torch.equal(logits(model, tokens), plain)


@exact
def test_a_call_with_gradients_computes_everything():
    model = tiny("llada")
    first = masked_tokens()
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
    for _ in range(3):
        logits(model, first)
    counts = computed(model)
    model(input_ids=first).logits.sum().backward()
    assert counts == [12] and model.get_input_embeddings().weight.grad is not None
    assert run_of(model, "dkv_cache").store is None


@exact
def test_memory_is_bounded_and_freed():
    model = tiny("llada")
    dx.enable(model, dx.DKVCacheConfig())
    generate(model, prompts(2, 4), gen_length=8)
    store = run_of(model, "dkv_cache").store
    sizes = [*store.keys.values(), *store.values.values()]
    assert sum(x.numel() for x in sizes) == 2 * 3 * 2 * 12 * 32 and store.logits.shape == (2, 12, 50)
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in [*sizes, store.logits])
    model._reset_stateful_cache()
    assert run_of(model, "dkv_cache").store is None


@exact
def test_in_our_pipeline_rows_come_and_go():
    """Rows with prompts of two lengths, one of which stops early; at interval 1 tokens are those without a cache."""
    model = tiny("llada")
    pipe = dx.MaskedDiffusionPipeline(model, BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {
        "input_ids": [torch.tensor([5, 6, 7]), torch.tensor([9, 10, 11, 12, 13])], "gen_length": 12, "block_length": 4,
        "temperature": 0.0, "threshold": 1.0, "mask_token_id": MASK, "output_type": "seq",
    }  # fmt: skip
    plain, plain_guided = pipe(**call).sequences, pipe(**call, guidance_scale=2.0).sequences
    dx.enable(pipe, dx.DKVCacheConfig(refresh_interval=1))
    assert torch.equal(pipe(**call).sequences, plain)
    assert torch.equal(pipe(**call, guidance_scale=2.0).sequences, plain_guided)
    assert run_of(model, "dkv_cache").store is None  # the run has ended
    dx.enable(pipe, dx.DKVCacheConfig(refresh_interval=8))
    counts = computed(model)
    first = pipe(**call).sequences
    assert min(counts) < 10 and max(counts) == 17
    assert torch.equal(pipe(**call).sequences, first)
    guided = pipe(**call, guidance_scale=2.0).sequences
    assert guided.shape == first.shape and torch.equal(pipe(**call, guidance_scale=2.0).sequences, guided)


@exact
def test_in_the_stock_pipeline():
    model = tiny("llada")
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {
        "input_ids": prompts(), "gen_length": 11, "block_length": 8, "num_inference_steps": 8, "threshold": 2.0,
        "editing_threshold": None, "mask_token_id": MASK, "output_type": "seq",
    }  # fmt: skip
    plain = pipe(**call).sequences
    dx.enable(pipe, dx.DKVCacheConfig(refresh_interval=1))
    assert torch.equal(pipe(**call).sequences, plain)
    dx.enable(pipe, dx.DKVCacheConfig(refresh_interval=4))
    counts = computed(model)
    pipe(**call)
    assert counts == [8, 8, 2, 1, 16, 16, 7, 6, 16, 4, 3, 2]  # two blocks, in windows of 8 and 16 tokens
    callback = {**call, "callback_on_step_end": _abort}
    first = pipe(**call).sequences
    with pytest.raises(KeyboardInterrupt):
        pipe(**callback)
    assert torch.equal(pipe(**call).sequences, first)


def _abort(pipe, step, timestep, values):
    if step == 2:
        raise KeyboardInterrupt
    return values


@exact
def test_neighbours_are_the_nearest_left_and_right_in_turn():
    """Against the walk of the paper's text, one place at a time."""

    def walk(chosen, centre, candidates, window):
        left, right, found, turn = centre - 1, centre + 1, 0, True
        while found < window and (left >= 0 or right < len(chosen)):
            place = left if turn else right
            if 0 <= place < len(chosen) and candidates[place] and not chosen[place]:
                chosen[place], found = True, found + 1
            left, right, turn = left - turn, right + (not turn), not turn

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        candidates = torch.rand((2, 14), generator=generator) < 0.6
        centres = candidates & (torch.rand((2, 14), generator=generator) < 0.2)
        chosen = centres | (torch.rand((2, 14), generator=generator) < 0.1)
        window = int(torch.randint(0, 5, (), generator=generator))
        expected = chosen.clone()
        for row in range(2):
            for centre in centres[row].nonzero().flatten().tolist():
                walk(expected[row], centre, candidates[row], window)
        assert torch.equal(with_neighbours(chosen, centres, candidates, window), expected)


@exact
def test_announcements_hold_for_one_call_and_are_checked():
    model = tiny("llada")
    first = masked_tokens(1)
    dx.enable(model, dx.DKVCacheConfig(variant="greedy", refresh_interval=10, window=0))
    counts = computed(model)
    now = torch.zeros_like(first, dtype=torch.bool)
    now[:, 6] = True
    logits(model, first)
    for tokens in (first, unmasked(first, 6)):
        dx.announce_positions(model, now)
        logits(model, tokens)
    logits(model, unmasked(first, 6))  # nothing announced: everything
    assert counts == [12, 1, 1, 12]
    with pytest.raises(ValueError, match=r"`positions` is torch\.int64 of shape"):
        dx.announce_positions(model, now.long())
    dx.announce_positions(model, now[:, :5])
    with pytest.raises(ValueError, match=r"`positions` announced have shape \(1, 5\)"):
        logits(model, unmasked(first, 6))


@exact
def test_what_is_refused():
    causal = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    )
    with pytest.raises(ValueError, match="'dkv_cache' does not work on LlamaForCausalLM: its attention is causal"):
        dx.enable(causal, dx.DKVCacheConfig())
    with pytest.raises(ValueError, match="`mask_token_id` is None, and the config of this BertForMaskedLM has none"):
        dx.enable(bert(), dx.DKVCacheConfig())
    with pytest.raises(ValueError, match="`mask_token_id` is 50; this MaskedLanguageModel has tokens 0 to 49"):
        dx.enable(tiny("llada"), dx.DKVCacheConfig(mask_token_id=50))
    model = tiny("llada")
    dx.enable(model, dx.DKVCacheConfig())
    with pytest.raises(ValueError, match="cannot be on together with 'dkv_cache'"):
        dx.enable(model, dx.FreeCacheConfig())
    with pytest.raises(RuntimeError, match="called with `input_ids`"):
        model.network(inputs_embeds=torch.zeros(1, 4, 32), use_cache=False)


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "all"}, "`variant` is 'all'"),
        ({"refresh_interval": 0}, "`refresh_interval` is 0"),
        ({"refresh_interval": True}, "`refresh_interval` is True"),
        ({"block_length": 0}, "`block_length` is 0"),
        ({"delay": -1}, "`delay` is -1"),
        ({"window": 1.5}, "`window` is 1.5"),
        ({"mask_token_id": -1}, "`mask_token_id` is -1"),
        ({"shift_logits": 1}, "`shift_logits` is 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dx.DKVCacheConfig(**options)


@exact
def test_a_copy_has_its_own_store_and_weights():
    model = tiny("llada")
    configs = {id(layer.self_attn): layer.self_attn.config for layer in model.network.model.layers}
    dx.enable(model, dx.DKVCacheConfig(refresh_interval=10))
    tokens, calls = generate(model, prompts())
    clone = copy.deepcopy(model)
    assert torch.equal(generate(clone, prompts())[0], tokens)
    assert run_of(clone, "dkv_cache") is not run_of(model, "dkv_cache")
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    generate(clone, prompts(seed=1))
    again, cached = generate(model, prompts())
    assert torch.equal(again, tokens) and all(torch.equal(a[1], b[1]) for a, b in zip(calls, cached, strict=True))
    dx.disable(model)
    assert all(layer.self_attn.config is configs[id(layer.self_attn)] for layer in model.network.model.layers)
    assert "diffusers_ext" not in json.dumps(clone.network.config.to_dict())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_equals_the_authors_code(name):
    """Their LLaDA with our weights: tokens, and the masked tokens' logits in each call."""
    run, model = GOLDEN["runs"][name], tiny("llada")
    kind, *numbers = name.split("_")
    order = before = None
    computed_tokens: list[torch.Tensor] = []
    if kind == "decode":
        dx.enable(model, dx.DKVCacheConfig(refresh_interval=int(numbers[0]), block_length=8))
    if kind == "greedy":
        interval, window = map(int, numbers)
        dx.enable(model, dx.DKVCacheConfig(variant="greedy", refresh_interval=interval, block_length=8, window=window))
        torch.manual_seed(0)
        order = lambda block: torch.rand(2, 21)  # noqa: E731
        before = lambda now: dx.announce_positions(model, now)  # noqa: E731

    def note(*_):
        chosen = None if kind == "none" else run_of(model, "dkv_cache").chosen
        everything = torch.ones(2, 21, dtype=torch.bool)
        one = everything if chosen is None else torch.zeros_like(everything).scatter(1, chosen.index, True)
        computed_tokens.append(one)

    model.network.model.norm.register_forward_hook(note)
    tokens, calls = generate(model, prompts(), order=order, before=before)
    assert tokens.tolist() == run["tokens"]
    for (before_it, found), fresh, expected in zip(calls, computed_tokens, run["calls"], strict=True):
        chosen = found[(before_it == MASK) & fresh].double()
        assert len(chosen) == expected[0]
        numbers_of = torch.stack([chosen.mean(), chosen.std(), *chosen[0, :3]])
        torch.testing.assert_close(numbers_of, torch.tensor(expected[1:]).double(), rtol=0, atol=2e-4)


# --- claim -----------------------------------------------------------------------------------------------------------


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_recipe_comes_back_and_a_hooked_model_is_saved_as_it_is(tmp_path):
    model = tiny("llada")
    pipe = dx.MaskedDiffusionPipeline(model, BlockRefinementScheduler())
    dx.enable(pipe, dx.DKVCacheConfig(refresh_interval=2, variant="prefix_decode"))
    dx.save_pretrained(pipe, tmp_path / "repo")
    again = dx.Pipeline.from_pretrained(tmp_path / "repo")
    assert [entry.config for entry in dx.status(again)] == [
        dx.DKVCacheConfig(refresh_interval=2, variant="prefix_decode")
    ]
    tokens = masked_tokens()
    dx.disable(again), dx.disable(pipe)
    assert torch.equal(logits(again.model, tokens), logits(model, tokens))


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("dkv_cache")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets[:1]:
        scope: dict = {}
        exec(compile(snippet, "card", "exec"), scope)
        assert len(scope["text"]) > 0 and dx.status(scope["pipe"]) == []
    assert "2505.15781" in card and "Apache-2.0" in card
