"""EOS early rejection and ascending step sizes, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import diffusers_ext as dx
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, pipeline, quiet
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_radd import run_alone

COMMON = CommonCase(process="other", inputs=run_alone, settings=[{"eos_token_id": 2, "threshold": 0.9}])
GOLDEN = Path(__file__).parents[1] / "golden" / "eoser_ass_cj_grpo.json"
EOS = 4

exact = pytest.mark.proof("exact")


def decode(scheduler, prompt=0, gen_length=32, **options):
    pipe = pipeline(FormulaModel(golden_logits), scheduler)
    options = {"temperature": 0.0, "mask_token_id": MASK, "output_type": "seq", "stop_at_eos": False, **options}
    return pipe(input_ids=PROMPTS[prompt], gen_length=gen_length, **options)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_quotas_and_blocks_add_up():
    for total in range(2, 300):
        steps = int(math.log2(total))
        scheduler = dx.AscendingStepScheduler(block_length=total)
        quotas = scheduler.quotas(total, steps)
        assert sum(quotas) == total and quotas[:-1] == [2**i for i in range(steps - 1)]
        for number in range(1, steps + 1):
            policy = dx.AscendingBlockPolicy(number)
            sizes = policy.sizes(total)
            assert sum(sizes) == total and len(sizes) == number and min(sizes) >= 1
            taken = [policy.steps(i, size, None) for i, size in enumerate(sizes)]
            assert sum(taken) == steps
            assert all(sum(scheduler.quotas(*pair)) == pair[0] for pair in zip(sizes, taken, strict=True))
    assert dx.AscendingBlockPolicy(4).sizes(128) == [15, 16, 32, 65]


@exact
@pytest.mark.parametrize("number", [1, 3])
def test_calls_are_the_logarithm_of_the_tokens(number):
    result = decode(dx.AscendingStepScheduler(), gen_length=37, block_policy=dx.AscendingBlockPolicy(number))
    assert result.num_calls == [5] and (result.sequences != MASK).all()


@exact
def test_factors_of_one_change_nothing():
    plain = decode(dx.UnmaskingScheduler(), num_inference_steps=8)
    same = decode(dx.EOSRejectionScheduler(eos_token_id=EOS, gamma_min=1.0), num_inference_steps=8)
    damped = decode(dx.EOSRejectionScheduler(eos_token_id=EOS, gamma_min=0.0), num_inference_steps=8)
    assert torch.equal(plain.sequences, same.sequences)
    assert not torch.equal(plain.sequences, damped.sequences), "the test would not notice the factor"


@exact
def test_factors_follow_the_formulas():
    scheduler = dx.EOSRejectionScheduler(eos_token_id=EOS)
    assert [scheduler.gamma(i, 5) for i in range(5)] == pytest.approx([0.4, 0.55, 0.7, 0.85, 1.0])
    ascending = dx.AscendingStepScheduler(eos_token_id=EOS)
    assert [ascending.gamma(i, 3) for i in range(3)] == pytest.approx([0.01 + 0.99 * n / 8 for n in (1, 3, 7)])
    assert scheduler.gamma(0, 1) == ascending.gamma(0, 1) == 1.0


@exact
def test_end_of_text_waits_and_is_not_lost():
    """Two masks, of which the surer is end-of-text: its confidence is multiplied, its token stays."""
    p = torch.tensor([[[0.1, 0.9, 0.0], [0.6, 0.4, 0.0]]])
    for gamma, first in ((1.0, 0), (0.7, 0), (0.6, 1)):  # 0.9 times that, against 0.6
        scheduler = dx.EOSRejectionScheduler(eos_token_id=1, gamma_min=gamma)
        scheduler.set_timesteps(2, block_length=2)
        result = scheduler.step(p.log(), 0, torch.full((1, 2), 2), mask_token_id=2)
        assert result.transfer_index.tolist() == [[first == 0, first == 1]]
        assert result.sampled_tokens.tolist() == [[1, 0]]
        result = scheduler.step(p.log(), 1, result.prev_sample, mask_token_id=2)
        assert result.prev_sample.tolist() == [[1, 0]]


@exact
def test_without_end_of_text_ascending_steps_reject_nothing():
    options = {"block_policy": dx.AscendingBlockPolicy()}
    plain = decode(dx.AscendingStepScheduler(), **options)
    ones = decode(dx.AscendingStepScheduler(eos_token_id=EOS, gamma_min=1.0), **options)
    assert torch.equal(plain.sequences, ones.sequences)


@exact
def test_in_the_stock_pipeline():
    from diffusers import LLaDA2Pipeline

    model, scheduler = FormulaModel(golden_logits), dx.AscendingStepScheduler(eos_token_id=EOS)
    expected = pipeline(model, scheduler)(
        input_ids=torch.zeros(1, 0, dtype=torch.long), gen_length=16, num_inference_steps=4, temperature=0.0,
        mask_token_id=MASK, output_type="seq", stop_at_eos=False,
    ).sequences  # fmt: skip
    found = quiet(LLaDA2Pipeline(model, scheduler))(
        input_ids=torch.zeros(1, 0, dtype=torch.long), gen_length=16, block_length=16, num_inference_steps=4,
        temperature=0.0, threshold=2.0, editing_threshold=None, eos_early_stop=False, mask_token_id=MASK,
        output_type="seq",
    ).sequences  # fmt: skip
    assert torch.equal(found, expected)


@exact
def test_bad_arguments():
    for call, message in (
        (lambda: dx.EOSRejectionScheduler(eos_token_id=EOS, gamma_min=-0.1), "`gamma_min` is -0.1"),
        (lambda: dx.EOSRejectionScheduler(eos_token_id=EOS, gamma_min=0.5, gamma_max=0.4), "`gamma_max` is 0.4"),
        (lambda: dx.AscendingBlockPolicy(0), "`block_num` is 0"),
        (lambda: dx.AscendingBlockPolicy(5).sizes(16), "`block_num` is 5; 16 tokens take at most 4"),
        (lambda: dx.AscendingStepScheduler().set_timesteps(5, block_length=8), "`num_inference_steps` is 5"),
        (lambda: dx.EOSRejectionScheduler(eos_token_id=None), "`eos_token_id` is None"),
        (
            lambda: decode(dx.AscendingStepScheduler(), block_policy=dx.AscendingBlockPolicy(), num_inference_steps=3),
            "`num_inference_steps` is 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- reference -------------------------------------------------------------------------------------------------------

# Their factor of the ascending schedule counts steps over all blocks, ours over those of the block: one block is compared.
RUNS = {
    f"{name}, prompt {prompt}, {length} tokens, {steps} steps, {blocks} blocks": (name, prompt, length, steps, blocks)
    for name, prompt, length, steps, blocks in (
        ("eoser", 0, 32, 8, 1), ("eoser", 2, 32, 32, 1), ("ass", 0, 32, 5, 1), ("ass", 1, 45, 5, 3), ("ass", 2, 64, 6, 4),
        ("eoser_ass", 0, 32, 5, 1), ("eoser_ass", 2, 77, 6, 1),
    )
}  # fmt: skip


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_decoder(run):
    name, prompt, length, steps, blocks = RUNS[run]
    if name == "eoser":
        result = decode(dx.EOSRejectionScheduler(eos_token_id=EOS), prompt, length, num_inference_steps=steps)
    else:
        scheduler = dx.AscendingStepScheduler(eos_token_id=EOS if name == "eoser_ass" else None)
        result = decode(scheduler, prompt, length, block_policy=dx.AscendingBlockPolicy(blocks))
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    assert result.num_calls == [golden["calls"]]
    assert result.sequences[0].tolist() == golden["tokens"]


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded(tmp_path):
    for cls in (dx.EOSRejectionScheduler, dx.AscendingStepScheduler):
        cls(eos_token_id=EOS, gamma_min=0.2).save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.config.eos_token_id == EOS and loaded.config.gamma_min == 0.2


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("eoser_ass_cj_grpo"), space)
    assert space["output"].num_calls == [6] and space["output"].texts
    assert "## When not to use it" in method_card("eoser_ass_cj_grpo")


@pytest.mark.proof("exact")
def test_a_confidence_below_zero_does_not_put_end_of_text_first():
    """`from_config` of a scheduler that goes by entropy: a factor below 1 would raise what is negative."""
    config = dx.UnmaskingScheduler(confidence="entropy").config
    scheduler = dx.EOSRejectionScheduler.from_config(config, eos_token_id=1, gamma_min=0.1)
    scheduler.set_timesteps(2, block_length=2)
    logits = torch.tensor([[[0.0, 2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]])
    result = scheduler.step(logits, 0, torch.full((1, 2), 3), mask_token_id=3)
    assert result.transfer_index.tolist() == [[False, True]]
