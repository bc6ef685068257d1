"""Hybrid noise, its sampler and hyperschedules, by the five proofs."""

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
from diffusers_ext.schedulers._hyperschedule import active_places, hyperschedule_levels, mask_rates
from diffusers_ext.training import train_hdlm
from diffusers_ext.training.train_hdlm import epsilon_hybrid_loss
from diffusers_ext.training.train_masked_diffusion_lm import masked_diffusion_loss
from tests.common import models, trainer
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, probability_of_such, sample, stock_sample
from tests.methods.test_radd import LENGTH, ROWS, VOCABULARY, golden_logits, golden_uniform, run_alone
from tests.tiny_models import draw_text

GOLDEN = Path(__file__).parents[1] / "golden" / "hdlm.json"
COMMON = CommonCase(
    process="other", inputs=run_alone,
    settings=[{"eta": 0.5}, {"hyperschedule": "sliding", "width": 4, "num_levels": 4, "eta": 0.0}],
)  # fmt: skip

exact = pytest.mark.proof("exact")


# --- exact: hyperschedules -------------------------------------------------------------------------------------------


@exact
def test_tables_of_levels():
    """Written out."""
    found = {
        "autoregressive": hyperschedule_levels("autoregressive", 3, 7, 7),
        "full": hyperschedule_levels("full", 2, 7, 3),
        "block": hyperschedule_levels("block", 5, 2, 2),
        "sliding": hyperschedule_levels("sliding", 4, 3, 3),
    }
    assert found["autoregressive"].tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert found["full"].tolist() == [[2, 2], [1, 1], [0, 0]]
    assert found["block"].tolist() == [
        [1, 1, 2, 2, 2], [0, 0, 2, 2, 2], [0, 0, 1, 1, 2], [0, 0, 0, 0, 2], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert found["sliding"].tolist() == [
        [2, 3, 3, 3], [1, 2, 3, 3], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1], [0, 0, 0, 0],
    ]  # fmt: skip
    assert active_places(found["block"], 2)[3].tolist() == [False, False, True, True, False]
    assert mask_rates(torch.tensor([0, 1, 2, 3, 4, 5]), 5).tolist() == pytest.approx(
        [1e-3, 1e-3 + 0.998 / 4, 0.5, 1e-3 + 3 * 0.998 / 4, 0.999, 1 - 1e-4]
    )


@exact
def test_wide_blocks_are_full_and_narrow_ones_autoregressive():
    for length in (5, 8):
        full, block = (hyperschedule_levels(kind, length, length, 4) for kind in ("full", "block"))
        assert torch.equal(full, block)
        narrow, one = hyperschedule_levels("block", length, 1, 1), hyperschedule_levels("autoregressive", length, 3, 3)
        assert torch.equal(narrow, one)
    for kind, width, levels in itertools.product(("block", "sliding"), (1, 2, 3, 5), (1, 2, 3, 5)):
        table = hyperschedule_levels(kind, 7, width, levels)
        assert (table.diff(dim=0) <= 0).all() and (table.diff(dim=1) >= 0).all()
        assert (table[-1] == 0).all() and (table[-2:-1] > 0).any(1).all()


@exact
def test_autoregression_samples_the_language_from_the_left():
    language = chain()
    order = []
    pipe = pipeline(exact_model(language), dx.HyperScheduleScheduler(hyperschedule="autoregressive", eta=0.5))
    options = {"callback_on_step_end": lambda pipe, i, t, kw: order.append((kw["sequences"] != 3).sum(1)) or {}}
    tokens = sample(pipe, 3000, 4, stop_at_eos=False, **options).sequences
    assert [set(each.tolist()) for each in order] == [{1}, {2}, {3}, {4}]
    assert probability_of_such(tokens, language) > 1e-3


