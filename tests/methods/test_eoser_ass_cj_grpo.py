"""EOS early rejection, ascending step sizes, and policy optimisation on the decoder's states, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.training.train_cj_grpo import CJGRPOTask, cj_grpo_loss, main, parse_args
from tests.common import trainer
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, pipeline, quiet
from tests.methods import test_mdpo
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_radd import run_alone

COMMON = CommonCase(process="other", inputs=run_alone, settings=[{"eos_token_id": 2, "threshold": 0.9}])
GOLDEN = Path(__file__).parents[1] / "golden" / "eoser_ass_cj_grpo.json"
CJ_GOLDEN = GOLDEN.with_name("cj_grpo.json")
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


# --- exact: CJ-GRPO --------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> dict:
    return {**test_mdpo.inputs(folder), "num_inference_steps": 3}


def flags(folder: Path, output: str, **more) -> list[str]:
    values = {**inputs(folder), "output_dir": folder / output, "max_train_steps": 1, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@exact
def test_the_loss_is_the_formula():
    given = {name: value[0] if value.ndim == 3 else value for name, value in golden_run().items()}
    log_prob, old, reference, committed = (given[name] for name in ("log_prob", "old", "reference", "committed"))
    advantage = given["rewards"] - given["rewards"].mean()
    wanted = 0.0
    for row in range(3):
        places = committed[row].nonzero().flatten().tolist()
        for place in places:
            ratio, a = float((log_prob - old)[row, place].exp()), float(advantage[row])
            apart = float((reference - log_prob)[row, place])
            loss = -min(ratio * a, min(max(ratio, 0.5), 1.5) * a) + 0.3 * (math.exp(apart) - apart - 1)
            wanted += loss / len(places) / 3
    assert cj_grpo_loss(log_prob, old, advantage, committed, reference, beta=0.3).item() == pytest.approx(wanted)
    # At the first update: REINFORCE with a baseline.
    first = old.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cj_grpo_loss(first, old, advantage, committed), first)
    count = committed.sum(1, keepdim=True)
    torch.testing.assert_close(slope, -advantage[:, None] * committed / count / 3)


@exact
def test_a_round_trains_every_state_and_its_ratio_is_one_at_first(tmp_path):
    task = CJGRPOTask(parse_args(flags(tmp_path, "out")))
    batch = test_mdpo.prepared(task)
    task.loss(batch, None)
    found = task.round.tensors
    where, states = found["where"], found["states"]
    assert where.shape == (6, 3, 8) and where.sum(-1).tolist() == [[1, 2, 5]] * 6 and (where.sum(1) == 1).all()
    assert torch.equal(states[:, 0], torch.full((6, 8), task.mask)) and (states[where] == task.mask).all()
    assert found["advantage"].view(2, 3, 3).sum(1).abs().max() < 1e-6 and found["advantage"].abs().max() > 0
    layout = task.layout([text for text in batch["prompt"] for _ in range(3)])
    for k in range(3):
        assert torch.equal(found["old"][:, k], task.log_prob(task.model, layout, *task.at(k)))
    assert torch.equal(found["reference"], found["old"]), "nothing is trained yet"
    assert isinstance(task.scheduler, dx.AscendingStepScheduler) and task.scheduler.config.eos_token_id == task.eos


@exact
def test_bad_arguments_of_the_trainer(tmp_path):
    for more, message in (
        ({"num_inference_steps": 5}, "`--num_inference_steps` is 5; 8 tokens take at most 4"),
        ({"num_iterations": 0}, "`--num_iterations` is 0"),
        ({"beta": -1}, "`--beta` is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags(tmp_path, "refused", **more))


@exact
def test_the_trainer_keeps_the_rules_of_trainers(tmp_path):
    """Those of `tests/common`, which asks a scheduler's row for other ones."""
    trainer.hold_to_the_rules("eoser_ass_cj_grpo", inputs, tmp_path / "runs", cj_grpo_loss)


# --- reference -------------------------------------------------------------------------------------------------------


def golden_run() -> dict[str, torch.Tensor]:
    """A group of 3 completions of 7 tokens in 3 steps, by formula."""
    wave = torch.sin(torch.arange(3 * 3 * 3 * 7, dtype=torch.float64).reshape(3, 3, 3, 7) * 12.9898) * 43758.5453
    log_prob, old, reference = -2 * torch.frac(wave).abs()  # (steps, completions, tokens)
    order = torch.arange(7) * torch.tensor([2, 3, 5])[:, None] % 7
    committed = torch.stack([(order >= low) & (order < high) for low, high in ((0, 1), (1, 3), (3, 7))])
    rewards = torch.tensor([1.0, 0.0, 0.4]).double()
    return {"log_prob": log_prob, "old": old, "reference": reference, "committed": committed, "rewards": rewards}


@pytest.mark.proof("reference")
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_equals_the_authors_loss(beta):
    given = golden_run()
    advantage = given["rewards"] - given["rewards"].mean()
    steps = zip(*(given[name] for name in ("log_prob", "old", "committed", "reference")), strict=True)
    losses = [cj_grpo_loss(p, old, advantage, where, ref, beta=beta) for p, old, where, ref in steps]
    golden = json.loads(CJ_GOLDEN.read_text())["losses"][str(beta)]
    assert torch.stack(losses).mean().item() == pytest.approx(golden, rel=1e-5)


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
