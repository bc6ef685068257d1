"""The first-hitting sampler, by the five proofs."""

from __future__ import annotations

import functools
import itertools
import math
from random import Random

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline

import diffusers_ext as dx
from diffusers_ext.oracles import total_variation, unmasking_law
from tests.common import models
from tests.common.suite import CommonCase
from tests.languages import chain, exact_model, pipeline, probability_of_such, sample, stock_sample
from tests.methods.test_radd import run_alone

COMMON = CommonCase(process="other", inputs=run_alone)

exact = pytest.mark.proof("exact")


@functools.cache
def conditionals(model, length):
    """What a model of 3 symbols says in every state: `[state][place][symbol]`."""
    states = list(itertools.product(range(4), repeat=length))
    return dict(zip(states, model(torch.tensor(states)).logits[..., :3].softmax(-1).tolist(), strict=True))


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("where", ["our pipeline", "stock pipeline"])
def test_samples_are_the_language(where):
    language = chain()
    model, scheduler = exact_model(language), dx.FirstHittingScheduler()
    if where == "our pipeline":
        result = sample(pipeline(model, scheduler), 8000, 4)
        assert set(result.num_calls) == {4}, "one call a token"
        tokens = result.sequences
    else:
        tokens = stock_sample(model, scheduler, 8000, 4, 4)
    found = total_variation(tokens, language)
    assert found.value < 1.3 * found.noise
    assert probability_of_such(tokens, language) > 1e-3


@exact
def test_the_test_would_notice_a_wrong_sampler():
    language = chain()
    tokens = sample(pipeline(exact_model(language, temperature=0.8), dx.FirstHittingScheduler()), 8000, 4).sequences
    assert probability_of_such(tokens, language) < 1e-6


@exact
def test_an_imperfect_model_has_the_mean_of_its_orders():
    """The law by an independent derivation: the mean over all orders of the product of the model's conditionals."""
    language = chain(length=3)
    model = exact_model(language, perturbation=1.0)
    law = torch.zeros(27, dtype=torch.float64)
    for code, string in enumerate(itertools.product(range(3), repeat=3)):
        for order in itertools.permutations(range(3)):
            state, probability = [language.mask_token_id] * 3, 1 / 6
            for place in order:
                probability *= conditionals(model, 3)[tuple(state)][place][string[place]]
                state[place] = string[place]
            law[code] += probability
    torch.testing.assert_close(law, unmasking_law(model, language), rtol=0, atol=1e-12)
    tokens = sample(pipeline(model, dx.FirstHittingScheduler()), 8000, 3).sequences
    assert probability_of_such(tokens, language, law) > 1e-3
    assert probability_of_such(tokens, language) < 1e-6


@exact
def test_given_tokens_the_rest_has_its_conditional_law():
    """Infilling: the second token is known, and the others follow the language given it."""
    language = chain()
    given = torch.tensor([[3, 1, 3, 3]]).expand(4000, -1)
    tokens = pipeline(exact_model(language), dx.FirstHittingScheduler())(
        input_ids=given, output_type="seq", generator=torch.Generator().manual_seed(0)
    ).sequences
    assert bool((tokens[:, 1] == 1).all())
    strings, log_p = language.strings()
    law = torch.zeros(3**4, dtype=torch.float64)
    fits = strings[:, 1] == 1
    law[language.codes(strings)[fits]] = (log_p[fits] - log_p[fits].logsumexp(0)).exp()
    assert probability_of_such(tokens, language, law) > 1e-3


@exact
def test_fewer_steps_share_calls():
    language = chain(length=6)
    result = sample(pipeline(exact_model(language), dx.FirstHittingScheduler()), 4000, 6, num_inference_steps=3)
    assert set(result.num_calls) == {3}
    assert probability_of_such(result.sequences, language) < 1e-6, "two at a time are not exact"


