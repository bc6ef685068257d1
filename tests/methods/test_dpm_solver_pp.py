"""DPM-Solver++, which diffusers has: what its schedulers compute, against the formulas and exact answers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    StableDiffusionPipeline,
)

from benchmarks._sampler_peers import fitting
from diffusers_ext.oracles import GaussianDenoiser, GaussianMixtureDenoiser, convergence_order, sampler_error
from diffusers_ext.schedulers._exponential import Point, combine, difference_weights, step_weights

exact = pytest.mark.proof("exact")
PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """Any smooth prediction of noise."""
    return torch.tanh(0.7 * x + t / 1000)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(scheduler, steps: int, x: torch.Tensor) -> list[torch.Tensor]:
    """The state after each step, in float64."""
    scheduler.set_timesteps(steps)
    found = []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x).prev_sample
        found.append(x)
    return found


@exact
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_order_1_is_ddim(steps):
    x = noise(2, 3, 4, 4)
    first = DPMSolverMultistepScheduler(**PROCESS, solver_order=1, timestep_spacing="trailing")
    ddim = DDIMScheduler(**PROCESS, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    for ours, theirs in zip(states(first, steps, x), states(ddim, steps, x), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * (1 + ours.abs().max())


def points_of(scheduler) -> list[Point]:
    return [Point(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in scheduler.sigmas.double().tolist()]


@exact
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_order_2_is_the_formula_of_the_paper(solver_type):
    """Algorithm 2 of the paper, written down in float64, and its exact second-order Taylor form."""
    scheduler = DPMSolverMultistepScheduler(**PROCESS, solver_type=solver_type, timestep_spacing="trailing")
    x = noise(2, 3, 4, 4)
    found = states(scheduler, 12, x)
    points, data = points_of(scheduler), []
    for i, t in enumerate(scheduler.timesteps):
        here, there = points[i], points[i + 1]
        data.append((x - here.sigma * model(x, float(t))) / here.alpha)
        if there.sigma == 0:
            x = data[-1]
        else:
            h = there.lambda_ - here.lambda_
            x = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * data[-1]
            if i > 0:
                slope = (data[-1] - data[-2]) / ((here.lambda_ - points[i - 1].lambda_) / h)
                x = x + there.alpha * slope * (
                    -math.expm1(-h) / 2 if solver_type == "midpoint" else math.expm1(-h) / h + 1
                )
        assert (found[i] - x).abs().max() < 1e-5


@exact
def test_order_3_has_half_of_the_second_derivative():
    """What diffusers calls order 3 is Taylor's third order with the second derivative halved, and so of order 2."""
    scheduler = DPMSolverMultistepScheduler(**PROCESS, solver_order=3, timestep_spacing="trailing")
    x = noise(2, 3, 4, 4)
    found = states(scheduler, 20, x)
    points, data = points_of(scheduler), []
    for i, t in enumerate(scheduler.timesteps[:-2]):
        here, there = points[i], points[i + 1]
        data.append((x - here.sigma * model(x, float(t))) / here.alpha)
        if i >= 2:
            offsets = [points[j].lambda_ - here.lambda_ for j in (i - 1, i - 2)]
            full, second = (step_weights("data", here, there, offsets, order) for order in (3, 2))
            newest = [data[-1], data[-2], data[-3]]
            whole, without = (combine(weights, x, newest) for weights in (full, second))
            assert (found[i] - (whole + without) / 2).abs().max() < 1e-5 * found[i].abs().max()
            assert (found[i] - whole).abs().max() > 1e-4
            assert difference_weights(offsets, 2).shape == (2,)
        x = found[i]


@pytest.fixture(scope="module")
def mixture() -> GaussianMixtureDenoiser:
    means = noise(3, 1, 1, 2)
    return GaussianMixtureDenoiser.from_components(
        means, 0.25, DPMSolverMultistepScheduler(), labels=torch.tensor([0, 1, 1])
    )


def order(cls: type, mixture, steps=(20, 40, 80), **options) -> float:
    """Empirical, on a grid evenly spread in log-SNR with real timesteps."""
    scheduler = fitting(cls, unrounded=True)(use_exponential_sigmas=True, **options)
    x = noise(8, 1, 1, 2)
    solution = mixture.exact_ode_solution(x, 999.0, None, tolerance=1e-11)
    errors = []
    for number in steps:
        errors.append(float(sampler_error(scheduler, mixture, number, x, exact=solution).per_sample.median()))
    return convergence_order(errors, steps)


@exact
@pytest.mark.parametrize(
    ("cls", "solver_order", "low", "high"),
    [
        (DPMSolverMultistepScheduler, 1, 0.8, 1.2),
        (DPMSolverMultistepScheduler, 2, 1.7, 2.5),
        (DPMSolverMultistepScheduler, 3, 1.7, 2.7),
    ],
)
def test_order_of_convergence(cls, solver_order, low, high, mixture):
    assert low < order(cls, mixture, solver_order=solver_order) < high


@exact
@pytest.mark.parametrize("solver_order", [2, 3])
def test_singlestep_converges_faster_than_first_order(solver_order, mixture):
    assert order(DPMSolverSinglestepScheduler, mixture, (24, 48, 96), solver_order=solver_order) > 1.5


@exact
@pytest.mark.parametrize("solver_order", [1, 2])
def test_the_sde_form_has_the_right_distribution(solver_order):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=solver_order, use_exponential_sigmas=True
    )
    denoiser = GaussianDenoiser.from_moments(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.09), scheduler)
    x, generator = noise(20_000, 1, 1, 1), torch.Generator().manual_seed(1)
    result = sampler_error(scheduler, denoiser, 100, x, generator=generator).result
    other = sampler_error(scheduler, denoiser, 100, x, generator=generator).result
    assert not torch.equal(result, other), "its steps draw noise"
    assert float(result.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(result.std()) == pytest.approx(0.3, abs=0.03 / solver_order)


@exact
def test_dynamic_thresholding_clips_the_data_at_a_quantile():
    scheduler = DPMSolverMultistepScheduler(
        thresholding=True, sample_max_value=100.0, prediction_type="sample", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    data = 3 * noise(2, 3, 8, 8)
    scheduler.set_begin_index(0)
    scheduler._init_step_index(scheduler.timesteps[0])
    found = scheduler.convert_model_output(data, sample=data)
    limit = torch.quantile(data.abs().flatten(1), 0.995, dim=1).view(-1, 1, 1, 1)
    assert (found - data.clamp(-limit, limit) / limit).abs().max() < 1e-6 and found.abs().max() <= 1


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe):
    from diffusers_ext.cards import method_card

    card = method_card("dpm_solver_pp")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2211.01095" in card
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert isinstance(names["pipe"], StableDiffusionPipeline)
        assert type(names["pipe"].scheduler) is DPMSolverMultistepScheduler
        assert names["pipe"].scheduler.config.beta_start == pipe.scheduler.config.beta_start
