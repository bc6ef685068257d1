"""FastDiff, by the five proofs."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx
from diffusers_ext.noise_schedule_search import ScheduleWalk, _Starts
from diffusers_ext.schedulers import fastdiff
from diffusers_ext.schedulers.fastdiff import fractional_timesteps
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training.train_noise_schedule_predictor import PredictorTask, main, noise_of, parse_args, step_loss
from tests.common import models, scheduler
from tests.common.suite import CommonCase
from tests.unets import fill

BETAS = [1e-3, 1e-2, 0.05, 0.3, 0.6]
COMMON = CommonCase(
    process="diffusion",
    settings=[{"noise_schedule": BETAS}, {"eta": 0.0, "clip_sample": True, "clip_sample_range": 5.0}],
    skips={
        "stock_pipelines": "DiTPipeline hands no generator to `step`, which draws noise; "
        "tests/methods/test_fastdiff.py runs it in the others, and in that one without noise"
    },
)
GOLDEN = Path(__file__).parents[1] / "golden" / "fastdiff.json"

exact = pytest.mark.proof("exact")

# --- what the golden numbers are of ----------------------------------------------------------------------------------

PROCESS = {"beta_start": 1e-6, "beta_end": 0.01}  # FastDiff's
PUBLISHED = {
    "3": [9e-5, 9e-3, 0.6],
    "4": [3.2176e-4, 2.5743e-3, 2.5376e-2, 0.70414],
    "6": [1.7838446e-6, 2.7984190e-5, 4.3231004e-4, 6.6343173e-3, 9.3570173e-2, 0.6],
    "8": [6.6893250e-7, 1.0033882e-5, 1.5496854e-4, 2.3872221e-3, 3.5597630e-2, 0.36811584, 0.47354144, 0.5],
}
TAU, RHO = 200, 1e-3
# a_N, beta_N and the largest number of steps: of a long walk, one that ends at rho, and one whose a would be over 1.
STARTS = {"long": (0.1, 0.9, 8), "short": (0.2, 0.5, 3), "to rho": (0.4, 0.8, 30), "over 1": (0.9, 0.5, 8)}


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    return 0.5 * x + 0.6 * torch.sin(3 * x + t / 150)


def predicted_beta(x: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
    return torch.minimum(beta_next, delta_squared) * torch.sigmoid(x.flatten(1).cos().mean(1).to(beta_next))


def noises(number: int) -> list[torch.Tensor]:
    wave = torch.arange(4 * number, dtype=torch.float64)
    return list((1.5 * torch.sin(2.3 * wave + 1)).reshape(number, 1, 1, 4))


def table() -> torch.Tensor:
    """a at the timesteps of training."""
    return dx.FastDiffScheduler(**PROCESS).alphas_cumprod.double().sqrt()


def loss_inputs() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Timesteps, clean samples `(1, 4)` and noise."""
    waves = [torch.arange(4, dtype=torch.float64) * f for f in (0.7, 1.1, 1.9, 2.9)]
    return [
        (t, wave.cos()[None], (2 * wave + t).sin()[None]) for t, wave in zip((200, 350, 500, 799), waves, strict=True)
    ]


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


class Toy:
    """A pipeline around a function of state and timestep."""

    def __init__(self, function: Any = network, shape: tuple[int, ...] = (1, 4), **config: Any) -> None:
        self.function, self.shape = function, shape
        self.scheduler = DDPMScheduler(**{**PROCESS, **config})

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 50) -> torch.Tensor:
        x = torch.randn((batch_size, *self.shape), generator=generator, dtype=torch.float64)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.function(x, float(t)), t, x, generator=generator).prev_sample
        return x


