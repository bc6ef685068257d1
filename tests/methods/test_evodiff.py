"""EVODiff, by the five proofs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import diffusers_ext as dx
from diffusers_ext.oracles import convergence_order, sampler_error
from tests.common.suite import CommonCase
from tests.multistep import MultistepScheduler

COMMON = CommonCase(
    skips={
        "gaussian": "its factors fit grids uniform in log-SNR; on the default grid more steps do not help, and "
        "test_it_converges_and_only_to_first_order takes the other one"
    }
)
GOLDEN = Path(__file__).parents[1] / "golden" / "evodiff.json"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# name -> (arguments, number of steps): more than 20 steps have another zeta
RUNS = {
    "linspace-8": ({}, 8),
    "exponential-12": ({"use_exponential_sigmas": True}, 12),
    "karras-24": ({"use_karras_sigmas": True}, 24),
}
exact = pytest.mark.proof("exact")


def start() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 4 * 4, dtype=torch.float64) * 1.7).reshape(2, 3, 4, 4) * 1.4


def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """Noise, by formula: that of a Gaussian and something curved, another one in each channel."""
    channel = torch.tensor([0.3, -0.6, 1.1], dtype=x.dtype)[:, None, None]
    z = x - alpha * channel
    return sigma * z / (alpha**2 * 0.25 + sigma**2) + 0.1 * alpha * torch.sin(3 * x + channel)


def built(name: str) -> tuple[dx.EVODiffScheduler, int]:
    arguments, number = RUNS[name]
    scheduler = dx.EVODiffScheduler(final_sigmas_type="sigma_min", **arguments)
    scheduler.set_timesteps(number)
    return scheduler, number


def run_grid(name: str) -> list[tuple[float, float, float]]:
    """`(time, alpha, sigma)` of each point; time from 1 / T to 1, as in the authors' discrete schedules."""
    scheduler, _ = built(name)
    times = [*scheduler.timesteps.tolist(), 0.0]
    return [((t + 1) / 1000, *point) for t, point in zip(times, scheduler.points, strict=True)]


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


def states(scheduler, x: torch.Tensor, predict=network) -> list[torch.Tensor]:
    """The states at which the network is called, and the result."""
    seen = [x]
    for i, t in enumerate(scheduler.timesteps):
        seen.append(scheduler.step(predict(seen[-1], *scheduler.points[i]), t, seen[-1]).prev_sample)
    return seen


class Plain(dx.EVODiffScheduler):
    """`r_1 = 1`, `r_i = r`, no correction."""

    def _factors(self, data, past, mix, balance, r):
        return torch.ones((), dtype=torch.float64), torch.tensor(r, dtype=torch.float64)

    def _corrected(self, probe, sample, data):
        return sample


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("grid", [{}, {"use_karras_sigmas": True}])
def test_an_uncorrected_probe_with_plain_factors_is_dpm_solver_pp_2m(grid):
    ours, theirs = Plain(**grid), DPMSolverMultistepScheduler(**grid)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    x = y = start()
    for i, (t, t_theirs) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        x = ours.step(network(x, *ours.points[i]), t, x).prev_sample
        y = theirs.step(network(y, *ours.points[i]), t_theirs, y).prev_sample
        torch.testing.assert_close(
            x, y, rtol=2e-4, atol=2e-4
        )  # upstream keeps its grid in float32, karras ones rounded


