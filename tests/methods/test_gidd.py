"""GIDD, masks and uniform noise, by the five proofs."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import BlockRefinementScheduler, ConfigMixin, DiffusionPipeline, LLaDA2Pipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import AutoModelForMaskedLM, AutoTokenizer

import diffusers_ext as dx
from diffusers_ext.oracles import unmasking_law
from diffusers_ext.pipelines import self_correction
from diffusers_ext.schedulers._token_noise import HybridNoise, tokens_but_mask
from diffusers_ext.schedulers.gidd import reverse_step
from diffusers_ext.training.train_gidd import gidd_loss, gidd_weights, parse_args
from tests.common import models, trainer
from tests.common.suite import CommonCase
from tests.language_models import masked_tokens, tiny
from tests.languages import FormulaModel, chain, exact_model, pipeline, probability_of_such, quiet, sample, stock_sample
from tests.methods.test_radd import run_alone

GOLDEN = Path(__file__).parents[1] / "golden" / "gidd.json"
exact, loads = pytest.mark.proof("exact"), pytest.mark.proof("loads")

COMMON = CommonCase(
    process="other", inputs=run_alone, settings=[{"p_uniform": 0.0}, {"gamma": 2.0, "min_p": 0.01, "eps": 0.01}]
)


def float_time(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


def kernel(noise: HybridNoise, t: float, s: float, count: int) -> torch.Tensor:
    """`[from, to]` probabilities of z_t given z_s of `count` tokens and the mask, the last: q_t = kernel of q_s."""
    (kept_t, mask_t, some_t), (kept_s, mask_s, some_s) = (
        [float(share) for share in noise.shares(float_time(time))] for time in (t, s)
    )
    kept = kept_t / kept_s
    arrives = torch.full((count + 1,), (some_t - kept * some_s) / count, dtype=torch.float64)
    arrives[-1] = mask_t - kept * mask_s
    return kept * torch.eye(count + 1, dtype=torch.float64) + arrives


def law_at(noise: HybridNoise, t: float, count: int) -> torch.Tensor:
    """`[x, z]` probabilities of z_t given the clean token."""
    kept, mask, some = (float(share) for share in noise.shares(float_time(t)))
    q = torch.full((count, count + 1), some / count, dtype=torch.float64)
    q[:, :-1] += kept * torch.eye(count, dtype=torch.float64)
    q[:, -1] = mask
    return q


# --- exact: the process ----------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_shares_sum_to_one_and_uniform_noise_peaks_in_the_middle(gamma):
    noise, t = HybridNoise(0.2, gamma), torch.linspace(0, 1, 101, dtype=torch.float64)
    kept, masked, uniform = noise.shares(t)
    torch.testing.assert_close(kept + masked + uniform, torch.ones_like(t))
    assert float(uniform[50]) == pytest.approx(0.2) and int(uniform.argmax()) == 50
    assert kept[0] == 1 and masked[-1] == 1 and uniform[0] == uniform[-1] == 0


@exact
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_one_step_kernels_are_probabilities_and_their_product_is_the_law(gamma):
    noise, grid = HybridNoise(0.3, gamma), torch.linspace(0, 0.9, 31).tolist()
    product = torch.eye(5, dtype=torch.float64)
    for s, t in itertools.pairwise(grid):
        step = kernel(noise, t, s, 4)
        assert float(step.min()) >= -1e-15
        torch.testing.assert_close(step.sum(1), torch.ones(5, dtype=torch.float64))
        product = product @ step
    torch.testing.assert_close(product[:4], law_at(noise, grid[-1], 4), rtol=0, atol=1e-12)


@exact
def test_noisy_tokens_follow_the_law():
    scheduler, generator = dx.GIDDScheduler(p_uniform=0.3), torch.Generator().manual_seed(0)
    for mask in (0, 2, 4):  # also a mask that is none of the five tokens of the network
        clean = tokens_but_mask(torch.ones(40, 500, dtype=torch.long), mask)
        noisy = scheduler.add_noise(
            clean, torch.full((40,), 0.4), mask_token_id=mask, vocab_size=5 if mask < 4 else 4, generator=generator
        )
        law = law_at(scheduler.noise, 0.4, 4)[1]
        found = torch.bincount(noisy.flatten(), minlength=5)[[*(i for i in range(5) if i != mask), mask]] / 20000
        assert float((found - law).abs().max()) < 5 * (0.25 / 20000) ** 0.5
    with pytest.raises(ValueError, match="`timesteps`"):
        scheduler.add_noise(clean, torch.full((40,), 1.5), mask_token_id=4, vocab_size=4)


# --- exact: the sampler ----------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(("p_uniform", "mask"), [(0.0, 3), (0.2, 3), (0.2, 1)])
def test_a_step_is_the_rule_of_bayes(p_uniform, mask):
    """From the law of s and the kernel, for any clean distribution and any token."""
    noise, t, s, count = HybridNoise(p_uniform), 0.7, 0.4, 3
    size = count + 1 if mask < count else count
    clean = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean /= clean.sum()
    joint = (clean @ law_at(noise, s, count))[:, None] * kernel(noise, t, s, count)  # [z_s, z_t]
    order = [*(i for i in range(count + 1) if i != mask), mask]  # the mask last
    reached = [i for i in range(count + 1) if joint[:, i].sum() > 0]
    z = torch.tensor([order[i] for i in reached])
    padded = torch.zeros(len(z), size, dtype=torch.float64)
    padded[:, [i for i in order[:-1] if i < size]] = clean
    found = reverse_step(noise, padded, z, t, s, mask)
    assert mask >= size or float(found[:, mask].abs().max()) == 0
    columns = [*order[:-1], size]
    torch.testing.assert_close(found[:, columns], (joint / joint.sum(0)).T[reached], rtol=0, atol=1e-12)


@exact
def test_without_uniform_noise_it_is_masked_diffusion():
    language, steps = chain(), 3
    model, scheduler = exact_model(language), dx.GIDDScheduler(p_uniform=0.0, eps=0.01)
    times = scheduler._grid(steps)
    law = unmasking_law(model, language, [*(1 - s / t for t, s in itertools.pairwise(times[:-1])), 1.0])
    found = sample(pipeline(model, scheduler), 4000, 4, num_inference_steps=steps)
    assert probability_of_such(found.sequences, language, law) > 1e-3
    assert max(found.num_calls) <= 3 and min(found.num_calls) < 3, "unchanged rows need no call"
    assert probability_of_such(stock_sample(model, scheduler, 4000, 4, steps), language, law) > 1e-3
    assert probability_of_such(found.sequences, language) < 1e-6, "the test would not notice another law"


class HybridModel(ModelMixin, ConfigMixin):
    """The exact network of a language for hybrid noise: what the other positions say, or what all say."""

    @register_to_config
    def __init__(self, time_conditioning: bool = True) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def clean(self, z, t):
        kept, _, uniform = self.noise.shares(t.double())
        told = self.language.log_likelihood(z, kept, uniform / self.language.num_symbols)
        log_p = self.language.log_context(told)
        return torch.log_softmax(log_p if self.others else log_p + told, -1)

    def forward(self, input_ids, attention_mask=None, position_ids=None, timesteps=None):
        self.seen.append(timesteps)
        logits = torch.nn.functional.pad(self.clean(input_ids, timesteps), (0, 1), value=-math.inf)
        return SimpleNamespace(logits=logits)


def hybrid_model(language, noise, others=True):
    model = HybridModel()
    model.language, model.noise, model.others, model.mask_token_id = language, noise, others, language.mask_token_id
    return model


def states(language):
    return torch.tensor(list(itertools.product(range(language.num_symbols + 1), repeat=language.length)))


def sampler_law(model, scheduler, steps):
    """Law of the strings that the sampler draws, over all states: `(V ** L,)`, in the order of the codes."""
    language, noise, size = model.language, model.noise, model.language.num_symbols
    everything = states(language)
    law = torch.zeros(len(everything), dtype=torch.float64)
    law[-1] = 1
    times = scheduler._grid(steps)
    for number, (t, s) in enumerate(itertools.pairwise(times)):
        clean = model.clean(everything, torch.full((len(everything),), t)).exp()
        step = reverse_step(noise, clean.flatten(0, 1), everything.flatten(), t, s, size)
        if number == steps - 1:
            step[:, :-1] += step[:, -1:] * clean.flatten(0, 1)
            step[:, -1] = 0
        step = step.view(len(everything), language.length, size + 1)
        moves = functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), step.unbind(1))
        law = law @ moves
    finished = ~(everything == size).any(1)
    assert float(law[~finished].sum()) < 1e-12
    return law[finished]


@pytest.fixture(scope="module")
def small():
    language, noise = chain(length=3), HybridNoise(0.2)
    right = torch.zeros(27, dtype=torch.float64)
    strings, log_p = language.strings()
    right[language.codes(strings)] = log_p.exp()
    return language, noise, right


@exact
def test_the_sampled_law_nears_the_language_with_what_the_others_say(small):
    language, noise, right = small
    scheduler = dx.GIDDScheduler(p_uniform=0.2)
    off = {
        others: [
            float((sampler_law(hybrid_model(language, noise, others), scheduler, steps) - right).abs().sum()) / 2
            for steps in (4, 16, 64)
        ]
        for others in (True, False)
    }
    assert off[True][0] > 1.5 * off[True][1] > 2 * off[True][2] and off[True][2] < 0.02
    assert min(off[False]) > 0.1, "with the ordinary posterior it stays wrong"


@exact
def test_samples_have_the_law_of_the_steps(small):
    language, noise, _ = small
    scheduler, model = (
        dx.GIDDScheduler(p_uniform=0.2, eps=0.2),
        hybrid_model(language, noise),
    )  # with masks left to draw
    law = sampler_law(model, scheduler, 4)
    found = sample(pipeline(model, scheduler), 6000, 3, num_inference_steps=4)
    assert set(found.num_calls) == {4}
    assert probability_of_such(found.sequences, language, law) > 1e-3
    assert probability_of_such(found.sequences, language) < 1e-6, "the test would not notice another law"


@exact
def test_the_network_is_told_the_time_and_given_tokens_stay(small):
    language, noise, _ = small
    model, scheduler = hybrid_model(language, noise), dx.GIDDScheduler(p_uniform=0.2, eps=0.01)
    found = sample(pipeline(model, scheduler), 50, 2, num_inference_steps=5, input_ids=torch.tensor([[2]]))
    assert found.sequences.shape == (50, 2)
    grid = scheduler._grid(5)
    assert [float(t[0]) for t in model.seen] == pytest.approx(grid[:-1], abs=1e-6)
    # A prompt is never changed
    text = sample(
        pipeline(model, scheduler), 50, 0, input_ids=torch.tensor([[2, 3, 1]]), num_inference_steps=5
    ).sequences
    assert text[:, 0].eq(2).all() and text[:, 2].eq(1).all() and len(text[:, 1].unique()) > 1


@exact
def test_rare_outcomes_are_left_out_and_the_likeliest_stays():
    logits = torch.tensor([[[3.0, 2.0, 0.0, -math.inf]]]).expand(1, 4000, 4)
    tokens = torch.full((1, 4000), 3)
    for min_p, expected in ((0.0, {0, 1, 2}), (0.1, {0, 1}), (1.0, {0})):
        scheduler = dx.GIDDScheduler(p_uniform=0.1, min_p=min_p)
        scheduler.set_timesteps(1)
        drawn = scheduler.step(
            logits, 0, tokens, mask_token_id=3, temperature=1.0, generator=torch.Generator().manual_seed(0)
        ).prev_sample
        assert set(drawn.unique().tolist()) == expected


# --- exact: the loss -------------------------------------------------------------------------------------------------


def bound(model, nodes=24):
    """The loss of a string with the model's own answers: all strings, all states, and quadrature over t."""
    language, noise = model.language, model.noise
    strings, log_p = language.strings()
    everything, total = states(language), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        u = (node + 1) / 2
        angle = math.pi / 2 * u**2 * (3 - 2 * u)  # nodes crowd at both ends, where the loss is like a logarithm
        t, dt = math.sin(angle) ** 2, math.sin(2 * angle) * math.pi / 2 * 6 * u * (1 - u) * weight / 2
        logits = torch.nn.functional.pad(model.clean(everything, float_time(t).expand(len(everything))), (0, 1))
        q = law_at(noise, t, language.num_symbols)
        chance = q[strings[:, None], everything].prod(-1) * log_p.exp()[:, None]  # (strings, states), together 1
        rows = [part.expand(*chance.shape, *part.shape[2:]).flatten(0, 1) for part in
                (logits[None], strings[:, None], everything[None])]  # fmt: skip
        loss = gidd_loss(
            *rows, float_time(t).expand(chance.numel()), language.mask_token_id, noise.p_uniform,
            attention_mask=chance.view(-1, 1).expand(-1, language.length),
        )  # fmt: skip
        total += float(loss) * language.length * dt
    return total


