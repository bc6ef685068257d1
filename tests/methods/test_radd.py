"""RADD, absorbing diffusion without time, by the five proofs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline

import diffusers_ext as dx
from diffusers_ext.oracles import unmasking_law
from diffusers_ext.schedulers import _unmasking
from diffusers_ext.training.train_masked_diffusion_lm import any_order_loss, masked_diffusion_loss
from tests.common import models
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, probability_of_such, sample, stock_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "radd.json"

exact = pytest.mark.proof("exact")


def run_alone(scheduler, steps, dtype, generator):
    """A sampling loop on one block, with logits by formula."""
    tokens = torch.full((2, 6), 5)
    logits = torch.sin(torch.arange(2 * 6 * 6.0)).view(2, 6, 6).to(dtype)
    scheduler.set_timesteps(steps, block_length=6)
    for step in range(steps):
        options = {"mask_token_id": 5, "temperature": 1.0, "generator": generator}
        tokens = scheduler.step(logits, step, tokens, **options).prev_sample
    return tokens.to(dtype)


COMMON = CommonCase(
    process="other", inputs=run_alone, settings=[{"method": "euler"}, {"schedule": "cosine", "eps": 0.01}]
)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("method", ["tweedie", "euler"])
@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_probabilities_follow_the_formulas(method, schedule):
    """From sigma itself, by numerical differences."""
    steps, eps = 7, 0.02
    scheduler = dx.AbsorbingDiffusionScheduler(method=method, schedule=schedule, eps=eps)

    def sigma(t):
        return -math.log(1 - t if schedule == "loglinear" else 1 - math.cos(math.pi * (1 - t) / 2))

    dt = (1 - eps) / steps
    found = scheduler.unmask_probabilities(steps)
    assert len(found) == steps and found[-1] == 1
    for n in range(1, steps - 1):  # at t = 1 sigma is infinite
        t = 1 - n * dt
        left = -math.expm1(-sigma(t))
        if method == "tweedie":
            r = (math.exp(-sigma(t - dt)) - math.exp(-sigma(t))) / left
        else:
            slope = (sigma(t + 1e-6) - sigma(t - 1e-6)) / 2e-6
            r = min(1.0, dt * slope * math.exp(-sigma(t)) / left)
        assert found[n] == pytest.approx(r, rel=1e-6)
    assert found[0] == pytest.approx(
        {"tweedie": math.exp(-sigma(1 - dt)), "euler": dt if schedule == "loglinear" else 0.0}[method], abs=1e-12
    )


@exact
def test_tweedie_and_euler_are_one_for_the_loglinear_schedule():
    two = [dx.AbsorbingDiffusionScheduler(method=method).unmask_probabilities(10) for method in ("tweedie", "euler")]
    assert two[0] == pytest.approx(two[1], abs=1e-12)
    assert two[0][:-1] == pytest.approx([1 / (10 - n) for n in range(9)], rel=1e-3)


@exact
@pytest.mark.parametrize(("schedule", "steps"), [("loglinear", 3), ("cosine", 8)])
def test_samples_have_the_exact_law_of_the_steps(schedule, steps):
    """Not the language's: the law of independent draws in each step, propagated over all partly masked states."""
    language = chain()
    model = exact_model(language)
    scheduler = dx.AbsorbingDiffusionScheduler(schedule=schedule)
    law = unmasking_law(model, language, scheduler.unmask_probabilities(steps))
    pipe = pipeline(model, scheduler)
    tokens = sample(pipe, 4000, 4, num_inference_steps=steps).sequences
    assert probability_of_such(tokens, language, law) > 1e-3
    assert probability_of_such(tokens, language) < 1e-6, "the test would not notice another law"


@exact
def test_the_law_nears_the_language_like_one_over_the_steps():
    language = chain()
    model, scheduler = exact_model(language), dx.AbsorbingDiffusionScheduler()
    right = unmasking_law(model, language)
    off = [
        float((unmasking_law(model, language, scheduler.unmask_probabilities(steps)) - right).abs().sum()) / 2
        for steps in (8, 16, 32)
    ]
    assert 1.8 < off[0] / off[1] < 2.2 and 1.8 < off[1] / off[2] < 2.2 and off[2] > 0.005


