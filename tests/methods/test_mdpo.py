"""MDPO: decoding by running confidence, and the trainer, by the five proofs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import LLaDA2Pipeline
from transformers import AutoModelForMaskedLM

import diffusers_ext as dx
from diffusers_ext.training import _digit_orders
from diffusers_ext.training._data import GlobalBatches, collate, generator_for
from diffusers_ext.training._unmasking_policy import _DRAWN, Layout, run_policy, token_log_probabilities
from diffusers_ext.training.train_mdpo import MDPOTask, backslides, main, mdpo_loss, parse_args, step_advantages
from tests.card_snippets import run_card
from tests.common import scheduler as scheduler_rules
from tests.common.models import World
from tests.common.suite import Case, CommonCase
from tests.languages import FormulaModel, pipeline, quiet
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_radd import run_alone

GOLDEN = Path(__file__).parents[1] / "golden" / "mdpo.json"
exact = pytest.mark.proof("exact")


def reward(completions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Something that an untrained model earns more or less of."""
    return [sum(digit in "01234" for digit in text) / 6 for text in completions]


def inputs(folder: Path) -> dict:
    if not (folder / "model").is_dir():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _digit_orders.write_untrained_model(folder / "model", hidden_size=16, num_layers=1)
        _digit_orders.write(folder, 12, 0)
    return {
        "pretrained_model_name_or_path": folder / "model", "train_data_dir": folder / "problems.jsonl",
        "reward": "tests.methods.test_mdpo:reward", "max_prompt_length": 9, "max_completion_length": 8,
        "num_inference_steps": 4, "num_generations": 3, "num_iterations": 2, "num_validation_prompts": 2,
        "train_batch_size": 2,
    }  # fmt: skip


COMMON = CommonCase(inputs=lambda folder: {**inputs(folder), "sample_train_steps": 2})
SCHEDULER = CommonCase(process="other", inputs=run_alone, settings=[{"schedule": "cosine"}, {"confidence": "entropy"}])


def flags(folder: Path, output: str, **more) -> list[str]:
    values = {**inputs(folder), "sample_train_steps": 2, "output_dir": folder / output, "max_train_steps": 1, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mdpo")


def prepared(task):
    """The first batch of a task that is ready to train."""
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda x: x)
    problems, args = task.dataset(task.args), task.args
    task.prepare(problems, accelerator)
    return collate([problems[row] for row in next(iter(GlobalBatches(12, args.train_batch_size, args.seed, 0, 1)))])


# --- exact: running confidence ---------------------------------------------------------------------------------------


def surest_logits(confidence: torch.Tensor) -> torch.Tensor:
    """Logits of tokens 0 to 3, of which 0 has the probability `confidence`, above 1 / 4, and of the mask, 4."""
    others = ((1 - confidence) / 3)[..., None].expand(*confidence.shape, 3)
    return torch.cat([confidence[..., None], others, torch.ones_like(others[..., :1])], -1).log()


def states(scheduler, confidences: torch.Tensor, given: int = 0) -> list[torch.Tensor]:
    """The block after each step; step i has the `confidences[i]` `(batch, block)`."""
    sample = torch.full(confidences.shape[1:], 4)
    sample[0, :given] = 1
    scheduler.set_timesteps(len(confidences), block_length=sample.shape[1])
    found = []
    for step, confidence in enumerate(confidences):
        output = scheduler.step(surest_logits(confidence), step, sample, mask_token_id=4)
        assert torch.equal(output.transfer_index & output.editing_transfer_index, torch.zeros_like(sample).bool())
        sample = output.prev_sample
        found.append(sample)
    return found