@exact
def test_the_bound_of_the_exact_network_is_the_entropy(small):
    language, noise, _ = small
    assert bound(hybrid_model(language, noise)) == pytest.approx(language.entropy(), abs=1e-3)
    assert bound(hybrid_model(language, noise, others=False)) > language.entropy() + 0.3


def loss_inputs(size=6, mask=5):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 7, size, generator=generator, dtype=torch.float64)
    clean = torch.randint(0, 5, (4, 7), generator=generator)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    u, others = torch.rand(4, 7, generator=generator), torch.randint(0, 5, (4, 7), generator=generator)
    return logits, clean, t, u, others, mask


@exact
def test_without_uniform_noise_the_loss_is_the_masked_one():
    logits, clean, t, u, others, mask = loss_inputs()
    noisy = HybridNoise(0.0).add(clean, t, 1 - u, others, mask)
    masked = noisy == mask
    assert (noisy[~masked] == clean[~masked]).all() and masked.any() and not masked.all()
    nats = -torch.log_softmax(logits[..., :5], -1).gather(-1, clean[..., None]).squeeze(-1)
    expected = float((nats * masked / t[:, None]).mean())
    for p_uniform in (0.0, 1e-8):
        found = gidd_loss(logits, clean, noisy, t, mask, p_uniform=p_uniform)
        assert float(found) == pytest.approx(expected, abs=1e-5)
    assert float(gidd_loss(logits[..., :5], clean, noisy, t, mask, p_uniform=0.0)) == pytest.approx(expected, rel=1e-9)


