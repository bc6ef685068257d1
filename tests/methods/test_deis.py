"""DEIS, which diffusers has: what its scheduler computes, against quadrature and exact answers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler

from benchmarks._sampler_peers import fitting
from diffusers_ext.oracles import GaussianMixtureDenoiser, convergence_order, sampler_error

exact = pytest.mark.proof("exact")
PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@exact
def test_order_1_is_ddim():
    x = y = noise(2, 3, 4, 4)
    first = DEISMultistepScheduler(**PROCESS, solver_order=1)
    ddim = DDIMScheduler(**PROCESS, set_alpha_to_one=False, clip_sample=False)  # ends where DEIS does
    first.set_timesteps(20)
    ddim.set_timesteps(20)
    assert first.timesteps.tolist() == ddim.timesteps.tolist()
    for t in first.timesteps:
        x = first.step(torch.tanh(x + t / 1000), t, x).prev_sample
        y = ddim.step(torch.tanh(y + t / 1000), t, y).prev_sample
        assert (x - y).abs().max() < 1e-5


@exact
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_a_constant_noise_is_integrated_exactly(solver_order):
    """The weights of a step sum to that of DDIM: `x / alpha` moves by the step in rho = sigma / alpha."""
    scheduler = DEISMultistepScheduler(**PROCESS, solver_order=solver_order)
    scheduler.set_timesteps(20)
    x, epsilon = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    rho = scheduler.sigmas.double()
    clean = x * (1 + rho[0] ** 2).sqrt() - rho[0] * epsilon
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(epsilon, t, x).prev_sample
        assert (x * (1 + rho[i + 1] ** 2).sqrt() - rho[i + 1] * epsilon - clean).abs().max() < 1e-4 * rho[0]


@exact
@pytest.mark.parametrize("solver_order", [2, 3])
def test_a_step_integrates_the_polynomial_in_log_rho(solver_order):
    """Against Gauss-Legendre quadrature of the Lagrange polynomial through the last outputs."""
    scheduler = DEISMultistepScheduler(**PROCESS, solver_order=solver_order)
    scheduler.set_timesteps(16)
    rho, x = scheduler.sigmas.double().numpy(), noise(1, 1, 4, 4)
    outputs = [noise(1, 1, 4, 4, seed=seed + 1) for seed in range(16)]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for i, t in enumerate(scheduler.timesteps):
        after = scheduler.step(outputs[i], t, x).prev_sample
        count = min(i + 1, solver_order)
        middle, half = (rho[i + 1] + rho[i]) / 2, (rho[i + 1] - rho[i]) / 2
        at = middle + half * nodes
        wanted = x * (1 + rho[i] ** 2) ** 0.5
        for j in range(count):
            basis = np.ones_like(at)
            for k in range(count):
                if k != j:
                    basis *= (np.log(at) - np.log(rho[i - k])) / (np.log(rho[i - j]) - np.log(rho[i - k]))
            wanted = wanted + half * float(weights @ basis) * outputs[i - j]
        wanted = wanted / (1 + rho[i + 1] ** 2) ** 0.5
        assert (after - wanted).abs().max() < 1e-4 * wanted.abs().max()
        x = after


@exact
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_order_of_convergence(solver_order):
    scheduler = fitting(DEISMultistepScheduler, unrounded=True)(use_exponential_sigmas=True, solver_order=solver_order)
    denoiser = GaussianMixtureDenoiser.from_components(noise(3, 1, 1, 2), 0.25, scheduler)
    x, steps = (
        noise(8, 1, 1, 2),
        (11, 21, 41),
    )  # the last step of such a grid stands still; more, and float32 weights of order 3 cancel
    solution = denoiser.exact_ode_solution(x, 999.0, 0.0, tolerance=1e-11)
    errors = [sampler_error(scheduler, denoiser, n, x, exact=solution).per_sample.median().item() for n in steps]
    found = convergence_order(errors, [n - 1 for n in steps])
    assert solver_order - 0.4 < found < solver_order + 0.8, errors


@exact
def test_it_ends_at_the_first_training_timestep_and_cannot_otherwise():
    """Where others go on to clean data. With other grids it calls the model once more, for a step that goes nowhere."""
    for options, last in (
        ({}, 0.0292),
        ({"use_karras_sigmas": True}, 0.0292),
        ({"use_exponential_sigmas": True}, 0.0292),
    ):
        scheduler = DEISMultistepScheduler(**PROCESS, **options)
        scheduler.set_timesteps(10)
        assert float(scheduler.sigmas[-1]) == pytest.approx(last, abs=1e-4)
        assert (float(scheduler.sigmas[-2]) == float(scheduler.sigmas[-1])) == bool(options)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe):
    from diffusers_ext.cards import method_card

    card = method_card("deis")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2204.13902" in card
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert type(names["pipe"].scheduler) is DEISMultistepScheduler and names["image"].size == (32, 32)
