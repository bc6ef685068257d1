"""EDLM, texts reweighted by an energy, by the five proofs."""

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
from diffusers_ext.models.nce_energy import nce_energy_loss
from diffusers_ext.oracles import unmasking_law
from diffusers_ext.training import train_edlm
from tests.common import models, trainer
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, probability_of_such, sample, stock_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "edlm.json"
EVERYWHERE = {"window_low": 0.0, "window_high": 1.0}

exact = pytest.mark.proof("exact")


def run_alone(scheduler, steps, dtype, generator):
    """A sampling loop on one block, with logits and energy by formula."""
    logits = torch.sin(torch.arange(2 * 6 * 6.0)).view(2, 6, 6).to(dtype)
    model = FormulaModel(lambda ids: logits)
    handle = scheduler.guide(model, lambda candidates, *_: torch.sin(candidates.double().sum(1)))
    tokens = torch.full((2, 6), 5)
    scheduler.set_timesteps(steps, block_length=6)
    for step in range(steps):
        options = {"mask_token_id": 5, "temperature": 1.0, "generator": generator}
        tokens = scheduler.step(model(input_ids=tokens).logits, step, tokens, **options).prev_sample
    handle.remove()
    return tokens.to(dtype)


COMMON = CommonCase(process="other", inputs=run_alone, settings=[{"num_candidates": 2, "window_low": 0.0}])


class ExactCausal(torch.nn.Module):
    """The language from left to right; texts begin with one more token, of any kind."""

    def __init__(self, language):
        super().__init__()
        self.tables, self.size = [], language.num_symbols
        model = exact_model(language)
        for i in range(language.length):  # of every beginning, what comes next
            starts = torch.tensor(list(itertools.product(range(self.size), repeat=i)), dtype=torch.long)
            texts = torch.full((len(starts), language.length), language.mask_token_id)
            texts[:, :i] = starts.view(len(texts), i)
            self.tables.append(model(texts).logits[:, i])
        self.tables.append(torch.zeros(self.size**language.length, self.size + 1))

    def forward(self, input_ids):
        code, logits = torch.zeros(len(input_ids), dtype=torch.long), []
        for i in range(input_ids.shape[1]):
            code = self.size * code + input_ids[:, i] if i else code
            logits.append(self.tables[i][code])
        return SimpleNamespace(logits=torch.stack(logits, 1))


def energy_of(language):
    return dx.ARResidualEnergy(ExactCausal(language), bos_token_id=0)


def guided(model, energy, **settings):
    pipe = pipeline(model, dx.EnergyReweightedScheduler(**settings))
    pipe.scheduler.guide(pipe.model, energy)
    return pipe


def reweighted_law(model, language, rates, count, carry_over=False):
    """The law of `count` candidates (1, 2 or infinite) in each step with the causal energy, over all partly masked states."""
    size, length, mask = language.num_symbols, language.length, language.mask_token_id
    texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
    places = (size + 1) ** torch.arange(length - 1, -1, -1)
    states = torch.tensor(list(itertools.product(range(size + 1), repeat=length)))
    log_ar = ExactCausal(language)(torch.nn.functional.pad(texts, (1, 0))).logits[:, :length].log_softmax(-1)
    log_ar = log_ar.gather(-1, texts[..., None]).squeeze(-1)  # (texts, length)
    conditionals = model(states).logits[..., :size].log_softmax(-1)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1
    for rate in rates:
        new = torch.zeros_like(law)
        for number in law.nonzero().squeeze(1).tolist():
            state = states[number]
            masked = state == mask
            if not masked.any():
                new[number] += law[number]
                continue
            fitting = ((texts == state) | masked).all(1).nonzero().squeeze(1)
            some = texts[fitting]
            log_p = conditionals[number].gather(-1, some.T).T[:, masked].sum(1)
            weight = (log_ar[fitting][:, masked] if carry_over else log_ar[fitting]).sum(1) - log_p
            p, w = log_p.exp(), (weight - weight.max()).exp()
            if count == 1:
                pick = p
            elif count == 2:
                pick = 2 * p * w * (p / (w[:, None] + w)).sum(1)
            else:
                pick = p * w / (p * w).sum()
            where = masked.nonzero().squeeze(1)
            for chosen in itertools.product([False, True], repeat=len(where)):
                unmask = where[torch.tensor(chosen)]
                after = state.repeat(len(some), 1)
                after[:, unmask] = some[:, unmask]
                share = rate ** len(unmask) * (1 - rate) ** (len(where) - len(unmask))
                new.index_add_(0, (after * places).sum(1), law[number] * share * pick)
        law = new
    return law[(states != mask).all(1)]


