"""AdaBlock, blocks that end at delimiters, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import diffusers_ext as dx
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, sample
from tests.methods.test_radd import run_alone

COMMON = CommonCase(
    process="other", inputs=run_alone, settings=[{"threshold": 0.5, "confidence": "margin"}, {"confidence": "entropy"}]
)
GOLDEN = Path(__file__).parents[1] / "golden" / "adablock.json"
MASK, VOCABULARY, DELIMITERS = 19, 20, (4, 7)

exact = pytest.mark.proof("exact")


def golden_logits(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, length, VOCABULARY)` float64, by formula; tokens look at one another, and delimiters come often."""
    places, v = torch.arange(tokens.shape[1]).double(), torch.arange(VOCABULARY).double()
    away = (places[:, None] - places).abs()
    seen = (torch.sin(1.3 * tokens.double()[:, None, :] + 0.9 * away) / (1 + away)).sum(-1)
    logits = 6 * torch.sin(seen[..., None] + 1.7 * v + 0.37 * places[:, None])
    logits = logits + 1.5 * torch.isin(v, torch.tensor(DELIMITERS).double())
    return torch.where(v == MASK, -1e4, logits)


def decode(prompt, gen_length, policy, threshold=0.9):
    pipe = pipeline(FormulaModel(golden_logits), dx.UnmaskingScheduler(threshold=threshold))
    return pipe(
        input_ids=prompt, gen_length=gen_length, temperature=0.0, mask_token_id=MASK, output_type="seq",
        **({"block_policy": policy} if policy is not None else {"block_length": 8}),
    )  # fmt: skip


PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([11]), torch.tensor([5, 18, 0, 9, 4])]


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_without_delimiters_blocks_are_fixed():
    for policy in (
        dx.AdaptiveBlockPolicy(DELIMITERS, math.inf, default=8),
        dx.AdaptiveBlockPolicy([], default=8),
        dx.AdaptiveBlockPolicy(DELIMITERS, 1.1, default=8),  # looks at the window, and finds nothing sure enough
    ):
        for prompt in PROMPTS:
            found, fixed = decode(prompt, 21, policy), decode(prompt, 21, None)
            assert torch.equal(found.sequences, fixed.sequences)
            assert found.num_calls == fixed.num_calls and found.block_lengths == fixed.block_lengths == [[8, 8, 5]]


@exact
def test_blocks_add_up_and_the_look_ahead_costs_no_call():
    for prompt in PROMPTS:
        policy = dx.AdaptiveBlockPolicy(DELIMITERS, 0.2, default=8)
        result = decode(prompt, 40, policy, threshold=2.0)
        (lengths,) = result.block_lengths
        assert sum(lengths) == 40 and len(set(lengths)) > 1
        assert result.num_calls == [40], "one token a step, the first of a block by the pass that sized it"


@exact
def test_a_block_ends_at_the_surest_delimiter_of_the_window():
    policy = dx.AdaptiveBlockPolicy([1, 2], 0.5, window=0.5, default=4)
    p = torch.full((3, 8, 3), 0.0, dtype=torch.float64)
    p[..., 0] = 1.0
    p[:, 2] = torch.tensor([0.3, 0.6, 0.1])  # a delimiter of 0.6
    p[:, 4] = torch.tensor([0.1, 0.1, 0.8])  # and of 0.8
    p[:, 6] = torch.tensor([0.0, 1.0, 0.0])  # out of the windows of 6 and 5 places
    p[2, 2], p[2, 4] = torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.4, 0.45, 0.15])  # not likeliest; not sure
    remaining, total = torch.tensor([12, 4, 12]), torch.tensor([12, 10, 12])
    assert policy.lengths(0, remaining, total, p.log()).tolist() == [5, 3, 4]
    assert policy.window(12) == 6 and policy.window(4) == 4