@exact
def test_positions_are_chosen_uniformly():
    scheduler, n = dx.FirstHittingScheduler(), 6000
    scheduler.set_timesteps(5, block_length=5)
    tokens = torch.full((n, 5), 7)
    tokens[:, 2] = 0  # given
    logits = torch.zeros(n, 5, 8)
    result = scheduler.step(
        logits, 0, tokens, mask_token_id=7, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert (result.transfer_index.sum(1) == 1).all()
    share = result.transfer_index.double().mean(0)
    assert share[2] == 0
    assert (share[[0, 1, 3, 4]] - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / n)


@exact
def test_hitting_times_are_order_statistics():
    """Of L uniform numbers: the time at which n masks become n - 1 has mean n / (L + 1) and a Beta law."""
    length, n = 5, 20_000
    times = dx.hitting_times(length, n, torch.Generator().manual_seed(0))
    assert times.shape == (n, length) and (times.diff(dim=1) < 0).all()
    masks = torch.arange(length, 0, -1).double()
    mean, variance = masks / (length + 1), masks * (length + 1 - masks) / ((length + 1) ** 2 * (length + 2))
    assert ((times.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((times.var(0) / variance - 1).abs() < 0.05).all()
    # Rounded to a grid, they are the counts of ancestral sampling: each of L tokens falls into a cell of width w or not
    first = (times > 0.75).sum(1).double()
    assert abs(first.mean() - length * 0.25) < 4 * math.sqrt(length * 0.25 * 0.75 / n)


@exact
def test_rare_tokens_come_as_often_as_they_should():
    """Of 500,000 draws, 20 of an outcome of probability 4e-5, and each outcome in proportion to its probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, math.log(4e-5)]).expand(500_000, -1)
    assert 6 <= int(dx.safe_categorical(logits, generator).sum()) <= 40
    # Evenly spread uniform numbers hit each of 40 outcomes, the rarest of 1e-5, in proportion to its probability
    n, p = 200_000, torch.logspace(-5, 0, 40, dtype=torch.float64)
    p[20] = 0
    p = p / p.sum()
    drawn = dx.safe_categorical(p.log().expand(n, -1), uniform=(torch.arange(n) + 0.5).double() / n)
    counts = torch.bincount(drawn, minlength=40).double()
    assert (counts - n * p).abs().max() < 1 and counts[20] == 0


@exact
def test_the_ends_of_the_uniform_numbers():
    """Outcomes far below what float32 resolves are drawn at the end; those of probability 0 never, at either end."""
    log_p = torch.tensor([-math.inf, 0.0, math.log(1e-14), -math.inf], dtype=torch.float64)
    for u, expected in ((0.0, 1), (0.5, 1), (1 - 1e-13, 1), (1 - 2**-53, 2)):
        uniform = torch.tensor([u], dtype=torch.float64)
        assert dx.safe_categorical(log_p[None], uniform=uniform).item() == expected
    for bad in ([math.nan, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(FloatingPointError):
            dx.safe_categorical(torch.tensor([bad]))


@exact
def test_float32_gumbel_noise_would_lose_them():
    """The fault that the paper reports: an explicit Gumbel-max in float32 misses rare outcomes, 8 expected ones here."""
    generator, rare = torch.Generator().manual_seed(0), 2000
    logits = torch.cat([torch.zeros(1), torch.full((rare,), math.log(4e-5 / rare))])
    hidden = seen = 0
    for _ in range(10):
        u = torch.rand(20_000, rare + 1, generator=generator)
        # Noise rises with u and the rare logits are equal, so the greatest u of them stands for all.
        common, best = (-torch.log(-torch.log(each)) for each in (u[:, 0], u[:, 1:].amax(-1)))
        hidden += int((logits[1] + best > logits[0] + common).sum())
        seen += int((dx.safe_categorical(logits.expand(20_000, -1), generator) > 0).sum())
    assert hidden <= 2 < 4 <= seen <= 16


@exact
def test_bad_arguments():
    for call, message in (
        (lambda: dx.FirstHittingScheduler(block_length=0), "`block_length` is 0"),
        (lambda: dx.hitting_times(0), "`num_masks` is 0"),
        (lambda: dx.hitting_times(3, 0), "`num_samples` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- reference -------------------------------------------------------------------------------------------------------


def slow_ancestral(said, length, mask, times, random):
    """The continuous-time reverse process itself, one string: in each tiny interval each mask goes on its own."""
    state = (mask,) * length
    for t, s in itertools.pairwise(times):
        after = list(state)
        for place in range(length):
            if state[place] == mask and random.random() < (t - s) / t:
                after[place] = random.choices(range(mask), said[state][place])[0]
        state = tuple(after)
    return state


@pytest.mark.proof("reference")
def test_equals_the_slow_process_in_continuous_time():
    """The authors published no sampler. Two samples of one model, by the chi-square of their difference."""
    language, n = chain(length=3), 2000
    model = exact_model(language, perturbation=1.0)
    times = [*torch.logspace(0, -3, 100, dtype=torch.float64).tolist(), 0.0]
    random = Random(0)
    slow = [slow_ancestral(conditionals(model, 3), 3, 3, times, random) for _ in range(n)]
    fast = sample(pipeline(model, dx.FirstHittingScheduler()), n, 3).sequences
    a, b = (torch.bincount(language.codes(tokens), minlength=27).double() for tokens in (torch.tensor(slow), fast))
    seen = a + b > 9
    statistic = ((a - b).square() / (a + b))[seen].sum()
    assert torch.special.gammaincc(seen.sum() / 2, statistic.float() / 2) > 1e-3


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_in_both_pipelines(tmp_path):
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    for cls in (LLaDA2Pipeline, dx.MaskedDiffusionPipeline):
        pipe = cls(models.masked_language_model(), BlockRefinementScheduler())
        pipe.scheduler = dx.FirstHittingScheduler.from_config(pipe.scheduler.config, block_length=6)
        pipe.set_progress_bar_config(disable=True)
        options = {"block_length": 6, "num_inference_steps": 6, "temperature": 1.0}
        expected = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is dx.FirstHittingScheduler and loaded.scheduler.config.block_length == 6
        found = loaded(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("first_hitting_sampler"), space)
    assert space["output"].num_calls == [32]
    assert "## When not to use it" in method_card("first_hitting_sampler")
