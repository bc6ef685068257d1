"""The exact denoisers: that their answers are exact, and that schedulers on them err as theory says."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    VQDiffusionScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext.oracles as oracles
from diffusers_ext.oracles import (
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LowRankMixtureDenoiser,
    convergence_order,
    sampler_error,
)
from diffusers_ext.oracles._ode import integrate

SHAPE = (2, 1, 2)
SIZE = math.prod(SHAPE)


def ddim(**options) -> DDIMScheduler:
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **options)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance() -> torch.Tensor:
    root = draw(SIZE, SIZE, seed=1) / 2
    return root @ root.T + 0.05 * torch.eye(SIZE, dtype=torch.float64)


def gaussian(scheduler=None) -> GaussianDenoiser:
    return GaussianDenoiser.from_moments(draw(*SHAPE, seed=2), covariance(), scheduler or ddim())


def mixture(scheduler=None) -> GaussianMixtureDenoiser:
    variances = 0.1 + draw(4, *SHAPE, seed=4).square() / 4
    labels = torch.tensor([0, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0])
    means = draw(4, *SHAPE, seed=3)
    return GaussianMixtureDenoiser.from_components(means, variances, scheduler or ddim(), weights, labels)


def low_rank(scheduler=None, noise=(0.1, 0.3, 0.2)) -> LowRankMixtureDenoiser:
    means, factors, noise = draw(3, *SHAPE, seed=5), draw(3, *SHAPE, 2, seed=6), torch.tensor(noise)
    labels = torch.tensor([0, 1, 1])
    return LowRankMixtureDenoiser.from_components(means, factors, noise, scheduler or ddim(), labels=labels)


KINDS = {"gaussian": gaussian, "mixture": mixture, "low-rank": low_rank}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def make(request):
    return request.param


# --- exact answers ---------------------------------------------------------------------------------------------------


class TestDensities:
    @pytest.mark.parametrize("timestep", [None, -0.5, 0, 37.25, 500, 999])
    def test_score_is_the_gradient_of_log_prob(self, make, timestep):
        model = make()
        x = model.sample(5, timestep).requires_grad_()
        (gradient,) = torch.autograd.grad(model.log_prob(x, timestep).sum(), x)
        torch.testing.assert_close(model.score(x, timestep), gradient, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("timestep", [20, 400])
    def test_posterior_by_quadrature(self, timestep):
        model = GaussianMixtureDenoiser.from_components(
            torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.0, -1.0]]).reshape(3, 1, 1, 2),
            torch.tensor([0.3, 0.1, 0.2]),
            ddim(),
            weights=torch.tensor([1.0, 2.0, 1.0]),
        )
        axis = torch.linspace(-5, 5, 801, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        prior = model.log_prob(grid.reshape(-1, 1, 1, 2)).exp()
        assert float(prior.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-9)

        alpha, sigma = (float(value) for value in model.noise_process(timestep, 1, torch.device("cpu")))
        x = torch.tensor([0.3, -0.4], dtype=torch.float64)
        likelihood = torch.exp(-(x - alpha * grid).square().sum(1) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        joint = prior * likelihood
        evidence = joint.sum() * (axis[1] - axis[0]) ** 2
        weight = joint / joint.sum()
        mean = (weight[:, None] * grid).sum(0)
        spread = (weight[:, None, None] * (grid - mean)[:, :, None] * (grid - mean)[:, None, :]).sum(0)

        sample = x.reshape(1, 1, 1, 2)
        assert float(model.log_prob(sample, timestep)) == pytest.approx(float(evidence.log()), abs=1e-8)
        torch.testing.assert_close(model.posterior_mean(sample, timestep).flatten(), mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(model.posterior_covariance(sample, timestep)[0], spread, rtol=0, atol=1e-8)

    def test_posterior_by_derivatives(self, make):
        """Tweedie: mean = (x + sigma^2 score) / alpha; covariance = sigma^2 / alpha^2 (I + sigma^2 Hessian)."""
        model, t = make(), 300
        alpha, sigma = (float(value) for value in model.noise_process(t, 1, torch.device("cpu")))
        x = model.sample(1, t)
        hessian = torch.autograd.functional.hessian(lambda y: model.log_prob(y, t).sum(), x).reshape(SIZE, SIZE)
        expected = sigma**2 / alpha**2 * (torch.eye(SIZE, dtype=torch.float64) + sigma**2 * hessian)
        torch.testing.assert_close(model.posterior_covariance(x, t)[0], expected, rtol=0, atol=1e-10)
        mean = (x + sigma**2 * model.score(x, t)) / alpha
        torch.testing.assert_close(model.posterior_mean(x, t), mean, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("timestep", [None, 300])
    def test_low_rank_density_by_its_matrices(self, timestep):
        model = low_rank()
        alpha, sigma = (float(value) for value in model.noise_process(timestep, 1, torch.device("cpu")))
        factors = draw(3, *SHAPE, 2, seed=6).reshape(3, SIZE, 2)
        noise = torch.tensor([0.1, 0.3, 0.2]).double()[:, None, None]
        identity = torch.eye(SIZE, dtype=torch.float64)
        spread = alpha**2 * (factors @ factors.mT + noise**2 * identity) + sigma**2 * identity
        normals = torch.distributions.MultivariateNormal(alpha * draw(3, *SHAPE, seed=5).flatten(1), spread)
        mixed = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3).double()), normals)
        x = draw(4, *SHAPE)
        torch.testing.assert_close(model.log_prob(x, timestep), mixed.log_prob(x.flatten(1)), rtol=1e-9, atol=0)

    def test_low_rank_with_all_factors_is_a_full_covariance(self):
        root = torch.linalg.cholesky(covariance()).reshape(1, *SHAPE, SIZE)
        mean = draw(*SHAPE, seed=2)
        same = LowRankMixtureDenoiser.from_components(mean[None], root, 0.0, ddim())
        x = draw(3, *SHAPE)
        for t in (0, 500):
            torch.testing.assert_close(same.log_prob(x, t), gaussian().log_prob(x, t), rtol=1e-9, atol=0)
        torch.testing.assert_close(same.moments()[1], covariance(), rtol=0, atol=1e-12)

    def test_a_diagonal_gaussian_is_a_full_one(self):
        variances = 0.2 + draw(*SHAPE, seed=9).square()
        diagonal = GaussianDenoiser.from_moments(draw(*SHAPE, seed=2), variances, ddim())
        full = GaussianDenoiser.from_moments(draw(*SHAPE, seed=2), torch.diag(variances.flatten()), ddim())
        x = draw(3, *SHAPE)
        torch.testing.assert_close(diagonal(x, 300).sample, full(x, 300).sample, rtol=0, atol=1e-12)
        for answer in ("log_prob", "posterior_covariance"):
            one, other = (getattr(model, answer)(x, 300) for model in (diagonal, full))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    def test_samples_have_the_moments(self, make):
        model, n = make(), 40_000
        mean, spread = model.moments()
        data = model.sample(n).flatten(1)
        torch.testing.assert_close(data.mean(0), mean.flatten(), rtol=0, atol=5 * float(data.std(0).max()) / n**0.5)
        torch.testing.assert_close(data.T.cov(), spread, rtol=0, atol=0.05 * float(spread.diagonal().max()))

    def test_noisy_samples_are_scaled_data_and_noise(self):
        model, t = gaussian(), 300
        alpha, sigma = (float(value) for value in model.noise_process(t, 1, torch.device("cpu")))
        mean, spread = model.moments()
        noisy = model.sample(40_000, t).flatten(1)
        expected = alpha**2 * spread + sigma**2 * torch.eye(SIZE, dtype=torch.float64)
        torch.testing.assert_close(noisy.mean(0), alpha * mean.flatten(), rtol=0, atol=0.03)
        torch.testing.assert_close(noisy.T.cov(), expected, rtol=0, atol=0.05)


class TestClasses:
    def test_a_label_leaves_its_components(self):
        model, x = mixture(), draw(4, *SHAPE)
        every = dict(means=draw(4, *SHAPE, seed=3), variances=0.1 + draw(4, *SHAPE, seed=4).square() / 4)
        first = GaussianMixtureDenoiser.from_components(
            every["means"][:2], every["variances"][:2], ddim(), torch.tensor([1.0, 2.0])
        )
        torch.testing.assert_close(model(x, 200, torch.zeros(4, dtype=torch.long)).sample, first(x, 200).sample)
        third = GaussianMixtureDenoiser.from_components(every["means"][3:], every["variances"][3:], ddim())
        torch.testing.assert_close(model(x, 200, torch.full((4,), 2)).sample, third(x, 200).sample)

    def test_none_and_the_null_label_are_all_components(self):
        model, x = mixture(), draw(4, *SHAPE)
        whole = GaussianMixtureDenoiser.from_components(
            draw(4, *SHAPE, seed=3),
            0.1 + draw(4, *SHAPE, seed=4).square() / 4,
            ddim(),
            torch.tensor([1.0, 2.0, 3.0, 1.0]),
        )
        torch.testing.assert_close(model(x, 200).sample, whole(x, 200).sample)
        assert torch.equal(model(x, 200, torch.full((4,), 3)).sample, model(x, 200).sample)

    def test_timesteps_and_labels_by_row(self):
        model, x = mixture(), draw(3, *SHAPE)
        times, labels = torch.tensor([3.5, 500.0, 900.0]), torch.tensor([2, 0, 3])
        together = model(x, times, labels).sample
        for row in range(3):
            alone = model(x[row : row + 1], float(times[row]), labels[row : row + 1]).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)

    def test_guided_score_is_that_of_the_tilted_density(self):
        """Classifier-free guidance follows p_t^(1 - w) p_t(.|c)^w (Ho and Salimans 2022)."""
        model, t, w, labels = mixture(), 300, 3.0, torch.tensor([0, 1, 2])
        x = model.sample(3, t).requires_grad_()
        tilted = (1 - w) * model.log_prob(x, t) + w * model.log_prob(x, t, labels)
        (gradient,) = torch.autograd.grad(tilted.sum(), x)
        conditional, unconditional = model(x, t, labels).sample, model(x, t).sample
        sigma = float(model.noise_process(t, 1, torch.device("cpu"))[1])
        guided = unconditional + w * (conditional - unconditional)
        torch.testing.assert_close(guided, -sigma * gradient, rtol=1e-9, atol=1e-9)

    def test_guided_solution_of_two_gaussians_of_one_covariance(self):
        """Their guided field is that of a Gaussian with the mean m0 + w (m1 - m0)."""
        means, variances = draw(2, *SHAPE, seed=3), 0.2 + draw(*SHAPE, seed=4).square()
        pair = GaussianMixtureDenoiser.from_components(
            means, torch.stack([variances, variances]), ddim(), weights=torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        )
        w, x = 4.0, draw(3, *SHAPE)
        shifted = GaussianDenoiser.from_moments(means[0] + w * (means[1] - means[0]), variances, ddim())
        solution = pair.exact_ode_solution(x, 999, None, torch.zeros(3, dtype=torch.long), guidance_scale=w)
        torch.testing.assert_close(solution, shifted.exact_ode_solution(x, 999), rtol=0, atol=1e-10)


class TestPredictions:
    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_scheduler_reads_the_posterior_mean_from_each(self, make, kind):
        scheduler = DPMSolverMultistepScheduler(prediction_type=kind)
        model = make(scheduler)
        scheduler.set_timesteps(10)
        for index, t in ((0, scheduler.timesteps[0]), (7, scheduler.timesteps[7])):
            x = model.sample(3, t)
            scheduler._step_index = index
            read = scheduler.convert_model_output(model(x, t).sample, sample=x)
            torch.testing.assert_close(read, model.posterior_mean(x, t), rtol=0, atol=1e-4)  # its sigmas are float32

    def test_flow_is_noise_minus_data(self, make):
        model = make(FlowMatchEulerDiscreteScheduler())
        x = model.sample(3, 250)
        clean = model.posterior_mean(x, 250)
        noise = (x - 0.75 * clean) / 0.25
        torch.testing.assert_close(model(x, 250).sample, noise - clean, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
    def test_edm_scheduler_reads_the_posterior_mean(self, make, kind, sigma):
        scheduler = EDMEulerScheduler(prediction_type=kind)
        model = make(scheduler)
        noise = torch.tensor(sigma, dtype=torch.float64)
        state = model.sample(3) + noise * draw(3, *SHAPE, seed=8)
        seen, t = scheduler.precondition_inputs(state, noise), scheduler.precondition_noise(noise)
        read = scheduler.precondition_outputs(state, model(seen, t).sample, noise)
        torch.testing.assert_close(read, model.posterior_mean(seen, t), rtol=0, atol=1e-9)

    def test_continuous_euler_is_edm(self):
        options = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
        scheduler = EulerDiscreteScheduler(**options, sigma_min=0.002, sigma_max=80.0)
        coarse, fine = (sampler_error(scheduler, mixture(scheduler), n, draw(4, *SHAPE)).rmse for n in (20, 80))
        assert fine < coarse / 3 and fine < 0.05

    def test_float32_in_float32_out(self, make):
        model, x = make(), draw(3, *SHAPE)
        single = model(x.float(), 400).sample
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), model(x.float().double(), 400).sample, rtol=1e-6, atol=1e-6)
        assert model(x, 400, return_dict=False)[0].dtype == torch.float64

    def test_pure_noise_and_clean_data(self, make):
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        model, x = make(scheduler), draw(3, *SHAPE)
        mean = model.moments()[0].expand(3, *SHAPE)
        torch.testing.assert_close(model(x, 999).sample, -mean, rtol=0, atol=1e-12)  # alpha = 0: v = -x0
        torch.testing.assert_close(model.posterior_mean(x, 999), mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.posterior_mean(x, None), x, rtol=0, atol=1e-12)
        assert model(x, 998.5).sample.isfinite().all()

    @settings(max_examples=30, deadline=None)
    @given(t=st.floats(-1, 999), size=st.floats(1e-6, 1e6), row=st.integers(0, 2))
    def test_finite_everywhere(self, t, size, row):
        x = size * draw(1, *SHAPE, seed=row)
        for build in KINDS.values():
            model = build()
            assert model(x, t).sample.isfinite().all()
            assert model.log_prob(x, t).isfinite().all()

    def test_forward_mode_derivatives(self, make):
        """Of the sample and of the timestep, as statistics of a denoiser need them."""
        model, x, direction, t = make(), draw(2, *SHAPE), draw(2, *SHAPE, seed=1), torch.tensor(300.0).double()
        _, tangent = torch.func.jvp(lambda y, s: model(y, s).sample, (x, t), (direction, torch.ones_like(t)))
        h = 1e-5
        # One-sided in time: the schedule has a kink at whole timesteps.
        numeric = (model(x + h * direction, t + h).sample - model(x, t).sample) / h
        torch.testing.assert_close(tangent, numeric, rtol=1e-3, atol=1e-3)


class TestProcesses:
    def test_whole_timesteps_are_the_table(self):
        scheduler = ddim()
        process = gaussian(scheduler).noise_process
        alpha, sigma = process(torch.arange(1000), 1000, torch.device("cpu"))
        table = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(alpha**2, table, rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma**2, 1 - table, rtol=1e-9, atol=0)

    def test_between_them_it_inverts_the_schedulers(self):
        scheduler = HeunDiscreteScheduler()
        levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
        wanted = torch.tensor([0.05, 0.3, 2.345, 10.0], dtype=torch.float64)
        timesteps = scheduler._sigma_to_t(wanted.numpy(), levels.log().numpy())
        alpha, sigma = gaussian(scheduler).noise_process(torch.as_tensor(timesteps), 4, torch.device("cpu"))
        torch.testing.assert_close(sigma / alpha, wanted, rtol=1e-6, atol=0)  # its table is float32

    @pytest.mark.parametrize(
        ("scheduler", "t"),
        [
            (ddim(), -1.1),
            (ddim(), 1000),
            (ddim(), math.nan),
            (FlowMatchEulerDiscreteScheduler(), -1),
            (FlowMatchEulerDiscreteScheduler(), 1001),
        ],
    )
    def test_refuses_timesteps_outside(self, scheduler, t):
        with pytest.raises(ValueError, match="timesteps from"):
            gaussian(scheduler)(draw(1, *SHAPE), t)


class TestExactSolution:
    @pytest.mark.parametrize(("tolerance", "most"), [(1e-9, 200), (1e-12, 320)])
    def test_the_integrator_on_a_rotation(self, tolerance, most):
        """Of high order: a turn and a half to 12 digits in a few hundred evaluations."""
        calls = 0

        def field(y, t):
            nonlocal calls
            calls += 1
            return torch.stack([y[..., 1], -y[..., 0]], -1)

        for end in (10.0, -10.0):
            turned = integrate(field, torch.tensor([1.0, 0.0], dtype=torch.float64), 0.0, end, tolerance)
            assert turned.tolist() == pytest.approx([math.cos(end), -math.sin(end)], abs=10 * tolerance)
        assert calls < 2 * most

    def test_the_integrator_gives_up_on_what_is_not_smooth(self):
        with pytest.raises(RuntimeError, match="could not be solved"):
            integrate(lambda y, t: y * math.nan, torch.ones(1, dtype=torch.float64), 0.0, 1.0, 1e-9)

    @pytest.mark.parametrize("scheduler", [ddim(), FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
    def test_numerical_solution_agrees_with_the_closed_form(self, scheduler):
        closed, x = gaussian(scheduler), draw(4, *SHAPE)
        root = torch.linalg.cholesky(covariance()).reshape(1, *SHAPE, SIZE).expand(2, -1, -1, -1, -1)
        means = draw(*SHAPE, seed=2).expand(2, -1, -1, -1)
        numeric = LowRankMixtureDenoiser.from_components(means, root, 0.0, scheduler)
        for t_end in (None, 100):
            expected = closed.exact_ode_solution(x, 999, t_end)
            torch.testing.assert_close(numeric.exact_ode_solution(x, 999, t_end), expected, rtol=0, atol=1e-10)

    def test_one_dimensional_mixtures_keep_their_quantiles(self):
        """On a line the flow is monotone, so it takes each quantile of p_T to the same quantile of p_0."""
        means = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
        variances = torch.tensor([0.04, 0.3, 0.1], dtype=torch.float64)
        weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
        model = GaussianMixtureDenoiser.from_components(means.reshape(3, 1, 1, 1), variances, ddim(), weights)

        def quantile(x, t):
            alpha, sigma = model.noise_process(t, 1, torch.device("cpu"))
            deviation = (alpha**2 * variances + sigma**2).sqrt()
            return (weights * torch.special.ndtr((x.flatten()[:, None] - alpha * means) / deviation)).sum(1)

        x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
        for t_end in (300, None):
            end = model.exact_ode_solution(x, 999, t_end)
            torch.testing.assert_close(quantile(end, t_end), quantile(x, 999), rtol=0, atol=1e-10)

    def test_there_and_back(self):
        model, x = low_rank(), draw(3, *SHAPE)
        end = model.exact_ode_solution(x, 900, 50, tolerance=1e-9)
        torch.testing.assert_close(model.exact_ode_solution(end, 50, 900, tolerance=1e-9), x, rtol=0, atol=1e-6)

    def test_the_same_data_by_another_schedule(self):
        """The ODE depends on the signal-to-noise ratio only, so flow matching and DDPM end alike."""
        vp, flow, x = mixture(), mixture(FlowMatchEulerDiscreteScheduler()), draw(3, *SHAPE)
        alpha, sigma = (float(value) for value in vp.noise_process(600, 1, torch.device("cpu")))
        seen = x / (alpha + sigma)
        end = flow.exact_ode_solution(seen, 1000 * sigma / (alpha + sigma))
        torch.testing.assert_close(end, vp.exact_ode_solution(x, 600), rtol=0, atol=1e-10)

    def test_data_on_subspaces(self):
        """Without noise around it, the flow ends on a subspace; for one subspace the answer is in closed form."""
        scheduler = ddim()
        means, factors = draw(1, *SHAPE, seed=5), draw(1, *SHAPE, 2, seed=6)
        one = LowRankMixtureDenoiser.from_components(means, factors, 0.0, scheduler)
        two = LowRankMixtureDenoiser.from_components(
            means.expand(2, -1, -1, -1), factors.expand(2, -1, -1, -1, -1), 0.0, scheduler
        )
        x = draw(3, *SHAPE)
        numeric = two.exact_ode_solution(x, 999, tolerance=1e-9)
        torch.testing.assert_close(numeric, one.exact_ode_solution(x, 999), rtol=0, atol=1e-7)
        matrix = factors.reshape(SIZE, 2)
        offset = (one.exact_ode_solution(x, 999) - means).flatten(1).T
        rest = offset - matrix @ torch.linalg.lstsq(matrix, offset).solution
        assert float(rest.abs().max()) < 1e-10

    def test_a_singular_gaussian_sends_all_noise_to_its_plane(self):
        variances = torch.tensor([1.0, 0.0, 0.5, 0.0]).reshape(SHAPE)
        model = GaussianDenoiser.from_moments(torch.zeros(SHAPE), variances, ddim())
        end = model.exact_ode_solution(draw(3, *SHAPE), 999)
        assert float(end.flatten(1)[:, [1, 3]].abs().max()) == 0
        assert model(draw(3, *SHAPE), -1).sample.isfinite().all()
        with pytest.raises(ValueError, match="not unique"):
            model.exact_ode_solution(draw(3, *SHAPE), -1, 999)


# --- schedulers on them ----------------------------------------------------------------------------------------------

START = draw(8, *SHAPE, seed=11)


def order_of(scheduler_class, steps=(10, 20, 40), **options) -> tuple[float, float]:
    errors = []
    for n in steps:
        scheduler = scheduler_class(**options)
        errors.append(sampler_error(scheduler, gaussian(scheduler), n, START).rmse)
    return convergence_order(errors, steps), errors[-1]


class TestSchedulers:
    @pytest.mark.parametrize(
        ("scheduler_class", "options", "low", "high"),
        [
            (DDIMScheduler, {"timestep_spacing": "leading", "clip_sample": False}, 0.8, 1.3),
            (DPMSolverMultistepScheduler, {"solver_order": 1}, 0.8, 1.3),
            (DPMSolverMultistepScheduler, {"solver_order": 2}, 1.7, 3.0),
            (UniPCMultistepScheduler, {}, 1.7, 3.2),
            (HeunDiscreteScheduler, {}, 1.7, 2.8),
            (EulerDiscreteScheduler, {}, 0.8, 1.3),
            (PNDMScheduler, {"skip_prk_steps": False}, 1.7, 4.5),
            (FlowMatchEulerDiscreteScheduler, {}, 0.8, 1.4),
            (FlowMatchHeunDiscreteScheduler, {}, 1.7, 2.4),
            (EDMEulerScheduler, {}, 0.8, 1.4),
            (EDMDPMSolverMultistepScheduler, {}, 1.7, 3.2),
        ],
    )
    def test_converge_at_their_order(self, scheduler_class, options, low, high):
        order, last = order_of(scheduler_class, **options)
        assert low < order < high
        assert last < (0.1 if low < 1 else 0.02)

    def test_on_a_mixture(self):
        errors = {}
        for n in (10, 40):
            for scheduler in (ddim(), DPMSolverMultistepScheduler(timestep_spacing="trailing")):
                errors[type(scheduler), n] = sampler_error(scheduler, mixture(scheduler), n, START).rmse
        assert errors[DDIMScheduler, 40] < errors[DDIMScheduler, 10] / 2.5
        assert errors[DPMSolverMultistepScheduler, 40] < errors[DPMSolverMultistepScheduler, 10] / 6
        assert errors[DPMSolverMultistepScheduler, 40] < errors[DDIMScheduler, 40] / 4

    def test_a_faulty_scheduler_does_not_converge(self):
        class Faulty(DDIMScheduler):
            def step(self, model_output, *args, **kwargs):
                return super().step(1.02 * model_output, *args, **kwargs)

        order, last = order_of(Faulty, (20, 40, 80), timestep_spacing="leading", clip_sample=False)
        assert order < 0.5
        assert last > 2 * order_of(DDIMScheduler, (40, 80), timestep_spacing="leading", clip_sample=False)[1]

    def test_guided(self):
        labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        errors = {}
        for w in (1.0, 4.0):
            for n in (10, 80):
                result = sampler_error(ddim(), mixture(), n, START, labels, guidance_scale=w)
                errors[w, n] = result.rmse
                assert result.calls == n
        assert all(errors[w, 80] < errors[w, 10] / 3 for w in (1.0, 4.0))
        assert errors[4.0, 80] != errors[1.0, 80]

    def test_result_and_calls(self):
        scheduler = HeunDiscreteScheduler()
        denoiser = gaussian(scheduler)
        result = sampler_error(scheduler, denoiser, 10, START)
        assert result.calls == 19
        exact = denoiser.exact_ode_solution(START, float(scheduler.timesteps[0]))
        error = (result.result - exact).flatten(1).square().mean(1)
        torch.testing.assert_close(result.per_sample, error.sqrt())
        assert result.rmse == pytest.approx(float(error.mean().sqrt()))
        assert sampler_error(HeunDiscreteScheduler(), denoiser, 10, START, exact=exact).rmse == result.rmse

    @pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
    def test_end_before_clean_data(self, scheduler_class):
        """On a single point every solver is exact, up to the noise that it leaves; Euler's state is x / alpha."""
        scheduler = scheduler_class(final_sigmas_type="sigma_min")
        point = GaussianDenoiser.from_moments(draw(*SHAPE), torch.zeros(SHAPE), scheduler)
        at_zero, at_clean = (sampler_error(scheduler, point, 10, START, t_end=t).rmse for t in (0, None))
        assert at_zero < 1e-5
        assert 5e-3 < at_clean < 2e-2  # sigma_0 = 0.01

    @settings(max_examples=20, deadline=None)
    @given(order=st.floats(0.5, 4), scale=st.floats(1e-6, 1e3))
    def test_convergence_order_of_a_power_law(self, order, scale):
        steps = [5, 10, 25]
        assert convergence_order([scale * n**-order for n in steps], steps) == pytest.approx(order)


