"""The exponential-integrator core: its functions against slow exact arithmetic, and its steps against known solvers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.oracles import GaussianMixtureDenoiser, convergence_order, sampler_error
from diffusers_ext.schedulers._exponential import (
    Point,
    combine,
    difference_weights,
    midpoint_scale,
    phi,
    step_weights,
)
from tests.multistep import MultistepScheduler


def slow_phi(order: int, z: float) -> Fraction:
    """The power series of phi, summed in fractions until what is left cannot matter."""
    x, term, total, j = Fraction(z), Fraction(1, math.factorial(order)), Fraction(0), 0
    while abs(term) > Fraction(1, 10**45) or j < 2 * abs(z):
        total += term
        j += 1
        term = term * x / (j + order)
        term = Fraction(round(term * 10**60), 10**60)  # short numbers
    return total


@pytest.mark.parametrize("order", range(6))
def test_phi_against_its_series_in_fractions(order):
    grid = [0.0, 1e-300, 1e-12, 1e-4, 0.3, 0.999999, 1.0, 1.000001, 2.5, 7.0, 20.0, 60.0]
    for z in [*grid, *(-z for z in grid)]:
        exact = slow_phi(order, z)
        assert abs(Fraction(phi(order, z)) - exact) <= abs(exact) * Fraction(1, 10**12), z


@pytest.mark.parametrize("order", range(1, 6))
def test_phi_is_the_integral_that_it_stands_for(order):
    """phi_k(z) = int_0^1 exp((1 - r) z) r^(k - 1) / (k - 1)! dr, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r = (nodes + 1) / 2
    for z in (-30.0, -3.0, -0.5, 0.5, 3.0, 12.0):
        value = float(np.sum(weights / 2 * np.exp((1 - r) * z) * r ** (order - 1)) / math.factorial(order - 1))
        assert phi(order, z) == pytest.approx(value, rel=1e-12)


offsets = st.lists(
    st.floats(0.01, 6.0).flatmap(lambda x: st.sampled_from([x, -x])), min_size=1, max_size=4, unique=True
).filter(lambda values: min(abs(a - b) for a in (0.0, *values) for b in (0.0, *values) if a != b) > 0.01)


@settings(max_examples=200, deadline=None)
@given(offsets=offsets, data=st.data())
def test_difference_weights_are_exact_for_polynomials(offsets, data):
    n = len(offsets)
    derivative = data.draw(st.integers(1, n))
    coefficients = data.draw(st.lists(st.integers(-5, 5), min_size=n + 1, max_size=n + 1))
    exact = math.factorial(derivative) * coefficients[derivative]
    weights = difference_weights(offsets, derivative)
    values = [sum(c * Fraction(o) ** k for k, c in enumerate(coefficients)) - coefficients[0] for o in offsets]
    found = sum(Fraction(float(w)) * v for w, v in zip(weights, values, strict=True))
    size = sum(abs(float(w) * float(v)) for w, v in zip(weights, values, strict=True))
    condition = np.linalg.cond(np.stack([(np.array(offsets) / max(map(abs, offsets))) ** q for q in range(1, n + 1)]))
    assert abs(float(found) - exact) <= 1e-13 * condition * (size + abs(exact) + 1)


