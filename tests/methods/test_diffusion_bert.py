"""DiffusionBERT, the spindle schedule, by the five proofs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline

import diffusers_ext as dx
from diffusers_ext.schedulers._spindle import survival, unmask_chance
from diffusers_ext.training import train_diffusion_bert
from diffusers_ext.training.train_diffusion_bert import parse_args, spindle_bound, spindle_diffusion_loss
from diffusers_ext.training.train_masked_diffusion_lm import masked_diffusion_loss
from tests.common import models, trainer
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, probability_of_such, sample, stock_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion_bert.json"

exact = pytest.mark.proof("exact")


def start(folder):
    options = {"max_seq_length": 16, "train_batch_size": 4, "num_diffusion_steps": 64, "num_validation_texts": 1}
    return trainer.masked_texts(folder, **options)


COMMON = CommonCase(inputs=start)


def frequencies_of(language):
    """As if symbols were the rarer, the later they come; the mask has none."""
    return dx.WordFrequencies.from_counts(torch.tensor([*(1000 // 8**i for i in range(language.num_symbols)), 0]))


def spindle(frequencies, **settings):
    return dx.SpindleScheduler.from_config(dx.SpindleScheduler(**settings).config, statistics=frequencies)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_the_schedule():
    found = dx.WordFrequencies.from_counts(torch.tensor([99, 0, 9, 99]), pad_token_id=3)
    assert found.frequency.tolist() == pytest.approx([1, 0, 0.5, 0])
    mean = found.mean(torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]]))
    assert mean.item() == pytest.approx(0.75)
    t, c = torch.linspace(0, 1, 401)[:, None], torch.linspace(-0.999, 0.999, 21).double()
    alive = survival(t, c, 1 / math.pi)
    assert (alive.diff(dim=0) <= 1e-12).all() and alive[0].tolist() == [1.0] * 21 and alive[-1].abs().max() < 1e-12
    assert (alive[1:-1].diff(dim=1) > 0).all(), "frequent tokens live longer"
    assert survival(0.25, torch.tensor(0.4), 0.3).item() == pytest.approx(0.75 + 0.3 * math.sqrt(0.5) * 0.4)
    assert unmask_chance(0.5, 0.75, torch.zeros(1), 0.3).item() == pytest.approx(1 / 3)
    at = [1 - t + 0.3 * math.sin(math.pi * t) * 0.4 for t in (0.5, 0.75)]
    found = unmask_chance(0.5, 0.75, torch.tensor(0.4).double(), 0.3)
    assert found.item() == pytest.approx((at[0] - at[1]) / (1 - at[1]))
    assert unmask_chance(0.0, 0.01, c, 0.3).tolist() == pytest.approx([1.0] * 21)


@exact
def test_without_spindle_loss_and_sampler_are_those_of_masked_diffusion():
    language = chain(length=6)
    model, frequencies = exact_model(language, perturbation=1.0), frequencies_of(language)
    ids, generator = language.sample(8, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    k, u = torch.arange(1, 9), torch.rand(8, 6, generator=generator).double()
    found = 8 * spindle_diffusion_loss(model, ids, 3, frequencies, k, 8, u, lam=0.0, hybrid_weight=0.0)
    expected = masked_diffusion_loss(model, ids, torch.ones_like(ids), 3, k.double() / 8, 1 - u)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    bound = spindle_bound(model, ids, 3, frequencies, k, 8, u, lam=0.0).mean() / 6
    assert bound.item() == pytest.approx(expected.item(), rel=1e-6)
    with_hybrid = 8 * spindle_diffusion_loss(model, ids, 3, frequencies, k, 8, u, lam=0.0, hybrid_weight=0.5)
    assert with_hybrid > found + 0.1
    schedulers = spindle(frequencies, lam=0.0), dx.AbsorbingDiffusionScheduler(eps=0.0)
    ours, plain = (sample(pipeline(model, one), 40, 6, num_inference_steps=5) for one in schedulers)
    assert torch.equal(ours.sequences, plain.sequences) and ours.num_calls == plain.num_calls


def reverse_law(model, language, frequencies, lam, steps):
    """The law of the reverse process, over all partly masked states, with its formulas written out again."""
    size, length, mask = language.num_symbols, language.length, language.mask_token_id
    states = torch.tensor(list(itertools.product(range(size + 1), repeat=length)))
    p = model(states).logits[..., :size].softmax(-1)
    masked, w = states == mask, frequencies.frequency.double()
    mean = w[torch.where(masked, p.argmax(-1), states)].mean(1)[:, None, None]
    law = torch.zeros(len(states)).double()
    law[-1] = 1

    def alive(t):
        return 1 - t + lam * math.sin(math.pi * t) * (w[:size] - mean)

    for n in range(steps):
        t, s = 1 - n / steps, 1 - (n + 1) / steps
        h = (alive(s) - alive(t)) / (1 - alive(t)) if s > 0 else torch.ones_like(p)
        drawn = torch.cat([p * h, 1 - (p * h).sum(-1, keepdim=True)], -1)
        stays = torch.nn.functional.one_hot(states, size + 1).double()
        factors, outcomes = torch.where(masked[..., None], drawn, stays), law[:, None]
        for i in range(length):
            outcomes = (outcomes[:, :, None] * factors[:, i, None]).flatten(1)
        law = outcomes.sum(0)
    return law[~masked.any(1)]


@exact
@pytest.mark.parametrize("draw", ["ours", "stock"])
def test_samples_have_the_law_of_the_reverse_process(draw):
    language = chain()
    model, frequencies = exact_model(language), frequencies_of(language)
    scheduler, steps = spindle(frequencies, lam=0.318), 3
    law = reverse_law(model, language, frequencies, 0.318, steps)
    if draw == "stock":
        tokens = stock_sample(model, scheduler, 4000, 4, steps)
    else:
        tokens = sample(pipeline(model, scheduler), 4000, 4, num_inference_steps=steps).sequences
    assert probability_of_such(tokens, language, law) > 1e-3
    linear = reverse_law(model, language, frequencies, 0.0, steps)
    assert probability_of_such(tokens, language, linear) < 0.05, "the test would not notice the schedule"


@exact
def test_frequent_tokens_come_first():
    """Of independent symbols, which of a text is unmasked in the first step: against the formula."""
    p = torch.tensor([0.25, 0.25, 0.25, 0.25]).double()
    logits = torch.cat([p.log(), torch.tensor([-math.inf]).double()])
    scheduler = spindle(dx.WordFrequencies.from_counts(torch.tensor([1000, 30, 3, 0, 0])), lam=0.318)
    scheduler.set_timesteps(4, block_length=1)
    tokens, step = torch.full((20000, 1), 4), {"mask_token_id": 4, "temperature": 1.0}
    out = scheduler.step(logits.expand(20000, 1, 5), 1, tokens, generator=torch.Generator().manual_seed(0), **step)
    shares = torch.bincount(out.prev_sample.flatten(), minlength=5).double() / 20000
    w = scheduler.statistics.frequency.double()[:4]
    alive = [1 - t + 0.318 * math.sin(math.pi * t) * (w - w[0]) for t in (0.75, 0.5)]  # the likeliest is the first
    expected = p * (alive[1] - alive[0]) / (1 - alive[0])
    assert shares[:4].tolist() == pytest.approx(expected.tolist(), abs=0.012)
    assert shares[0] > shares[3] + 0.01


@exact
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_bound_holds_and_the_loss_is_none(lam):
    """Four independent symbols, all noise and steps enumerated, the exact posterior: only the bound is over the entropy."""
    p, length, steps = torch.tensor([0.6, 0.25, 0.1, 0.05]).double(), 3, 32
    frequencies = dx.WordFrequencies.from_counts(torch.tensor([1000, 100, 10, 0, 0]))
    texts = torch.tensor(list(itertools.product(range(4), repeat=length)))
    hidden = torch.tensor(list(itertools.product([False, True], repeat=length)))
    w = frequencies.frequency.double()[texts]

    def survivors(k):
        t = (k.double() / steps)[:, None, None]
        return 1 - t + lam * torch.sin(math.pi * t) * (w - w.mean(1, keepdim=True))  # (k, texts, length)

    number, pattern, k = torch.cartesian_prod(
        torch.arange(len(texts)), torch.arange(len(hidden)), torch.arange(1, steps + 1)
    ).T
    masked, each = hidden[pattern], torch.arange(len(k))
    alive, before = (survivors(one)[each, number] for one in (k, k - 1))
    chance = p[texts[number]].prod(1) * torch.where(masked, 1 - alive, alive).prod(1) / steps
    kept = chance > 1e-15
    ids, masked, k, alive, before, chance = (one[kept] for one in (texts[number], masked, k, alive, before, chance))
    assert chance.sum() == pytest.approx(1, abs=1e-6)

    class Posterior:
        """Knows the time of each row, and what a mask says about the token under it."""

        def __init__(self, k):
            self.k = k

        def __call__(self, input_ids, attention_mask):
            seen = (input_ids[:, None] == texts) | (input_ids[:, None] == 4)
            alive = survivors(self.k)
            told = torch.where(input_ids[:, None] == 4, 1 - alive, alive * seen).prod(-1)  # (rows, texts)
            marginal = (told * p[texts].prod(1)) @ torch.nn.functional.one_hot(texts, 5).double().flatten(1)
            return SimpleNamespace(logits=marginal.view(-1, length, 5).log())

    bound = (chance * spindle_bound(Posterior(k), ids, 4, frequencies, k, steps, masked.double(), lam)).sum()
    noisy = torch.where(masked, 4, ids)
    log_p = Posterior(k)(noisy, None).logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    told = torch.where(masked, (before - alive) / (1 - alive) * -log_p, 0.0)
    weighted, entropy = steps * (chance * told.sum(1)).sum(), -3 * (p * p.log()).sum()
    if lam == 0:
        assert float(bound) == pytest.approx(float(entropy), abs=1e-5) == pytest.approx(float(weighted), abs=1e-5)
    else:
        assert weighted < entropy - 1e-3 and entropy < bound < entropy + 0.06
    some = slice(0, 4000, 7)
    loss = spindle_diffusion_loss(
        Posterior(k[some]), ids[some], 4, frequencies, k[some], steps, masked[some].double(), lam, hybrid_weight=0.0
    )
    assert loss.item() == pytest.approx(told[some].mean().item(), rel=1e-5)


@exact
def test_a_row_is_the_same_in_every_batch():
    language = chain(length=6)
    pipe = pipeline(exact_model(language), spindle(frequencies_of(language)))

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    call = {"gen_length": 6, "num_inference_steps": 5, "output_type": "seq"}
    together = pipe(num_texts_per_prompt=3, generator=seeded(0, 1, 2), **call).sequences
    for i in range(3):
        assert torch.equal(pipe(generator=seeded(i), **call).sequences[0], together[i])


@exact
def test_bad_arguments(tmp_path):
    language = chain()
    flags = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    for call, message in (
        (lambda: dx.SpindleScheduler(lam=0.5), r"`lam` is 0\.5"),
        (lambda: dx.SpindleScheduler().set_timesteps(4), "`statistics` is None"),
        (lambda: dx.WordFrequencies(0), "`vocab_size` is 0"),
        (lambda: dx.WordFrequencies.from_counts(torch.zeros(4)), "`counts` must hold"),
        (
            lambda: sample(
                pipeline(exact_model(language), spindle(dx.WordFrequencies.from_counts(torch.ones(9)))), 2, 4
            ),
            "`statistics` has 9 tokens, and the network 4",
        ),
        (lambda: parse_args([*flags, "--lam", "0.5"]), r"`--lam` is 0\.5"),
        (lambda: parse_args([*flags, "--num_diffusion_steps", "0"]), "`--num_diffusion_steps` is 0"),
        (lambda: parse_args([*flags, "--hybrid_weight", "-1"]), r"`--hybrid_weight` is -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- reference -------------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY, STEPS = 3, 6, 7, 16  # token 3 is the mask
MASK = 3


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts and uniform numbers `(ROWS, LENGTH)`, and counts `(VOCABULARY,)`, by formula."""
    i = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    ids = (i * 5 + i // 4) % (VOCABULARY - 1)
    return ids + (ids >= MASK), ((i + 1) * 0.6180339887) % 1, torch.tensor([100, 3, 40, 0, 900, 7, 20])


def golden_logits(ids: torch.Tensor) -> torch.Tensor:
    """`(batch, length, VOCABULARY)` by formula; that of the mask is -1e4."""
    v = torch.arange(VOCABULARY, dtype=torch.float64)
    seen = torch.sin(1.1 * ids.double()).sum(1)[:, None, None] + 0.3 * ids[..., None]
    return torch.where(v == MASK, -1e4, 2 * torch.sin(seen + 1.9 * v))


@pytest.mark.proof("reference")
def test_equals_the_authors_schedule_and_loss():
    """Their clip at 0.999 does not come into play here; with `lam=0` their rate is the token's own, else it is not."""
    golden = json.loads(GOLDEN.read_text())
    ids, u, counts = golden_inputs()
    frequencies = dx.WordFrequencies.from_counts(counts)
    centred = frequencies.frequency.double()[ids] - frequencies.mean(ids, torch.ones_like(ids))
    for k, alive in golden["survival"].items():
        torch.testing.assert_close(
            survival(int(k) / STEPS, centred, 0.3), torch.tensor(alive).double(), rtol=0, atol=1e-5
        )
    for k, value in golden["losses"].items():
        step = torch.full((ROWS,), int(k))
        found = spindle_diffusion_loss(FormulaModel(golden_logits), ids, MASK, frequencies, step, STEPS, u, lam=0.0)
        assert found.item() * ids.numel() == pytest.approx(value, rel=1e-4)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_in_both_pipelines(tmp_path):
    frequencies = dx.WordFrequencies.from_counts(torch.arange(models.MASK + 1) ** 2)
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    for cls in (LLaDA2Pipeline, dx.MaskedDiffusionPipeline):
        pipe = cls(models.masked_language_model(), BlockRefinementScheduler())
        pipe.scheduler = spindle(frequencies, lam=0.2)
        pipe.set_progress_bar_config(disable=True)
        options = {"block_length": 8, "num_inference_steps": 5, "temperature": 1.0}
        expected = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is dx.SpindleScheduler and loaded.scheduler.config.lam == 0.2
        assert torch.equal(loaded.scheduler.statistics.frequency, frequencies.frequency)
        found = loaded(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


@pytest.mark.proof("loads")
def test_what_the_trainer_writes_is_a_pipeline(tmp_path):
    values = {**start(tmp_path), "output_dir": tmp_path / "out", "max_train_steps": 2, "lam": 0.25}
    train_diffusion_bert.main(trainer.flags(values))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is dx.MaskedDiffusionPipeline and pipe.scheduler.config.lam == 0.25
    values = pipe.scheduler.statistics.frequency
    words = pipe.tokenizer.convert_tokens_to_ids(["e", "z", "<pad>"])
    assert values[words[0]] > 0.5 and values[words[1]] == 0 and values[words[2]] == 0
    output = pipe(gen_length=8, num_inference_steps=4, generator=torch.Generator().manual_seed(0), stop_at_eos=False)
    assert (output.sequences != pipe.tokenizer.mask_token_id).all()


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("diffusion_bert"), space)
    assert space["output"].texts[0]
    assert "## When not to use it" in method_card("diffusion_bert")
