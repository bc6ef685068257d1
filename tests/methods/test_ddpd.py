"""DDPD, a planner and a denoiser, by the five proofs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
)

import diffusers_ext as dx
from diffusers_ext.pipelines import planned_denoising
from diffusers_ext.schedulers import ddpd
from diffusers_ext.training.train_ddpd import planner_loss
from tests import unets
from tests.common import models, trainer
from tests.common.suite import CommonCase
from tests.languages import FormulaModel, chain, exact_model, probability_of_such, quiet

GOLDEN = Path(__file__).parents[1] / "golden" / "ddpd.json"
exact, loads = pytest.mark.proof("exact"), pytest.mark.proof("loads")


def planner() -> BertForTokenClassification:
    config = BertConfig(
        vocab_size=models.MASK + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    return unets.fill(BertForTokenClassification(config)).eval()


COMMON = CommonCase(
    make=lambda: dx.PlannedDenoisingPipeline(planner(), models.masked_language_model(), dx.DDPDScheduler()),
    inputs=lambda steps: {
        "input_ids": torch.tensor([[1, 2, 3, 4]]), "mask_token_id": models.MASK, "gen_length": 6,
        "num_inference_steps": steps, "output_type": "seq",
    },
)  # fmt: skip


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- exact: the plan -------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("selection", ["softmax", "proportional"])
def test_positions_are_chosen_by_odds_or_probabilities_and_masks_by_probabilities(selection):
    logits = torch.tensor([1.5, -0.5, 0.3, -2.0, 5.0]).double()
    free = torch.tensor([True, True, True, True, False]).expand(40000, -1)
    scheduler = dx.DDPDScheduler(selection=selection)
    plan = scheduler.plan(logits.expand(40000, -1), free, generator=torch.Generator().manual_seed(0))
    weight = (logits if selection == "softmax" else F.logsigmoid(logits))[:4].softmax(-1)
    found, sharp = plan.chosen.double().mean(0), 4 * (0.25 / 40000) ** 0.5
    assert (plan.chosen.sum(1) == 1).all() and (plan.masked | ~plan.chosen).all() and not plan.masked[:, 4].any()
    assert float((found[:4] - weight).abs().max()) < sharp
    p = logits[:4].sigmoid()
    assert float((plan.masked[:, :4].double().mean(0) - (p + weight - p * weight)).abs().max()) < sharp
    assert float(plan.noise[0]) == pytest.approx(float(p.sum()))
    final = scheduler.plan(logits.expand(40000, -1), free, final=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(final.chosen, final.masked)
    assert float((final.masked[:, :4].double().mean(0) - p).abs().max()) < sharp


@exact
def test_several_positions_a_step_and_an_end():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    plan = dx.DDPDScheduler(positions_per_step=3).plan(logits, generator=torch.Generator().manual_seed(0))
    assert (plan.chosen.sum(1) == 3).all() and (plan.masked | ~plan.chosen).all()
    logits[::2] = -30.0
    plan = dx.DDPDScheduler().plan(logits, generator=torch.Generator().manual_seed(0))
    assert not plan.masked[::2].any() and (plan.chosen[1::2].sum(1) == 1).all()
    assert dx.DDPDScheduler(tolerance=0.0).plan(logits).chosen.any(1).all(), "without a tolerance it goes on for ever"


# --- exact: the law --------------------------------------------------------------------------------------------------


class Exact:
    """Everything about a language under uniform noise, by sums over all strings and all sets of noisy positions.

    `strings` `(n, L)` are all strings; `sets` `(2 ** L, L)` all sets z; `seen[z, x]` the probability that a clean string has
    the tokens of x outside z; `clean[z, x, d, v]` what is then known of token d.
    """

    def __init__(self, language):
        self.language, self.length, self.size = language, language.length, language.num_symbols
        self.strings = torch.tensor(list(itertools.product(range(self.size), repeat=self.length)))
        self.sets = torch.tensor(list(itertools.product([False, True], repeat=self.length)))
        self.right = language.log_prob(self.strings).exp()
        same = self.strings[:, None] == self.strings  # [x, x0, d]
        fits = (same[None] | self.sets[:, None, None]).all(-1).double() * self.right  # [z, x, x0]
        self.seen = fits.sum(-1)
        hot = F.one_hot(self.strings, self.size).double()
        self.clean = torch.einsum("zxn,ndv->zxdv", fits, hot) / self.seen[..., None, None]
        self.noisy = self.sets.double()
        # [x, d, v]: the number of the string that x becomes with v at d
        places = self.size ** torch.arange(self.length - 1, -1, -1)
        code = (self.strings * places).sum(1)
        self.to = code[:, None, None] + (torch.arange(self.size) - self.strings[..., None]) * places[:, None]

    def joint(self, t):
        """`[z, x]` probabilities that x is seen at noise level t with the noisy positions z."""
        count = self.noisy.sum(1)
        return (t**count * (1 - t) ** (self.length - count) * self.size**-count)[:, None] * self.seen

    def marginals(self, joint):
        """`[x, d]`: P(z_d = 1 | x)."""
        return (joint.T @ self.noisy) / joint.sum(0)[:, None]

    def independent(self, p):
        """`[z, x]`: the sets as independent draws of `p` `[x, d]`."""
        return torch.where(self.sets[:, None], p[None], 1 - p[None]).prod(-1)

    def moves(self, weight):
        """`[x, x']` of redrawing d given z with `weight` `[z, x, d]`."""
        rate = torch.einsum("zxd,zxdv->xdv", weight, self.clean)
        result = torch.zeros(len(self.strings), len(self.strings), dtype=torch.float64)
        return result.scatter_add_(1, self.to.flatten(1), rate.flatten(1))

    def planner(self):
        """P(z_d = 1 | x), `[x, d]`, averaged over the noise levels: the best planner that is not told t."""
        nodes = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
        return self.marginals(sum(self.joint(t) for t in nodes))

    def loop(self, p, selection):
        """`[x, x']` of one step of the loop, with a planner that says `p`."""
        weight = p.logit().softmax(-1) if selection == "softmax" else p / p.sum(-1, keepdim=True)
        forced = torch.where(self.sets[:, None], p[None], 1 - p[None])  # [z, x, j]
        total = forced.prod(-1, keepdim=True) / forced * self.noisy[:, None]  # without d, which is in z
        return self.moves(total * weight)

    def final(self, p):
        """`[x, x']` of the last step, which draws all noisy positions on their own."""
        chance, result = self.independent(p), torch.zeros(len(self.strings), len(self.strings), dtype=torch.float64)
        kept = F.one_hot(self.strings, self.size).double()
        for z, inside in enumerate(self.sets):
            each = torch.where(inside[:, None], self.clean[z], kept)  # [x, d, v]
            outcomes = each[:, 0]
            for d in range(1, self.length):
                outcomes = (outcomes[:, :, None] * each[:, d, None]).flatten(1)
            result += chance[z][:, None] * outcomes
        return result

    def distance(self, law):
        return float((law - self.right).abs().sum()) / 2


def integrated(world, independent, end=11.0, steps=160):
    """Law at the end of the reverse process of rate P(z_d = 1 | x, t) / t, from uniform tokens at t = 1: in log t, by RK4."""
    law = torch.full((len(world.strings),), 1 / len(world.strings), dtype=torch.float64)

    def slope(law, log_t):
        joint = world.joint(math.exp(-log_t))
        p = world.marginals(joint)
        if independent:
            forced = torch.where(world.sets[:, None], p[None], 1 - p[None])
            weight = forced.prod(-1, keepdim=True) * world.noisy[:, None]  # P(z_d = 1) times the others' own draws
        else:
            weight = (joint / joint.sum(0))[..., None] * world.noisy[:, None]
        moves = world.moves(weight)
        return law @ moves - law * moves.sum(1)

    h = end / steps
    for n in range(steps):
        s = n * h + 1e-9
        a = slope(law, s)
        b = slope(law + h / 2 * a, s + h / 2)
        c = slope(law + h / 2 * b, s + h / 2)
        law = law + h / 6 * (a + 2 * b + 2 * c + slope(law + h * c, s + h))
    return law


@exact
def test_the_generator_with_the_time_leads_to_the_language():
    world = Exact(chain(length=3))
    assert world.distance(integrated(world, independent=False)) < 3e-4
    assert 1e-3 < world.distance(integrated(world, independent=True)) < 0.03, "independent masks cost a little"


@exact
@pytest.mark.parametrize("selection", ["softmax", "proportional"])
def test_the_loop_without_time_is_not_exact_and_drifts(selection):
    """However good the planner: the distance is least at about one step a token, and then texts become alike."""
    world = Exact(chain(length=4))
    step = world.loop(world.planner(), selection)
    torch.testing.assert_close(step.sum(1), torch.ones(81, dtype=torch.float64))
    law, off = torch.full((81,), 1 / 81, dtype=torch.float64), []
    for _ in range(200):
        law = law @ step
        off.append(world.distance(law))
    best = 1 + min(range(200), key=off.__getitem__)
    assert 4 <= best <= 8 and 0.05 < off[best - 1] < 0.8 * off[-1]
    assert -float(torch.xlogy(law, law).sum()) < world.language.entropy() - 0.05


class FormulaPlanner(ModelMixin, ConfigMixin):
    """Logits by the string's number, from a table `[x, d]`."""

    def __init__(self, world, p) -> None:
        super().__init__()
        self.register_buffer("logits", p.logit())
        self.world = world

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits[self.world.language.codes(input_ids)][..., None])