@exact
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_the_loss_is_that_of_the_formula(gamma):
    """Slowly, with all probabilities; in float32 it is the same, and its gradient is finite where t is nearly 0 or 1."""
    logits, clean, t, u, others, mask = loss_inputs()
    noise = HybridNoise(0.2, gamma)
    noisy = noise.add(clean, t, u, others, mask)
    total = 0.0
    for i, j in itertools.product(range(4), range(7)):
        q = law_at(noise, float(t[i]), 5)
        x, z, guess = int(clean[i, j]), int(noisy[i, j]), torch.softmax(logits[i, j, :5], -1) @ q
        kl = float((q[x] * (q[x] / guess).log()).sum())
        r = float(q[x, z] / guess[z])
        c, eps = (float(noise.uniform_over_masks(t[i] + d)) for d in (0.0, 1e-6))
        slope, left = (eps - c) / 1e-6, 1 - float(t[i])
        weight = (
            1 / (float(t[i]) * left) if z == mask
            else (c + left * slope) / (5 * left * (left + c / 5)) if z == x
            else (c + left * slope) / (left * c)
        )  # fmt: skip
        total += weight * (kl + r - math.log(r) - 1) / 28
    found = gidd_loss(logits, clean, noisy, t, mask, 0.2, gamma)
    assert float(found) == pytest.approx(total, rel=1e-4)
    assert float(gidd_loss(logits.float(), clean, noisy, t, mask, 0.2, gamma)) == pytest.approx(float(found), rel=1e-4)
    for time in (1e-4, 1 - 1e-4):
        steep = (30 * logits).float().requires_grad_()
        gidd_loss(steep, clean, noisy, torch.full((4,), time), mask, 0.2, gamma).backward()
        assert steep.grad.isfinite().all()


