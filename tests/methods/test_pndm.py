"""PNDM, which diffusers has: what its schedulers compute, against the paper's algorithms and exact answers."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import DDIMScheduler, IPNDMScheduler, PNDMScheduler

from diffusers_ext.oracles import GaussianDenoiser, convergence_order, sampler_error

exact = pytest.mark.proof("exact")
PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + t / 1000)


def transfer(bar: torch.Tensor, x: torch.Tensor, e: torch.Tensor, t: int, to: int) -> torch.Tensor:
    """Equation 11 of the paper; before the first timestep there is clean data."""
    a, b = bar[t], bar[to] if to >= 0 else torch.ones((), dtype=bar.dtype)
    return (b / a).sqrt() * x - (b - a) / (a.sqrt() * (((1 - b) * a).sqrt() + ((1 - a) * b).sqrt())) * e


@exact
@pytest.mark.parametrize("skip_prk_steps", [False, True])
def test_a_constant_noise_is_carried_as_by_ddim(skip_prk_steps):
    """All weights sum to one, and the transfer is that of DDIM."""
    scheduler = PNDMScheduler(**PROCESS, skip_prk_steps=skip_prk_steps, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    x, e, bar = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), scheduler.alphas_cumprod.double()
    start = int(scheduler.timesteps[0])
    wanted = (x - (1 - bar[start]).sqrt() * e) / bar[start].sqrt()
    for t in scheduler.timesteps:
        x = scheduler.step(e, t, x).prev_sample
    assert (x - wanted).abs().max() < 1e-4


@exact
def test_the_first_step_is_that_of_ddim():
    x = noise(2, 3, 4, 4)
    plms = PNDMScheduler(**PROCESS, skip_prk_steps=True)
    ddim = DDIMScheduler(**PROCESS, clip_sample=False)
    plms.set_timesteps(10)
    ddim.set_timesteps(10)
    t = plms.timesteps[0]
    assert t == ddim.timesteps[0]
    first, other = (scheduler.step(model(x, float(t)), t, x).prev_sample for scheduler in (plms, ddim))
    assert (first - other).abs().max() < 1e-6


@exact
def test_it_is_the_paper_s_algorithm():
    """F-PNDM: three pseudo Runge-Kutta steps of four calls, then the pseudo linear multistep, written down in float64."""
    scheduler = PNDMScheduler(**PROCESS, skip_prk_steps=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10 + 9
    bar, step, kept = scheduler.alphas_cumprod.double(), 100, []
    x = y = noise(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x).prev_sample
    for t in range(900, -1, -step):
        e = e1 = model(y, t)
        if len(kept) < 3:
            half = t - step // 2
            e2 = model(transfer(bar, y, e1, t, half), half)
            e3 = model(transfer(bar, y, e2, t, half), half)
            e4 = model(transfer(bar, y, e3, t, t - step), t - step)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            e = (55 * e1 - 59 * kept[-1] + 37 * kept[-2] - 9 * kept[-3]) / 24
        kept.append(e1)
        y = transfer(bar, y, e, t, t - step)
    assert (x - y).abs().max() < 1e-5


@exact
@pytest.mark.parametrize("skip_prk_steps", [False, True])
def test_order_of_convergence(skip_prk_steps):
    """At least 2 on an exact Gaussian; steps that divide the number of timesteps, others do not add up to the grid."""
    scheduler = PNDMScheduler(skip_prk_steps=skip_prk_steps)
    denoiser = GaussianDenoiser.from_moments(noise(1, 2, 2), torch.full((1, 2, 2), 0.5), scheduler)
    errors, steps = [], (20, 40, 100)
    for number in steps:
        x = noise(8, 1, 2, 2)
        errors.append(sampler_error(scheduler, denoiser, number, x, t_end=0.0).rmse)
    assert convergence_order(errors, steps) > 2, errors


@exact
def test_ipndm_carries_a_constant_noise_exactly():
    """Its process is its own: sigma = sin^2 of the time, and timesteps from 1 down."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(1)  # at the first there is no data in the state
    clean, e = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    x = scheduler.alphas[1] * clean + scheduler.betas[1] * e
    for i, t in enumerate(scheduler.timesteps[1:], start=1):
        velocity = (e - scheduler.betas[i] * x) / scheduler.alphas[i]  # what its model predicts
        x = scheduler.step(velocity, t, x).prev_sample
    assert (x - clean).abs().max() < 1e-5


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe):
    from diffusers_ext.cards import method_card

    card = method_card("pndm")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2202.09778" in card
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert type(names["pipe"].scheduler) is PNDMScheduler and names["image"].size == (32, 32)