def distance(a, b):
    return float((a - b).abs().sum()) / 2


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laws():
    """Of two steps: by number of candidates, without and with energy, and the language itself."""
    language = chain()
    model, rates = exact_model(language), [0.5, 1.0]
    found = {count: reweighted_law(model, language, rates, count) for count in (1, 2, math.inf)}
    found["carry over"] = reweighted_law(model, language, rates, math.inf, carry_over=True)
    found["language"] = unmasking_law(model, language)
    return language, found


@exact
def test_the_law_nears_the_language_with_more_candidates(laws):
    """With infinitely many it is the language; not where visible tokens are left out of the causal sum."""
    language, law = laws
    plain = unmasking_law(exact_model(language), language, [0.5, 1.0])
    torch.testing.assert_close(law[1], plain, rtol=0, atol=1e-12)
    off = {name: distance(one, law["language"]) for name, one in law.items()}
    assert off[math.inf] < 1e-12 < 0.01 < off[2] < 0.8 * off[1] and off["carry over"] > 0.01


@exact
@pytest.mark.parametrize("through", [sample, "stock"])
def test_samples_have_the_law_of_two_candidates(laws, through):
    """In both pipelines. A wrong sign of the energy, or none, would show."""
    language, law = laws
    model, settings = exact_model(language), {"num_candidates": 2, "eps": 0.0, **EVERYWHERE}
    if through == "stock":
        scheduler = dx.EnergyReweightedScheduler(**settings)
        scheduler.guide(model, energy_of(language))
        tokens = stock_sample(model, scheduler, 4000, 4, 2)
    else:
        pipe = guided(model, energy_of(language), **settings)
        tokens = sample(pipe, 4000, 4, num_inference_steps=2, step_cache=False).sequences
    assert probability_of_such(tokens, language, law[2]) > 1e-3
    assert probability_of_such(tokens, language, law[1]) < 1e-6


@exact
def test_many_candidates_sample_the_language(laws):
    language, _ = laws
    pipe = guided(exact_model(language), energy_of(language), num_candidates=64, **EVERYWHERE)
    tokens = sample(pipe, 2000, 4, num_inference_steps=1, step_cache=False).sequences
    assert probability_of_such(tokens, language) > 1e-3


@exact
def test_visible_tokens_on_both_sides_count(laws):
    """Infilling: the middle of a string, given its ends, in one step."""
    language, _ = laws
    strings, log_p = language.strings()
    pipe = guided(exact_model(language), energy_of(language), num_candidates=64, **EVERYWHERE)
    prompt = torch.tensor([[1, 3, 3, 2]])
    tokens = pipe(
        input_ids=prompt, num_texts_per_prompt=1500, num_inference_steps=1, output_type="seq", step_cache=False,
        generator=torch.Generator().manual_seed(0),
    ).sequences  # fmt: skip
    fits = (strings[:, 0] == 1) & (strings[:, 3] == 2)
    law = torch.zeros(3**4, dtype=torch.float64)
    law[language.codes(strings)] = log_p.exp() * fits
    assert probability_of_such(tokens, language, law / law.sum()) > 1e-3