class Formula:
    """A predictor."""

    device = torch.device("cpu")

    def __init__(self, function: Any = predicted_beta) -> None:
        self.function = function

    def __call__(self, x: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
        return self.function(x, beta_next, delta_squared)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    pipe = models.STOCKS["tiny-ddpm"].make()
    pipe.set_progress_bar_config(disable=True)
    predictor = fill(dx.NoiseSchedulePredictor(hidden_channels=8, num_layers=2))
    return pipe, predictor


# --- the sampler -----------------------------------------------------------------------------------------------------


def in_doubles(made: Any, table: torch.Tensor | None = None) -> Any:
    """diffusers' scheduler with its table in float64, as this package computes from it."""
    made.alphas_cumprod = made.alphas_cumprod.double() if table is None else table
    return made


def run(made: Any, steps: int | None, x: torch.Tensor, function: Any = network, **grid: Any) -> list[torch.Tensor]:
    made.set_timesteps(steps, **grid)
    generator, states = torch.Generator().manual_seed(1), []
    for t in made.timesteps:
        x = made.step(function(x, float(t)), t, x, generator=generator).prev_sample
        states.append(x)
    return states


def start(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@exact
@pytest.mark.parametrize("given_betas", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"clip_sample": True},
        {"thresholding": True},
    ],
    ids=str,
)
def test_with_the_training_betas_it_is_ddpm(given_betas, config):
    stock = DDPMScheduler(**{"clip_sample": False, "num_train_timesteps": 100, **config})
    betas = stock.betas.tolist()
    # A given schedule has its levels in float64, and the table of training in float32.
    stock = in_doubles(stock, torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0) if given_betas else None)
    ours = dx.FastDiffScheduler.from_config(stock.config, noise_schedule=betas if given_betas else None)
    function = lambda x, t: network(x, float(round(t)))  # noqa: E731
    wanted, found = (run(made, 100, start(), function) for made in (stock, ours))
    torch.testing.assert_close(ours.timesteps.double(), stock.timesteps.double(), rtol=0, atol=1e-2)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_noise_it_is_ddim(prediction_type):
    stock = in_doubles(DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=prediction_type))
    ours = dx.FastDiffScheduler.from_config(stock.config, eta=0.0)
    for wanted, found in zip(run(stock, 20, start()), run(ours, 20, start()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@exact
def test_a_step_is_the_papers_formula():
    ours, bar = dx.FastDiffScheduler(noise_schedule=BETAS), np.cumprod(1 - np.array(BETAS))
    ours.set_timesteps(5)
    x = start()
    for n in range(5, 0, -1):
        beta, delta = BETAS[n - 1], math.sqrt(1 - bar[n - 1])
        epsilon = network(x, float(ours.timesteps[5 - n]))
        mean = (x - beta / delta * epsilon) / math.sqrt(1 - beta)
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=x.dtype)
        above = math.sqrt(1 - bar[n - 2]) if n > 1 else 0.0
        expected = mean + above / delta * math.sqrt(beta) * z
        x = ours.step(epsilon, ours.timesteps[5 - n], x, torch.Generator().manual_seed(n)).prev_sample
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@exact
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 998), st.floats(0, 1))
def test_the_timestep_of_a_level_inverts_the_table(t, share):
    ours = dx.FastDiffScheduler()
    a = ours.alphas_cumprod.double().sqrt().numpy()
    (found,) = fractional_timesteps(np.array([a[t] + share * (a[t + 1] - a[t])]), a)
    assert found == pytest.approx(t + share, abs=1e-9)
    assert ours._time_at(ours._ratio_at(np.array([t + share]))) == pytest.approx(t + share, abs=1e-6)


@exact
def test_beyond_the_table_it_is_its_end():
    ours = dx.FastDiffScheduler(noise_schedule=[1e-6, 0.5, 0.99999, 0.9999])
    ours.set_timesteps(4)
    assert ours.timesteps[[0, 1, 3]].tolist() == [999.0, 999.0, 0.0]
    assert 0 < float(ours.timesteps[2]) < 999
    assert ours.points[-1].sigma == 0 and ours.points[0].alpha == pytest.approx(math.sqrt(0.5e-9), rel=1e-4)