@exact
def test_rows_have_blocks_of_their_own():
    """A batch gives each row what it gets alone."""
    policy = dx.AdaptiveBlockPolicy(DELIMITERS, 0.2, default=8)
    prompts = torch.tensor([[1, 2, 3], [5, 18, 0], [11, 7, 2]])
    together = decode(prompts, 40, policy)
    assert len({tuple(lengths) for lengths in together.block_lengths}) == 3
    for i in range(3):
        alone = decode(prompts[i : i + 1], 40, policy)
        assert torch.equal(alone.sequences[0], together.sequences[i])
        assert alone.num_calls[0] == together.num_calls[i]
        assert alone.block_lengths[0] == together.block_lengths[i]


@exact
def test_the_commit_rule():
    """All from the threshold on, itself included, and always the surest; in float64 at temperature 1."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.45, 0.55 - 1e-9, 1e-9]], dtype=torch.float64)
    found = {}
    for threshold in (0.5, 0.55, 2.0):
        scheduler = dx.UnmaskingScheduler(threshold=threshold)
        scheduler.set_timesteps(3, block_length=3)
        tokens = torch.full((1, 3), 3)
        logits = torch.nn.functional.pad(p.log(), (0, 1), value=5.0)  # the mask, which no text has
        found[threshold] = scheduler.step(logits[None], 0, tokens, mask_token_id=3).transfer_index[0].tolist()
    assert found == {0.5: [True, True, True], 0.55: [False, True, False], 2.0: [False, True, False]}


@exact
def test_a_high_threshold_is_one_token_a_step():
    language = chain(length=6)
    pipe = pipeline(exact_model(language), dx.UnmaskingScheduler(threshold=2.0))
    result = sample(pipe, 20, 6, block_policy=dx.AdaptiveBlockPolicy([1], default=3))
    assert set(result.num_calls) == {6}


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter_ids": "\n"}, "`delimiter_ids`"),
        ({"delimiter_threshold": -0.1}, "`delimiter_threshold` is -0.1"),
        ({"delimiter_threshold": math.nan}, "`delimiter_threshold` is nan"),
        ({"window": 0.0}, "`window` is 0.0"),
        ({"default": 0}, "`default` is 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        dx.AdaptiveBlockPolicy(**{"delimiter_ids": [1], **options})


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {
    f"prompt {prompt}, threshold {threshold}, delimiters {delimiter}, length {length}": (
        prompt, threshold, delimiter, length,
    )
    for prompt, threshold, delimiter, length in (
        (0, 0.9, 0.2, 40), (1, 0.6, 0.3, 64), (2, 0.9, 0.3, 64), (2, 0.3, 0.1, 33), (1, 0.9, math.inf, 24),
    )
}  # fmt: skip


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_decoder(run):
    """Tokens, lengths of the blocks and calls of each block together, batch 1 and greedy, as theirs is."""
    number, threshold, delimiter_threshold, length = RUNS[run]
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    policy = dx.AdaptiveBlockPolicy(DELIMITERS, delimiter_threshold, default=8)
    result = decode(PROMPTS[number], length, policy, threshold)
    assert result.block_lengths == [golden["blocks"]]
    assert result.num_calls == [sum(golden["calls"])]
    assert result.sequences[0].tolist() == golden["tokens"]


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded(tmp_path):
    scheduler = dx.UnmaskingScheduler(threshold=0.9, confidence="margin")
    pipe = pipeline(FormulaModel(golden_logits), scheduler)
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = dx.UnmaskingScheduler.from_pretrained(tmp_path)
    assert loaded.config.threshold == 0.9 and loaded.config.confidence == "margin"


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("adablock"), space)
    output = space["output"]
    assert sum(output.block_lengths[0]) == 48 and output.texts
    tokenizer = AutoTokenizer.from_pretrained(dx.zoo_path("verses-mdlm"))
    ends = torch.tensor(output.block_lengths[0]).cumsum(0) - 1
    delimiter = tokenizer("\n", add_special_tokens=False).input_ids
    assert space["policy"].delimiter_ids == delimiter
    made, lengths = output.sequences[0], output.block_lengths[0]
    for end, length in zip(ends.tolist()[:-1], lengths[:-1], strict=True):
        assert length == space["policy"].default or made[end].item() in delimiter
    assert "## When not to use it" in method_card("adablock")