@exact
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_samples_have_the_law_of_the_table(kind):
    """Without correction. Full: by the law of the steps. Sliding: every place at its own rate, by all orders of 2 tokens."""
    language = chain(length=4 if kind == "full" else 2)
    model = exact_model(language)
    scheduler = dx.HyperScheduleScheduler(hyperschedule=kind, width=3, num_levels=3, eta=0.0)
    steps = scheduler.num_steps(language.length)
    r = scheduler.unmask_probabilities(steps, language.length)
    if kind == "full":
        law = unmasking_law(model, language, r[:, 0].tolist())
    else:
        first, second = model(torch.full((1, 2), 3)).logits[0, :, :3].exp()
        after = {i: torch.full((3, 2), 3).index_fill(1, torch.tensor([i]), 0) for i in (0, 1)}
        for i in (0, 1):
            after[i][:, i] = torch.arange(3)
        given_first, given_second = (model(after[i]).logits[:, 1 - i, :3].exp() for i in (0, 1))
        left = torch.cat([torch.ones(1, 2), (1 - r).cumprod(0)]).double()  # still a mask before a step
        at = left[:-1] * r  # chance to unmask in a step, (steps, 2)
        ways = at[:, :1] * at[:, 1]  # of the first in row, of the second in column
        together, earlier, later = ways.diagonal().sum(), ways.triu(1).sum(), ways.tril(-1).sum()
        assert ways.sum() == pytest.approx(1) and min(together, earlier, later) > 0.0
        law = together * first[:, None] * second + earlier * first[:, None] * given_first
        law = (law + later * (second[:, None] * given_second).T).flatten()
    tokens = sample(pipeline(model, scheduler), 4000, language.length, num_inference_steps=steps + 1).sequences
    assert probability_of_such(tokens, language, law) > 1e-3
    if kind == "full":
        assert probability_of_such(tokens, language) < 1e-4, "the test would not notice another law"


# --- exact: correction -----------------------------------------------------------------------------------------------


@exact
def test_without_correction_it_is_the_plain_sampler():
    """Bit for bit, in both pipelines."""
    language = chain(length=6)
    model = exact_model(language, perturbation=1.0)
    two = [dx.AbsorbingDiffusionScheduler(), dx.AdaptiveCorrectionScheduler(eta=0.0)]
    ours = [sample(pipeline(model, one), 40, 6, num_inference_steps=5) for one in two]
    assert torch.equal(ours[0].sequences, ours[1].sequences) and ours[0].num_calls == ours[1].num_calls
    stock = [stock_sample(model, one, 40, 6, 5) for one in two]
    assert torch.equal(*stock)


@exact
def test_correction_draws_visible_tokens_from_what_the_model_says():
    """One step on complete strings, against the law by enumeration; with one place at a time it would be Gibbs sampling."""
    language, eta = chain(), 0.6
    model = exact_model(language, leave_one_out=True)
    strings, log_p = language.strings()
    scheduler = dx.AdaptiveCorrectionScheduler(eta=eta)
    scheduler.set_timesteps(4, block_length=4)
    again = eta * (1 - float(scheduler.rates[1]))
    conditional = model(strings).logits[..., :3].exp()  # (strings, 4, 3)
    law, gibbs = torch.zeros(3**4).double(), torch.zeros(3**4).double()
    places = 3 ** torch.arange(3, -1, -1)
    for chosen in itertools.product([False, True], repeat=4):
        where = torch.tensor(chosen).nonzero().squeeze(1)
        chance = again ** len(where) * (1 - again) ** (4 - len(where))
        for drawn in itertools.product(range(3), repeat=len(where)):
            after = strings.clone()
            after[:, where] = torch.tensor(drawn, dtype=torch.long)
            share = log_p.exp() * conditional[:, where, torch.tensor(drawn, dtype=torch.long)].prod(1)
            law.index_add_(0, (after * places).sum(1), chance * share)
            if len(where) == 1:
                gibbs.index_add_(0, (after * places).sum(1), share / 4)
    torch.testing.assert_close(gibbs[language.codes(strings)], log_p.exp(), rtol=0, atol=1e-9)
    texts = language.sample(6000, torch.Generator().manual_seed(0))
    step = {"mask_token_id": 3, "temperature": 1.0, "generator": torch.Generator().manual_seed(1)}
    out = scheduler.step(model(texts).logits, 1, texts, **step)
    assert probability_of_such(out.prev_sample, language, law) > 1e-3
    assert not out.transfer_index.any() and torch.equal(out.editing_transfer_index, out.prev_sample != texts)
    assert (
        abs(
            float((out.prev_sample == texts).all(1).double().mean())
            - float(_unchanged(strings, log_p, conditional, again))
        )
        < 0.03
    )
    kept = scheduler.step(
        model(texts).logits, 1, texts, prompt_mask=torch.ones(4, dtype=torch.bool), **step
    ).prev_sample
    assert torch.equal(kept, texts), "given tokens stay"
    last = scheduler.step(model(texts).logits, 3, texts, **step).prev_sample
    assert torch.equal(last, texts), "s = 0 in the last step"