@exact
def test_on_gaussian_data_with_many_betas_the_moments_are_right():
    """A linear network: mean and variance of the end follow from a recursion that knows no scheduler."""
    mean, deviation = 0.3, 0.5
    for betas in (BETAS, np.geomspace(1e-4, 0.5, 60).tolist()):
        bar = np.cumprod(1 - np.array(betas))
        m, v = 0.0, 1.0
        for n in range(len(betas), 0, -1):
            a2, beta = bar[n - 1], betas[n - 1]
            gain = beta / (a2 * deviation**2 + 1 - a2)  # of the mean of the step on x - a mean
            scale = (1 - gain) / math.sqrt(1 - beta)
            m = scale * m + gain * math.sqrt(a2) * mean / math.sqrt(1 - beta)
            v = scale**2 * v + (beta * (1 - bar[n - 2]) / (1 - a2) if n > 1 else 0.0)
        ours = dx.FastDiffScheduler(noise_schedule=betas)
        found = scheduler.sample(ours, "diffusion", len(betas), shape=(16, 3, 32, 32)).double()
        assert float(found.mean()) == pytest.approx(m, abs=0.01)
        assert float(found.std()) == pytest.approx(math.sqrt(v), rel=0.02)


@exact
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"noise_schedule": []}, "noise_schedule"),
        ({"noise_schedule": [0.1, 1.0]}, "noise_schedule"),
        ({"noise_schedule": [0.1, 0.0]}, "noise_schedule"),
        ({"noise_schedule": [0.1, math.nan]}, "noise_schedule"),
        ({"noise_schedule": 0.1}, "noise_schedule"),
        ({"noise_schedule": BETAS, "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({"eta": 1.5}, "eta"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        dx.FastDiffScheduler(**arguments)


@exact
def test_flows_and_other_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        dx.FastDiffScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    ours = dx.FastDiffScheduler(noise_schedule=BETAS)
    with pytest.raises(ValueError, match="`num_inference_steps` is 4; `noise_schedule` has 5 steps"):
        ours.set_timesteps(4)
    ours.set_timesteps(timesteps=[900, 100])  # what is asked for goes first
    assert ours.timesteps.tolist() == [900, 100]


@exact
def test_it_runs_in_stock_pipelines(tmp_path):
    """The common rule, but for DiTPipeline; that one without noise."""
    (case,) = (case for case in scheduler.SUITE.cases() if case.cls is dx.FastDiffScheduler)
    world = models.World(tmp_path, only=("tiny-ddpm", "tiny-animatediff"))
    scheduler.SUITE.run(case, scheduler.SUITE.rules["stock_pipelines"], world)
    stock = models.STOCKS["tiny-dit"]
    pipe = stock.make()
    pipe.scheduler = dx.FastDiffScheduler.from_config(pipe.scheduler.config, eta=0.0, noise_schedule=BETAS)
    assert torch.equal(stock.draw(pipe, 5), stock.draw(pipe, 5))


# --- the loss --------------------------------------------------------------------------------------------------------


def best_share(q: float) -> float:
    """The root of `2 u (1 - q) (1 + (1 - u)^-2) = 1`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        low, high = (low, u) if 2 * u * (1 - q) * (1 + (1 - u) ** -2) > 1 else (u, high)
    return low


@exact
@pytest.mark.parametrize("q", [0.05, 0.5, 0.8, 0.99])
def test_for_gaussian_data_the_loss_has_the_minimiser_in_closed_form(q):
    """A perfect prediction of noise has mean square q, and so has its product with the noise."""
    noise = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    rest = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    predicted = q * noise + math.sqrt(q * (1 - q)) * rest
    for delta_squared in (0.9, 0.01):
        d2 = torch.tensor([delta_squared], dtype=torch.float64)
        shares = torch.linspace(1e-4, 1 - 1e-4, 9999, dtype=torch.float64)
        losses = step_loss(shares * d2, noise.expand(9999, -1), predicted.expand(9999, -1), d2)
        assert float(shares[losses.argmin()]) == pytest.approx(best_share(q), abs=2e-4)
        assert int((losses.diff().sign().diff() != 0).sum()) == 1, "it falls, and then it rises"
    assert best_share(0.8) == pytest.approx(0.5)


@exact
def test_the_minimiser_of_an_oracles_predictions():
    """On samples: the share for the q that the process and the data give."""
    ddpm = DDPMScheduler()
    oracle = dx.GaussianDenoiser.from_moments(torch.zeros(1, 4, 4), 0.25 * torch.eye(16), ddpm)
    for t in (100, 400):
        bar = ddpm.alphas_cumprod[t].double()
        noise, clean = start(16000, 1, 4, 4).chunk(2)
        predicted = oracle(0.5 * bar.sqrt() * clean + (1 - bar).sqrt() * noise, t).sample
        best = best_share(float((1 - bar) / (0.25 * bar + 1 - bar)))
        shares = torch.tensor([best - 0.03, best, best + 0.03], dtype=torch.float64)
        losses = [step_loss(share * (1 - bar).expand(8000), noise, predicted, 1 - bar).mean() for share in shares]
        assert losses[1] < min(losses[0], losses[2])


@exact
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictions_of_all_kinds_mean_the_same_noise(kind):
    a, delta = (torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.8))
    clean, noise = start(), start().flip(0)
    output = {"epsilon": noise, "v_prediction": a * noise - delta * clean, "sample": clean}[kind]
    torch.testing.assert_close(noise_of(output, a * clean + delta * noise, a, delta, kind), noise)


@exact
def test_the_trainers_loss_is_the_papers_at_its_random_timesteps(tiny, tmp_path):
    """Slow derivation, by diffusers' own process, for the predictor and the noise that the trainer has."""
    tiny[0].save_pretrained(tmp_path / "pipe")
    task = PredictorTask(
        parse_args([
            f"--pretrained_model_name_or_path={tmp_path / 'pipe'}", "--train_data_dir=x", "--resolution=8", "--tau=300",
        ])
    )  # fmt: skip
    clean, ids = start(6, 3, 8, 8).float(), torch.arange(6)
    found = task.loss({"pixel_values": clean}, SampleNoise(0, ids))
    assert sorted(task.trained) == ["predictor"] and not any(p.requires_grad for p in task.pipeline.unet.parameters())
    noise = SampleNoise(0, ids)
    times, epsilon = 300 + noise.integers(400), noise.normal(3, 8, 8)
    process, losses = DDPMScheduler(), []
    for i, t in enumerate(times.tolist()):
        x = process.add_noise(clean[i : i + 1], epsilon[i : i + 1], times[i : i + 1])
        bar, bar_next = process.alphas_cumprod[t], process.alphas_cumprod[t + 300]
        beta_next, d2 = 1 - bar_next / bar, 1 - bar
        with torch.no_grad():
            beta = task.predictor(x, beta_next[None], d2[None])[0]
            predicted = task.pipeline.unet(x, t).sample
        miss = (d2.sqrt() * epsilon[i : i + 1] - beta / d2.sqrt() * predicted).square().mean()
        losses.append(miss / (2 * (d2 - beta)) + (d2 / beta).log() / 4 + beta / d2 / 2)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@exact
@pytest.mark.parametrize("shape", [(2, 50), (1, 7, 5), (3, 2, 6, 6)])
def test_the_predictor_stays_within_its_bounds(shape):
    model = fill(
        dx.NoiseSchedulePredictor(in_channels=shape[0], spatial_dims=len(shape) - 1, hidden_channels=8)
    ).double()
    with torch.no_grad():
        model.proj_out.weight.mul_(1e6)
    x = torch.randn(64, *shape, dtype=torch.float64)
    beta_next, delta_squared = torch.rand(2, 64).clamp(1e-5, 1 - 1e-5)
    betas = model(x, beta_next, delta_squared)
    bound = torch.minimum(beta_next, delta_squared)
    assert betas.shape == (64,) and bool((betas > 0).all()) and bool((betas < bound).all())
    with pytest.raises(ValueError, match="`sample` has shape"):
        model(x[:, 0], beta_next, delta_squared)
    fresh = dx.NoiseSchedulePredictor(in_channels=shape[0], spatial_dims=len(shape) - 1)
    torch.testing.assert_close(fresh(x, beta_next, delta_squared), bound / 2)


@exact
def test_training_on_gaussian_data_finds_the_closed_form():
    """Of data N(0, 1/4): at levels where the bound does not cut it off, and at one where it does."""
    torch.manual_seed(0)
    table, deviation, tau = DDPMScheduler().alphas_cumprod, 0.5, 200
    model = dx.NoiseSchedulePredictor(in_channels=1, hidden_channels=16, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def at(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bar, noise = table[t], torch.randn(len(t), 1, 8, 8)
        a, delta = (value.sqrt().view(-1, 1, 1, 1) for value in (bar, 1 - bar))
        x = a * deviation * torch.randn(noise.shape) + delta * noise
        return x, 1 - table[t + tau] / bar, 1 - bar, noise, delta * x / (a**2 * deviation**2 + delta**2)

    for _ in range(150):
        x, beta_next, delta_squared, noise, predicted = at(torch.randint(tau, 1000 - tau, (32,)))
        loss = step_loss(model(x, beta_next, delta_squared), noise, predicted, delta_squared).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for t in (220, 300, 400, 500, 700):
        with torch.no_grad():
            x, beta_next, delta_squared, *_ = at(torch.full((64,), t))
            share = float((model(x, beta_next, delta_squared) / delta_squared).mean())
        d2 = float(delta_squared[0])
        wanted = best_share(d2 / ((1 - d2) * deviation**2 + d2))
        assert share == pytest.approx(min(wanted, float(beta_next[0]) / d2), abs=0.05), f"at timestep {t}"


@exact
@pytest.mark.parametrize(("name", "value"), [("in_channels", 0), ("spatial_dims", 4), ("hidden_channels", 2.5), ("num_layers", True)])  # fmt: skip
def test_wrong_arguments_of_the_predictor(name, value):
    with pytest.raises(ValueError, match=name):
        dx.NoiseSchedulePredictor(**{name: value})


# --- walks and the search --------------------------------------------------------------------------------------------


def walk_of(pipe: Any, predictor: Any = None, conditions: Any = 1, noise: torch.Tensor | None = None, **options: Any) -> ScheduleWalk:  # fmt: skip
    walk = ScheduleWalk(pipe, predictor or Formula(), conditions, **options)  # type: ignore[arg-type]
    walk.noise = walk.noise if noise is None else noise
    return walk


@exact
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_walk_on_gaussian_data_follows_the_closed_form(kind):
    """With a perfect predictor the betas follow from levels alone, and the state from a linear recursion."""
    ddpm, seen = DDPMScheduler(prediction_type=kind), []
    bars = ddpm.alphas_cumprod.double()
    ratios = ((1 - bars) / bars).sqrt().log()

    def perfect(x: torch.Tensor, t: float) -> torch.Tensor:
        low = min(int(t), 998)
        ratio = torch.lerp(ratios[low], ratios[low + 1], t - low).exp()
        a = 1 / torch.hypot(ratio, torch.ones(()))
        delta = ratio * a
        clean = a * 0.25 * x / (a**2 * 0.25 + delta**2)
        noise = (x - a * clean) / delta
        return {"epsilon": noise, "sample": clean, "v_prediction": a * noise - delta * clean}[kind]

    def predictor(x: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
        d2 = float(delta_squared[0])
        seen.append(x)
        return torch.minimum(beta_next, best_share(d2 / (0.25 * (1 - d2) + d2)) * delta_squared)

    pipe = Toy(perfect, (1, 4), beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    betas = walk_of(pipe, Formula(predictor), 2)((0.1, 0.6), 6)
    assert len(betas) == 6 and min(np.diff(betas)) > -1e-6
    a, x = 0.1, torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    for n, beta in enumerate(betas[::-1]):
        if n:
            d2 = 1 - a**2
            wanted = min(betas[6 - n], d2 * best_share(d2 / (0.25 * a**2 + d2)))
            assert beta == pytest.approx(wanted, rel=1e-5)
            torch.testing.assert_close(seen[n - 1], x, rtol=1e-3, atol=1e-4)
        x = (x - beta * x / (a**2 * 0.25 + 1 - a**2)) / math.sqrt(1 - beta)
        a /= math.sqrt(1 - beta)


@exact
def test_a_walk_sees_guidance(avatars_sd):
    """The first step, by the network itself: fractional timestep, unconditional and conditional prediction."""
    prompt, scale, seen = "a person with tan skin", 3.0, []

    def predictor(x: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return predicted_beta(x, beta_next, delta_squared)

    a, beta = 0.3, 0.5
    walk = walk_of(avatars_sd, Formula(predictor), [prompt], guidance_scale=scale)
    walk((a, beta), 2)
    states = torch.cat(avatars_sd.encode_prompt(prompt, "cpu", 1, True)[::-1])
    table = avatars_sd.scheduler.alphas_cumprod.double().sqrt().numpy()
    t = torch.tensor(fractional_timesteps(np.array([a]), table)[0]).float()
    with torch.no_grad():
        free, bound = avatars_sd.unet(torch.cat([walk.noise] * 2), t, states).sample.chunk(2)
    epsilon = free + scale * (bound - free)
    expected = (walk.noise - beta / math.sqrt(1 - a**2) * epsilon) / math.sqrt(1 - beta)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


class Wanted:
    """An objective: how far beta_1 is from a value."""

    def __init__(self, pipe: Any, wanted: float) -> None:
        self.config, self.wanted, self.calls = pipe.scheduler.config, wanted, 0
        self.identity = {"wanted": wanted}

    def __call__(self, made: Any, num_steps: int) -> float:
        assert type(made) is dx.FastDiffScheduler and len(made.config.noise_schedule) == num_steps
        self.calls += 1
        return abs(math.log(made.config.noise_schedule[0] / self.wanted))


STARTING = [[999.0, 700.0], [800.0, 300.0], [900.0, 850.0], [500.0, 40.0]]


def search(tiny: tuple[Any, Any], objective: Wanted, **options: Any) -> Any:
    pipe, predictor = tiny
    return dx.search_noise_schedule(
        pipe, predictor, objective, 3, **{"conditions": 1, "starts": STARTING, "attempts": 2, **options}
    )


@exact
def test_the_search_finds_the_best_start_and_resumes(tiny, tmp_path):
    pipe, predictor = tiny
    objective = Wanted(pipe, 0.02)
    found = search(tiny, objective, file=tmp_path / "search.json")
    calls = objective.calls
    assert calls == 6, "four starts, and two near the best"
    walk = ScheduleWalk(pipe, predictor, 1)
    assert found.noise_schedule == walk(found.start, 3) == found.scheduler.config.noise_schedule
    scores = [abs(math.log(walk(walk.start_at(*start), 3)[0] / 0.02)) for start, _ in found.evolved.evaluated]
    assert found.score == min(scores) and scores == [score for _, score in found.evolved.evaluated]
    near = np.array([start for start, _ in found.evolved.evaluated[4:]])
    best = np.array(STARTING[int(np.argmin(scores[:4]))])
    assert (abs(near - best) <= 0.05 * 999).all()
    again = search(tiny, objective, file=tmp_path / "search.json")
    assert again.noise_schedule == found.noise_schedule and objective.calls == calls, "all scores are in the file"
    assert search(tiny, Wanted(pipe, 0.02)).noise_schedule == found.noise_schedule, "it is deterministic"
    with pytest.raises(ValueError, match="of another search"):
        search(tiny, Wanted(pipe, 0.03), file=tmp_path / "search.json")


@exact
def test_a_start_is_given_by_two_timesteps_and_the_grid_has_all_pairs(tiny):
    walk = ScheduleWalk(*tiny, 1)
    bar = DDPMScheduler().alphas_cumprod.double()
    a, beta = walk.start_at(999, 400)
    assert a == pytest.approx(float(bar[999].sqrt())) and beta == pytest.approx(float(1 - bar[999] / bar[400]))
    grid = _Starts(999).grid(9)
    assert len(grid) == len({tuple(pair) for pair in grid}) == 45 and [999.0, 0.0] in grid
    assert all(_Starts(999).allowed(*pair) for pair in grid)


@exact
def test_walks_that_end_early_are_not_chosen(tiny):
    pipe, predictor = tiny
    with pytest.raises(ValueError, match="`num_steps` is 3; no walk"):
        search(tiny, Wanted(pipe, 0.02), rho=0.999)
    assert len(ScheduleWalk(pipe, predictor, 1, rho=0.999)((0.1, 0.9), 3)) == 1


@exact
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1001}, "num_steps"),
        ({"attempts": -1}, "attempts"),
        ({"rho": -1.0}, "rho"),
        ({"starts": [[500, 500]]}, "starts"),
        ({"starts": [[1000, 500]]}, "starts"),
        ({"starts": []}, "starts"),
        ({"conditions": ["a prompt"]}, "conditions"),
    ],
    ids=str,
)
def test_wrong_searches(tiny, changes, name):
    pipe, predictor = tiny
    call = {"num_steps": 3, "conditions": 1, **changes}
    with pytest.raises(ValueError, match=name):
        dx.search_noise_schedule(pipe, predictor, Wanted(pipe, 0.02), **call)


# --- reference -------------------------------------------------------------------------------------------------------


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.proof("reference")
@pytest.mark.parametrize("eta", [1.0, 0.0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_runs_on_the_published_schedules_are_the_authors(name, eta, monkeypatch):
    """The same timesteps to float32, and the same states."""
    drawn = iter(noises(len(PUBLISHED[name])))
    monkeypatch.setattr(fastdiff, "randn_tensor", lambda *_args, **_kwargs: next(drawn))
    ours = dx.FastDiffScheduler(noise_schedule=PUBLISHED[name], eta=eta, **PROCESS)
    ours.set_timesteps(len(PUBLISHED[name]))
    wanted = golden()["runs"][name + (", ddim" if eta == 0 else "")]
    x, found = next(drawn), []
    for t in ours.timesteps:
        found.append([float(t), *numbers(x)])
        x = ours.step(network(x, float(t)), t, x).prev_sample
    assert len(found) == len(wanted["calls"])
    for one, other in zip([*found, [0.0, *numbers(x)]], [*wanted["calls"], [0.0, *wanted["end"]]], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", STARTS)
def test_walks_are_the_authors(name):
    a, beta, most = STARTS[name]
    walk = walk_of(Toy(), noise=noises(1)[0], rho=RHO)
    assert walk((a, beta), most) == pytest.approx(golden()["walks"][name], rel=1e-4)


@pytest.mark.proof("reference")
def test_the_loss_is_that_of_both_authors():
    """FastDiff's is a mean over elements; BDDM's is a sum, less the constant that the mean leaves out."""
    a = table()
    for (t, clean, noise), (one, other) in zip(loss_inputs(), golden()["losses"], strict=True):
        d2 = (1 - a[t] ** 2)[None]
        x = a[t] * clean + d2.sqrt() * noise
        betas = predicted_beta(x, (1 - (a[t + TAU] / a[t]) ** 2)[None], d2)
        found = float(step_loss(betas, noise, network(x, t), d2))
        assert found == pytest.approx(one, rel=1e-6)
        assert found == pytest.approx(other / 4 + 0.5, rel=1e-6)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_predictor_is_saved_and_loaded_by_its_class_and_by_auto_model(tiny, tmp_path):
    from diffusers import AutoModel

    predictor = tiny[1]
    predictor.save_pretrained(tmp_path)
    x, levels = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    expected = predictor(x, levels, levels.flip(0))
    for cls in (dx.NoiseSchedulePredictor, AutoModel):
        loaded = cls.from_pretrained(str(tmp_path))
        assert type(loaded) is dx.NoiseSchedulePredictor
        assert torch.equal(loaded(x, levels, levels.flip(0)), expected)


@pytest.mark.proof("loads")
def test_a_found_schedule_travels_with_the_pipeline(tiny, tmp_path):
    stock = models.STOCKS["tiny-ddpm"]
    pipe = copy.copy(tiny[0])
    pipe.scheduler = dx.FastDiffScheduler.from_config(pipe.scheduler.config, noise_schedule=tuple(BETAS))
    expected = stock.draw(pipe, 5)
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.noise_schedule == BETAS
    torch.testing.assert_close(stock.draw(loaded, 5), expected, rtol=0, atol=1e-5)
    stock_again = DDPMScheduler.from_config(loaded.scheduler.config)
    assert stock_again.config.beta_end == pipe.scheduler.config.beta_end


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """Two runs of the trainer: 4 steps, and 2 steps resumed to 4."""
    root = tmp_path_factory.mktemp("predictor")
    tiny[0].save_pretrained(root / "pipe")
    np.savez(root / "pictures.npz", image=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))

    def train(output: str, *flags: str) -> None:
        main([
            f"--pretrained_model_name_or_path={root / 'pipe'}", f"--train_data_dir={root / 'pictures.npz'}",
            f"--output_dir={root / output}", "--resolution=8", "--train_batch_size=2", "--checkpointing_steps=2",
            "--use_ema", "--hidden_channels=8", "--validation_inference_steps=3", "--num_validation_images=2", *flags,
        ])  # fmt: skip

    train("straight", "--max_train_steps=4")
    train("resumed", "--max_train_steps=2")
    train("resumed", "--max_train_steps=4", "--resume_from_checkpoint=latest")
    return root


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal_and_changes_the_predictor(trained):
    straight, resumed = (dx.NoiseSchedulePredictor.from_pretrained(trained / name) for name in ("straight", "resumed"))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.state_dict().items())
    assert straight.config.in_channels == 3 and straight.proj_out.weight.abs().max() > 0
    assert list((trained / "straight" / "samples").glob("step-*.png"))
    assert "NoiseSchedulePredictor" in (trained / "straight" / "README.md").read_text()


@pytest.mark.proof("loads")
@pytest.mark.parametrize(("flag", "message"), [("--tau=0", "tau"), ("--tau=500", "tau"), ("--num_layers=0", "num_layers")])  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(trained, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        main([
            f"--pretrained_model_name_or_path={trained / 'pipe'}", f"--train_data_dir={trained / 'pictures.npz'}",
            "--resolution=8", f"--output_dir={tmp_path / 'out'}", flag,
        ])  # fmt: skip
    assert not (tmp_path / "out").exists()


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tiny, tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(tmp_path)
    whole, few = dx.PictureObjective, {"conditions": 1, "starts": [[999, 700]], "attempts": 1}
    monkeypatch.setattr(dx, "PictureObjective", lambda pipe, seeds, metric: whole(pipe, seeds[:4], metric))
    monkeypatch.setattr(dx, "search_noise_schedule", functools.partial(dx.search_noise_schedule, **few))
    tiny[1].save_pretrained("my-predictor")
    card = method_card("fastdiff")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    pipe = copy.copy(tiny[0])
    features = lambda pictures: torch.from_numpy(pictures).flatten(1)[:, ::16]  # noqa: E731
    real = torch.rand(64, 12, generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"pipe": pipe, "features": features, "real_features": real}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), names)
    assert type(pipe.scheduler) is dx.FastDiffScheduler and len(pipe.scheduler.config.noise_schedule) == 4
    assert names["image"].size == (8, 8)
    assert "2204.09934" in card and "2203.13508" in card
