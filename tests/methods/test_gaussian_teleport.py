"""Gaussian teleport, by the five proofs."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import diffusers_ext as dx
from diffusers_ext.schedulers import gaussian_teleport
from diffusers_ext.schedulers._exponential import Point
from diffusers_ext.schedulers.gaussian_teleport import GaussianTeleport, GaussianTeleportScheduler
from tests.common import models
from tests.common.scheduler import MEAN, SMALL, STD, in_threads, noised
from tests.common.suite import CommonCase

_UNSCALED = "DDPMPipeline calls its network on pure noise; tests/methods/test_gaussian_teleport.py does it with others"
COMMON = CommonCase(
    extras=lambda: {"statistics": known()},
    process="diffusion",
    settings=[{"t_stop": 850, "use_karras_sigmas": True}],
    skips={
        "stock_pipelines": _UNSCALED,
        "two_pipelines": _UNSCALED,
        "travels": _UNSCALED,
        "adding_noise": "before the first step its input counts as pure noise; tested with `set_begin_index`",
    },
    upstream_skips=dict.fromkeys(
        ("test_add_noise_device", "test_from_save_pretrained", "test_scheduler_outputs_equivalence", "test_step_shape"),
        "it needs statistics, which diffusers' suite does not give it",
    ),
)

exact = pytest.mark.proof("exact")
SHAPE = (2, 4, 3)


def known() -> GaussianTeleport:
    """Statistics of the data of the common suite, of any shape."""
    return GaussianTeleport.from_moments(torch.tensor([MEAN]), remainder=STD**2)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rank: int, remainder: float, seed: int = 0) -> tuple[GaussianTeleport, torch.Tensor, torch.Tensor]:
    """Statistics, and the mean and the whole covariance that they mean."""
    size = math.prod(SHAPE)
    mean = 0.5 * draws(*SHAPE, seed=seed)
    basis = torch.linalg.qr(draws(size, size, seed=seed + 1)).Q[:, :rank]
    values = torch.linspace(3.0, 0.2, rank, dtype=torch.float64)
    covariance = basis @ torch.diag(values) @ basis.T + remainder * (torch.eye(size) - basis @ basis.T)
    return GaussianTeleport.from_moments(mean, basis, values, remainder), mean, covariance


def level(t: int) -> Point:
    bar = float(DDPMScheduler().alphas_cumprod.double()[t])
    return Point(math.sqrt(bar), math.sqrt(1 - bar))


NOISE = level(999)
CASES = [(24, 0.0), (5, 0.0), (5, 0.3), (0, 0.7)]


# --- the formulas ----------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(("rank", "remainder"), CASES)
@pytest.mark.parametrize("t", [998, 700, 200, 0])
def test_the_jump_is_the_exact_solution(rank, remainder, t):
    statistics, mean, covariance = moments(rank, remainder)
    denoiser = dx.GaussianDenoiser.from_moments(mean, covariance, DDPMScheduler())
    x = draws(6, *SHAPE, seed=5)
    expected = denoiser.exact_ode_solution(x, 999, t)
    torch.testing.assert_close(statistics.jump(x, NOISE, level(t)), expected, rtol=0, atol=3e-6)


@exact
def test_to_clean_data_for_flows_and_from_pure_noise():
    statistics, mean, covariance = moments(5, 0.3)
    denoiser = dx.GaussianDenoiser.from_moments(mean, covariance, FlowMatchEulerDiscreteScheduler())
    x = draws(6, *SHAPE, seed=5)
    for t in (600.0, None):
        expected = denoiser.exact_ode_solution(x, 1000.0, t)
        end = Point(1.0, 0.0) if t is None else Point(1 - t / 1000, t / 1000)
        torch.testing.assert_close(statistics.jump(x, Point(0.0, 1.0), end), expected, rtol=0, atol=3e-6)


@exact
@pytest.mark.parametrize(("rank", "remainder"), CASES)
def test_the_end_has_the_mean_and_the_covariance_of_the_data(rank, remainder):
    """The jump is linear, so that what it does to unit vectors gives the covariance of its end."""
    statistics, mean, covariance = moments(rank, remainder)
    size = mean.numel()
    start = NOISE.alpha * mean
    centre = statistics.jump(start[None], NOISE, Point(1.0, 0.0))[0]
    torch.testing.assert_close(centre, mean, rtol=0, atol=1e-6)
    moved = statistics.jump(start + torch.eye(size).double().reshape(size, *SHAPE), NOISE, Point(1.0, 0.0)) - centre
    linear = moved.reshape(size, size).T
    noisy = NOISE.sigma**2 * torch.eye(size) + NOISE.alpha**2 * covariance
    torch.testing.assert_close(linear @ noisy @ linear.T, covariance, rtol=0, atol=1e-5)


@exact
@pytest.mark.parametrize(("rank", "remainder"), CASES)
def test_its_denoiser_is_the_posterior_mean(rank, remainder):
    statistics, mean, covariance = moments(rank, remainder)
    denoiser = dx.GaussianDenoiser.from_moments(mean, covariance, DDPMScheduler())
    x = draws(6, *SHAPE, seed=5)
    for t in (999, 500, 0):
        expected = denoiser.posterior_mean(x, t)
        torch.testing.assert_close(statistics.denoised(x, level(t)), expected, rtol=0, atol=2e-5)


@exact
def test_classes_are_separate_and_their_labels_repeat_over_the_batch():
    single = [moments(5, remainder, seed=k)[0] for k, remainder in enumerate((0.1, 0.5, 0.9))]
    parts = [torch.stack([getattr(one, name)[0] for one in single]) for name in ("mean", "basis", "variances")]
    both = GaussianTeleport.from_moments(*parts, torch.tensor([0.1, 0.5, 0.9]))
    x, labels = draws(6, *SHAPE, seed=5), [2, 0, 2]
    found = both.jump(x, NOISE, level(600), labels)
    for i in range(6):
        expected = single[labels[i % 3]].jump(x[i : i + 1], NOISE, level(600))
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=1e-6)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    statistics = moments(5, 0.3)[0]
    x = draws(6, *SHAPE, seed=5).to(dtype)
    found = statistics.jump(x, NOISE, level(500))
    assert found.dtype == dtype
    torch.testing.assert_close(found, statistics.jump(x.double(), NOISE, level(500)).to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 0, atol=1e-5)  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


@exact
def test_fit_finds_mean_eigenpairs_and_what_is_left():
    data = draws(200, *SHAPE) * torch.linspace(0.1, 2, 24).reshape(SHAPE) + 1.5
    rows = data.flatten(1)
    values = torch.linalg.eigvalsh(rows.T.cov()).flip(0)
    for rank in (0, 6, 24, 500):
        fitted = GaussianTeleport.fit(data.float(), rank=rank)
        kept = min(rank, 24)
        assert fitted.config.rank == kept and tuple(fitted.config.shape) == SHAPE
        torch.testing.assert_close(fitted.mean[0].double(), data.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(fitted.variances[0].double(), values[:kept], rtol=1e-5, atol=0)
        left = values[kept:].mean() if kept < 24 else torch.tensor(0.0)
        torch.testing.assert_close(float(fitted.remainder[0]), float(left), rtol=1e-5, atol=1e-6)
        along = (rows - rows.mean(0)) @ fitted.basis[0].double()
        torch.testing.assert_close(along.square().sum(0) / 199, values[:kept], rtol=1e-4, atol=0)


@exact
def test_fit_of_few_samples_of_large_data_and_of_classes():
    few = GaussianTeleport.fit(draws(5, 3, 20, 20), rank=128)
    assert few.config.rank == 4 and float(few.remainder[0]) < 1e-6
    data, labels = draws(60, *SHAPE), torch.arange(60) % 3
    classes = GaussianTeleport.fit(data, rank=4, class_labels=labels)
    for k in range(3):
        alone = GaussianTeleport.fit(data[labels == k], rank=4)
        x = draws(2, *SHAPE, seed=5)
        torch.testing.assert_close(
            classes.jump(x, NOISE, level(500), [k]), alone.jump(x, NOISE, level(500)), rtol=0, atol=1e-5
        )


@exact
def test_random_projections_find_the_same_eigenvectors(monkeypatch):
    data = draws(90, 80) * 0.85 ** torch.arange(80) @ torch.linalg.qr(draws(80, 80, seed=3)).Q
    expected = GaussianTeleport.fit(data, rank=10)
    monkeypatch.setattr(gaussian_teleport, "_EXACT_LIMIT", 0)
    found = GaussianTeleport.fit(data, rank=10)
    torch.testing.assert_close(found.variances, expected.variances, rtol=1e-4, atol=0)
    torch.testing.assert_close((found.basis[0].T @ expected.basis[0]).abs(), torch.eye(10), rtol=0, atol=1e-2)
    assert torch.equal(found.basis, GaussianTeleport.fit(data, rank=10).basis), "its seed is fixed"


# --- with stock schedulers -------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(
    "cls", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DDPMScheduler]
)
def test_teleport_gives_what_a_stock_pipeline_needs(cls):
    """A stock pipeline multiplies latents by `init_noise_sigma` after `set_timesteps(timesteps=...)`."""
    statistics, mean, covariance = moments(24, 0.0)
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    denoiser = dx.GaussianDenoiser.from_moments(mean, covariance, scheduler)
    noise = draws(3, *SHAPE, seed=5)
    start = statistics.teleport(scheduler, noise, t_stop=700, num_inference_steps=7)
    assert start.timesteps == [700, 600, 500, 400, 300, 200, 100]
    scheduler.set_timesteps(timesteps=start.timesteps)
    state = start.latents * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(state, scheduler.timesteps[0])
    torch.testing.assert_close(seen, denoiser.exact_ode_solution(noise, 999, 700), rtol=0, atol=2e-5)


@exact
def test_it_runs_in_stable_diffusion_with_a_stock_scheduler(pipe):
    statistics = GaussianTeleport.fit(draws(40, *shape_of(pipe)).float(), rank=8)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    noise = draws(1, *shape_of(pipe), seed=1).float()
    start = statistics.teleport(pipe, noise, t_stop=600, num_inference_steps=3)
    seen = inputs_of(pipe.unet)
    pipe("a person with tan skin", latents=start.latents, timesteps=start.timesteps, output_type="latent")
    assert [t for _, t in seen] == [600, 400, 200]
    expected = statistics.jump(noise, *(point(pipe.scheduler, t) for t in (999, 600)))
    torch.testing.assert_close(seen[0][0][:1], expected, rtol=0, atol=1e-5)


def point(scheduler, t: int) -> Point:
    bar = float(scheduler.alphas_cumprod.double()[t])
    return Point(math.sqrt(bar), math.sqrt(1 - bar))


def shape_of(pipe) -> tuple[int, int, int]:
    config = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).config
    size = config.sample_size
    return (config.in_channels, size, size)


def inputs_of(module) -> list[tuple[torch.Tensor, float]]:
    """What a denoiser is called with from now on: samples and timesteps."""
    seen: list[tuple[torch.Tensor, float]] = []

    def note(_module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((x.clone(), float(torch.as_tensor(t).reshape(-1)[0])))

    module.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@exact
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": DDIMScheduler()}, "`target` has DDIMScheduler"),
        ({"target": FlowMatchEulerDiscreteScheduler()}, "`target` has FlowMatch"),
        ({"target": GaussianTeleportScheduler()}, "`target` has GaussianTeleportScheduler"),
        ({"t_stop": 999}, "`t_stop` is 999"),
        ({"t_stop": 0}, "`t_stop` is 0"),
        ({"num_inference_steps": 701}, "`num_inference_steps` is 701"),
        ({"class_labels": [0]}, "`class_labels`"),
        ({"noise": torch.zeros(2, 2, 4, 4)}, "`sample` has shape"),
    ],
    ids=str,
)
def test_refusals(changes, words):
    call = {"target": DPMSolverMultistepScheduler(), "noise": torch.zeros(2, *SHAPE), "t_stop": 700}
    with pytest.raises(ValueError, match=words):
        moments(5, 0.3)[0].teleport(**{**call, "num_inference_steps": 7, **changes})
    with pytest.raises(ValueError, match="orthonormal"):
        GaussianTeleport.from_moments(torch.zeros(3), 2 * torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="`class_labels`"):
        GaussianTeleport.fit(torch.zeros(4, 3), class_labels=[0, 0, 2, 2])


# --- the scheduler ---------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_run_begins_at_the_exact_state_of_t_stop_and_ends_near_the_solution(prediction_type):
    statistics, mean, covariance = moments(24, 0.0)
    config = {"prediction_type": prediction_type, "t_stop": 600}
    scheduler = GaussianTeleportScheduler.from_config(GaussianTeleportScheduler(**config).config, statistics=statistics)
    denoiser = dx.GaussianDenoiser.from_moments(mean, covariance, scheduler)
    seen, noise, errors = inputs_of(denoiser), draws(3, *SHAPE, seed=5), []
    exact_end = denoiser.exact_ode_solution(noise, 999)
    for steps in (10, 40):
        scheduler.set_timesteps(steps)
        state = noise
        for t in scheduler.timesteps:
            output = denoiser(scheduler.scale_model_input(state, t), t).sample
            state = scheduler.step(output, t, state).prev_sample
        errors.append((state - exact_end).square().mean().sqrt())
    assert len(seen) == 50 and [t for _, t in seen][:2] == [600, 540]
    torch.testing.assert_close(seen[0][0], denoiser.exact_ode_solution(noise, 999, 600), rtol=0, atol=2e-5)
    assert errors[1] < errors[0] / 4 < 0.05


@exact
def test_the_earlier_the_jump_ends_the_less_it_loses_on_data_that_are_not_gaussian():
    """The Gaussian knows nothing of modes, which show late: a short jump costs nothing, a long one does."""
    generator = torch.Generator().manual_seed(0)
    means = 0.9 * torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    denoiser = dx.GaussianMixtureDenoiser.from_components(means, 0.1, DDPMScheduler())
    statistics = GaussianTeleport.fit(denoiser.sample(4000, generator=generator), rank=16)
    noise = draws(32, 1, 4, 4, seed=5)
    errors = {}
    for t in (900, 700, 300):
        jumped = statistics.jump(noise, NOISE, level(t))
        ends = (
            denoiser.exact_ode_solution(jumped, t, tolerance=1e-8),
            denoiser.exact_ode_solution(noise, 999, tolerance=1e-8),
        )
        errors[t] = float((ends[0] - ends[1]).square().mean().sqrt())
    assert errors[900] < 0.05 < errors[300] and errors[900] < errors[700] < errors[300]


@exact
@pytest.mark.parametrize("name", ["avatars-sd", "tiny-dit", "tiny-animatediff"])
def test_in_stock_pipelines(name):
    """The network first sees the pipeline's own noise, jumped; guidance doubles the batch on the way."""
    stock = models.STOCKS[name]
    plain, pipes = stock.make(), [stock.make() for _ in range(2)]
    first = inputs_of(plain.unet if hasattr(plain, "unet") else plain.transformer)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    stock.draw(plain, 1)
    for pipe in pipes:
        pipe.scheduler = GaussianTeleportScheduler.from_config(plain.scheduler.config, statistics=known())
    seen = inputs_of(pipes[0].unet if hasattr(plain, "unet") else pipes[0].transformer)
    result = stock.draw(pipes[0], 3)
    assert result.isfinite().all() and [round(t) for _, t in seen[:3]] == [
        round(float(t)) for t in pipes[0].scheduler.timesteps
    ]
    assert seen[0][1] == 700
    expected = known().jump(first[0][0], *(point(plain.scheduler, t) for t in (999, 700)))
    torch.testing.assert_close(seen[0][0], expected, rtol=0, atol=1e-5)
    assert torch.equal(stock.draw(pipes[0], 3), result), "the second call differs"
    models.abort(stock, pipes[0], seed=9)
    assert torch.equal(stock.draw(pipes[0], 3), result), "after a run broken off, another result"
    alone = stock.draw(pipes[1], 3, seed=1)
    together = in_threads([lambda: stock.draw(pipes[0], 3), lambda: stock.draw(pipes[1], 3, seed=1)])
    assert torch.equal(together[0], result) and torch.equal(together[1], alone)