@exact
def test_one_candidate_or_an_empty_window_is_the_plain_sampler():
    """Bit for bit, and the energy is not asked."""
    language = chain(length=6)
    expected = sample(pipeline(exact_model(language), dx.AbsorbingDiffusionScheduler()), 30, 6, num_inference_steps=4)
    for settings in ({"num_candidates": 1}, {"num_candidates": 8, "window_low": 0.3, "window_high": 0.31}):
        pipe = pipeline(exact_model(language), dx.EnergyReweightedScheduler(**settings))
        assert torch.equal(sample(pipe, 30, 6, num_inference_steps=4).sequences, expected.sequences)


@exact
def test_a_constant_energy_changes_nothing_of_the_law(laws):
    language, law = laws
    pipe = guided(exact_model(language), lambda c, *_: torch.zeros(len(c)), num_candidates=4, eps=0.0, **EVERYWHERE)
    tokens = sample(pipe, 4000, 4, num_inference_steps=2, step_cache=False).sequences
    assert probability_of_such(tokens, language, law[1]) > 1e-3


@exact
def test_the_causal_energy_is_the_difference_of_two_log_probabilities():
    language = chain()
    texts = language.sample(20, torch.Generator().manual_seed(0))
    log_p, every = torch.randn(20).double(), torch.ones_like(texts)
    found = energy_of(language)(texts, texts, log_p, every, language.mask_token_id)
    torch.testing.assert_close(found, log_p - language.log_prob(texts), rtol=0, atol=1e-6)
    short = texts.clone()
    short[:, 2] = language.mask_token_id  # text after a mask that is left does not count
    for mask, ids in ((every, short), (torch.tensor([1, 1, 0, 0]).expand_as(texts), texts)):
        found = energy_of(language)(ids, ids, log_p, mask, language.mask_token_id)
        strings, log_q = language.strings()
        first_two = [float(torch.logsumexp(log_q[(strings[:, :2] == row[:2]).all(1)], 0)) for row in texts]
        torch.testing.assert_close(found, log_p - torch.tensor(first_two).double(), rtol=0, atol=1e-6)


def wave(ids, causal=False, real=1):
    """Logits `(batch, length, 10)` by formula, 9 is the mask."""
    seen = torch.sin(1.3 * ids.double() + torch.arange(ids.shape[1])) * real
    seen = seen.cumsum(1) if causal else seen.sum(1, keepdim=True).expand_as(seen)
    places = torch.arange(ids.shape[1]).double()
    return 2 * torch.sin(seen[..., None] + 1.9 * torch.arange(10) + 0.4 * places[:, None])


class CausalWave(torch.nn.Module):
    def forward(self, input_ids):
        return SimpleNamespace(logits=wave(input_ids, causal=True))


@exact
def test_a_row_is_the_same_in_every_batch_with_its_own_energy():
    """Prompts of different lengths, in blocks; the energy sees each row's own text and no filling."""
    asked = []

    def energy(candidates, noisy, log_probability, attention_mask, mask_token_id):
        kept = noisy != mask_token_id
        assert torch.equal(candidates[kept], noisy[kept]) and bool((noisy == mask_token_id).any(1).all())
        asked.append(attention_mask.sum(1).unique().tolist())
        inner = dx.ARResidualEnergy(CausalWave(), bos_token_id=1, rows_at_once=3)
        return inner(candidates, noisy, log_probability, attention_mask, mask_token_id)

    class Model(FormulaModel):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=wave(input_ids, real=attention_mask))

    rows = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    pipe = guided(Model(None), energy, num_candidates=3, window_low=0.2)
    call = {"gen_length": 8, "block_length": 4, "num_inference_steps": 3, "mask_token_id": 9, "output_type": "seq"}
    call |= {"step_cache": False, "guidance_scale": 1.5}

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = pipe(input_ids=rows, generator=seeded(0, 1, 2), **call).sequences
    assert {length for lengths in asked for length in lengths} == {9, 10, 11}
    for i, row in enumerate(rows):
        assert torch.equal(pipe(input_ids=[row], generator=seeded(i), **call).sequences[0], together[i])


