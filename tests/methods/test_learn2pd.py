"""Learn2PD, a learned filter for parallel decoding, by the five proofs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.training.parallel_filter import replay
from tests.common import models
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, pipeline
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_radd import run_alone

GOLDEN = Path(__file__).parents[1] / "golden" / "learn2pd.json"
BLOCK = 8

exact = pytest.mark.proof("exact")


def threshold_filter(threshold, block=BLOCK):
    """Says yes where the confidence of the place itself is above a threshold."""
    made = dx.ParallelDecodeFilter(block)
    with torch.no_grad():
        made.layers.weight.copy_(1e6 * torch.eye(block))
        made.layers.bias.fill_(-1e6 * threshold)
    return made


def formula_filter():
    """Weights by formula: places look at one another."""
    made = dx.ParallelDecodeFilter(BLOCK)
    i = torch.arange(BLOCK).float()
    with torch.no_grad():
        made.layers.weight.copy_(4 * torch.cos(0.9 * i[:, None] + 1.7 * i) + 5 * torch.eye(BLOCK))
        made.layers.bias.copy_(-2 + torch.sin(i))
    return made


def scheduler_with(filter_, **settings):
    scheduler = dx.LearnedParallelScheduler(block_length=filter_.config.block_length, **settings)
    return dx.LearnedParallelScheduler.from_config(scheduler.config, statistics=filter_)


COMMON = CommonCase(
    process="other", inputs=run_alone, extras=lambda: {"statistics": threshold_filter(0.5, 32)},
    settings=[{"accept_threshold": 0.5}],
)  # fmt: skip


def decode(scheduler, prompt=0, gen_length=32, **options):
    pipe = pipeline(FormulaModel(golden_logits), scheduler)
    options = {"temperature": 0.0, "mask_token_id": MASK, "output_type": "seq", "block_length": BLOCK, **options}
    return pipe(input_ids=PROMPTS[prompt], gen_length=gen_length, **options)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.4])
def test_a_step_function_of_the_confidence_is_a_threshold(threshold):
    for prompt in range(3):
        found = decode(scheduler_with(threshold_filter(threshold), accept_threshold=0.5), prompt)
        expected = decode(dx.UnmaskingScheduler(threshold=threshold), prompt)
        assert torch.equal(found.sequences, expected.sequences) and found.num_calls == expected.num_calls
        assert found.num_calls[0] < 32


@exact
def test_accepting_nothing_is_one_token_a_step():
    found = decode(scheduler_with(threshold_filter(0.0), accept_threshold=1.0))
    assert torch.equal(found.sequences, decode(dx.UnmaskingScheduler()).sequences) and found.num_calls == [32]


@exact
def test_the_oracle_reproduces_the_text_in_fewer_steps():
    for prompt in range(3):
        expected = decode(dx.UnmaskingScheduler(), prompt)
        final = torch.cat([PROMPTS[prompt][None], expected.sequences], 1)
        pipe = pipeline(FormulaModel(golden_logits), dx.UnmaskingScheduler())
        found, oracle = replay(pipe, final, len(PROMPTS[prompt]), BLOCK, mask_token_id=MASK)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.num_calls[0] < 32 and len(oracle.records) == found.num_calls[0]
        confidence, correct = oracle.records[0]
        assert confidence.shape == correct.shape == (1, BLOCK) and confidence.min() > 0 and confidence.max() <= 1
        assert type(pipe.scheduler) is dx.UnmaskingScheduler


@exact
def test_records_say_which_likeliest_tokens_are_final():
    """Against a slow replay of one block, visible places included."""
    prompt = PROMPTS[1]
    final = torch.cat([prompt[None], decode(dx.UnmaskingScheduler(), 1, BLOCK).sequences], 1)
    _, oracle = replay(
        pipeline(FormulaModel(golden_logits), dx.UnmaskingScheduler()), final, 1, BLOCK, mask_token_id=MASK
    )
    tokens = torch.cat([prompt, torch.full((BLOCK,), MASK)])
    for confidence, correct in oracle.records:
        p = golden_logits(tokens[None])[0, 1:].softmax(-1)
        torch.testing.assert_close(confidence[0].double(), p.amax(-1), rtol=1e-6, atol=1e-6)
        right = p.argmax(-1) == final[0, 1:]
        assert torch.equal(correct[0], right)
        masked = tokens[1:] == MASK
        fill = masked & right if bool((masked & right).any()) else masked
        tokens[1:] = torch.where(fill, final[0, 1:], tokens[1:])
    assert torch.equal(tokens, final[0])


@exact
def test_a_trained_filter_learns_the_records():
    """It tells right from wrong better than always saying what is more frequent."""
    pipe = pipeline(FormulaModel(golden_logits), dx.UnmaskingScheduler())
    prompts = torch.randint(0, MASK, (24, 2), generator=torch.Generator().manual_seed(0))
    made = dx.fit_parallel_filter(
        pipe, prompts, 16, BLOCK, hidden_size=32, steps=300, learning_rate=1e-2, mask_token_id=MASK
    )
    again = dx.fit_parallel_filter(
        pipe, prompts, 16, BLOCK, hidden_size=32, steps=300, learning_rate=1e-2, mask_token_id=MASK
    )
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    final = torch.cat([prompts, pipe(
        input_ids=prompts, gen_length=16, block_length=BLOCK, temperature=0.0, mask_token_id=MASK, output_type="seq",
    ).sequences], 1)  # fmt: skip
    _, oracle = replay(pipe, final, 2, BLOCK, mask_token_id=MASK)
    confidence, correct = (torch.cat(part) for part in zip(*oracle.records, strict=True))
    right = ((made(confidence) > 0) == correct).double().mean()
    assert right > max(correct.double().mean(), 1 - correct.double().mean()) + 0.05
    result = pipeline(pipe.model, scheduler_with(made, accept_threshold=0.9))(
        input_ids=prompts, gen_length=16, block_length=BLOCK, temperature=0.0, mask_token_id=MASK, output_type="seq"
    )
    assert sum(result.num_calls) < 24 * 16


@exact
def test_bad_arguments():
    for call, message in (
        (lambda: dx.ParallelDecodeFilter(0), "`block_length` is 0"),
        (lambda: dx.ParallelDecodeFilter(8, -1), "`hidden_size` is -1"),
        (lambda: dx.LearnedParallelScheduler(accept_threshold=1.5), "`accept_threshold` is 1.5"),
        (lambda: dx.LearnedParallelScheduler().set_timesteps(4), "`statistics` is None"),
        (lambda: decode(scheduler_with(threshold_filter(0.5)), block_length=16), "`block_length` is 16"),
        (
            lambda: dx.fit_parallel_filter(pipeline(FormulaModel(golden_logits), dx.UnmaskingScheduler()), None, 9, 4),
            "`gen_length` is 9",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {
    f"prompt {prompt}, accepted above {accepted}": (prompt, accepted)
    for prompt, accepted in ((0, 0.5), (1, 0.96), (2, 0.96), (2, 0.1))
}


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_decoder(run):
    prompt, accepted = RUNS[run]
    result = decode(scheduler_with(formula_filter(), accept_threshold=accepted), prompt)
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    assert result.num_calls == [golden["calls"]]
    assert result.sequences[0].tolist() == golden["tokens"]


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_filter_is_saved_with_the_scheduler(tmp_path):
    pipe = pipeline(models.masked_language_model(), scheduler_with(formula_filter(), accept_threshold=0.7))
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 8}
    expected = pipe(**call, block_length=8, temperature=0.0).sequences
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded.scheduler.statistics.layers.weight, pipe.scheduler.statistics.layers.weight)
    assert loaded.scheduler.config.accept_threshold == 0.7
    assert torch.equal(loaded(**call, block_length=8, temperature=0.0).sequences, expected)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("learn2pd"), space)
    assert space["output"].texts and space["output"].num_calls[0] <= 16
    assert "## When not to use it" in method_card("learn2pd")
