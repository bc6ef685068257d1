"""Gotta Go Fast, the adaptive SDE solver, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config

import diffusers_ext as dx
from diffusers_ext.oracles import GaussianDenoiser, GaussianMixtureDenoiser
from diffusers_ext.pipelines import adaptive_sde
from tests import unets
from tests.common.suite import CommonCase

COMMON = CommonCase(
    make=lambda: dx.AdaptiveSDEPipeline(unets.unconditional(1), DDPMScheduler()),
    inputs=lambda steps: {"batch_size": steps - 1, "eps_rel": 0.5, "output_type": "np"},
)
GOLDEN = Path(__file__).parents[1] / "golden" / "gotta_go_fast.json"

exact = pytest.mark.proof("exact")


class TwoGaussians(ModelMixin, ConfigMixin):
    """Score of an even mixture of N(m, v) and N(-m, v) under exploding noise, told sigma; `m = cos(k)` at pixel k."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 4, variance: float = 0.04):
        super().__init__()
        mean = torch.cos(torch.arange(in_channels * sample_size**2, dtype=torch.float64))
        self.register_buffer("mean", mean.view(in_channels, sample_size, sample_size))

    def forward(self, sample, timestep, return_dict=True):
        width = (self.config.variance + timestep.double() ** 2).view(-1, 1, 1, 1)
        x = sample.double()
        which = torch.tanh((x * self.mean).sum((1, 2, 3), keepdim=True) / width)
        return (((self.mean * which - x) / width).to(sample.dtype),)


def quiet(unet, scheduler):
    pipe = dx.AdaptiveSDEPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixture(kind="epsilon"):
    """Two Gaussians of 16 pixels in [-1, 1], under DDPM's schedule, in float64."""
    scheduler = DDPMScheduler(prediction_type=kind)
    mean = 0.5 * torch.cos(torch.arange(16.0).view(1, 1, 4, 4))
    return quiet(GaussianMixtureDenoiser.from_components(torch.cat([mean, -mean]), 0.05, scheduler), scheduler)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- exact -----------------------------------------------------------------------------------------------------------


def coefficients(scheduler, t):
    """`(alpha, sigma, beta)` of a beta schedule at one time, by interpolation of the logarithm, in plain numpy."""
    table, timestep = np.log(scheduler.alphas_cumprod.double().numpy()), t * (scheduler.config.num_train_timesteps - 1)
    bar = math.exp(np.interp(timestep, np.arange(len(table)), table))
    cell = min(int(timestep), len(table) - 2)
    beta = (table[cell] - table[cell + 1]) * (len(table) - 1)
    return math.sqrt(bar), math.sqrt(1 - bar), beta