@exact
def test_the_optimum_of_the_training_is_the_residual():
    """All of a language whose probabilities are sixteenths, by every draw: the gradient vanishes at E*, not at -E*."""
    counts = {(0, 0): 7, (0, 1): 1, (1, 0): 1, (1, 1): 7}  # marginals 1/2
    data = torch.tensor([text for text, count in counts.items() for _ in range(count)])
    grid = torch.tensor(list(itertools.product([0.25, 0.75], repeat=2))).double()  # each value draws one symbol
    ids, draws = data.repeat_interleave(4, 0), grid.repeat(len(data), 1)
    denoiser = FormulaModel(lambda ids: torch.zeros(*ids.shape, 3))
    optimum = torch.tensor([[math.log(0.25 / (counts[i, j] / 16)) for j in (0, 1)] for i in (0, 1)]).double()
    size = {}
    for sign in (1, -1):
        table = (sign * optimum).requires_grad_()

        def energy(candidates, *_, table=table):
            return table[candidates[:, 0], candidates[:, 1]]

        every = torch.ones_like(ids)
        nce_energy_loss(energy, denoiser, ids, every, 2, torch.ones(64), torch.zeros(64, 2), draws).backward()
        size[sign] = table.grad.abs().max().item()
    assert size[1] < 1e-9 and size[-1] > 0.1


def tiny_denoiser():
    return models.masked_language_model()


@exact
def test_an_untrained_energy_is_zero_and_padding_does_not_count():
    energy = dx.NCEEnergy.from_denoiser(tiny_denoiser())
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randint(0, 10, (2, 3, 8), generator=generator)
    assert torch.equal(energy(text, noisy), torch.zeros(3))
    with torch.no_grad():
        for parameter in energy.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        energy.mix.weight.add_(0.1 * torch.randn(energy.mix.weight.shape, generator=generator))
    mask = torch.tensor([[1] * 6 + [0] * 2] * 3)
    found, other = energy(text, noisy, attention_mask=mask), text.clone()
    other[:, 6:] = 1
    assert found.abs().min() > 1e-3 and torch.equal(energy(other, noisy, attention_mask=mask), found)
    other[:, 0] = (other[:, 0] + 1) % 10
    assert not torch.allclose(energy(other, noisy, attention_mask=mask), found)