@exact
def test_training_weights():
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    kept, masked = (
        torch.tensor([[True, False, False]]).expand(7, -1),
        torch.tensor([[False, True, False]]).expand(7, -1),
    )
    noise = HybridNoise(0.2)
    elbo, dynamic, released = (
        gidd_weights(noise, t, kept, masked, 49, kind) for kind in ("elbo", "dynamic", "released")
    )
    torch.testing.assert_close(dynamic, 2 * (t * (1 - t))[:, None] * elbo)
    assert (dynamic[:, 1:] == torch.tensor([2.0, 1.0])).all() and (released[:, 1:] == dynamic[:, 1:]).all()
    assert float(released[:, 0].max() / released[:, 0].min()) < 1.2 < float(dynamic[:, 0].max() / dynamic[:, 0].min())


# --- exact: self-correction ------------------------------------------------------------------------------------------


@exact
def test_wrong_tokens_are_corrected_and_right_ones_stay():
    """Brackets that must close: the exact network knows at a visible place what it ought to be."""
    language = dx_brackets()
    model = hybrid_model(language, HybridNoise(0.2))
    pipe = quiet(dx.MaskedDiffusionPipeline(model, dx.GIDDScheduler()))
    right = language.encode(["([a]b)aa", "aaaa(bb)", "((aa))bb"])
    wrong = right.clone()
    wrong[0, 0], wrong[1, 7], wrong[2, 1] = 4, 4, 2  # three brackets become letters or others
    assert not language.validity(wrong).any()
    fix = dx.SelfCorrection(pipe, time=0.05, max_steps=20)
    found = fix(wrong, generator=torch.Generator().manual_seed(0))
    assert language.validity(found.sequences).all()
    assert all(1 <= changes <= 3 for changes in found.num_changes) and max(found.num_calls) <= 20
    assert (model.seen[-1] == 0.05).all()
    kept = fix(wrong, prompt_length=[8 - 1, 1, 1], generator=torch.Generator().manual_seed(0)).sequences
    assert torch.equal(kept[0, :7], wrong[0, :7]) and torch.equal(kept[1:, 0], wrong[1:, 0])