def random_confidences(seed: int, steps: int, batch: int = 2, block: int = 9) -> torch.Tensor:
    numbers = torch.rand(steps, batch, block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.4 + 0.6 * numbers


@exact
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_as_many_masks_as_without_and_the_prompt_stays(schedule):
    for steps in range(1, 10):
        scheduler = dx.RunningConfidenceScheduler(schedule=schedule)
        quotas = scheduler.quotas(9, steps)
        assert sum(quotas) == 9 and len(quotas) == steps
        found = states(scheduler, random_confidences(steps, steps), given=2)
        for i, sample in enumerate(found):
            done = sum(quotas[: i + 1])
            assert (sample == 4).sum(1).tolist() == [max(0, 7 - done), 9 - done]
            assert (sample[0, :2] == 1).all()
    if schedule == "cosine":  # floor(9 cos(pi / 8)), floor(9 cos(pi / 4)), floor(9 cos(3 pi / 8))
        assert dx.RunningConfidenceScheduler(schedule="cosine").quotas(9, 4) == [1, 2, 3, 3]


@exact
def test_it_is_the_plain_scheduler_exactly_where_no_later_confidence_is_higher():
    same = 0
    for seed in range(60):
        confidences = random_confidences(seed, 3, 1, 6)
        if seed % 3 == 0:  # they fall
            confidences = confidences[:1] * torch.tensor([1.0, 0.95, 0.9])[:, None, None].double()
        if seed % 3 == 1:  # they rise
            confidences = confidences * torch.tensor([0.7, 0.9, 1.0])[:, None, None].double()
        plain = states(dx.UnmaskingScheduler(), confidences)
        found = states(dx.RunningConfidenceScheduler(), confidences)
        holds, kept = True, torch.full((1, 6), torch.inf, dtype=torch.float64)
        for confidence, before, after in zip(confidences, [torch.full((1, 6), 4), *plain], plain, strict=False):
            new = (before == 4) & (after != 4)
            kept = torch.where(new, confidence, kept)
            left = (after == 4).any()
            holds &= not left or bool(kept.min() > confidence[after == 4].max())
        equal = all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert equal == holds, seed
        same += equal
    assert 30 <= same < 57


@exact
def test_a_token_that_was_kept_becomes_a_mask_again():
    confidences = torch.tensor([[0.6, 0.5, 0.4, 0.45], [0.9, 0.9, 0.95, 0.7], [0.9, 0.8, 0.9, 0.9]]).double()[:, None]
    found = states(dx.RunningConfidenceScheduler(), confidences)  # quotas are 2, 1 and 1
    visible = [(sample != 4)[0].tolist() for sample in found]
    assert visible == [[True, True, False, False], [True, False, True, True], [True] * 4]


@exact
def test_rows_of_a_run_are_each_their_own():
    """Prompts of different lengths, in blocks, beside each other and alone."""
    for block in (None, 6):
        pipe = pipeline(FormulaModel(causal_logits), dx.RunningConfidenceScheduler())
        call = {
            "gen_length": 16, "block_length": block, "num_inference_steps": 3, "temperature": 0.0, "mask_token_id": MASK,
            "output_type": "seq", "stop_at_eos": False,
        }  # fmt: skip
        together = pipe(input_ids=list(PROMPTS), **call).sequences
        for prompt, row in zip(PROMPTS, together, strict=True):
            assert torch.equal(pipe(input_ids=prompt[None], **call).sequences[0], row)


def causal_logits(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, length, 20)` by formula; a token sees those before it, so that padding on the right changes nothing."""
    i, v = torch.arange(tokens.shape[1], dtype=torch.float64), torch.arange(20, dtype=torch.float64)
    seen = torch.sin(1.3 * tokens.double() + 0.7 * i).cumsum(1)
    return 4 * torch.sin(1.7 * seen[..., None] * (1 + v) + 0.3 * i[:, None] + v)


@exact
def test_in_the_stock_pipeline():
    model, scheduler = FormulaModel(causal_logits), dx.RunningConfidenceScheduler()
    expected = pipeline(model, scheduler)(
        input_ids=torch.zeros(2, 0, dtype=torch.long), gen_length=16, block_length=8, num_inference_steps=4,
        temperature=0.0, mask_token_id=MASK, output_type="seq", stop_at_eos=False,
    ).sequences  # fmt: skip
    found = quiet(LLaDA2Pipeline(model, scheduler))(
        input_ids=torch.zeros(2, 0, dtype=torch.long), gen_length=16, block_length=8, num_inference_steps=4,
        temperature=0.0, threshold=2.0, editing_threshold=None, eos_early_stop=False, mask_token_id=MASK,
        output_type="seq",
    ).sequences  # fmt: skip
    assert torch.equal(found, expected)


@exact
@pytest.mark.slow
def test_it_keeps_the_rules_of_schedulers(tmp_path):
    """Those of `tests/common`, which asks a trainer's row for other ones."""
    cls = dx.RunningConfidenceScheduler
    case = Case(dx.get_method("mdpo"), cls, (cls,), SCHEDULER, "mdpo")
    assert scheduler_rules.SUITE.broken(case, World(tmp_path, []), leave_out=["travels"]) == {}


# --- exact: the trainer ----------------------------------------------------------------------------------------------


@exact
def test_advantages_are_the_formula():
    rewards = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    found = step_advantages(rewards)
    value = torch.zeros(2, 4, 5)
    for p, g, t in torch.cartesian_prod(*map(torch.arange, rewards.shape)).tolist():
        r = rewards[p, g].tolist()
        after = r[t + 1 :]
        value[p, g, t] = r[t] - (r[t - 1] if t else 0) + 1 + (sum(after) / len(after) if after else r[t])
    for p, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        group = value[p, :, t]
        wanted = (group - group.mean()) / (group.std(unbiased=True) + 1e-4)
        torch.testing.assert_close(found[p, :, t], wanted, rtol=1e-5, atol=1e-5)
    assert (step_advantages(torch.ones(3, 4, 5)) == 0).all()
    assert (step_advantages(torch.rand(2, 4, 1)).mean(1).abs() < 1e-6).all()


@exact
def test_the_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    log_prob, old, reference = torch.rand(3, 2, 4, generator=generator).log()
    advantage, masked = torch.tensor([0.7, -1.3]), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]]).bool()
    found = mdpo_loss(log_prob, old, advantage, masked, reference, epsilon=0.2, beta=0.3)
    wanted = 0.0
    for row in range(2):
        places = masked[row].nonzero().flatten().tolist()
        for place in places:
            ratio = float((log_prob - old)[row, place].exp())
            a = float(advantage[row])
            gain = min(ratio * a, min(max(ratio, 0.8), 1.2) * a) * 4 / len(places)
            apart = float((reference - log_prob)[row, place]) ** 2 / 2
            wanted += float(old[row, place].exp()) * (0.3 * apart - gain) / len(places) / 2
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    # At the first update the ratio is 1, and the gradient that of the log-probability.
    first = old.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mdpo_loss(first, old, advantage, masked), first)
    count = masked.sum(1, keepdim=True)
    torch.testing.assert_close(slope, -old.exp() * advantage[:, None] * masked * 4 / count**2 / 2)
    (slope,) = torch.autograd.grad(mdpo_loss(first, old, torch.zeros(2), masked), first)
    assert (slope == 0).all(), "rewards that are all equal train nothing"


@exact
def test_right_and_then_wrong():
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.5, 0.0]])
    assert backslides(rewards).tolist() == [True, False, False]


@exact
@pytest.mark.parametrize("scheduler", [dx.RunningConfidenceScheduler(), dx.UnmaskingScheduler()])
def test_runs_are_those_of_the_pipeline(folder, scheduler):
    inputs(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder / "model").eval()
    prompts = [[4, 5, 6, 3], [7, 8, 9, 10, 11, 3]]
    layout = Layout.of(prompts, 6, 8, 2, 1)
    runs = run_policy(model, scheduler, layout, 4, 0.7, 2, [torch.Generator().manual_seed(i) for i in range(2)])
    expected = quiet(dx.MaskedDiffusionPipeline(model, scheduler))(
        input_ids=[torch.tensor(row) for row in prompts], gen_length=8, num_inference_steps=4, temperature=0.7,
        mask_token_id=2, eos_token_id=1, stop_at_eos=False, output_type="seq",
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    ).sequences  # fmt: skip
    assert torch.equal(runs.final, expected) and torch.equal(runs.predictions[:, -1], expected)
    assert (runs.states[:, 0] == 2).all() and (runs.predictions != 2).all()
    visible = runs.states != 2
    assert torch.equal(runs.predictions[visible], runs.states[visible])
    assert torch.equal(
        runs.committed, (runs.states == 2) & (torch.cat([runs.states[:, 1:], runs.final[:, None]], 1) != 2)
    )
    # What is trained is the probability of drawing what was drawn.
    log_prob = token_log_probabilities(layout.logits(model, runs.states[:, 1]), runs.predictions[:, 1], 0.7, 2)
    p = layout.logits(model, runs.states[:, 1]).double().index_fill(-1, torch.tensor([2]), -torch.inf) / 0.7
    p = p.softmax(-1).gather(-1, runs.predictions[:, 1, :, None])[..., 0]
    torch.testing.assert_close(log_prob.exp().double(), p, rtol=1e-5, atol=1e-6)


@exact
def test_a_round_is_the_papers_algorithm(folder):
    """One optimizer step, by loops over completions and steps."""
    arguments = flags(folder, "ours", learning_rate=1e-3, adam_epsilon=1e-3, beta=0.0, seed=5, max_grad_norm=1e9)
    task = MDPOTask(parse_args(arguments))
    batch = prepared(task)
    layout = task.layout([text for text in batch["prompt"] for _ in range(3)])
    task.loss(batch, None)
    found = task.round.tensors
    assert torch.equal(found["old"][:, 0], task.log_prob(task.model, layout, *task.at(0))), "the ratio is 1 at first"

    numbers = [sample * 3 + each for sample in range(2) for each in range(3)]
    model = AutoModelForMaskedLM.from_pretrained(folder / "model").eval()
    runs = task.runs(layout, [generator_for(_DRAWN ^ 5, number) for number in numbers])
    rewards = torch.tensor([reward(task.texts(tokens), [], []) for tokens in runs.predictions.unbind(1)]).T
    advantages = step_advantages(rewards.view(2, 3, 4)).view(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3, weight_decay=0.0)
    total = 0.0
    for row in range(6):
        group = advantages[row // 3 * 3 : row // 3 * 3 + 3]
        for step in group.abs().sum(0).argsort(descending=True)[:2].tolist():
            one = Layout(*(part[row : row + 1] for part in layout))
            state, drawn = runs.states[row, step], runs.predictions[row, step]
            log_p = one.logits(model, state[None])[0].index_fill(-1, torch.tensor([2]), -torch.inf) / 0.4
            log_p = log_p.log_softmax(-1)
            places = (state == 2).nonzero().flatten().tolist()
            for place in places:
                term = log_p[place, drawn[place]]
                total = total - term.exp().detach() * advantages[row, step] * 8 / len(places) ** 2 * term / 12
    total.backward()
    optimizer.step()
    main(arguments)
    ours = AutoModelForMaskedLM.from_pretrained(folder / "ours")
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    loaded = dx.RunningConfidenceScheduler.from_pretrained(folder / "ours", subfolder="scheduler")
    assert loaded.config.block_length == 8 and loaded.config.num_inference_steps == 4


@exact
def test_bad_arguments(folder):
    for more, message in (
        ({"sample_train_steps": 5}, "`--sample_train_steps` is 5"),
        ({"num_generations": 1}, "`--num_generations` is 1"),
        ({"temperature": 0}, "`--temperature` is 0.0"),
        ({"num_inference_steps": 9}, "`--num_inference_steps` is 9"),
        ({"gradient_accumulation_steps": 4}, "`--gradient_accumulation_steps` is 4"),
        ({"reward": "nowhere:reward"}, "`--reward` is 'nowhere:reward'"),
        ({"max_prompt_length": 3}, "`--max_prompt_length` is 3; the longest prompt has 6"),
        ({"answer_column": "solution"}, "'solution'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags(folder, "refused", **more))
    assert not (folder / "refused").exists()
    for settings, message in (({"schedule": "sine"}, "`schedule` is 'sine'"), ({"confidence": "x"}, "`confidence` is")):
        with pytest.raises(ValueError, match=message):
            dx.RunningConfidenceScheduler(**settings)


@exact
def test_the_task_has_a_program_for_its_reward():
    for row in _digit_orders.problems(50, 1):
        assert _digit_orders.reward([row["answer"]], [""], [row["prompt"]]) == [1.0]
        assert _digit_orders.reward([row["answer"][:-1]], [""], [row["prompt"]]) == [0.0]
    assert _digit_orders.reward(["227"], [""], ["270>"]) == [0.0]
    assert _digit_orders.problems(3, 1) != _digit_orders.problems(3, 2)


# --- reference -------------------------------------------------------------------------------------------------------

# Their quotas of the linear schedule are rounded otherwise where steps do not divide the tokens, and their table of several
# blocks lets tokens of earlier blocks be masked again: one block, and steps that divide or the cosine schedule.
RUNS = {
    f"{schedule}, prompt {prompt}, {length} tokens, {steps} steps": (schedule, prompt, length, steps)
    for schedule, prompt, length, steps in (
        ("linear", 0, 16, 4), ("linear", 1, 32, 8), ("linear", 2, 32, 16), ("cosine", 0, 16, 5), ("cosine", 2, 24, 8),
    )
}  # fmt: skip


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_decoder(run):
    schedule, prompt, length, steps = RUNS[run]
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    pipe = pipeline(FormulaModel(golden_logits), dx.RunningConfidenceScheduler(schedule=schedule))
    result = pipe(
        input_ids=PROMPTS[prompt], gen_length=length, num_inference_steps=steps, temperature=0.0, mask_token_id=MASK,
        output_type="seq", stop_at_eos=False, step_cache=False,
    )  # fmt: skip
    assert result.sequences[0].tolist() == golden["tokens"]
    seen = [call["input_ids"][0, len(PROMPTS[prompt]) :].tolist() for call in pipe.model.seen]
    assert seen == golden["inputs"]


def golden_numbers() -> dict[str, torch.Tensor]:
    """What the losses are made of, by formula: 3 completions of 6 tokens, 4 steps."""
    wave = torch.sin(torch.arange(3 * 3 * 6, dtype=torch.float64).reshape(3, 3, 6) * 12.9898) * 43758.5453
    log_prob, old, reference = -2 * torch.frac(wave).abs()
    rewards = (torch.arange(12).reshape(3, 4) * 5 % 7 > 3).double()
    masked = torch.tensor([[1, 1, 0, 1, 1, 0]] * 3).bool()
    return {"log_prob": log_prob, "old": old, "reference": reference, "rewards": rewards, "masked": masked}


@pytest.mark.proof("reference")
def test_equals_the_authors_advantages_and_loss():
    given, golden = golden_numbers(), json.loads(GOLDEN.read_text())
    advantages = step_advantages(given["rewards"])
    torch.testing.assert_close(advantages, torch.tensor(golden["advantages"]).double(), rtol=1e-5, atol=1e-6)
    for name, beta in (("loss", 0.0), ("loss with reference", 0.1)):
        found = mdpo_loss(
            given["log_prob"],
            given["old"],
            advantages[:, 1],
            given["masked"],
            given["reference"],
            epsilon=0.2,
            beta=beta,
        )
        assert found.item() == pytest.approx(golden[name], rel=1e-4)  # theirs adds 1e-4 to the number of masks


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded(tmp_path):
    dx.RunningConfidenceScheduler(schedule="cosine", confidence="margin").save_pretrained(tmp_path)
    loaded = dx.RunningConfidenceScheduler.from_pretrained(tmp_path)
    assert loaded.config.schedule == "cosine" and loaded.config.confidence == "margin" and loaded.running is None


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("mdpo")
    assert names["output"].texts and "## When not to use it" in card