@exact
@pytest.mark.parametrize("grid", [{}, {"use_exponential_sigmas": True}, FLOW])
def test_an_uncorrected_probe_with_plain_factors_is_the_midpoint_rule(grid):
    ours, theirs = Plain(**grid), MultistepScheduler(midpoint=True, **grid)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    for found, wanted in zip(states(ours, start()), states(theirs, start()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def slow(points, times, x: torch.Tensor, predict) -> list[torch.Tensor]:
    """The algorithm box, step by step: whole vectors, nothing rearranged. States at which the network is called."""

    def inner(a, b):
        result = torch.empty(a.shape[:2], dtype=a.dtype)
        for n in range(a.shape[0]):
            for c in range(a.shape[1]):
                result[n, c] = torch.dot(a[n, c].flatten(), b[n, c].flatten())
        return result[..., None, None]

    def onto(a, b):
        return (inner(a, b) / inner(b, b)).clamp(-2, 2)

    def data(x, i):
        return (x - points[i].sigma * predict(x, *points[i])) / points[i].alpha

    number = len(points) - 1
    seen, past = [x], [data(x, 0)]
    for i in range(number):
        s_t, s_0, m_0 = points[i + 1].sigma, points[i].sigma, past[-1]
        if i in (0, number - 1):
            x = s_t / s_0 * x + (points[i + 1].alpha - points[i].alpha * s_t / s_0) * m_0
            seen.append(x)
            past.append(data(x, i + 1))
            continue
        k_t, k_0 = s_t / points[i + 1].alpha, s_0 / points[i].alpha
        h = 1 / k_t - 1 / k_0
        euler = s_t / s_0 * x + s_t * h * m_0
        s_1, k_1, m_1 = points[i - 1].sigma, points[i - 1].sigma / points[i - 1].alpha, past[-2]
        r = math.log(k_1 / k_0) / math.log(k_0 / k_t)
        w = 0.5 * (1 - ((times[i + 1] + times[-1]) / (times[0] + times[-1])) ** 2)
        bal = math.sqrt((s_t / s_0) / (s_0 / s_1))
        r_1 = (1 - w) * bal + w * onto(m_0, m_1)
        d_1 = m_0 - r_1 * m_1
        r_i = torch.sigmoid(0.25 * r_1.abs()) * r
        probe = euler + 0.5 * s_t * h * d_1 / r_i
        seen.append(probe)
        m_t = data(probe, i + 1)
        past.append(m_t)
        d_2 = m_t - ((1 - w) * bal + w * onto(m_t, m_0)) * m_0
        p, n = d_1 / (r * h), r * d_2 / h
        eta = 0.5 * torch.sigmoid((0.5 * onto(n + p, n - p)).abs())
        b = -eta / r * d_1 + r * (1 - eta) * d_2
        left = onto(probe - euler - 0.5 * s_t * h * b / r_i, d_1) / (h * s_t)
        if number > 20:
            change = (m_0 - m_1) / h
            zeta = torch.sigmoid(-(left.abs() - 0.5) * torch.sigmoid(onto(m_0, change) * (2 - (s_t / s_0) ** 2)))
        else:
            zeta = torch.sigmoid(left.abs() - 0.5)
        x = euler + 0.5 * s_t * h * b / zeta
    return seen


@exact
@pytest.mark.parametrize("name", RUNS)
def test_it_takes_the_steps_of_the_algorithm(name):
    scheduler, _ = built(name)
    times = [row[0] for row in run_grid(name)]
    expected = slow(scheduler.points, times, start(), network)
    for found, wanted in zip(states(scheduler, start()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@exact
def test_it_takes_the_steps_of_the_algorithm_on_a_flow():
    scheduler = dx.EVODiffScheduler(**FLOW, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(9)
    expected = slow(scheduler.points, [point.sigma for point in scheduler.points], start(), network)
    found = states(scheduler, start(), lambda x, a, s: network(x, a, s) - (x - s * network(x, a, s)) / a)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@exact
def test_a_constant_prediction_of_the_data_is_ddim_but_for_the_balance():
    """`D_1 = (1 - w)(1 - bal) m`: the probe leaves DDIM as far as the grid is not even."""
    scheduler = dx.EVODiffScheduler(use_karras_sigmas=True, prediction_type="sample")
    scheduler.set_timesteps(6)
    m = torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64)
    x = start()[:1, :1, :2, :2]
    for i in (0, 1):
        before, x = x, scheduler.step(m, scheduler.timesteps[i], x).prev_sample
    (_, s_1), (a_0, s_0), (a_t, s_t) = scheduler.points[:3]
    sizes = [math.log(a.sigma / a.alpha) for a in scheduler.points[:3]]
    w, bal = 0.5 * (1 - scheduler._times[2] ** 2), math.sqrt(s_t * s_1) / s_0
    r_i = (sizes[0] - sizes[1]) / (sizes[1] - sizes[2]) / (1 + math.exp(-((1 - w) * bal + w) / 4))
    reach = a_t - a_0 * s_t / s_0
    expected = s_t / s_0 * before + reach * m * (1 + (1 - w) * (1 - bal) / (2 * r_i))
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    assert abs(1 - bal) > 1e-3


@exact
def test_vanishing_predictions_leave_no_nan():
    """The quotients of a channel without data are 0 / 0; the authors' code gives NaN there."""
    for number in (8, 24):
        scheduler = dx.EVODiffScheduler(prediction_type="sample")
        scheduler.set_timesteps(number)
        x = start().float()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
            assert x.isfinite().all()
        assert torch.equal(x, torch.zeros_like(x))


@exact
def test_a_nearly_vanishing_difference_does_not_blow_the_step_up():
    """In runs of many steps the authors' zeta falls to 0 there, and the correction is divided by it."""
    scheduler = dx.EVODiffScheduler(prediction_type="sample")
    scheduler.set_timesteps(100)
    s_1, s_0, s_t = (point.sigma for point in scheduler.points[48:51])
    scheduler.set_begin_index(48)
    m = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    x = torch.zeros_like(m)
    for data in (m, 1.0001 * math.sqrt(s_t * s_1) / s_0 * m, 2 * m):  # the second makes D_1 = 0 but for the 0.0001
        x = scheduler.step(data, scheduler.timesteps[48], x).prev_sample
    assert x.abs().max() < 1


@exact
def test_packed_latents_are_read_as_pictures_with_channels():
    def packed(x):
        return x.flatten(2).transpose(1, 2)

    def on_packed(x, alpha, sigma):
        return packed(network(x.transpose(1, 2).reshape(2, 3, 4, 4), alpha, sigma))

    scheduler, number = built("linspace-8")
    expected = states(scheduler, start())
    scheduler.set_timesteps(number)
    for found, wanted in zip(states(scheduler, packed(start()), on_packed), expected, strict=True):
        torch.testing.assert_close(found, packed(wanted), rtol=1e-12, atol=1e-12)


def mixture(scheduler):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 1, 2, 4, generator=generator, dtype=torch.float64)
    return dx.GaussianMixtureDenoiser.from_components(means, 0.05, scheduler)


@exact
def test_it_converges_and_only_to_first_order():
    """Second-order in form, but the squashed factors are not the ones that a second order needs."""
    grid = {"use_exponential_sigmas": True}
    scheduler = dx.EVODiffScheduler(**grid)
    model = mixture(scheduler)
    scheduler.set_timesteps(10)
    x = torch.randn(16, 1, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exactly = model.exact_ode_solution(x, float(scheduler.timesteps[0]))
    counts = (40, 80, 160)
    errors = [sampler_error(scheduler, model, n, x, exact=exactly).rmse for n in counts]
    assert 0.7 < convergence_order(errors, counts) < 1.5, errors


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_it_calls_the_network_where_the_authors_code_does(name):
    scheduler, number = built(name)
    found = [numbers(x) for x in states(scheduler, start())[:number]]
    wanted = json.loads(GOLDEN.read_text())["runs"][name]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-8, abs=1e-10)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_it_takes_the_config_of_a_stock_pipeline_and_comes_back(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = dx.EVODiffScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    picture = pipe(
        "a person", num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = dx.EVODiffScheduler.from_pretrained(tmp_path)
    again = pipe("a person", num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (picture == again).all()
    pipe.scheduler = dx.EVODiffScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False)
    other = pipe("a person", num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert abs(picture - other).max() > 1e-2


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("evodiff")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert type(names["pipe"].scheduler) is dx.EVODiffScheduler
        assert names["image"].size == (32, 32)
    assert "2509.26096" in card