def dx_brackets():
    from diffusers_ext.oracles import EnumerableLanguage

    return EnumerableLanguage.brackets(length=8)


def stubborn(tokens):
    """Logits that never agree with the text: each place wants the token after its own."""
    return 9.0 * torch.nn.functional.one_hot((tokens + 1) % 5, 6).double()


@exact
def test_correction_changes_few_tokens_a_step_and_loses_patience():
    pipe = quiet(dx.MaskedDiffusionPipeline(FormulaModel(stubborn), dx.GIDDScheduler()))
    text = torch.zeros(2, 10, dtype=torch.long)

    def run(**options):
        return dx.SelfCorrection(pipe, **options)(text, mask_token_id=5, generator=torch.Generator().manual_seed(0))

    assert run(max_steps=1).num_changes == [1, 1] and run(max_steps=1, tokens_per_step=4).num_changes == [4, 4]
    assert run(max_steps=3).accuracy == [0.1, 0.1], "what was put in is what the network found likeliest"
    # Accuracy is 1 / 10 from the first step on: 3 steps more, and the last of them is not kept
    found = run(patience=2)
    assert found.num_calls == [4, 4] and found.sequences[:, 0].tolist() == [3, 3] and found.num_changes == [1, 1]


@exact
def test_a_text_is_corrected_alike_in_every_batch():
    model = models.masked_language_model()
    pipe = quiet(dx.MaskedDiffusionPipeline(model, dx.GIDDScheduler()))
    texts = [torch.arange(1, 8), torch.arange(2, 9)]
    fix = dx.SelfCorrection(pipe, temperature=1.0, max_steps=6)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = fix(texts, mask_token_id=models.MASK, generator=seeded(0, 1))
    for i, text in enumerate(texts):
        alone = fix([text], mask_token_id=models.MASK, generator=seeded(i))
        assert torch.equal(alone.sequences[0], both.sequences[i, : len(text)])
        assert alone.num_changes[0] == both.num_changes[i] > 0
    shorter = fix([texts[0], texts[1][:4]], mask_token_id=models.MASK).sequences
    assert torch.equal(shorter[1, 4:], torch.zeros(3, dtype=torch.long)), "what fills up stays"
    assert "current_block" not in vars(pipe.scheduler)