def _unchanged(strings, log_p, conditional, again):
    same = conditional.gather(-1, strings[..., None]).squeeze(-1)
    return (log_p.exp() * (1 - again * (1 - same)).prod(1)).sum()


@exact
def test_a_wrong_token_is_mended_and_a_row_is_the_same_in_every_batch():
    """A model that knows the text, and a pipeline in blocks; tokens of earlier blocks stay."""
    right = torch.arange(12) % 5

    def logits(ids):
        wanted = torch.nn.functional.one_hot(right[: ids.shape[1]], 6).double() * 30
        noise = torch.sin(torch.arange(6) * 1.7 + ids.sum(1, keepdim=True))[:, None]
        first = (ids == 5).sum(1)[:, None, None] > 4  # many masks: it knows nothing
        return torch.where(first, 2 * noise, wanted)

    pipe = pipeline(FormulaModel(logits), dx.AdaptiveCorrectionScheduler(eta=1.0))
    call = {"gen_length": 12, "num_inference_steps": 24, "mask_token_id": 5, "output_type": "seq"}

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = pipe(num_texts_per_prompt=4, generator=seeded(0, 1, 2, 3), **call).sequences
    assert torch.equal(together, right.expand(4, -1))
    plain = pipeline(FormulaModel(logits), dx.AdaptiveCorrectionScheduler(eta=0.0))
    assert (plain(num_texts_per_prompt=4, generator=seeded(0, 1, 2, 3), **call).sequences != right).any(1).all()
    call["block_length"] = 4
    together = pipe(num_texts_per_prompt=4, generator=seeded(0, 1, 2, 3), **call).sequences
    assert (together[:, :4] != right[:4]).any(1).sum() >= 3, "the first block was settled while nothing was known"
    for i in range(4):
        assert torch.equal(pipe(generator=seeded(i), **call).sequences[0], together[i])


# --- exact: training -------------------------------------------------------------------------------------------------