class TestPipelines:
    def test_ddim_pipeline_ends_at_the_exact_solution(self):
        """A stock pipeline in float64; it maps [-1, 1] to [0, 1] and clips, so the data are kept inside."""
        errors = []
        for n in (50, 100):
            scheduler = ddim()
            denoiser = GaussianDenoiser.from_moments(0.1 * draw(*SHAPE), 0.01 * covariance(), scheduler)
            pipe = DDIMPipeline(unet=denoiser, scheduler=scheduler)
            pipe.set_progress_bar_config(disable=True)
            options = {"num_inference_steps": n, "output_type": "pt"}
            images = pipe(batch_size=8, generator=torch.Generator().manual_seed(0), **options).images
            noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            exact = denoiser.exact_ode_solution(noise, 999) / 2 + 0.5
            assert float(exact.min()) > 0 and float(exact.max()) < 1
            errors.append(float((images - exact).square().mean().sqrt()))
        assert errors[1] < errors[0] / 1.6 and errors[1] < 0.01

    def test_ddpm_pipeline_samples_the_data(self):
        scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
        means = 0.2 * draw(3, *SHAPE, seed=3).clamp(-2, 2)
        denoiser = GaussianMixtureDenoiser.from_components(means, 0.02, scheduler, torch.tensor([1.0, 2.0, 1.0]))
        pipe = DDPMPipeline(unet=denoiser, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        (mean, spread), n, errors = denoiser.moments(), 2000, {}
        deviation = spread.diagonal().sqrt()
        for steps in (15, 150):
            images = pipe(n, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt").images
            data = (2 * images - 1).flatten(1)
            assert float(((data.mean(0) - mean.flatten()) / deviation).abs().max()) < 5 / n**0.5
            errors[steps] = float(((data.T.cov() - spread) / (deviation[:, None] * deviation)).abs().max())
        # Its variance is that of known data, too small by a share that falls with the number of steps.
        assert errors[150] < 0.25 and errors[15] > 2.5 * errors[150]

    def test_few_steps_distort_what_many_sample_right(self):
        denoiser = mixture()
        start = denoiser.sample(4000, 999)
        exact, spread = denoiser.moments()[1], {}
        for n in (3, 60):
            result = sampler_error(ddim(), denoiser, n, start, exact=torch.zeros_like(start)).result
            spread[n] = float((result.flatten(1).T.cov() - exact).norm() / exact.norm())
        assert spread[60] < 0.1 < spread[3]

    @pytest.mark.parametrize("scheduler", [ddim(), FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
    def test_saved_and_loaded(self, make, scheduler, tmp_path):
        model = make(scheduler)
        model.save_pretrained(tmp_path)
        assert [file.suffix for file in tmp_path.iterdir() if file.name != "config.json"] == [".safetensors"]
        loaded = type(model).from_pretrained(tmp_path)
        state, again = model.state_dict(), loaded.state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) and again[key].dtype == torch.float64 for key in state)
        assert {key: value for key, value in loaded.config.items() if key[0] != "_"} == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.config.items()
            if key[0] != "_"
        }
        x, t = draw(2, *SHAPE), -0.3 if scheduler.config.get("sigma_data") else 300
        assert torch.equal(loaded(x, t).sample, model(x, t).sample)
        assert type(model).from_config(model.config).config == model.config

    def test_loads_inside_a_stock_pipeline(self, tmp_path):
        DDIMPipeline(unet=mixture(), scheduler=ddim()).save_pretrained(tmp_path)
        pipe = DDIMPipeline.from_pretrained(tmp_path, dtype=torch.float64)
        assert isinstance(pipe.unet, GaussianMixtureDenoiser)
        x = draw(2, *SHAPE)
        assert torch.equal(pipe.unet(x, 300).sample, mixture()(x, 300).sample)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian()(draw(2, 3, 1, 2), 3), "`sample` has shape"),
        (lambda: gaussian()(draw(3, *SHAPE), torch.zeros(2)), "`timestep` has shape"),
        (lambda: mixture()(draw(2, *SHAPE), 3, torch.tensor([0, 4])), "allowed are 0 to 3"),
        (lambda: mixture()(draw(2, *SHAPE), 3, torch.tensor([0.0, 1.0])), "must hold integers"),
        (lambda: low_rank(noise=0.0)(draw(2, *SHAPE), -1), "no density"),
        (lambda: low_rank(noise=0.0).log_prob(draw(2, *SHAPE)), "no density"),
        (lambda: gaussian().sample(0), "`n` is 0"),
        (lambda: gaussian(object()), "`scheduler` is"),
        (lambda: gaussian(VQDiffusionScheduler(10)), "`scheduler` is VQDiffusionScheduler"),
        (lambda: gaussian(DPMSolverMultistepScheduler(prediction_type="flow_prediction")), "`scheduler` is DPM"),
        (lambda: GaussianDenoiser(covariance="banded"), "`covariance` is 'banded'"),
        (lambda: GaussianDenoiser(process="cosine"), "`process` is 'cosine'"),
        (lambda: GaussianDenoiser(prediction_type="noise"), "`prediction_type` is 'noise'"),
        (lambda: GaussianDenoiser(process="edm", prediction_type="sample"), "`prediction_type` is 'sample'"),
        (lambda: GaussianDenoiser(in_channels=0), "`in_channels` is 0"),
        (lambda: GaussianDenoiser(sigma_data=0.0), "`sigma_data` is 0.0"),
        (lambda: GaussianMixtureDenoiser(num_components=0), "`num_components` is 0"),
        (lambda: LowRankMixtureDenoiser(rank=5), "`rank` is 5"),
        (lambda: GaussianDenoiser.from_moments(draw(4), torch.eye(4), ddim()), "`mean` has shape"),
        (lambda: GaussianDenoiser.from_moments(draw(*SHAPE), torch.eye(3), ddim()), "`covariance` has shape"),
        (lambda: GaussianDenoiser.from_moments(draw(*SHAPE), -torch.eye(4), ddim()), "has the eigenvalue -1"),
        (lambda: GaussianDenoiser.from_moments(draw(*SHAPE), -torch.ones(SHAPE), ddim()), "has the variance -1"),
        (lambda: GaussianDenoiser.from_moments(draw(*SHAPE), torch.ones(4, 4).triu(), ddim()), "not symmetric"),
        (
            lambda: GaussianMixtureDenoiser.from_components(draw(2, *SHAPE), torch.ones(3), ddim()),
            "`variances` has shape",
        ),
        (lambda: GaussianMixtureDenoiser.from_components(draw(2, *SHAPE), -1.0, ddim()), "`variances` has the value"),
        (
            lambda: GaussianMixtureDenoiser.from_components(draw(2, *SHAPE), 1.0, ddim(), torch.ones(3)),
            "`weights` has shape",
        ),
        (
            lambda: GaussianMixtureDenoiser.from_components(draw(2, *SHAPE), 1.0, ddim(), labels=torch.tensor([0, 2])),
            "no component to class 1",
        ),
        (
            lambda: GaussianMixtureDenoiser.from_components(draw(2, *SHAPE), 1.0, ddim(), labels=torch.tensor([0])),
            "`labels` is",
        ),
        (
            lambda: GaussianMixtureDenoiser.from_components(
                draw(2, *SHAPE), 1.0, ddim(), torch.ones(2, 2), torch.tensor([0, 1])
            ),
            "give one of them",
        ),
        (
            lambda: LowRankMixtureDenoiser.from_components(draw(2, *SHAPE), draw(2, *SHAPE, 5), 0.1, ddim()),
            "`factors` has shape",
        ),
        (
            lambda: LowRankMixtureDenoiser.from_components(draw(2, *SHAPE), draw(2, *SHAPE, 1), -0.1, ddim()),
            "`noise` is",
        ),
        (lambda: sampler_error(ddim(), mixture(), 5, START, guidance_scale=2.0), "without `class_labels`"),
        (lambda: sampler_error(ddim(beta_end=0.03), mixture(), 5, START), "another noise schedule"),
        (lambda: sampler_error(FlowMatchEulerDiscreteScheduler(), mixture(), 5, START), "process 'flow'"),
        (lambda: convergence_order([1.0, 0.5], [10]), "`errors` is"),
        (lambda: convergence_order([1.0, 0.0], [10, 20]), "`errors` is"),
        (lambda: convergence_order([1.0, 0.5], [10, 10]), "`errors` is"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_are_imported_when_used():
    assert set(oracles.__all__) <= set(dir(oracles))
    for name in oracles.__all__:
        assert getattr(oracles, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        oracles.Nothing  # noqa: B018
