"""HEX, a vote over block lengths, by the five proofs."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.pipelines.hex import vote
from tests.common import models
from tests.common.suite import CommonCase
from tests.languages import chain, exact_model, quiet

COMMON = CommonCase(
    make=lambda: dx.HEXPipeline(models.masked_language_model(), dx.UnmaskingScheduler()),
    inputs=lambda steps: {
        "input_ids": torch.tensor([[1, 2, 3, 4]]), "mask_token_id": models.MASK, "gen_length": 6,
        "num_inference_steps": steps, "block_lengths": (2, 6), "seeds_per_block": 2,
    },
)  # fmt: skip

exact = pytest.mark.proof("exact")


def hex_pipeline(language, **settings):
    return quiet(dx.HEXPipeline(exact_model(language, **settings), dx.UnmaskingScheduler()))


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_one_block_length_and_seed_is_the_base_pipeline():
    language = chain(length=8)
    pipe = hex_pipeline(language, perturbation=1.0)
    prompt = torch.tensor([[0, 1], [2, 2]])
    found = pipe(input_ids=prompt, block_lengths=[3], seeds_per_block=1, temperature=0.0, gen_length=6)
    base = quiet(dx.MaskedDiffusionPipeline(pipe.model, pipe.scheduler))
    expected = base(input_ids=prompt, block_length=3, temperature=0.0, gen_length=6, output_type="seq")
    assert torch.equal(found.sequences[:, 0], expected.sequences) and found.num_calls == expected.num_calls
    assert found.answers == [tuple(row) for row in expected.sequences.tolist()]


@exact
def test_the_vote_does_not_depend_on_the_order():
    answers = ["b", "a", None, "a", "b", "c", "a", "b", None]
    lengths = [8, 8, 8, 16, 16, 16, 32, 32, 32]
    expected = vote(answers, lengths)
    pairs, shuffle = list(zip(answers, lengths, strict=True)), random.Random(0)
    for _ in range(50):
        shuffle.shuffle(pairs)
        assert vote(*zip(*pairs, strict=True)) == expected


@exact
@pytest.mark.parametrize(
    ("answers", "lengths", "best", "without"),
    [
        (["a", "b", "b"], [8, 16, 32], "b", "b"),
        (["b", "a"], [8, 16], "b", None),
        (["a", "b", "b", "a"], [16, 8, 32, 16], "b", None),
        (["b", "a"], [8, 8], "a", None),
        ([None, "a"], [8, 16], "a", "a"),
        ([None, None], [8, 16], None, None),
    ],
)
def test_ties(answers, lengths, best, without):
    assert vote(answers, lengths) == best
    assert vote(answers, lengths, "none") == without


@exact
def test_every_block_length_has_its_samples():
    language = chain(length=6)
    pipe = hex_pipeline(language)
    prompt = [torch.tensor([0]), torch.tensor([1, 2])] * 4
    found = pipe(
        input_ids=prompt, block_lengths=(1, 2, 4), seeds_per_block=3, gen_length=4,
        extractor=lambda tokens: tokens[0] if tokens[0] else None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.sequences.shape == (8, 9, 4) and found.block_lengths == [1] * 3 + [2] * 3 + [4] * 3
    assert found.num_calls == [9 * 4] * 8
    for row, votes, answer in zip(found.sequences[..., 0].tolist(), found.votes, found.answers, strict=True):
        right = Counter(first for first in row if first)
        assert votes == dict(right) and answer in votes and votes[answer] == max(right.values())
    assert len({tuple(row) for row in found.sequences[0].tolist()}) > 1


@exact
def test_seeds_decide():
    pipe = hex_pipeline(chain(length=6))
    options = {"gen_length": 6, "block_lengths": (2, 6), "seeds_per_block": 4}
    one, same, other = (pipe(generator=torch.Generator().manual_seed(seed), **options).sequences for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_lengths": ()}, "`block_lengths` is \\(\\)"),
        ({"block_lengths": (0, 8)}, "`block_lengths`"),
        ({"seeds_per_block": 0}, "`seeds_per_block` is 0"),
        ({"tie": "first"}, "`tie` is 'first'"),
        ({"block_length": 8}, "`block_length` is given"),
        ({"num_steps": 8}, "`num_steps` is no argument"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        hex_pipeline(chain())(**{"gen_length": 4, **options})


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
def test_equals_a_slow_ensemble():
    """The authors published no code. One sample at a time by the base pipeline, and the vote by hand."""
    language = chain(length=7)
    pipe = hex_pipeline(language)
    base = quiet(dx.MaskedDiffusionPipeline(pipe.model, pipe.scheduler))
    prompt, lengths, seeds = torch.tensor([2]), (1, 3), 6
    found = pipe(
        input_ids=prompt, gen_length=3, block_lengths=lengths, seeds_per_block=seeds, extractor=lambda tokens: tokens[-1],
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    generator, said = torch.Generator().manual_seed(3), []
    for length in lengths:
        for seed in torch.randint(2**63 - 1, (seeds,), generator=generator).tolist():
            sequence = base(
                input_ids=prompt, gen_length=3, block_length=length, output_type="seq",
                generator=[torch.Generator().manual_seed(seed)],
            ).sequences  # fmt: skip
            said.append(int(sequence[0, -1]))
    counts = [said.count(symbol) for symbol in range(3)]
    assert found.votes[0] == {symbol: count for symbol, count in enumerate(counts) if count}
    assert counts[found.answers[0]] == max(counts)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_folder_of_the_base_pipeline_loads(tmp_path):
    base = quiet(dx.MaskedDiffusionPipeline(models.masked_language_model(), dx.UnmaskingScheduler(threshold=0.9)))
    base.save_pretrained(tmp_path)
    pipe = quiet(dx.HEXPipeline.from_pretrained(tmp_path, tokenizer=None))
    assert pipe.scheduler.config.threshold == 0.9
    options = {**COMMON.inputs(3), "generator": torch.Generator().manual_seed(0)}
    assert pipe(**options).sequences.shape == (1, 4, 6)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("hex"), space)
    output = space["output"]
    assert sum(output.votes[0].values()) <= 6 and len(output.texts[0]) == 6
    assert "## When not to use it" in method_card("hex")
