"""FreeCache and guided diffusion, by the five proofs. What all language-model caches share is in `test_dkv_cache`."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import diffusers_ext as dx
from tests.common.models import MASK as BERT_MASK
from tests.common.suite import CommonCase
from tests.language_models import (
    CHECKPOINTS,
    MASK,
    computed,
    generate,
    logits,
    masked_tokens,
    prompts,
    slow_logits,
    tiny,
    unmasked,
)

COMMON = CommonCase(
    settings=[
        {"mask_token_id": BERT_MASK, "block_length": 2},
        {"mask_token_id": BERT_MASK, "window": 1},
        {"mask_token_id": BERT_MASK, "block_length": 4, "recompute_finished": True},
    ],
    skips={"compiled": "it breaks the graph at each layer; `compiled_eagerly` holds it to the same numbers"},
)

exact = pytest.mark.proof("exact")


# --- exact: the cache ------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_step_in_which_nothing_was_settled_equals_a_full_one(name):
    model, tokens = tiny(name).double(), masked_tokens()
    full = logits(model, tokens)
    dx.enable(model, dx.FreeCacheConfig(block_length=4))
    counts = computed(model)
    for _ in range(3):
        torch.testing.assert_close(logits(model, tokens), full, rtol=0, atol=1e-10)
    before = 1 if model.config.shift_logits else 0
    assert counts == [12, 8 + before, 8 + before]


@exact
def test_the_work_shrinks_block_by_block():
    model = tiny("llada")
    for settings, expected in (
        ({"block_length": 4}, [12, 8, 8, 8, 4, 4, 4, 4]),
        ({"block_length": 4, "recompute_finished": True}, [12, 8, 8, 8, 8, 4, 4, 4]),
        ({"window": 2}, [12, 9, 8, 7, 6, 5, 4, 3]),
    ):
        dx.enable(model, dx.FreeCacheConfig(**settings))
        counts = computed(model)
        order = lambda block: torch.arange(12, 0, -1).float().expand(1, -1)  # noqa: E731  # from left to right
        generate(model, prompts(1, 4), gen_length=8, block_length=4, order=order)
        assert counts == expected, settings


@exact
@torch.no_grad()
@pytest.mark.parametrize("again", [False, True])
def test_rows_are_in_blocks_of_their_own(again):
    """Rows finish their blocks at different steps; each is as it is alone, and as a forward written out says."""
    first = masked_tokens(2)
    two = [unmasked(first[:1], 4, 5, 6, 7), unmasked(first[1:], 4)]
    states = [first, torch.cat(two), torch.cat([unmasked(two[0], 9), unmasked(two[1], 5, 6, 7, 10)])]
    begins = [[0, 0], [8, 4], [8, 8]]
    if again:
        begins = [[0, 0], [4, 4], [8, 4]]
    model, plain = tiny("llada").double(), tiny("llada").double()
    dx.enable(model, dx.FreeCacheConfig(block_length=4, recompute_finished=again))
    stored = None
    for tokens, begin in zip(states, begins, strict=True):
        fresh = torch.arange(12) >= torch.tensor(begin)[:, None]
        expected, stored = slow_logits(plain, tokens, fresh, stored)
        torch.testing.assert_close(logits(model, tokens)[fresh], expected[fresh], rtol=0, atol=1e-5)


@exact
@pytest.mark.parametrize("again", [True, False])
def test_with_block_causal_attention_it_is_exact_if_finished_blocks_are_computed_again(again):
    model = tiny("sdar").double()
    plain, calls = generate(model, prompts(2, 4), gen_length=12, block_length=4)
    dx.enable(model, dx.FreeCacheConfig(block_length=4, recompute_finished=again))
    tokens, cached = generate(model, prompts(2, 4), gen_length=12, block_length=4)
    difference = max((a - b)[x == MASK].abs().max() for (x, a), (_, b) in zip(calls, cached, strict=True))
    if again:
        assert torch.equal(tokens, plain) and difference < 1e-10
    else:
        assert difference > 1e-3  # the authors' way: frozen as in the last step


@exact
def test_in_the_pipelines():
    """A text of one block is nothing to freeze but the prompt; in blocks the stock windows and ours are one after another."""
    model = tiny("llada")
    stock = LLaDA2Pipeline(model, BlockRefinementScheduler())
    ours = dx.MaskedDiffusionPipeline(model, BlockRefinementScheduler())
    for pipe, counts_expected in ((stock, [8, 4, 4, 4, 4, 4, 4, 4]), (ours, [12, 8, 8, 8, 4, 4, 4, 4])):
        pipe.set_progress_bar_config(disable=True)
        dx.enable(pipe, dx.FreeCacheConfig(block_length=4))
        counts = computed(model)
        settings = {} if pipe is ours else {"editing_threshold": None}
        pipe(
            input_ids=prompts(2, 4), gen_length=8, block_length=4, num_inference_steps=4, threshold=2.0, temperature=0.0,
            mask_token_id=MASK, output_type="seq", **settings,
        )  # fmt: skip
        assert counts[: len(counts_expected)] == counts_expected, counts
        dx.disable(pipe)


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, "`block_length` is 0"),
        ({"block_length": 1.5}, "`block_length` is 1.5"),
        ({"window": -1}, "`window` is -1"),
        ({"recompute_finished": 1}, "`recompute_finished` is 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dx.FreeCacheConfig(**options)


# --- exact: the verifier ---------------------------------------------------------------------------------------------


def copies(tokens, shift=0):
    """A verifier whose likeliest next token is the one that comes (`shift` 0), or another one."""
    following = torch.roll(tokens, -1, 1)
    return SimpleNamespace(logits=torch.nn.functional.one_hot((following + shift) % 50, 50).float() * 20)


def run_guided(model, verifier, **settings):
    pipe = dx.MaskedDiffusionPipeline(model, dx.GuidedUnmaskingScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.scheduler.guide(model, verifier)
    result = pipe(
        input_ids=[torch.tensor([5, 6, 7]), torch.tensor([8, 9])], gen_length=8, temperature=0.0, mask_token_id=MASK,
        output_type="seq",
    )  # fmt: skip
    handle.remove()
    return result


@torch.no_grad()
def left_to_right(model, prompt, length):
    """Greedy, one token a call."""
    x = torch.cat([prompt, torch.full((length,), MASK)])[None]
    for place in range(len(prompt), x.shape[1]):
        found = model(input_ids=x).logits[0, place].double()
        found[MASK] = -torch.inf
        x[0, place] = found.argmax()
    return x[0, len(prompt) :]


@exact
def test_a_verifier_that_rejects_all_leaves_greedy_decoding_from_left_to_right():
    model = tiny("llada")
    result = run_guided(model, lambda input_ids: copies(input_ids, shift=1))
    assert result.num_calls == [8, 8]
    for row, prompt in enumerate([torch.tensor([5, 6, 7]), torch.tensor([8, 9])]):
        assert torch.equal(result.sequences[row], left_to_right(model, prompt, 8))


@exact
@pytest.mark.parametrize("acceptance", ["argmax", "topk", "threshold"])
def test_a_verifier_that_accepts_all_takes_the_first_draft(acceptance):
    model = tiny("llada")
    result = run_guided(model, lambda input_ids: copies(input_ids), acceptance=acceptance)
    assert result.num_calls == [1, 1]
    x = torch.cat([torch.tensor([5, 6, 7]), torch.full((8,), MASK)])[None]
    found = logits(model, x).double()
    found[..., MASK] = -torch.inf
    assert torch.equal(result.sequences[0], found.argmax(-1)[0, 3:])


@exact
def test_the_longest_accepted_run_is_written():
    """The verifier rejects each token at a place that is a multiple of 4."""
    model = tiny("llada")

    def verifier(input_ids):
        found = copies(input_ids)
        found.logits[:, 3::4] = 0
        found.logits[:, 3::4, MASK] = 1
        return found

    assert run_guided(model, verifier).num_calls == [5, 5]  # places 3 | 4 | 5-7 | 8 | 9, 10 and 2, 3 | 4 | 5-7 | 8 | 9
    with pytest.raises(ValueError, match="No verifier reads along"):
        pipe = dx.MaskedDiffusionPipeline(model, dx.GuidedUnmaskingScheduler())
        pipe(input_ids=[torch.tensor([5])], gen_length=4, mask_token_id=MASK, output_type="seq")


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@torch.no_grad()
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_equals_the_loop_of_the_authors_written_out(name):
    """Their loop needs their own copy of Dream and a GPU package, so it is written out here: what is fed in each call
    (`x[block_start - o:]`, o = 1 for shifted logits), which keys and values are frozen after it, and when."""
    model = tiny(name).double()
    offset = 1 if name == "dream" else 0
    prompt, length, block = prompts(2, 5), 8, 4
    dx.enable(model, dx.FreeCacheConfig(block_length=block))
    counts = computed(model)
    states = []
    generate(model, prompt, gen_length=length, block_length=block)
    assert counts == [13, *[13 - 5 + offset] * 3, *[13 - 9 + offset] * 4]
    if name == "dream":
        return  # its layers are written out in no test; that counts agree is what is left
    plain = tiny(name).double()
    x, stored, frozen = torch.full((2, 13), MASK), None, 0
    x[:, :5] = prompt
    tokens, calls = generate(model, prompt, gen_length=length, block_length=block)
    for number in range(2):
        for step in range(4):
            fresh = torch.arange(13).expand(2, -1) >= frozen
            expected, stored = slow_logits(plain, x, fresh, stored)
            inside = (x == MASK) & (torch.arange(13) >= 5 + 4 * number) & (torch.arange(13) < 9 + 4 * number)
            torch.testing.assert_close(calls[4 * number + step][1][inside], expected[inside], rtol=0, atol=1e-5)
            confidence, token = expected.double().softmax(-1).max(-1)
            now = torch.zeros_like(inside).scatter(1, confidence.masked_fill(~inside, -1.0).topk(1, 1).indices, True)
            x = torch.where(now, token, x)
            if number == 0 and step == 0:
                frozen = 5  # after the first pass: the prompt
            if step == 3:
                frozen = 9 + 4 * number  # after a block's last pass: the block, as that pass saw it
        states.append(x)
    assert torch.equal(states[-1], tokens)


# --- claim -----------------------------------------------------------------------------------------------------------


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_cache_and_scheduler_come_back(tmp_path):
    model = tiny("llada")
    pipe = dx.MaskedDiffusionPipeline(model, dx.GuidedUnmaskingScheduler(acceptance="topk", acceptance_top_k=3))
    dx.enable(pipe, dx.FreeCacheConfig(window=8))
    dx.save_pretrained(pipe, tmp_path / "repo")
    again = dx.Pipeline.from_pretrained(tmp_path / "repo")
    assert [entry.config for entry in dx.status(again)] == [dx.FreeCacheConfig(window=8)]
    assert again.scheduler.config.acceptance == "topk" and again.scheduler.config.acceptance_top_k == 3


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("freecache")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    scope: dict = {}
    exec(compile(snippets[0], "card", "exec"), scope)
    assert len(scope["text"]) > 0 and dx.status(scope["pipe"]) == []
    assert "2505.21467" in card and "Apache-2.0" in card
