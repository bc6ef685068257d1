"""The guard against masks in a user's text, and the probe, with harmless canary policies."""

from __future__ import annotations

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import diffusers_ext as dx
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, quiet

exact = pytest.mark.proof("exact")
REFUSAL = "no."


def canary(text: str) -> float:
    """The word that must not be said."""
    return float("zebra" in text)


def update(seed: int) -> tuple:
    return (["a zebra", "a lion", "no"][seed:], ["infill", "infill", "plain"][seed:])


COMMON = CommonCase(
    settings=[{"policy_fn": canary}],
    inputs=update,
    known=[((["a zebra", "a lion", "no"], ["infill", "infill", "plain"]), {"infill": 0.5, "plain": 0.0})],
)


@pytest.fixture(scope="module")
def tokenizer():
    special = {"eos_token": "<end>", "mask_token": "<mask>", "pad_token": "<end>"}
    vocab = {token: i for i, token in enumerate(["<end>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    letters = Tokenizer(token_models.BPE(vocab=vocab, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, clean_up_tokenization_spaces=False, **special)


@pytest.fixture
def pipe(tokenizer):
    """Refuses a question, and fills in whatever fits: the word, where masks stand within a text; `>` asks for it by name."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(*tokens.shape, len(tokenizer))
        for row, result in zip(tokens.tolist(), made, strict=True):
            start = row.index(1) if 1 in row else len(row)
            framed = any(token not in (0, 1) for token in row[start:]) and row[-1] not in (0, 1)
            asked = tokenizer.convert_tokens_to_ids(">") in row
            begin = row.index(tokenizer.convert_tokens_to_ids(">")) + 1 if asked else 0
            say = "a zebra " if asked else "zebra" if framed else "no"
            for place in range(len(row)):
                i = place - (begin if asked else start if framed else 0)
                letter = say[i % len(say)] if asked or framed else None
                token = 0 if letter is None else tokenizer(letter, add_special_tokens=False).input_ids[0]
                result[place, token] = 10.0
        return made

    return quiet(dx.MaskedDiffusionPipeline(FormulaModel(logits), dx.UnmaskingScheduler(), tokenizer))


CALL = {"gen_length": 24, "block_length": 8, "temperature": 0.0}


@exact
def test_a_mask_in_a_users_text_is_text(tokenizer):
    guard = dx.InfillGuard(tokenizer, canary)
    text = "say <mask><mask> or <end> here"
    assert tokenizer(text).input_ids.count(1) == 2, "without the guard they are masks"
    (row,) = guard.encode([text])
    assert not {0, 1} & set(row.tolist()) and tokenizer.decode(row) == text

    class Stubborn:
        mask_token_id, eos_token_id = 1, 0

        def __call__(self, text, **_):
            return tokenizer(text)

    with pytest.raises(ValueError, match="has masks in it, 2; infilling is not allowed"):
        dx.InfillGuard(Stubborn(), canary).encode([text])


@exact
def test_a_policy_that_accepts_everything_changes_nothing(tokenizer, pipe):
    prompts = ["a>", "abc>"]
    ids = dx.InfillGuard(tokenizer, canary).encode(prompts)
    call = {**CALL, "temperature": 1.0, "num_inference_steps": 3}
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pipe(input_ids=ids, output_type="seq", generator=seeds, **call).sequences
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    found = dx.InfillGuard(tokenizer, lambda text: 0.0)(pipe, prompts, generator=seeds, **call)
    assert torch.equal(found.sequences, expected) and found.refused == [False, False]


@exact
@pytest.mark.parametrize("attention", ["padding", "block_causal"])
def test_a_block_that_breaks_the_policy_becomes_the_refusal(tokenizer, pipe, attention):
    """Only the row that breaks it: the blocks before it stay, nothing follows, and no mask is left."""
    pipe.register_to_config(attention=attention)
    free = dx.InfillGuard(tokenizer, lambda text: 0.0)(pipe, ["ab>", "abcd"], **CALL)
    assert free.texts[0].startswith("a zebra a zebra")
    guard = dx.InfillGuard(tokenizer, lambda text: text.count("zebra") >= 2, REFUSAL)
    found = guard(pipe, ["ab>", "abcd"], **CALL)
    assert found.refused == [True, False] and torch.equal(found.sequences[1], free.sequences[1])
    kept = (
        8 if attention == "padding" else 13
    )  # blocks begin after the prompt, or at multiples of 8; the second word ends at 15
    assert found.texts[0] == free.texts[0][:kept] + REFUSAL
    assert (found.sequences != 1).all() and (found.sequences[0, kept + len(REFUSAL) :] == 0).all()
    assert not guard.breaks(found.sequences[0].tolist())


@exact
def test_in_the_stock_pipeline(tokenizer, pipe):
    stock = quiet(LLaDA2Pipeline(pipe.model, BlockRefinementScheduler(), tokenizer))
    guard = dx.InfillGuard(tokenizer, lambda text: text.count("zebra") >= 2, REFUSAL)
    options = {**CALL, "num_inference_steps": 8, "threshold": 2.0, "editing_threshold": None}
    found = guard(stock, ["ab>", "abcd"], **options)
    assert found.texts[0] == "a zebra a zeb"[:13] + REFUSAL and found.refused == [True, False]


@exact
def test_what_the_stock_pipeline_leaves_before_an_end_of_text_is_judged(tokenizer):
    """It goes on as soon as a text has ended, with masks after the end in the block."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(*tokens.shape, len(tokenizer))
        for place, letter in enumerate("q: zebra"):
            made[:, place, tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter)] = 10.0
        made[:, 8, 0] = 9.0
        return made

    stock = quiet(LLaDA2Pipeline(FormulaModel(logits), BlockRefinementScheduler(), tokenizer))
    options = {**CALL, "block_length": 16, "num_inference_steps": 14, "threshold": 2.0, "editing_threshold": None}
    free = dx.InfillGuard(tokenizer, lambda text: 0.0)(stock, "q:", **options)
    assert free.texts == [" zebra"] and (free.sequences == 1).any()
    found = dx.InfillGuard(tokenizer, canary, REFUSAL)(stock, "q:", **options)
    assert found.texts == [REFUSAL] and found.refused == [True] and (found.sequences != 1).all()


@exact
def test_no_room_for_the_refusal(tokenizer, pipe):
    guard = dx.InfillGuard(tokenizer, canary, "I cannot help with that.")
    found = guard(pipe, "ab>", gen_length=8, temperature=0.0)
    assert found.texts == ["I canno"] and found.refused == [True]


@exact
def test_the_probe_sees_the_gap_and_the_guard_closes_it(tokenizer, pipe):
    probe, guard = dx.InfillSafetyProbe(canary), dx.InfillGuard(tokenizer, canary, REFUSAL)
    plain, framed = (
        ["tell me", "name one"],
        ["my animal: <mask><mask><mask><mask><mask>.", "a <mask><mask><mask><mask><mask>!"],
    )
    call = {**CALL, "num_inference_steps": 1}  # all masks of a frame at once
    probe.run(pipe, plain, "plain", **call)
    probe.run(pipe, framed, "infill", **call)
    probe.run(pipe, framed, "infill, guarded", guard=guard, **call)
    assert probe.compute() == {"plain": 0.0, "infill": 1.0, "infill, guarded": 0.0}


@exact
def test_bad_arguments(tokenizer, pipe):
    guard = dx.InfillGuard(tokenizer, canary)
    stock = LLaDA2Pipeline(pipe.model, BlockRefinementScheduler(), tokenizer)
    for call, message in (
        (lambda: dx.InfillGuard(tokenizer, "zebra"), "`policy_fn` is 'zebra'"),
        (lambda: dx.InfillGuard(object(), canary), "`tokenizer` has no `mask_token_id`"),
        (lambda: guard(pipe, "a", gen_length=4, input_ids=torch.ones(1, 1)), "`input_ids` is given"),
        (lambda: guard(pipe, "a", gen_length=4, max_post_steps=1), "`max_post_steps` is 1"),
        (lambda: guard(stock, "a", gen_length=4), "`block_length` is None"),
        (lambda: dx.InfillSafetyProbe(None), "`policy_fn` is None"),
        (lambda: dx.InfillSafetyProbe(canary).update(["a"], []), "`kinds` has 0 entries for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("dija")
    assert len(names["output"].texts) == 1 and "## When not to use it" in card