@exact
def test_without_wrong_tokens_the_loss_is_that_of_masked_diffusion():
    language = chain(length=6)
    model, ids = exact_model(language, perturbation=1.0), language.sample(8, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    u, v, m = (
        torch.rand(8, 6, generator=generator),
        torch.rand(8, 6, generator=generator),
        torch.rand(8, generator=generator),
    )
    found = epsilon_hybrid_loss(model, ids, 3, m[:, None], u, v, torch.zeros_like(ids), epsilon=0.0)
    expected = masked_diffusion_loss(model, ids, torch.ones_like(ids), 3, m, u)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    with_wrong = epsilon_hybrid_loss(model, ids, 3, m[:, None], u, v, torch.zeros_like(ids), epsilon=0.5)
    assert abs(with_wrong.item() - expected.item()) > 0.01


@exact
def test_the_best_answer_at_a_visible_token():
    """One token of three, all noise enumerated: the gradient vanishes at p(x) (1/V + 1[x = z]), and at p under a mask."""
    p, epsilon = torch.tensor([0.5, 0.25, 0.25]).double(), 0.25
    best = torch.log(torch.cat([p * (1 / 3 + torch.eye(3)), p[None]]))
    best = torch.cat([best, torch.full((4, 1), -50.0)], 1).requires_grad_()  # (what is seen, vocabulary)
    model = FormulaModel(lambda ids: best[ids])
    # Four texts; v in quarters, one of which is below epsilon; each wrong token; masked or not
    rows = list(itertools.product([0, 0, 1, 2], [0.1, 0.3, 0.6, 0.9], [0, 1, 2], [0.1, 0.9]))
    ids, v, tokens, u = (torch.tensor(column)[:, None] for column in zip(*rows, strict=True))
    epsilon_hybrid_loss(model, ids, 3, torch.full((len(rows), 1), 0.5).double(), u, v, tokens, epsilon).backward()
    assert best.grad.abs().max() < 1e-9
    other = torch.log_softmax(best.detach(), -1) * torch.tensor([1.1, 1, 1, 1])
    best.data.copy_(other)
    best.grad = None
    epsilon_hybrid_loss(model, ids, 3, torch.full((len(rows), 1), 0.5).double(), u, v, tokens, epsilon).backward()
    assert best.grad.abs().max() > 1e-3, "the test would not notice another optimum"


@exact
def test_only_active_tokens_have_a_loss():
    seen = []
    model = FormulaModel(lambda ids: seen.append(ids) or torch.zeros(*ids.shape, 6))
    ids = torch.arange(8)[None] % 5
    levels = hyperschedule_levels("block", 8, 2, 2)
    active, rates = active_places(levels, 2), mask_rates(levels, 2)
    m = rates.masked_fill(levels == 2, 1.0).masked_fill((levels == 0) & ~active, 0.0)[2:3]
    u = torch.full((1, 8), 0.5)
    loss = epsilon_hybrid_loss(model, ids, 5, m, u, u, ids, epsilon=0.5, visible_weight=1.0, active=active[2:3])
    assert seen[0].tolist() == [[0, 1, 5, 5, 5, 5, 5, 5]]
    assert loss.item() == pytest.approx(math.log(5) / float(m[0, 2]), rel=1e-6)


@exact
def test_bad_arguments():
    for cls, settings, message in (
        (dx.AdaptiveCorrectionScheduler, {"eta": 1.5}, "`eta` is 1.5"),
        (dx.AdaptiveCorrectionScheduler, {"eps": -1.0}, "`eps` is -1.0"),
        (dx.HyperScheduleScheduler, {"hyperschedule": "spiral"}, "`hyperschedule` is 'spiral'"),
        (dx.HyperScheduleScheduler, {"width": 0}, "`width` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(**settings)
    with pytest.raises(ValueError, match="`num_inference_steps` is 4; 8 tokens take at least 8"):
        dx.HyperScheduleScheduler(hyperschedule="autoregressive").set_timesteps(4, block_length=8)


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {f"eta {eta}, {steps} steps": (eta, steps) for eta in (0.0, 0.3, 1.0) for steps in (4, 10)}
TABLES = {f"{kind} {width} {levels} {length}": (kind, width, levels, length) for kind, width, levels, length in (
    ("block", 4, 4, 8), ("block", 4, 3, 10), ("sliding", 4, 4, 9), ("sliding", 3, 7, 6), ("sliding", 5, 3, 7),
)}  # fmt: skip


def golden_noise() -> tuple[torch.Tensor, ...]:
    """Times `(ROWS,)`; u, v `(ROWS, LENGTH)`; wrong tokens and texts, by formula."""
    u, v = (torch.stack([golden_uniform(row, number) for row in range(ROWS)]) for number in (3, 4))
    i = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    return torch.tensor([0.2, 0.5, 0.8]), u.float(), v.float(), (3 * i + 1) % 6, (5 * i + i // 4) % 6


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_sampler(run, monkeypatch):
    """Likeliest tokens where the same uniform numbers unmask and correct."""
    eta, steps = RUNS[run]
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    count = iter(range(10**6))

    def draw(shape, generator, device):
        now = next(count)
        return torch.stack([golden_uniform(row, now) for row in range(ROWS)])

    monkeypatch.setattr(_unmasking, "draw_uniform", draw)
    scheduler = dx.AdaptiveCorrectionScheduler(eta=eta)
    scheduler.set_timesteps(steps, block_length=LENGTH)
    tokens = torch.full((ROWS, LENGTH), VOCABULARY - 1)
    for step in range(steps):
        if eta == 0:
            count = iter(range(2 * step, 10**6))  # theirs draws the numbers of corrections all the same
        options = {"mask_token_id": VOCABULARY - 1, "temperature": 0.0}
        tokens = scheduler.step(golden_logits(tokens), step, tokens, **options).prev_sample
    assert tokens.tolist() == golden


@pytest.mark.proof("reference")
def test_equals_the_authors_loss_and_tables():
    golden = json.loads(GOLDEN.read_text())
    t, u, v, tokens, ids = golden_noise()
    m = ((1 - 1e-4) * t + 1e-4)[:, None]
    for name, value in golden["losses"].items():
        epsilon, weight = map(float, name.split())
        found = epsilon_hybrid_loss(FormulaModel(golden_logits), ids, VOCABULARY - 1, m, u, v, tokens, epsilon, weight)
        assert found.item() == pytest.approx(value, rel=1e-5)
    for name, (kind, width, levels, length) in TABLES.items():
        assert hyperschedule_levels(kind, length, width, levels).tolist() == golden["levels"][name]
    for name, rates in golden["rates"].items():
        levels = torch.arange(int(name) + 1)
        assert mask_rates(levels, int(name)).tolist() == pytest.approx(rates, abs=1e-6)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_in_both_pipelines(tmp_path):
    call = {"input_ids": torch.tensor([[1, 2]]), "mask_token_id": models.MASK, "output_type": "seq", "gen_length": 6}
    made = [
        dx.AdaptiveCorrectionScheduler(eta=0.4),
        dx.HyperScheduleScheduler(hyperschedule="block", width=4, num_levels=3, eta=0.4),
    ]
    for cls, scheduler in itertools.product((LLaDA2Pipeline, dx.MaskedDiffusionPipeline), made):
        pipe = cls(models.masked_language_model(), BlockRefinementScheduler())
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        options = {"block_length": 8, "num_inference_steps": 24, "temperature": 1.0}
        expected = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is type(scheduler) and loaded.scheduler.config.eta == 0.4
        assert loaded.scheduler.revises
        found = loaded(**call, **options, generator=torch.Generator().manual_seed(0)).sequences
        assert torch.equal(found, expected)


@pytest.mark.proof("loads")
def test_the_rules_of_trainers_hold_and_the_model_loads(tmp_path):
    values = trainer.masked_texts(
        tmp_path, max_seq_length=16, train_batch_size=4, learning_rate=1e-2, num_validation_texts=1
    )
    out = trainer.hold_to_the_rules("hdlm", lambda _: values, tmp_path / "runs")
    draw_text(out)
    values |= {"output_dir": tmp_path / "sliding", "max_train_steps": 2, "seed": 3}
    train_hdlm.main(trainer.flags({**values, "hyperschedule": "sliding", "width": 4, "num_levels": 5}))
    plain, sliding = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "sliding"))
    assert plain != sliding
    for options, message in (
        ({"epsilon": 1.0}, r"`--epsilon` is 1\.0"),
        ({"width": 0}, "`--width` is 0"),
        ({"visible_weight": -1}, r"`--visible_weight` is -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_hdlm.main(trainer.flags({**values, **options}))


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("hdlm"), space)
    assert len(space["texts"]) == 2 and all(space["texts"])
    assert "## When not to use it" in method_card("hdlm")