@exact
def test_bad_arguments():
    language = chain()
    for settings, message in (
        ({"num_candidates": 0}, "`num_candidates` is 0"),
        ({"window_low": 2.0}, "`window_low` is 2.0"),
        ({"energy_temperature": 0.0}, "`energy_temperature` is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.EnergyReweightedScheduler(**settings)
    with pytest.raises(ValueError, match="There is no energy"):
        sample(pipeline(exact_model(language), dx.EnergyReweightedScheduler()), 2, 4, num_inference_steps=2)
    pipe = guided(exact_model(language), energy_of(language), window_low=0.0)
    with pytest.raises(ValueError, match="`temperature` is 0"):
        sample(pipe, 2, 4, num_inference_steps=2, temperature=0.0, step_cache=False)
    with pytest.raises(ValueError, match="step_cache=False"):
        sample(pipe, 20, 4, num_inference_steps=20)
    with pytest.raises(ValueError, match="has 3 tokens, and a text has token 8"):
        small = FormulaModel(lambda ids: torch.zeros(*ids.shape, 3))
        text = torch.tensor([[8, 1]])
        dx.ARResidualEnergy(small, 0)(text, text, torch.zeros(1), torch.ones_like(text), 9)
    with pytest.raises(ValueError, match="`backbone` has"):
        dx.NCEEnergy({"hidden_size": 8})


# --- reference -------------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY = 4, 6, 8  # the last token is the mask


def golden_texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts, uniform numbers (both `(ROWS, LENGTH)`) and times `(ROWS,)`, by formula. The first token is never masked."""
    i = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    u = ((i + 1) * 0.6180339887) % 1
    return (
        (i * 5 + i // 3) % (VOCABULARY - 1),
        u.index_fill(1, torch.tensor([0]), 1.0),
        torch.tensor([0.3, 0.5, 0.7, 0.9]),
    )


def golden_causal(ids: torch.Tensor) -> torch.Tensor:
    """`(rows, length, VOCABULARY)` log-probabilities of a causal model by formula; the mask has none."""
    v = torch.arange(VOCABULARY, dtype=torch.float64)
    logits = 2 * torch.sin(torch.sin(1.7 * ids.double()).cumsum(1)[..., None] + 1.3 * v)
    return torch.where(v == VOCABULARY - 1, -1e6, logits).log_softmax(-1)


def golden_denoiser(ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a denoiser by formula: 1 for a visible token; a masked one is as good as certain."""
    v = torch.arange(VOCABULARY)
    sure = 50.0 * (v == (ids.sum(1, keepdim=True) + torch.arange(ids.shape[1]))[..., None] % (VOCABULARY - 1))
    log_p = torch.where(v == VOCABULARY - 1, -1e6, sure.double()).log_softmax(-1)
    same = torch.where(v == ids[..., None], 0.0, -1e6).double()
    return torch.where((ids == VOCABULARY - 1)[..., None], log_p, same)


def golden_energy(candidates: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """`(rows,)`, by formula."""
    places = torch.arange(1, candidates.shape[1] + 1)
    return 2 * torch.sin((places * (candidates + 0.7 * noisy)).sum(1).double())


@pytest.mark.proof("reference")
def test_equals_the_authors_energy_and_loss():
    """Their sampler weighs by exp(+energy) and gives the energy probabilities in place of log-probabilities; not copied."""
    golden = json.loads(GOLDEN.read_text())
    text, u, t = golden_texts()
    noisy = torch.where(u < t[:, None], VOCABULARY - 1, text)
    every = torch.ones_like(text)
    log_p = golden_denoiser(noisy).gather(-1, text[..., None]).squeeze(-1).sum(1)
    energy = dx.ARResidualEnergy(FormulaModel(golden_causal))(text, noisy, log_p, every, VOCABULARY - 1)
    assert energy.tolist() == pytest.approx(golden["energies"], abs=1e-3)
    loss = nce_energy_loss(
        lambda c, n, *_: golden_energy(c, n), FormulaModel(golden_denoiser), text, every, VOCABULARY - 1, t, u,
        torch.full_like(u, 0.5),
    )  # fmt: skip
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-6)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_with_its_energy(tmp_path):
    energy = dx.NCEEnergy.from_denoiser(tiny_denoiser())
    with torch.no_grad():
        energy.head[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    energy.save_pretrained(tmp_path / "energy")
    again = dx.NCEEnergy.from_pretrained(tmp_path / "energy")
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    call |= {"block_length": 8, "num_inference_steps": 4, "temperature": 1.0}
    for cls in (LLaDA2Pipeline, dx.MaskedDiffusionPipeline):
        more = {"step_cache": False} if cls is dx.MaskedDiffusionPipeline else {}
        pipe = cls(models.masked_language_model(), BlockRefinementScheduler())
        pipe.scheduler = dx.EnergyReweightedScheduler.from_config(
            pipe.scheduler.config, num_candidates=4, window_low=0.1
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler.guide(pipe.model, energy)
        expected = pipe(**call, **more, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is dx.EnergyReweightedScheduler and loaded.scheduler.config.window_low == 0.1
        loaded.scheduler.guide(loaded.model, again)
        found = loaded(**call, **more, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


@pytest.mark.proof("loads")
def test_the_rules_of_trainers_hold_and_the_energy_loads(tmp_path):
    values = trainer.masked_texts(tmp_path, max_seq_length=16, train_batch_size=4, learning_rate=1e-2)
    out = trainer.hold_to_the_rules("edlm", lambda _: values, tmp_path / "runs")
    assert dx.NCEEnergy.from_pretrained(out).head[2].weight.abs().max() > 0
    assert "EnergyReweightedScheduler" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match=r"`--min_mask_ratio` is 0\.0"):
        train_edlm.main(trainer.flags({**values, "output_dir": tmp_path / "refused", "min_mask_ratio": 0.0}))


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("edlm"), space)
    assert space["output"].texts[0] and space["output"].num_calls == [8]
    assert "## When not to use it" in method_card("edlm")