@exact
def test_a_pipeline_that_calls_its_network_on_pure_noise_is_refused():
    stock = models.STOCKS["tiny-ddpm"]
    pipe = stock.make()
    pipe.scheduler = GaussianTeleportScheduler.from_config(pipe.scheduler.config, statistics=known())
    with pytest.raises(ValueError, match=r"GaussianTeleport\.teleport"):
        stock.draw(pipe, 3)
    assert isinstance(pipe, DDPMPipeline)


@exact
def test_a_run_that_begins_in_the_middle_jumps_over_nothing():
    scheduler = GaussianTeleportScheduler.from_config(GaussianTeleportScheduler().config, statistics=known())
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(0)
    x0, noise = draws(*SMALL), draws(*SMALL, seed=1)
    t = scheduler.timesteps[0]
    x = noised(scheduler, x0, noise, t)
    assert torch.equal(scheduler.scale_model_input(x, t), x)
    end = level(700)
    torch.testing.assert_close(x, end.alpha * x0 + end.sigma * noise, rtol=0, atol=1e-6)
    scheduler.step(x, t, x)


@exact
def test_class_labels_of_a_class_conditional_pipeline():
    stock = models.STOCKS["tiny-dit"]
    pipe = stock.make()
    means = torch.stack([torch.full((1, 1, 1), float(k)) for k in range(5)])
    statistics = GaussianTeleport.from_moments(means, remainder=torch.full((5,), 0.25))
    pipe.scheduler = GaussianTeleportScheduler.from_config(pipe.scheduler.config, statistics=statistics)
    with pytest.raises(ValueError, match="`class_labels`"):
        stock.draw(pipe, 2)
    results = []
    for labels in ([1, 3], [3, 1]):
        pipe.scheduler.set_class_labels(labels)
        results.append(stock.draw(pipe, 2, class_labels=labels))
    assert results[0].isfinite().all() and not torch.equal(results[0][0], results[1][1])


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
def test_equals_two_thousand_steps_of_heuns_method():
    """The authors published no code: a slow derivation, uniform in log-SNR, of y = x / a along the equation."""
    mean = 0.5 * draws(6)
    basis = torch.linalg.qr(draws(6, 6, seed=1)).Q[:, :4]
    values = torch.tensor([2.0, 1.0, 0.5, 0.05], dtype=torch.float64)
    covariance = basis @ torch.diag(values) @ basis.T
    x = draws(4, 6, seed=5)

    def slope(y: torch.Tensor, ratio: float) -> torch.Tensor:
        """dy / dratio = (y - E[x_0 | y]) / ratio, with y = x_0 + ratio * noise."""
        total = covariance + ratio**2 * torch.eye(6)
        return (y - mean - torch.linalg.solve(total, (y - mean).T).T @ covariance) / ratio

    end = level(300)
    ratios = torch.linspace(
        math.log(NOISE.sigma / NOISE.alpha), math.log(end.sigma / end.alpha), 2001, dtype=torch.float64
    ).exp().tolist()  # fmt: skip
    y = x / NOISE.alpha
    for a, b in itertools.pairwise(ratios):
        here = slope(y, a)
        y = y + (b - a) * (here + slope(y + (b - a) * here, b)) / 2
    statistics = GaussianTeleport.from_moments(mean, basis, values)
    torch.testing.assert_close(statistics.jump(x, NOISE, end), y * end.alpha, rtol=0, atol=1e-5)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    """With this package, and without it by `trust_remote_code`; the statistics come along."""
    from tests.fresh import run_fresh

    stock = models.STOCKS["tiny-dit"]
    pipe = stock.make()
    shape = shape_of(pipe)
    statistics = GaussianTeleport.fit(0.3 + draws(12, *shape).float(), rank=5)
    pipe.scheduler = GaussianTeleportScheduler.from_config(pipe.scheduler.config, statistics=statistics, t_stop=650)
    expected = stock.draw(pipe)
    dx.save_pretrained(pipe, tmp_path / "repo")
    assert list((tmp_path / "repo" / "scheduler" / "statistics").glob("*.safetensors"))
    alone = GaussianTeleport.from_pretrained(tmp_path / "repo" / "scheduler" / "statistics")
    assert all(torch.equal(a, b) for a, b in zip(alone.buffers(), statistics.buffers(), strict=True))
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
        import sys, torch
        import diffusers
        from tests.common import models
        stock = models.STOCKS["tiny-dit"]
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        folder = {str(tmp_path / "repo")!r}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert "diffusers_ext" not in sys.modules
        assert (stock.draw(pipe) - expected).abs().max() <= 1e-5
        import diffusers_ext as dx
        ours = dx.Pipeline.from_pretrained(folder)
        assert isinstance(ours.scheduler, dx.GaussianTeleportScheduler) and ours.scheduler.config.t_stop == 650
        assert isinstance(ours.scheduler.statistics, dx.GaussianTeleport)
        assert (stock.draw(ours) - expected).abs().max() <= 1e-5
    """
    run_fresh(code)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("gaussian_teleport")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {})
    assert "2303.02490" in card and "Apache-2.0" in card