@exact
@pytest.mark.parametrize("selection", ["softmax", "proportional"])
def test_samples_have_the_law_of_the_loop(selection):
    world = Exact(chain(length=3))
    p = world.planner()
    pipe = quiet(
        dx.PlannedDenoisingPipeline(
            FormulaPlanner(world, p), exact_model(world.language), dx.DDPDScheduler(selection=selection)
        )
    )
    found = pipe(
        gen_length=3, num_texts_per_prompt=6000, num_inference_steps=2, vocab_size=3, output_type="seq",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    step = world.loop(p, selection)
    law = torch.full((27,), 1 / 27, dtype=torch.float64) @ step @ step @ world.final(p)
    assert probability_of_such(found.sequences, world.language, law) > 1e-3
    assert probability_of_such(found.sequences, world.language) < 1e-6, "the test would not notice another law"
    assert min(found.num_calls) == 5 and max(found.num_calls) == 6, "two a step; the last may need no denoiser"


# --- exact: the pipeline ---------------------------------------------------------------------------------------------


class Fixed(FormulaModel):
    """A planner whose logits are the same for all tokens."""

    def __init__(self, value) -> None:
        super().__init__(lambda tokens: value.expand(tokens.shape))


def fixed_pipeline(value, **settings):
    denoiser = FormulaModel(lambda tokens: 9.0 * F.one_hot(torch.full_like(tokens, 3), 6))
    return quiet(dx.PlannedDenoisingPipeline(Fixed(value), denoiser, dx.DDPDScheduler(**settings)))


@exact
def test_a_planner_that_sees_no_noise_changes_nothing():
    pipe = fixed_pipeline(torch.tensor(-40.0))
    start = torch.tensor([[0, 1, 2, 4]])
    found = pipe(gen_length=4, start=start, mask_token_id=5, vocab_size=6, output_type="seq", num_inference_steps=9)
    assert torch.equal(found.sequences, start) and found.num_calls == [1] and found.noise[0] < 1e-12
    # Without the tolerance it rewrites one place after another
    pipe = fixed_pipeline(torch.tensor(-40.0), tolerance=0.0)
    found = pipe(gen_length=4, start=start, mask_token_id=5, vocab_size=6, output_type="seq", num_inference_steps=40)
    assert (found.sequences == 3).all() and found.num_calls == [81]


@exact
def test_prompts_never_change_and_masks_in_them_are_filled():
    pipe = fixed_pipeline(torch.tensor(3.0))
    prompts = [torch.tensor([0, 1]), torch.tensor([4, 2, 0])]
    call = {"mask_token_id": 5, "vocab_size": 6, "output_type": "seq"}
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append(tensors["sequences"].clone())
        return {}

    found = pipe(input_ids=prompts, gen_length=4, **call, generator=seeded(0, 1), callback_on_step_end=callback)
    assert (found.sequences == 3).all() and len(seen) == 5
    for tokens in seen:
        assert torch.equal(tokens[0, :2], prompts[0]) and torch.equal(tokens[1, :3], prompts[1])
        assert not (tokens == 5).any()
    filled = pipe(input_ids=torch.tensor([[0, 5, 1, 5]]), **call).sequences
    assert filled.tolist() == [[0, 3, 1, 3]]
    for row in pipe.denoiser.seen:
        ids = row["input_ids"]
        assert (ids[:, 0] != 5).all() and (ids == 5).any(1).all(), "a chosen place is always masked"


@exact
def test_a_row_is_the_same_in_every_batch():
    pipe = quiet(COMMON.make())
    call = {**COMMON.inputs(4), "num_texts_per_prompt": 3}
    together = pipe(**call, generator=seeded(0, 1, 2)).sequences
    for i in range(3):
        alone = pipe(**COMMON.inputs(4), generator=seeded(i)).sequences
        assert torch.equal(alone[0], together[i])


@exact
def test_bad_arguments():
    for settings, message in (
        ({"selection": "argmax"}, "`selection` is 'argmax'"),
        ({"positions_per_step": 0}, "`positions_per_step` is 0"),
        ({"tolerance": -1}, "`tolerance` is -1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.DDPDScheduler(**settings)
    with pytest.raises(ValueError, match="`planner_logits` has shape"):
        dx.DDPDScheduler().plan(torch.zeros(2, 3, 1))
    pipe = fixed_pipeline(torch.tensor(0.0))
    call = {"gen_length": 4, "mask_token_id": 5, "vocab_size": 6, "output_type": "seq"}
    for options, message in (
        ({"vocab_size": None}, "`vocab_size` is None"),
        ({"vocab_size": 1}, "`vocab_size` is 1"),
        ({"mask_token_id": None}, "`mask_token_id` is None"),
        ({"start": torch.zeros(1, 3, dtype=torch.long)}, "`start` has shape"),
        ({"start": torch.full((1, 4), 5)}, "without masks"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"generator": seeded(0, 1)}, "`generator` has 2"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "`callback_on_step_end_tensor_inputs`"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{**call, **options})
    pipe.planner = FormulaModel(lambda tokens: torch.zeros(*tokens.shape, 2))
    with pytest.raises(ValueError, match="`planner` gives logits of shape"):
        pipe(**call)


# --- exact: the loss -------------------------------------------------------------------------------------------------


@exact
def test_the_loss_is_that_of_the_formula():
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, -4.0]], requires_grad=True)
    noised, kept = torch.tensor([[True, False, True], [False, False, False]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    each = torch.where(noised, -F.logsigmoid(logits), -F.logsigmoid(-logits)) * kept
    assert planner_loss(logits, noised, kept).item() == pytest.approx(each.sum().item() / 5, rel=1e-6)
    weighted = (each[0].sum() / 2 + each[1].sum() / 1).item() / 2  # no redrawn token counts as one
    assert planner_loss(logits, noised, kept, weighted=True).item() == pytest.approx(weighted, rel=1e-6)
    planner_loss(logits, noised, kept).backward()
    assert logits.grad[1, 2] == 0


@exact
def test_the_best_planner_says_the_probability_of_noise():
    """Also for tokens that were redrawn and came out as before, which only noise explains in part."""
    world = Exact(chain(length=3))
    joint = world.joint(0.5)
    p = world.marginals(joint)

    def loss(logits):
        rows = [planner_loss(logits, noised.expand(27, -1), joint[z][:, None].expand(-1, 3)) * joint[z].sum()
                for z, noised in enumerate(world.sets)]  # fmt: skip
        return float(sum(rows))

    best = loss(p.logit())
    for shift in (0.1, -0.1):
        assert loss(p.logit() + shift) > best
    assert not torch.allclose(p, torch.full_like(p, 0.5), atol=0.05)


# --- reference -------------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY, RUNS = 3, 8, 7, {"8": 8, "20": 20}  # the last token is the mask


def golden_start() -> torch.Tensor:
    return torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) * 5 % (VOCABULARY - 1)


def golden_planner(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, LENGTH)` float64, by formula; tokens look at one another."""
    i = torch.arange(LENGTH, dtype=torch.float64)
    seen = torch.sin(0.9 * tokens.double()[:, None, :] + 0.5 * (i[:, None] - i).abs()).sum(-1)
    return 3 * torch.sin(seen + 0.4 * i)


def golden_denoiser(tokens: torch.Tensor) -> torch.Tensor:
    """`(batch, LENGTH, VOCABULARY)` float64, by formula."""
    i, v = torch.arange(LENGTH, dtype=torch.float64), torch.arange(VOCABULARY, dtype=torch.float64)
    seen = torch.sin(1.1 * tokens.double()[:, None, :] + 0.7 * (i[:, None] - i).abs()).sum(-1)
    return 3 * torch.sin(seen[..., None] + 1.9 * v + 0.3 * i[:, None])


def golden_uniform(number: int) -> torch.Tensor:
    """`(ROWS, LENGTH)` on [0, 1), by formula."""
    places = torch.arange(1, ROWS * LENGTH + 1, dtype=torch.float64).view(ROWS, LENGTH)
    return (places * 0.6180339887 + 0.7548776662 * number) % 1


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_sampler(run, monkeypatch):
    """Their text sampler, with the likeliest position and token in place of draws, and the same uniform numbers for masks.

    Their image sampler never calls its planner, and is not followed.
    """
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    steps, asked = RUNS[run], itertools.count()

    def draw(shape, generator, device):
        """In each step: for masks, for positions (all alike: the likeliest), for tokens (not used); at last for masks."""
        number = next(asked)
        return golden_uniform(number // 3) if number % 3 == 0 else torch.full(shape, 0.5, dtype=torch.float64)

    monkeypatch.setattr(ddpd, "draw_uniform", draw)
    monkeypatch.setattr(planned_denoising, "draw_uniform", draw)
    pipe = quiet(
        dx.PlannedDenoisingPipeline(FormulaModel(golden_planner), FormulaModel(golden_denoiser), dx.DDPDScheduler())
    )
    found = pipe(
        gen_length=LENGTH, num_texts_per_prompt=ROWS, start=golden_start(), num_inference_steps=steps, temperature=0.0,
        mask_token_id=VOCABULARY - 1, vocab_size=VOCABULARY, output_type="seq", stop_at_eos=False,
    )  # fmt: skip
    assert found.sequences.tolist() == golden


# --- loads -----------------------------------------------------------------------------------------------------------


@loads
def test_the_rules_of_trainers_hold_and_the_planner_loads(tmp_path):
    values = trainer.masked_texts(tmp_path)
    out = trainer.hold_to_the_rules("ddpd", lambda _: values, tmp_path / "runs")
    assert "PlannedDenoisingPipeline" in (out / "README.md").read_text()
    pipe = quiet(
        dx.PlannedDenoisingPipeline(
            AutoModelForTokenClassification.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(tmp_path / "start"),
            dx.DDPDScheduler(selection="proportional"), AutoTokenizer.from_pretrained(out),
        )
    )  # fmt: skip
    expected = pipe("In the", gen_length=6, generator=torch.Generator().manual_seed(0))
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(dx.PlannedDenoisingPipeline.from_pretrained(tmp_path / "pipe"))
    assert loaded.scheduler.config.selection == "proportional"
    assert loaded("In the", gen_length=6, generator=torch.Generator().manual_seed(0)).texts == expected.texts


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("ddpd"), space)
    assert space["output"].texts and space["better"].sequences.shape == space["output"].sequences.shape
    assert "## When not to use it" in method_card("ddpd")