@exact
def test_calls_are_as_many_as_the_formula_says():
    language = chain(length=6)
    scheduler = dx.AbsorbingDiffusionScheduler(eps=0.0)
    pipe = pipeline(exact_model(language), scheduler)
    for steps in (3, 6, 24):
        expected = steps * (1 - (1 - 1 / steps) ** 6)
        assert scheduler.expected_calls(steps, 6) == pytest.approx(expected, rel=1e-9)
        calls = torch.tensor(sample(pipe, 800, 6, num_inference_steps=steps).num_calls).double()
        assert calls.max() <= min(steps, 6)
        assert abs(calls.mean() - expected) < 4 * calls.std() / len(calls) ** 0.5
    cosine = dx.AbsorbingDiffusionScheduler(schedule="cosine", eps=0.0)
    calls = sample(pipeline(exact_model(language), cosine), 800, 6, num_inference_steps=8).num_calls
    calls = torch.tensor(calls).double()
    assert abs(calls.mean() - cosine.expected_calls(8, 6)) < 4 * calls.std() / len(calls) ** 0.5


@exact
def test_without_the_step_cache_it_draws_the_same_by_more_calls():
    language = chain(length=6)
    pipe = pipeline(exact_model(language, perturbation=1.0), dx.AbsorbingDiffusionScheduler())
    kept, all_called = (sample(pipe, 50, 6, num_inference_steps=20, step_cache=cache) for cache in (True, False))
    assert torch.equal(kept.sequences, all_called.sequences)
    assert sum(kept.num_calls) < 0.5 * sum(all_called.num_calls)


@exact
def test_the_concrete_score_is_the_conditional_times_a_number():
    """Theorem 1, with the score by brute force over all strings."""
    language, t = chain(length=3), 0.6
    strings, log_p = language.strings()
    alphabet, mask = range(language.num_symbols), language.mask_token_id
    alpha = 1 - t  # e^{-sigma}

    def probability(z):
        """Of a noisy string z at time t."""
        fits = torch.ones(len(strings), dtype=torch.float64)
        for i, symbol in enumerate(z):
            fits = fits * ((1 - alpha) if symbol == mask else alpha * (strings[:, i] == symbol).double())
        return float((log_p.exp() * fits).sum())

    model = exact_model(language)
    for z in itertools.product([*alphabet, mask], repeat=3):
        conditional = model(torch.tensor([z])).logits.exp()[0]
        masked = [i for i in range(3) if z[i] == mask]
        for i, symbol in itertools.product(masked, alphabet):
            jumped = probability((*z[:i], symbol, *z[i + 1 :]))
            expected = alpha / (1 - alpha) * float(conditional[i, symbol]) * probability(z)
            assert jumped == pytest.approx(expected, abs=1e-12)


@exact
def test_both_losses_of_the_exact_model_are_the_entropy():
    """lambda-DCE by quadrature over lambda and all masks; k-DCE over all k and all orders."""
    language, length = chain(length=3, size=2), 3
    model = exact_model(language)
    strings, log_p = language.strings()
    whole = torch.ones_like(strings)
    entropy = language.entropy() / length

    def mean(losses):
        return float((log_p.exp() * losses).sum())

    def each(loss, numbers, u):
        """The loss of each string alone."""
        values = [loss(model, row[None], whole[:1], language.mask_token_id, numbers, u[None]) for row in strings]
        return torch.stack(values).double()

    below, above = 0.1, 0.9  # a uniform number under lambda masks
    total, nodes = 0.0, [(0.5, 4 / 9), *((0.5 + side * math.sqrt(0.15), 5 / 18) for side in (-1, 1))]
    for rate, weight in nodes:  # Gauss, exact for polynomials of degree 5
        for pattern in itertools.product([True, False], repeat=length):
            chance = math.prod(rate if masked else 1 - rate for masked in pattern)
            u = torch.tensor([rate * below if masked else rate + (1 - rate) * above for masked in pattern])
            if any(pattern):
                total += weight * chance * mean(each(masked_diffusion_loss, torch.tensor([rate]).double(), u.double()))
    assert total == pytest.approx(entropy, abs=1e-6)

    total = 0.0
    for k in range(1, length + 1):
        for order in itertools.permutations(range(length)):
            u = torch.tensor([rank / length for rank in order])
            total += mean(each(any_order_loss, torch.tensor([k]), u)) / length / math.factorial(length)
    assert total == pytest.approx(entropy, abs=1e-6)


@exact
def test_any_order_loss_masks_as_many_tokens_as_it_says_and_no_padding():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            seen.append(input_ids)
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 10)})

    ids = torch.arange(16).view(2, 8) % 9
    kept = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    u = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    loss = any_order_loss(Model(), ids, kept, 9, torch.tensor([3, 2]), u)
    masked = seen[0] == 9
    assert masked.sum(1).tolist() == [3, 2] and not (masked & (kept == 0)).any()
    # Nine outcomes of equal probability: each of the 13 tokens counts log 9
    assert loss.item() == pytest.approx(math.log(9), rel=1e-6)