@exact
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_attempt_is_euler_maruyama_and_stochastic_heun_of_one_noise(kind):
    """The textbook formulas of the reverse SDE, picture by picture, with the score of the epsilon model."""
    pipe, plain = mixture(kind), mixture("epsilon")
    process = adaptive_sde.read_process(pipe.scheduler)
    x, z = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Whole timesteps: in between, the networks of the three kinds mean noise levels that differ by a millionth
    times, steps = [900 / 999, 400 / 999, 12 / 999], [50 / 999, 200 / 999, 11 / 999]
    t, h = (torch.tensor(values, dtype=torch.float64) for values in (times, steps))
    low, high = adaptive_sde.proposals(lambda x, t: pipe.unet(x, t)[0], process, x, z, t, h)
    for i in range(3):

        def drift(x, t):
            _, sigma, beta = coefficients(plain.scheduler, t)
            score = -plain.unet(x[None], 999 * t)[0][0] / sigma
            return -0.5 * beta * x - beta * score, math.sqrt(beta)

        f, g = drift(x[i], times[i])
        euler = x[i] - steps[i] * f + g * math.sqrt(steps[i]) * z[i]
        f_after, g_after = drift(euler, times[i] - steps[i])
        heun = x[i] - steps[i] * (f + f_after) / 2 + (g + g_after) / 2 * math.sqrt(steps[i]) * z[i]
        torch.testing.assert_close(low[i], euler, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(high[i], heun, rtol=1e-9, atol=1e-9)


def slow_solver(pipe, eps_rel, eps_abs, seed):
    """Algorithm 1 for one picture, in plain floats: `(picture, calls, rejected)`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, 1, 4, 4), generator=generator, dtype=torch.float64)
    previous, t, h, calls, rejected = x, 1.0, 0.01, 0, 0

    def score(x, t):
        return -pipe.unet(x, torch.tensor([999 * t], dtype=torch.float64))[0] / coefficients(pipe.scheduler, t)[1]

    while t > 1e-3 + 1e-12:
        z = torch.randn((1, 1, 4, 4), generator=generator, dtype=torch.float64)
        beta, after = (coefficients(pipe.scheduler, time)[2] for time in (t, t - h))
        first = h * beta * (x / 2 + score(x, t)) + math.sqrt(h * beta) * z
        second = h * after * ((x + first) / 2 + score(x + first, t - h)) + math.sqrt(h * after) * z
        calls += 2
        delta = (eps_rel * torch.maximum((x + first).abs(), previous.abs())).clamp(min=eps_abs)
        error = ((second - first) / 2 / delta).square().mean().sqrt().item()
        if error <= 1:
            x, previous, t = x + (first + second) / 2, x + first, t - h
        else:
            rejected += 1
        h = min(t - 1e-3, 0.9 * h * error**-0.9)
    sigma = coefficients(pipe.scheduler, 1e-3)[1]
    return x + sigma**2 * score(x, 1e-3), calls + 1, rejected


@exact
def test_each_picture_of_a_batch_follows_algorithm_1():
    pipe = mixture()
    result = pipe(4, eps_rel=0.3, generator=seeded(0, 1, 2, 3), output_type="pt")
    for i in range(4):
        x, calls, rejected = slow_solver(pipe, 0.3, 2 / 256, i)
        assert (result.num_calls[i], result.num_rejected[i]) == (calls, rejected)
        torch.testing.assert_close(result.images[i], (x[0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-8)
    assert len(set(result.num_calls)) > 1 and sum(result.num_rejected) > 0, "the test would not notice a common step"


@exact
def test_a_picture_is_the_same_in_every_batch():
    pipe = COMMON.make()
    pipe.set_progress_bar_config(disable=True)
    together = pipe(3, eps_rel=0.2, generator=seeded(5, 6, 7), output_type="pt")
    for i in range(3):
        alone = pipe(1, eps_rel=0.2, generator=seeded(5 + i), output_type="pt")
        assert alone.num_calls == together.num_calls[i : i + 1]
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-4)
    one, two = (pipe(n, eps_rel=0.2, generator=torch.Generator().manual_seed(9), output_type="pt") for n in (1, 3))
    torch.testing.assert_close(one.images[0], two.images[0], rtol=0, atol=1e-4)
    assert not torch.equal(two.images[0], two.images[1])


@exact
def test_gaussian_data_keep_their_law_and_calls_grow_as_the_tolerance_falls():
    """1,024 independent pixels a picture: mean and variance to Monte-Carlo error; few rejections in high dimension."""
    scheduler = DDPMScheduler()
    mean, variance = torch.full((1, 32, 32), 0.2), torch.full((1, 32, 32), 0.04)
    pipe = quiet(GaussianDenoiser.from_moments(mean, variance, scheduler), scheduler)
    calls = []
    for eps_rel in (0.5, 0.1, 0.05):
        result = pipe(8, eps_rel=eps_rel, generator=seeded(*range(8)), output_type="pt")
        calls.append(sum(result.num_calls) / 8)
        if eps_rel == 0.5:
            continue
        x = 2 * result.images - 1
        count = x.numel()
        assert (x.mean() - 0.2).abs() < 4 * 0.2 / count**0.5
        # Tweedie's last step takes off the noise at the end and leaves the posterior mean: of variance v^2 / (v + s^2)
        assert (x.var() / 0.04 - 1).abs() < 4 * (2 / count) ** 0.5 + 0.01
        attempts = (sum(result.num_calls) - 8) / 2
        assert sum(result.num_rejected) < 0.1 * attempts
    assert calls[0] < calls[1] < calls[2]


@exact
def test_exploding_noise_reaches_both_modes():
    pipe = quiet(TwoGaussians(), ScoreSdeVeScheduler(sigma_max=50.0))
    result = pipe(64, eps_rel=0.05, generator=torch.Generator().manual_seed(0), output_type="pt")
    x, m = result.images.flatten(1), pipe.unet.mean.flatten()
    # Pictures are clamped to [0, 1]: near a mode they are its positive part, up to the deviation of 0.2
    distances = torch.stack([(x - (sign * m).clamp(0, 1)).square().mean(1).sqrt() for sign in (1, -1)])
    assert distances.amin(0).max() < 0.3
    share = (distances.argmin(0) == 0).double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / 8


@exact
def test_the_schedule_is_that_of_the_scheduler_at_whole_timesteps():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    process = adaptive_sde.read_process(scheduler)
    timesteps = torch.arange(1000, dtype=torch.float64)
    sigma = process.at(timesteps / 999).sigma
    torch.testing.assert_close(sigma**2, 1 - scheduler.alphas_cumprod.double(), rtol=1e-9, atol=1e-12)
    between = process.at((timesteps[:-1] + 0.5) / 999).g ** 2 / 999
    torch.testing.assert_close(between, -torch.log1p(-scheduler.betas.double()[1:]), rtol=1e-4, atol=1e-6)


@exact
def test_only_the_process_of_the_scheduler_counts():
    pipe = mixture()
    expected = pipe(2, eps_rel=0.5, generator=seeded(0, 1), output_type="np")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    found = pipe(2, eps_rel=0.5, generator=seeded(0, 1), output_type="np")
    np.testing.assert_allclose(found.images, expected.images, atol=1e-6)


@exact
def test_the_second_half_of_the_channels_is_a_learned_variance():
    unet = unets.fill(
        UNet2DModel(
            sample_size=8, in_channels=3, out_channels=6, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
        )
    )  # fmt: skip
    images = quiet(unet, DDPMScheduler(variance_type="learned_range"))(2, eps_rel=0.5, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


@exact
def test_the_progress_bar_ends_at_100_percent():
    from tests.common.models import Updates

    pipe = mixture()
    pipe.progress_bar = updates = Updates()
    pipe(2, eps_rel=0.5, generator=seeded(0, 1))
    assert updates.count == 100


@exact
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"eps_rel": 0}, "`eps_rel` is 0"),
        ({"eps_rel": math.nan}, "`eps_rel` is nan"),
        ({"eps_abs": -1.0}, "`eps_abs` is -1.0"),
        ({"output_type": "latent"}, "`output_type` is 'latent'"),
        ({"batch_size": 3, "generator": seeded(0, 1)}, "`generator` has 2 generators for `batch_size` 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture()(**arguments)


@exact
def test_other_processes_are_refused():
    for scheduler, message in (
        (FlowMatchEulerDiscreteScheduler(), "`scheduler` is a FlowMatchEuler"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_prediction"),
        (DDPMScheduler(rescale_betas_zero_snr=True), "`rescale_betas_zero_snr`"),
    ):
        pipe = mixture()
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            pipe()


@exact
def test_a_broken_denoiser_is_an_error_and_not_an_endless_loop():
    pipe = mixture()
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * math.nan,)
    with pytest.raises(FloatingPointError, match="not finite"):
        pipe()
    pipe.unet.forward = lambda x, *args, **kwargs: (1e9 * torch.randn_like(x),)  # no step is small enough
    with pytest.raises(FloatingPointError, match="not smooth enough"):
        pipe()


# --- reference -------------------------------------------------------------------------------------------------------

RUNS = {
    f"{name}, {eps_rel}": (name, eps_rel, eps_abs)
    for name, eps_abs in (("preserving", 0.0078), ("exploding", 0.0039))
    for eps_rel in (0.05, 0.5)
}


def golden_pipe(name):
    return mixture() if name == "preserving" else quiet(TwoGaussians(), ScoreSdeVeScheduler(sigma_max=50.0))


def golden_noise(picture, number):
    """Of unit variance, by formula: number 0 is the start."""
    place = torch.arange(16, dtype=torch.float64).view(1, 4, 4)
    return math.sqrt(2) * torch.sin(1.7 * place**2 + 2.3 * number + 0.9 * picture * (number + 1) + 0.5)


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_solver(run, monkeypatch):
    """Three pictures in lock step; theirs go on computing those that are done, ours do not."""
    name, eps_rel, eps_abs = RUNS[run]
    pipe, generators = golden_pipe(name), seeded(0, 1, 2)
    drawn = dict.fromkeys(generators, 0)

    def draw(shape, generator, **_):
        noise = []
        for one in generator:
            noise.append(golden_noise(generators.index(one), drawn[one]))
            drawn[one] += 1
        return torch.stack(noise)

    monkeypatch.setattr(adaptive_sde, "randn_tensor", draw)
    process = adaptive_sde.read_process(pipe.scheduler)
    with torch.no_grad():
        x, calls, _ = pipe._solve(process, eps_rel, eps_abs, generators)
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    assert (max(calls) - 1) // 2 == golden["attempts"]
    torch.testing.assert_close(x.flatten(1), torch.tensor(golden["states"], dtype=torch.float64), rtol=0, atol=1e-6)


# --- claim -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("claim")
def test_less_noise_is_left_than_by_euler_maruyama_of_equal_calls():
    """The cheapest form of the claim: two pictures of 1,024 pixels near subspaces, at the loosest tolerance."""
    from benchmarks.gotta_go_fast import adaptive, deviations, euler_maruyama, oracle

    pipe, seeds = oracle(), range(2)
    x, calls, _ = adaptive(pipe, 0.5, seeds, 2)
    ours, theirs = (deviations(pipe, one)[0] for one in (x, euler_maruyama(pipe, max(calls), seeds, 2)))
    assert (abs(ours - 1) < 0.5 * abs(theirs - 1)).all()


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_folder_of_a_stock_pipeline_loads(tmp_path):
    pipe = dx.AdaptiveSDEPipeline.from_pretrained(dx.zoo_path("fashion-ddpm"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(eps_rel=1.0, generator=seeded(0), output_type="np")
    assert expected.images.shape == (1, 28, 28, 1) and expected.images.std() > 0.1
    pipe.save_pretrained(tmp_path)
    again = dx.AdaptiveSDEPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    found = again(eps_rel=1.0, generator=seeded(0), output_type="np")
    assert found.num_calls == expected.num_calls
    np.testing.assert_allclose(found.images, expected.images, atol=1e-3)  # steps carry rounding on


@pytest.mark.proof("loads")
def test_exploding_noise_loads(tmp_path):
    unet = unets.fill(
        UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, add_attention=False,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), time_embedding_type="fourier",
        )
    )  # fmt: skip
    pipe = quiet(unet, ScoreSdeVeScheduler(sigma_max=50.0))
    pipe.save_pretrained(tmp_path)
    again = dx.AdaptiveSDEPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (one(eps_rel=0.5, generator=seeded(3), output_type="np").images for one in (pipe, again))
    np.testing.assert_allclose(first, second, atol=1e-3)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card, snippet

    space: dict = {}
    exec(snippet("gotta_go_fast"), space)
    assert len(space["result"].images) == 4 and "## When not to use it" in method_card("gotta_go_fast")