def test_difference_weights_of_textbooks():
    np.testing.assert_allclose(difference_weights([-1, 1], 1), [-0.5, 0.5])  # central differences
    np.testing.assert_allclose(difference_weights([-1, 1], 2), [1, 1])
    np.testing.assert_allclose(difference_weights([-1, -2], 1), [-2, 0.5])  # backward, of second order
    np.testing.assert_allclose(difference_weights([0.5], 1), [2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: difference_weights([1.0], 2), "`derivative` is 2"),
        (lambda: difference_weights([1.0], 0), "`derivative` is 0"),
        (lambda: difference_weights([1.0, 1.0], 1), "`offsets` is"),
        (lambda: difference_weights([1.0, 0.0], 1), "`offsets` is"),
        (lambda: step_weights("score", Point(0.6, 0.8), Point(0.8, 0.6)), "`kind` is 'score'"),
        (lambda: step_weights("data", Point(0.6, 0.8), Point(0.8, 0.6), order=2), "`order` is 2"),
        (lambda: step_weights("data", Point(0.6, 0.8), Point(0.8, 0.6), order=0), "`order` is 0"),
        (lambda: step_weights("data", Point(0.6, 0.8), Point(0.8, 0.6), [-1.0], counts=[2]), "`counts` is"),
        (lambda: step_weights("data", Point(0.6, 0.8), Point(0.8, 0.6), [-1.0, -2.0], 3, counts=[1, 1]), "`counts` is"),
        (lambda: step_weights("data", Point(0.6, 0.8), Point(1.0, 0.0), [-1.0]), "`order` is 2 of kind 'data'"),
        (lambda: step_weights("noise", Point(0.6, 0.8), Point(1.0, 0.0)), "`order` is 1 of kind 'noise'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- a step ----------------------------------------------------------------------------------------------------------


def at(lambda_: float, flow: bool) -> Point:
    """The point of half log-SNR `lambda_`, of either process."""
    ratio = math.exp(-lambda_)
    return (
        Point(1 / (1 + ratio), ratio / (1 + ratio))
        if flow
        else Point(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
    )


def exact_step(kind: str, start: Point, end: Point, x: float, prediction) -> float:
    """The variation-of-constants formula by quadrature, with a prediction that is a function of lambda - lambda_s."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    h = end.lambda_ - start.lambda_
    tau = (nodes + 1) / 2 * h
    sign, linear, factor = (
        (-1, end.alpha / start.alpha, end.sigma) if kind == "noise" else (1, end.sigma / start.sigma, end.alpha)
    )
    # noise: -sigma_t int exp(h - tau) m(tau) dtau; data: alpha_t int exp(tau - h) m(tau) dtau.
    kernel = np.exp(-sign * (h - tau))
    return linear * x + sign * factor * float(np.sum(weights * h / 2 * kernel * prediction(tau)))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["noise", "data"]), flow=st.booleans(), start=st.floats(-4, 3), h=st.floats(0.01, 4),
    offsets=offsets, coefficients=st.lists(st.floats(-1, 1), min_size=5, max_size=5), x=st.floats(-2, 2),
)  # fmt: skip
def test_a_step_is_exact_where_predictions_are_polynomials(kind, flow, start, h, offsets, coefficients, x):
    degree = len(offsets)

    def prediction(tau):
        return sum(c * (np.asarray(tau) / 4) ** k for k, c in enumerate(coefficients[: degree + 1]))

    s, t = at(start, flow), at(start + h, flow)
    weights = step_weights(kind, s, t, offsets)
    values = [float(prediction(0.0)), *(float(prediction(o)) for o in offsets)]
    found = weights.state * x + sum(w * v for w, v in zip(weights.predictions, values, strict=True))
    size = 1 + abs(weights.state * x) + sum(abs(w * v) for w, v in zip(weights.predictions, values, strict=True))
    scaled = np.array(offsets) / max(map(abs, offsets))
    condition = np.linalg.cond(np.stack([scaled**q for q in range(1, degree + 1)]))
    assert abs(found - exact_step(kind, s, t, x, prediction)) < 1e-13 * condition * size


@pytest.mark.parametrize("kind", ["noise", "data"])
def test_a_step_of_no_length_is_none_and_two_halves_of_order_1_are_close_to_one(kind):
    s, t = at(0.3, False), at(0.9, False)
    assert step_weights(kind, s, s).state == 1.0
    assert step_weights(kind, s, s).predictions == (0.0,)
    middle = at(0.6, False)
    first, second, whole = step_weights(kind, s, middle), step_weights(kind, middle, t), step_weights(kind, s, t)
    # With the same prediction at both points order 1 is exact, so two halves are the whole.
    assert second.state * first.state == pytest.approx(whole.state, rel=1e-14)
    assert second.state * first.predictions[0] + second.predictions[0] == pytest.approx(whole.predictions[0], rel=1e-13)


def test_order_1_is_ddim():
    """DDIM: keep the predicted noise and data, change their shares (Song et al. 2021, equation 12)."""
    s, t = at(-1.2, False), at(0.4, False)
    for kind in ("noise", "data"):
        weights = step_weights(kind, s, t)
        data, noise = 0.7, -0.4
        x = s.alpha * data + s.sigma * noise
        found = weights.state * x + weights.predictions[0] * (noise if kind == "noise" else data)
        assert found == pytest.approx(t.alpha * data + t.sigma * noise, rel=1e-13)


def test_the_step_to_clean_data_is_the_limit_of_steps_towards_it():
    s = at(2.0, False)
    near, end = step_weights("data", s, at(18.0, False)), step_weights("data", s, Point(1.0, 0.0), [-0.7], 1)
    assert end == (0.0, (1.0, 0.0))
    assert near.predictions[0] == pytest.approx(1.0, abs=1e-6) and near.state == pytest.approx(0.0, abs=1e-6)


def test_a_step_from_pure_noise():
    end = at(-3.0, True)
    weights = step_weights("data", Point(0.0, 1.0), end)
    assert (weights.state, *weights.predictions) == pytest.approx((end.sigma, end.alpha), rel=1e-14)


def test_counts_and_scales_reach_their_own_terms_only():
    s, t, past = at(0.0, False), at(0.7, False), [-0.5, -1.1]
    full = step_weights("data", s, t, past)
    h = 0.7
    second = t.alpha * h**3 * phi(3, -h) * difference_weights(past, 2)
    first = t.alpha * h**2 * phi(2, -h) * difference_weights(past, 1)
    halved = step_weights("data", s, t, past, second_derivative_scale=0.5)
    np.testing.assert_allclose(np.array(full.predictions[1:]) - halved.predictions[1:], second / 2, rtol=1e-12)
    doubled = step_weights("data", s, t, past, first_derivative_scale=2.0)
    np.testing.assert_allclose(np.array(doubled.predictions[1:]) - full.predictions[1:], first, rtol=1e-12)
    short = step_weights("data", s, t, past, counts=[1, 2])
    other = t.alpha * h**2 * phi(2, -h) * np.array([1 / past[0], 0.0])
    np.testing.assert_allclose(short.predictions[1:], other + second, rtol=1e-12)
    assert sum(short.predictions) == pytest.approx(sum(full.predictions), rel=1e-12), "constants are exact all the same"


@pytest.mark.parametrize("kind", ["noise", "data"])
@pytest.mark.parametrize("h", [1e-9, 0.2, 1.0, 5.0])
def test_midpoint_scale_is_the_formula_of_the_papers(kind, h):
    z = h if kind == "noise" else -h
    exact = Fraction(z) * (slow_phi(1, z)) / (2 * (slow_phi(1, z) - 1)) if h > 1e-6 else 1 + Fraction(z) / 6
    assert midpoint_scale(kind, h) == pytest.approx(float(exact), rel=1e-9)


def test_combine_changes_none_of_its_inputs_and_keeps_the_dtype():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, *predictions = (torch.randn(2, 3, generator=generator).to(dtype) for _ in range(3))
        kept = [part.clone() for part in (x, *predictions)]
        weights = step_weights("data", at(0.0, False), at(0.5, False), [-0.4])
        found = combine(weights, x, predictions)
        assert found.dtype == dtype and all(torch.equal(a, b) for a, b in zip(kept, (x, *predictions), strict=True))
        expected = weights.state * x.double() + sum(
            w * m.double() for w, m in zip(weights.predictions, predictions, strict=True)
        )
        torch.testing.assert_close(found.double(), expected, rtol=0, atol={torch.bfloat16: 0.05}.get(dtype, 1e-6))


# --- whole runs ------------------------------------------------------------------------------------------------------


def mixture(scheduler) -> GaussianMixtureDenoiser:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    return GaussianMixtureDenoiser.from_components(means, torch.tensor([0.05, 0.2, 0.1]), scheduler)


@pytest.mark.parametrize("kind", ["data", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_empirical_order_of_convergence(order, kind):
    scheduler = MultistepScheduler(
        solver_order=order, kind=kind, use_exponential_sigmas=True, final_sigmas_type="sigma_min"
    )
    denoiser = mixture(scheduler)
    x = torch.randn((4, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = {1: (80, 160), 2: (80, 160), 3: (120, 240), 4: (160, 320)}[order]
    scheduler.set_timesteps(10)
    exact = denoiser.exact_ode_solution(x, float(scheduler.timesteps[0]), 0.0)
    errors = [sampler_error(scheduler, denoiser, n, x, t_end=0.0, exact=exact).rmse for n in numbers]
    assert abs(convergence_order(errors, numbers) - order) < 0.35, errors


def run(scheduler, num_steps: int) -> torch.Tensor:
    """A run in float64 with the exact denoiser, from the same noise."""
    denoiser = mixture(scheduler)
    x = torch.randn((2, 1, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t).sample, t, x, return_dict=False)[0]
    return x


COMMON = {"timestep_spacing": "linspace"}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("kind", ["heun", "midpoint"])
def test_order_2_is_dpm_solver_pp_2m_of_diffusers(kind, num_steps):
    ours = MultistepScheduler(solver_order=2, midpoint=kind == "midpoint", **COMMON)
    theirs = DPMSolverMultistepScheduler(solver_order=2, solver_type=kind, **COMMON)
    # Theirs has its grid in float32.
    torch.testing.assert_close(run(ours, num_steps), run(theirs, num_steps), rtol=0, atol=2e-5)


def test_order_1_is_ddim_of_diffusers():
    ours = MultistepScheduler(solver_order=1, timestep_spacing="trailing")
    theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    torch.testing.assert_close(run(ours, 10), run(theirs, 10), rtol=0, atol=2e-5)


def unip(kind: str, start: Point, end: Point, past: list[Point], x: float, values: list[float]) -> float:
    """One step of UniP with `bh2`, in float64, by the classes of diffusers."""
    scheduler = UniPCMultistepScheduler(
        solver_order=len(values), predict_x0=kind == "data", solver_type="bh2", disable_corrector=list(range(10))
    )
    scheduler.set_timesteps(10)
    points = [*past[::-1], start, end]
    scheduler.sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    scheduler.model_outputs = [torch.tensor([[v]], dtype=torch.float64) for v in values[::-1]]
    scheduler._step_index = len(past)
    return float(
        scheduler.multistep_uni_p_bh_update(
            scheduler.model_outputs[-1], sample=torch.tensor([[x]], dtype=torch.float64), order=len(values)
        )
    )


@pytest.mark.parametrize("kind", ["noise", "data"])
def test_order_2_and_3_are_unip_of_diffusers_in_float64(kind):
    past, start, end = [at(-0.5, False), at(-1.3, False)], at(0.1, False), at(0.9, False)
    x, values = 0.8, [0.3, -0.2, 0.5]
    offsets = [p.lambda_ - start.lambda_ for p in past]
    second = step_weights(kind, start, end, offsets[:1], first_derivative_scale=midpoint_scale(kind, 0.8))
    third = step_weights(kind, start, end, offsets)
    for weights in (second, third):
        used = values[: len(weights.predictions)]
        found = weights.state * x + sum(w * v for w, v in zip(weights.predictions, used, strict=True))
        assert found == pytest.approx(unip(kind, start, end, past[: len(used) - 1], x, used), rel=1e-9)
