"""DC-Solver, by the five proofs."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

import diffusers_ext as dx
from diffusers_ext.oracles import GaussianMixtureDenoiser
from diffusers_ext.schedulers.dc_search import reference_levels
from diffusers_ext.schedulers.dc_solver import lagrange_weights
from tests.common.models import STOCKS, draw
from tests.common.suite import CommonCase

RATIOS = [1.0, 1.0, 1.1, 0.8, 1.3, 0.9, 1.2, 0.7, 1.05, 1.4]
COMMON = CommonCase(
    settings=[
        {"dc_ratios": RATIOS},
        {"dc_ratios": RATIOS, "final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
    ]
)
GOLDEN = Path(__file__).parents[1] / "golden" / "dc_solver.json"
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

exact = pytest.mark.proof("exact")


def start(dtype=torch.float32) -> torch.Tensor:
    return (1.2 * torch.sin(torch.arange(2 * 3 * 4 * 4, dtype=torch.float64) * 1.3)).reshape(2, 3, 4, 4).to(dtype)


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """A prediction, by formula."""
    return torch.tanh(0.7 * x + float(t) / 1000) + 0.2 * torch.sin(2 * x)


def states(scheduler, x: torch.Tensor, predict=network) -> list[torch.Tensor]:
    seen = [x]
    for t in scheduler.timesteps:
        seen.append(scheduler.step(predict(seen[-1], t), t, seen[-1]).prev_sample)
    return seen


def run(scheduler, number: int, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    scheduler.set_timesteps(number)
    return states(scheduler, start() if x is None else x)


# --- exact: the scheduler --------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_without_compensation_it_is_unipc_bit_for_bit(number, dtype):
    for options in (
        {}, {"solver_order": 3}, {"final_sigmas_type": "sigma_min", "predict_x0": False}, {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing", "disable_corrector": []}, {"use_karras_sigmas": True}, FLOW,
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {"thresholding": True, "prediction_type": "sample"},
    ):  # fmt: skip
        options = {"disable_corrector": [0], **BASE, **options}
        wanted = run(UniPCMultistepScheduler(**options), number, start(dtype))
        for ratios in (None, [1.0] * number):
            found = run(dx.DCSolverMultistepScheduler(dc_ratios=ratios, **options), number, start(dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), options
    changed = run(
        dx.DCSolverMultistepScheduler(dc_ratios=(RATIOS * 4)[:2] + [0.9] * (number - 2), **BASE), max(number, 2)
    )
    assert number < 3 or not torch.equal(changed[3], run(UniPCMultistepScheduler(disable_corrector=[0], **BASE), number)[3])  # fmt: skip


@exact
def test_interpolation():
    nodes = [100.0, 350.0, 800.0]
    assert lagrange_weights(nodes[0], nodes) == [1, 0, 0] and lagrange_weights(nodes[1], nodes) == [0, 1, 0]
    for t in (-50.0, 120.0, 900.0):
        weights = lagrange_weights(t, nodes)
        for power in range(3):
            assert sum(w * node**power for w, node in zip(weights, nodes, strict=True)) == pytest.approx(t**power)


class SlowDC(UniPCMultistepScheduler):
    """UniPC whose newest prediction is replaced by that of `numpy.polyfit` through the last three, element by element."""

    def multistep_uni_p_bh_update(self, model_output, *args, **kwargs):
        i = self.step_index
        self.past = [*([] if i == 0 else self.past), self.model_outputs[-1]][-3:]
        ratio = self.ratios[i]
        if len(self.past) == 3:
            t0, t1, t2 = (float(self.timesteps[i - j]) for j in range(3))
            values = torch.stack(self.past).reshape(3, -1).double().numpy()
            fitted = np.polyfit(np.array([t2, t1, t0]) / 1000, values, 2)
            at = (t1 + ratio * (t0 - t1)) / 1000
            mixed = torch.from_numpy(fitted[0] * at**2 + fitted[1] * at + fitted[2]).to(self.past[-1])
            self.past[-1] = self.model_outputs[-1] = mixed.reshape(self.past[-1].shape)
        return super().multistep_uni_p_bh_update(model_output, *args, **kwargs)


@exact
@pytest.mark.parametrize("options", [{}, {"solver_order": 3}, {"disable_corrector": list(range(10))}, {"predict_x0": False, "final_sigmas_type": "sigma_min"}], ids=str)  # fmt: skip
def test_compensation_replaces_the_newest_prediction_by_the_interpolation(options):
    options = {"disable_corrector": [0], **BASE, **options}
    slow = SlowDC(**options)
    slow.ratios = RATIOS
    found = run(dx.DCSolverMultistepScheduler(dc_ratios=RATIOS, **options), 10)
    for one, other in zip(found, run(slow, 10), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@exact
def test_what_it_refuses_and_what_it_warns_of(caplog):
    made = dx.DCSolverMultistepScheduler(
        dc_ratios=[1, 1, 0.9, 1.2, 1], dc_key={"grid": {"timestep_spacing": "leading"}}
    )
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 6.*for 5 steps"):
        made.set_timesteps(6)
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    try:
        made.set_timesteps(5)
    finally:
        logger.propagate = False
    assert "`timestep_spacing` 'leading', and it is 'linspace'" in caplog.text
    for wrong in (
        {"dc_ratios": [1, 0.9, 1]}, {"dc_ratios": 1.0}, {"dc_ratios": [1, 1, float("nan")]}, {"dc_key": "x"},
        {"disable_corrector": 0}, {"lower_order_final": False}, {"predict_x0": False}, {"solver_type": "bh1"}, {"use_flow_sigmas": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            dx.DCSolverMultistepScheduler(**wrong)
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 1000.*twice"):
        dx.DCSolverMultistepScheduler().set_timesteps(1000)


# --- exact: the search -----------------------------------------------------------------------------------------------


class Guided(ModelMixin, ConfigMixin):
    """A mixture of Gaussians with guidance to its classes inside, called as an unconditional network."""

    config_name = "config.json"

    def __init__(self, scale: float = 6.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(6, 1, 4, 4, generator=generator)
        self.inner = GaussianMixtureDenoiser.from_components(
            means, 0.2, DDIMScheduler(**BASE), labels=torch.arange(6) % 3
        )
        self.scale = scale
        self.register_to_config(in_channels=1, sample_size=4)

    def forward(self, x, t):
        labels = torch.arange(len(x)) % 3
        conditional, plain = self.inner(x, t, labels).sample, self.inner(x, t).sample
        return UNet2DOutput(sample=plain + self.scale * (conditional - plain))

    @property
    def dtype(self):
        return torch.float32


def guided_pipeline() -> DDPMPipeline:
    return DDPMPipeline(Guided(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BASE))


def reference(pipe, number: int, x: torch.Tensor) -> list[torch.Tensor]:
    """Slow derivation: states at the levels of the grid of a DDIM run that is laid here step by step."""
    scheduler = dx.DCSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(number)
    levels, times, nodes = reference_levels(scheduler, 40)
    y, reached = x.double(), []
    for i, level in enumerate(levels):
        following = levels[i + 1] if i + 1 < len(levels) else float(scheduler.sigmas[-1])
        e = pipe.unet(y.float(), times[i]).sample.double()
        y = (y * (1 + level**2) ** 0.5 + (following - level) * e) / (1 + following**2) ** 0.5
        if i + 1 in nodes:
            reached.append(y)
    return reached


def losses(pipe, ratios: list[float], x: torch.Tensor, wanted: list[torch.Tensor]) -> list[float]:
    """Mean squared distance of each corrected state, and of the result, from the reference."""
    scheduler = dx.DCSolverMultistepScheduler.from_config(pipe.scheduler.config, dc_ratios=ratios)
    scheduler.set_timesteps(len(ratios))
    found = []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
        if i:
            found.append(scheduler.last_sample)
    return [float((a - b).square().mean()) for a, b in zip([*found, x], wanted, strict=True)]


@exact
def test_no_step_is_worse_than_with_ratio_1_and_the_ratio_is_about_the_best(tmp_path):
    pipe, file = guided_pipeline(), tmp_path / "search.json"
    found = dx.search_dc_ratios(pipe, 6, 5, iterations=20, reference_steps=40, file=file)
    ratios, noted = found["dc_ratios"], json.loads(file.read_text())["losses"]
    assert ratios[:2] == [1.0, 1.0] and any(ratio != 1 for ratio in ratios)
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = reference(pipe, 5, noise)
    for i in range(2, 5):
        plain, best = noted[i]
        assert best <= plain

        def loss(ratio, i=i):
            return losses(pipe, [*ratios[:i], ratio, *[1.0] * (4 - i)], noise, wanted)[i]

        assert loss(ratios[i]) == pytest.approx(best, rel=1e-3, abs=1e-9), "what was noted is what the scheduler does"
        assert loss(1.0) == pytest.approx(plain, rel=1e-3, abs=1e-9)
        lowest = min(loss(ratio) for ratio in np.linspace(0, 2, 9))
        assert best < lowest + 0.2 * (plain - lowest) + 1e-6, f"step {i}"
    fresh = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    ends = [losses(pipe, given, fresh, reference(pipe, 5, fresh))[-1] for given in (ratios, [1.0] * 5)]
    assert ends[0] < ends[1], "on other noise it ends nearer to the reference than UniPC"


@exact
def test_the_reference_passes_through_the_levels_of_the_grid():
    for options, number in (
        ({}, 5), ({"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, 7), ({"use_karras_sigmas": True}, 6),
        ({"flow_shift": 3.0, **FLOW}, 6),
    ):  # fmt: skip
        scheduler = dx.DCSolverMultistepScheduler(**BASE, **options)
        scheduler.set_timesteps(number)
        levels, times, nodes = reference_levels(scheduler, 100)
        assert len(levels) == len(times) == nodes[-1] and 80 <= len(levels) <= 100 + number
        assert [levels[0], *(levels[j] for j in nodes[:-1])] == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)
        assert [times[0], *(times[j] for j in nodes[:-1])] == scheduler.timesteps.tolist()
        assert all(a > b for a, b in itertools.pairwise(levels))


@exact
def test_a_search_that_was_cut_off_goes_on_to_the_same_result(tmp_path):
    pipe = guided_pipeline()
    whole = dx.search_dc_ratios(pipe, 4, 6, iterations=6, reference_steps=30, file=tmp_path / "whole.json")
    settings = {"iterations": 6, "reference_steps": 30, "file": tmp_path / "cut.json"}
    forward, calls = pipe.unet.forward, [0]
    scheduler = dx.DCSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    first = len(reference_levels(scheduler, 30)[0]) + 3  # calls before a ratio is searched

    def breaking(*args):
        calls[0] += 1
        if calls[0] == first + 9:  # in the second of the searched steps
            raise KeyboardInterrupt
        return forward(*args)

    before = pipe.scheduler, pipe.unet.inner.means.clone()
    pipe.unet.forward = breaking
    with pytest.raises(KeyboardInterrupt):
        dx.search_dc_ratios(pipe, 4, 6, **settings)
    del pipe.unet.forward
    assert pipe.scheduler is before[0] and torch.equal(pipe.unet.inner.means, before[1])
    assert 2 < len(json.loads((tmp_path / "cut.json").read_text())["dc_ratios"]) < 6
    assert dx.search_dc_ratios(pipe, 4, 6, **settings) == whole
    pipe.unet.forward = None  # all is known: nothing is called
    assert dx.search_dc_ratios(pipe, 4, 6, **settings) == whole
    with pytest.raises(ValueError, match=r"`file` is .* of another search"):
        dx.search_dc_ratios(pipe, 5, 6, **settings)


CALLS = {
    "tiny-dit": ([1, 2], 4.0, {}),
    "tiny-ddpm": (2, None, {}),
    "tiny-sd3": (None, 5.0, {}),
    "tiny-flux": (None, None, {}),
    "tiny-animatediff": (None, 4.0, {}),
}


@exact
@pytest.mark.parametrize("name", CALLS)
def test_the_search_works_in_any_pipeline_and_leaves_it_as_it_was(name, monkeypatch):
    stock, (conditions, scale, call) = STOCKS[name], CALLS[name]
    pipe = stock.make()
    if conditions is None:  # these pipelines get their text as embeddings
        call = {key: value for key, value in stock.call(5).items() if key not in ("num_inference_steps", "output_type")}
    expected = stock.draw(copy.deepcopy(pipe), 4)
    wanted = [parameter.requires_grad for part in _networks(pipe) for parameter in part.parameters()]
    settings = dict(vars(pipe))
    found = dx.search_dc_ratios(pipe, conditions, 5, scale, iterations=3, reference_steps=10, **call)
    assert len(found["dc_ratios"]) == 5 and found["dc_ratios"][:2] == [1.0, 1.0]
    assert all(np.isfinite(found["dc_ratios"])) and any(ratio != 1 for ratio in found["dc_ratios"])
    assert {name: vars(pipe)[name] for name in settings} == settings
    assert [parameter.requires_grad for part in _networks(pipe) for parameter in part.parameters()] == wanted
    assert torch.equal(stock.draw(pipe, 4), expected)
    plain = copy.deepcopy(pipe)
    plain.scheduler = dx.DCSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = dx.DCSolverMultistepScheduler.from_config(pipe.scheduler.config, **found)
    arguments = {**stock.call(5), **({"guidance_scale": scale} if scale else {})}
    one, other = draw(pipe, arguments), draw(plain, arguments)
    assert one.isfinite().all() and not torch.equal(one, other)
    assert dx.check_dc_ratios(pipe, scale) and not dx.check_dc_ratios(pipe, 1.5)
    with torch.no_grad():
        for parameter in _networks(pipe)[0].parameters():
            parameter.mul_(1.5)
    assert not dx.check_dc_ratios(pipe, scale)


def _networks(pipe):
    return [part for part in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)) if part is not None]


@exact
def test_stable_diffusion_is_searched_with_its_guidance(pipe):
    found = dx.search_dc_ratios(pipe, ["a person with tan skin"] * 2, 4, 7.5, iterations=2, reference_steps=4)
    assert found["dc_key"]["guidance_scale"] == 7.5 and len(found["dc_ratios"]) == 4
    for wrong, name in (
        ({"conditions": "a prompt"}, "conditions"), ({"num_inference_steps": 2}, "num_inference_steps"),
        ({"iterations": 0}, "iterations"), ({"nonsense": 1}, "nonsense"), ({"learning_rate": 0.0}, "learning_rate"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            dx.search_dc_ratios(pipe, **{"conditions": ["a prompt"], "num_inference_steps": 5, **wrong})
    with pytest.raises(ValueError, match="there is nothing to check"):
        dx.check_dc_ratios(pipe)


# --- exact: cascade polynomial regression ----------------------------------------------------------------------------


def planted() -> np.ndarray:
    return np.sin(np.arange(36.0) * 1.9).reshape(4, 3, 3)


@exact
def test_regression_finds_planted_coefficients():
    found = [
        {"dc_ratios": dx.predict_dc_ratios(planted(), w, n), "dc_key": {"guidance_scale": w, "num_inference_steps": n}}
        for w in (2.0, 5.0, 7.5, 12.0)
        for n in (5, 6, 10, 20)
    ]
    np.testing.assert_allclose(dx.fit_dc_ratios(found), planted(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="which determine"):
        dx.fit_dc_ratios(found[:6])
    assert dx.predict_dc_ratios(planted(), 3.0, 2) == [1.0, 1.0] and dx.predict_dc_ratios(planted(), 3.0, 1) == [1.0]
    k = [
        sum(planted()[k, a, b] * 0.5 ** (2 - a) * 0.2 ** (2 - b) for a in range(3) for b in range(3)) for k in range(4)
    ]
    assert dx.predict_dc_ratios(planted(), 6.0, 10)[4] == pytest.approx(sum(c * 0.5**i for i, c in enumerate(k)))


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {
    "5 steps": ({}, 5), "8 steps, order 3": ({"solver_order": 3}, 8), "10 steps, v": ({"prediction_type": "v_prediction"}, 10),
    "6 steps, noise": ({"predict_x0": False}, 6), "10 steps, trailing": ({"timestep_spacing": "trailing"}, 10),
}  # fmt: skip


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_it_agrees_with_the_authors_scheduler(name):
    options, number = RUNS[name]
    options = {**BASE, "final_sigmas_type": "sigma_min", **options}
    scheduler = dx.DCSolverMultistepScheduler(dc_ratios=RATIOS[:number], **options)
    found = [numbers(x) for x in run(scheduler, number)]
    wanted = json.loads(GOLDEN.read_text())["runs"][name]
    assert len(found) == len(wanted) == number + 1
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.proof("reference")
def test_regression_agrees_with_the_authors_code():
    for name, wanted in json.loads(GOLDEN.read_text())["regression"].items():
        guidance, number = name.split(", ")
        assert dx.predict_dc_ratios(planted(), float(guidance), int(number)) == pytest.approx(wanted, rel=1e-9)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_ratios_and_what_they_are_for_are_saved_with_the_scheduler(avatars_sd, tmp_path):
    key = {"model": [0.5, -1.0], "num_inference_steps": 5, "guidance_scale": 7.5, "grid": {"disable_corrector": [0]}}
    config = avatars_sd.scheduler.config
    made = dx.DCSolverMultistepScheduler.from_config(config, dc_ratios=RATIOS[:5], dc_key=key)
    made.save_pretrained(tmp_path)
    again = dx.DCSolverMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.dc_ratios == RATIOS[:5] and again.config.dc_key == key
    assert torch.equal(run(made, 5)[-1], run(again, 5)[-1])
    stock = UniPCMultistepScheduler.from_config(again.config)  # and goes back to diffusers
    assert stock.config.disable_corrector == [0] and type(stock) is UniPCMultistepScheduler
    other = dx.DCSolverMultistepScheduler.from_config(DPMSolverMultistepScheduler(**BASE).config)
    assert other.config.solver_type == "bh2"
    flow = dx.DCSolverMultistepScheduler.from_config(STOCKS["tiny-sd3"].make().scheduler.config)
    assert flow.config.use_flow_sigmas and flow.config.prediction_type == "flow_prediction"


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe, monkeypatch):
    from diffusers_ext.cards import method_card
    from diffusers_ext.schedulers import dc_search

    full = dc_search.search_dc_ratios
    quick = {"iterations": 1, "reference_steps": 5}  # as long as a test may take
    monkeypatch.setattr(
        dx, "search_dc_ratios", lambda *args, **kwargs: full(*args, **{**kwargs, **quick}), raising=False
    )
    card = method_card("dc_solver")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {"pipe": pipe})
    assert "2409.03755" in card