@exact
def test_it_works_in_the_stock_pipeline():
    language = chain()
    model, scheduler = exact_model(language), dx.AbsorbingDiffusionScheduler()
    law = unmasking_law(model, language, scheduler.unmask_probabilities(3))
    assert probability_of_such(stock_sample(model, scheduler, 4000, 4, 3), language, law) > 1e-3


@exact
def test_a_row_is_the_same_in_every_batch():
    language = chain(length=6)
    pipe = pipeline(exact_model(language), dx.AbsorbingDiffusionScheduler())

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    call = {"gen_length": 6, "num_inference_steps": 5, "output_type": "seq"}
    together = pipe(num_texts_per_prompt=4, generator=seeded(0, 1, 2, 3), **call).sequences
    for i in range(4):
        assert torch.equal(pipe(generator=seeded(i), **call).sequences[0], together[i])


@exact
def test_bad_arguments():
    for settings, message in (
        ({"method": "heun"}, "`method` is 'heun'"),
        ({"schedule": "sine"}, "`schedule` is 'sine'"),
        ({"eps": -1.0}, "`eps` is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.AbsorbingDiffusionScheduler(**settings)


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {f"{method}, {steps}": (method, steps) for method in ("tweedie", "euler") for steps in (4, 10, 40)}
ROWS, LENGTH, VOCABULARY = 3, 8, 7  # the last token is the mask


def golden_logits(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, LENGTH, VOCABULARY)` float64, by formula; tokens look at one another."""
    i, v = torch.arange(LENGTH, dtype=torch.float64), torch.arange(VOCABULARY, dtype=torch.float64)
    away = (i[:, None] - i).abs()
    seen = torch.sin(1.1 * tokens.double()[:, None, :] + 0.7 * away)  # (batch, LENGTH, LENGTH)
    logits = 3 * torch.sin(seen.sum(-1)[..., None] + 1.9 * v + 0.3 * i[:, None])
    return torch.where(v == VOCABULARY - 1, -1e4, logits)


def golden_uniform(row: int, number: int) -> torch.Tensor:
    """`(LENGTH,)` on [0, 1), by formula."""
    return (torch.arange(1, LENGTH + 1, dtype=torch.float64) * (0.6180339887 + 0.137 * row) + 0.7548776662 * number) % 1


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_sampler(run, monkeypatch):
    """Likeliest tokens where the same uniform numbers unmask. Theirs goes on to the end of the grid; ours stops."""
    method, steps = RUNS[run]
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    drawn = dict.fromkeys(generators, 0)

    def draw(shape, generator, device):
        numbers = []
        for one in generator:
            numbers.append(golden_uniform(generators.index(one), drawn[one]))
            drawn[one] += 1
        return torch.stack(numbers)

    monkeypatch.setattr(_unmasking, "draw_uniform", draw)
    scheduler = dx.AbsorbingDiffusionScheduler(method=method)
    result = pipeline(FormulaModel(golden_logits), scheduler)(
        gen_length=LENGTH, num_texts_per_prompt=ROWS, num_inference_steps=steps, temperature=0.0, generator=generators,
        mask_token_id=VOCABULARY - 1, output_type="seq",
    )  # fmt: skip
    assert result.sequences.tolist() == golden["sequences"]
    assert scheduler.unmask_probabilities(steps)[:-1] == pytest.approx(golden["rates"][:-1], rel=2e-3)
    # Theirs calls the network once more for each row that is complete before the last step
    assert sum(result.num_calls) <= golden["calls"] <= sum(result.num_calls) + ROWS


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_in_both_pipelines(tmp_path):
    scheduler = dx.AbsorbingDiffusionScheduler(method="euler", schedule="cosine", eps=0.01)
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    for cls in (LLaDA2Pipeline, dx.MaskedDiffusionPipeline):
        pipe = cls(models.masked_language_model(), BlockRefinementScheduler())
        pipe.scheduler = dx.AbsorbingDiffusionScheduler.from_config(scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        options = {"block_length": 6, "num_inference_steps": 4, "temperature": 1.0}
        expected = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is cls and type(loaded.scheduler) is dx.AbsorbingDiffusionScheduler
        assert loaded.scheduler.config.schedule == "cosine" and loaded.scheduler.config.eps == 0.01
        found = loaded(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("radd"), space)
    assert space["output"].texts and max(space["output"].num_calls) <= 48
    assert "## When not to use it" in method_card("radd")