@exact
def test_bad_arguments():
    for settings, message in (
        ({"p_uniform": 1.0}, "`p_uniform` is 1.0"),
        ({"p_uniform": -0.1}, "`p_uniform` is -0.1"),
        ({"gamma": 0.0}, "`gamma` 0.0"),
        ({"gamma": 2.5}, "`gamma` is 2.5"),
        ({"min_p": 1.5}, "`min_p` is 1.5"),
        ({"eps": 0.5}, "`eps` is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.GIDDScheduler(**settings)
    pipe = quiet(dx.MaskedDiffusionPipeline(FormulaModel(stubborn), dx.GIDDScheduler()))
    for settings, message in (
        ({"temperature": 0}, "`temperature` is 0"),
        ({"time": 2}, "`time` is 2"),
        ({"patience": -1}, "`patience` is -1"),
        ({"tokens_per_step": 0}, "`tokens_per_step` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.SelfCorrection(pipe, **settings)
    fix, text = dx.SelfCorrection(pipe), torch.zeros(1, 4, dtype=torch.long)
    for options, message in (
        ({"mask_token_id": None}, "`mask_token_id` is None"),
        ({"mask_token_id": 0}, "`input_ids` has masks"),
        ({"prompt_length": 4}, "`prompt_length` is 4"),
        ({"prompt_length": [1, 1]}, "`prompt_length`"),
        ({"generator": [torch.Generator()] * 2}, "`generator` has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fix(text, **{"mask_token_id": 5, **options})
    causal = dx.MaskedDiffusionPipeline(FormulaModel(stubborn), dx.GIDDScheduler(), attention="block_causal")
    with pytest.raises(ValueError, match="block-causal"):
        dx.SelfCorrection(causal)
    with pytest.raises(ValueError, match="`weighting` is 'none'"):
        gidd_loss(torch.zeros(1, 4, 6), text, text, torch.tensor([0.5]), 5, weighting="none")


# --- reference -------------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY = 3, 8, 7  # the last token is the mask
PROCESSES = {"0.0": 0.0, "0.1": 0.1, "0.5": 0.5}
TIMES = (0.08, 0.45, 0.9)
STEPS = {"first": (0.9999, 0.8), "middle": (0.5, 0.4), "last": (0.1, 0.0001)}


def golden_logits(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, LENGTH, VOCABULARY)` float64, by formula; tokens look at one another."""
    i, v = torch.arange(LENGTH, dtype=torch.float64), torch.arange(VOCABULARY, dtype=torch.float64)
    seen = torch.sin(1.1 * tokens.double()[:, None, :] + 0.7 * (i[:, None] - i).abs()).sum(-1)
    return 2 * torch.sin(seen[..., None] + 1.9 * v + 0.3 * i[:, None])


def golden_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean tokens, and noisy ones of all three kinds."""
    places = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    clean = places * 5 % (VOCABULARY - 1)
    noisy = torch.where(places % 3 == 0, VOCABULARY - 1, torch.where(places % 3 == 1, clean, (clean + 2) % 6))
    return clean, noisy


def golden_uniform(number: int) -> torch.Tensor:
    """`(1, LENGTH)` on [0, 1), by formula."""
    return (torch.arange(1, LENGTH + 1, dtype=torch.float64) * 0.6180339887 + 0.7548776662 * number)[None] % 1


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", PROCESSES)
def test_losses_equal_the_authors(name):
    """Row by row. Theirs has no p_uniform below e^-20; the "dynamic" weights of their code are our "released"."""
    golden = json.loads(GOLDEN.read_text())["losses"][name]
    clean, noisy = golden_tokens()
    for weighting, key in (("elbo", "none"), ("released", "dynamic")):
        for i, t in enumerate(TIMES):
            found = gidd_loss(
                golden_logits(noisy)[i : i + 1], clean[i : i + 1], noisy[i : i + 1], float_time(t), VOCABULARY - 1,
                max(PROCESSES[name], math.exp(-20)), weighting=weighting,
            )  # fmt: skip
            assert float(found) == pytest.approx(golden[key][i], rel=1e-6)


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", PROCESSES)
def test_steps_equal_the_authors(name):
    """Single steps. Their loop begins at the second time of the grid and ends with an empty step; ours does not."""
    golden = json.loads(GOLDEN.read_text())["steps"][name]
    _, noisy = golden_tokens()
    logits = golden_logits(noisy)
    logits[..., -1] = -math.inf
    clean = torch.softmax(logits, -1).flatten(0, 1)
    noise = HybridNoise(max(PROCESSES[name], math.exp(-20)))
    for step, (t, s) in STEPS.items():
        found = reverse_step(noise, clean, noisy.flatten(), t, s, VOCABULARY - 1)[:, [*range(VOCABULARY - 1), -1]]
        expected = torch.tensor(golden[step], dtype=torch.float64).view(-1, VOCABULARY)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.proof("reference")
def test_corrections_equal_the_authors(monkeypatch):
    golden = json.loads(GOLDEN.read_text())["corrections"]
    clean, _ = golden_tokens()
    numbers = itertools.count()
    monkeypatch.setattr(self_correction, "draw_uniform", lambda shape, generator, device: golden_uniform(next(numbers)))
    pipe = quiet(dx.MaskedDiffusionPipeline(FormulaModel(golden_logits), dx.GIDDScheduler()))
    for row, expected in zip(clean, golden["sequences"], strict=True):
        found = dx.SelfCorrection(pipe, temperature=0.5, max_steps=24, patience=4)(
            row[None], mask_token_id=VOCABULARY - 1
        )
        assert found.sequences[0].tolist() == expected
    assert next(numbers) == golden["calls"]


# --- loads -----------------------------------------------------------------------------------------------------------


@loads
def test_saved_and_loaded_in_both_pipelines(tmp_path):
    scheduler = dx.GIDDScheduler(p_uniform=0.3, gamma=1.5, min_p=0.01, eps=0.01)
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    for cls in (LLaDA2Pipeline, dx.MaskedDiffusionPipeline):
        pipe = quiet(cls(models.masked_language_model(), BlockRefinementScheduler()))
        pipe.scheduler = dx.GIDDScheduler.from_config(scheduler.config)
        options = {"block_length": 6, "num_inference_steps": 8, "temperature": 1.0}
        expected = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None))
        assert type(loaded) is cls and type(loaded.scheduler) is dx.GIDDScheduler
        assert loaded.scheduler.noise == HybridNoise(0.3, 1.5) and loaded.scheduler.revises
        found = loaded(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


@loads
def test_the_public_checkpoints_network_is_told_the_time():
    """Of tiny size; the pipeline takes it as it is."""
    pipe = pipeline(tiny("gidd"), dx.GIDDScheduler(p_uniform=0.2))
    found = pipe(
        input_ids=masked_tokens(2), num_inference_steps=4, output_type="seq", generator=torch.Generator().manual_seed(0)
    )
    assert found.num_calls == [4, 4] and torch.equal(found.sequences[:, :4], masked_tokens(2)[:, :4])


@loads
def test_the_rules_of_trainers_hold(tmp_path):
    values = trainer.masked_texts(tmp_path, num_validation_texts=1)
    out = trainer.hold_to_the_rules("gidd", lambda _: values, tmp_path / "runs")
    assert (out / "samples" / "step-000002.txt").is_file()
    assert "GIDDScheduler(p_uniform=0.1" in (out / "README.md").read_text()
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(out)
    assert tokenizer.mask_token_id == model.config.pad_token_id + 2


@exact
def test_the_trainer_refuses_what_cannot_work():
    for name, value in (("p_uniform", 1.0), ("gamma", 3.0), ("random_length_probability", 2.0)):
        with pytest.raises(ValueError, match=name):
            parse_args([f"--{name}={value}", "--pretrained_model_name_or_path=x", "--train_data_dir=x"])


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("gidd"), space)
    assert space["output"].texts and space["corrected"].sequences.shape == space["output"].sequences.shape
    assert "## When not to use it" in method_card("gidd")
