"""Gradients through whole runs: equal to those of the full graph, with the memory of one step."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from diffusers_ext.training._chain import backpropagate, last_sample, pipeline_loop
from diffusers_ext.training._data import SampleNoise
from tests.common.models import STOCKS

IDS = torch.tensor([3, 8])
SCHEDULERS = {
    "ddim": (DDIMScheduler(clip_sample=False), {}),
    "ddim, eta 1": (DDIMScheduler(clip_sample=False), {"eta": 1.0}),
    "ddpm": (DDPMScheduler(clip_sample=False), {}),
    "euler": (EulerDiscreteScheduler(), {}),
    "euler with churn": (EulerDiscreteScheduler(), {"s_churn": 2.0}),
    "euler ancestral": (EulerAncestralDiscreteScheduler(), {}),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
}


class Denoiser(nn.Module):
    """A guided network whose output depends on time and is not linear in the sample."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, x + 1.0])  # "prompts"
        without, given = self.outer(torch.tanh(self.inner(both) + t / 1000)).chunk(2)
        return without + 2.0 * (given - without)


def plain_loop(denoise, steps, options, scheduler, seed=1):
    """A sampler as anyone would write it; `seed` is that of the noise in the steps."""
    scheduler.set_timesteps(steps)
    x = SampleNoise(5, IDS).normal(6) * getattr(scheduler, "init_noise_sigma", 1.0)
    drawn = {"generator": SampleNoise(seed, IDS).generators} if scheduler.config.get("shift") is None else {}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoise(given, t), t, x, return_dict=False, **drawn, **options)[0]
    return x


def loss_of(sample: torch.Tensor) -> torch.Tensor:
    return (sample - 0.5).square().mean()


def relative(found, wanted) -> float:
    scale = max(gradient.abs().max().item() for gradient in wanted)
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) / scale


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_gradient_is_that_of_the_full_graph(name, checkpoint):
    scheduler, options = SCHEDULERS[name]
    denoiser = Denoiser()
    parameters = list(denoiser.parameters())
    sample = plain_loop(denoiser, 6, options, type(scheduler).from_config(scheduler.config))
    wanted = torch.autograd.grad(loss_of(sample), parameters)
    loop = functools.partial(plain_loop, denoiser, 6, options)
    found = backpropagate(loop, scheduler, loss_of, parameters, checkpoint=checkpoint)
    assert relative(found.gradients, wanted) < 1e-5
    assert torch.equal(found.sample, sample) and found.loss == loss_of(sample) and not found.loss.requires_grad
    assert torch.equal(last_sample(loop, scheduler), sample)
    assert all(parameter.grad is None for parameter in parameters) and torch.is_grad_enabled()


def test_noise_that_is_not_drawn_again_is_noticed():
    """Of the denoiser itself, such as dropout: the gradient would be another one, without a sign of it."""
    denoiser, generator = Denoiser(), torch.Generator().manual_seed(0)

    def noisy(x, t):
        return denoiser(x, t) * (1 + 0.1 * torch.rand(6, generator=generator))

    loop = functools.partial(plain_loop, noisy, 4, {})
    with pytest.raises(RuntimeError, match="A step taken again gives something else"):
        backpropagate(loop, DDIMScheduler(clip_sample=False), loss_of, list(denoiser.parameters()))
    assert torch.is_grad_enabled()


def test_noise_of_the_global_generator_is_drawn_again():
    """Loops that hand no generator on, such as that of `DiTPipeline`."""
    denoiser = Denoiser()

    def loop(scheduler):
        scheduler.set_timesteps(5)
        x = SampleNoise(5, IDS).normal(6)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t), t, x).prev_sample
        return x

    parameters = list(denoiser.parameters())
    torch.manual_seed(3)
    sample = loop(DDPMScheduler(clip_sample=False))
    wanted = torch.autograd.grad(loss_of(sample), parameters)
    torch.manual_seed(3)
    found = backpropagate(loop, DDPMScheduler(clip_sample=False), loss_of, parameters)
    assert relative(found.gradients, wanted) < 1e-5


def test_what_begin_sets_is_set_again_and_the_loss_may_depend_on_parameters():
    """A scale drawn anew for each call, as masks are."""
    denoiser, log_scale = Denoiser(), torch.full((6,), 0.1, requires_grad=True)
    calls, scale = [], [torch.ones(6)]

    def begin(step):
        calls.append((step, torch.is_grad_enabled()))
        scale[0] = torch.exp(log_scale) * SampleNoise(step, IDS[:1]).uniform(6)[0]

    def loop(scheduler):
        return plain_loop(lambda x, t: denoiser(x, t) * scale[0], 4, {}, scheduler)

    def loss(sample):
        return loss_of(sample) + log_scale.square().sum()

    numbers = iter(range(4))

    def counted(x, t):
        begin(next(numbers))
        return denoiser(x, t) * scale[0]

    sample = plain_loop(counted, 4, {}, DDIMScheduler(clip_sample=False))
    (wanted,) = torch.autograd.grad(loss(sample), log_scale)
    calls.clear()
    found = backpropagate(loop, DDIMScheduler(clip_sample=False), loss, [log_scale], begin=begin)
    assert relative(found.gradients, [wanted]) < 1e-5
    assert calls == [(step, False) for step in range(4)] + [(step, True) for step in (3, 2, 1, 0)]


def peak_saved(run) -> int:
    """Most bytes that graphs keep at one time."""
    now, most = 0, 0

    def release(size):
        nonlocal now
        now -= size

    class Kept:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor = tensor
            now += tensor.nbytes
            most = max(most, now)
            weakref.finalize(self, release, tensor.nbytes)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most


def test_the_memory_is_that_of_one_step():
    denoiser = Denoiser()

    def peak(steps, checkpoint):
        loop = functools.partial(plain_loop, denoiser, steps, {})
        scheduler, parameters = DDIMScheduler(clip_sample=False), list(denoiser.parameters())
        return peak_saved(lambda: backpropagate(loop, scheduler, loss_of, parameters, checkpoint=checkpoint))

    assert peak(40, True) == peak(4, True)
    assert peak(40, False) > 8 * peak(4, False)
    assert peak(4, True) < peak(4, False) / 2


PIPELINES = {
    "tiny-ddpm": {"batch_size": 2},
    "tiny-dit": {"guidance_scale": 3.0, "class_labels": [3, 5]},
    "tiny-flux": {},
    "tiny-sd3": {"guidance_scale": 3.0},
    "avatars-sd": {"guidance_scale": 3.0},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_led_through_their_own_loop(name):
    """Guidance and conditions included; the pipeline is as before."""
    stock = STOCKS[name]
    pipe = stock.make()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    parameters = [parameter for parameter in denoiser.parameters() if parameter.ndim == 2][:3]
    scheduler, modules = pipe.scheduler, dict(pipe.components)

    def run(checkpoint):
        call = {**stock.call(3), **PIPELINES[name]}
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in range(2 if "batch_size" in call or "class_labels" in call else 1)]  # fmt: skip
        return backpropagate(
            pipeline_loop(pipe, call), scheduler, lambda x: x.square().mean(), parameters, checkpoint=checkpoint
        )

    torch.manual_seed(0)
    one = run(True)
    torch.manual_seed(0)
    other = run(False)
    assert relative(one.gradients, other.gradients) < 1e-5 and one.loss == other.loss
    assert all(gradient.abs().max() > 0 for gradient in one.gradients)
    assert pipe.scheduler is scheduler and dict(pipe.components) == modules
    call = {**stock.call(3), **PIPELINES[name], "output_type": "latent"}
    if "dit" not in name and "ddpm" not in name:  # those two have no latents to give
        plain = pipe(**call, generator=[torch.Generator().manual_seed(0)]).images
        packed = one.sample if plain.shape == one.sample.shape else plain
        assert torch.allclose(plain, packed, atol=1e-5)


def test_what_cannot_be_led_is_refused():
    denoiser = Denoiser()
    loop = functools.partial(plain_loop, denoiser, 4, {})
    with pytest.raises(ValueError, match="`scheduler` is a DPMSolverMultistepScheduler"):
        backpropagate(loop, DPMSolverMultistepScheduler(), loss_of, list(denoiser.parameters()))

    def late(scheduler):
        scheduler.set_timesteps(4)
        x = torch.ones(2, 6)
        for t in scheduler.timesteps[1:]:
            x = scheduler.step(denoiser(x, t), t, x, return_dict=False)[0]

    def early(scheduler):
        scheduler.set_timesteps(4)

    for broken, message in ((late, "from the first timestep"), (early, "ended before")):
        with pytest.raises(RuntimeError, match=message):
            backpropagate(broken, DDIMScheduler(), loss_of, list(denoiser.parameters()))
        assert torch.is_grad_enabled()


def test_the_global_generator_goes_on_as_after_a_plain_run():
    """Steps that are taken again draw the same noise again; what is drawn next must not be noise of this run."""
    weight = torch.ones(1, requires_grad=True)

    def loop(scheduler):
        scheduler.set_timesteps(3)
        x = torch.ones(1, 1, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * weight * x, t, x).prev_sample

    after = []
    for checkpoint in (True, False):
        torch.manual_seed(0)
        backpropagate(
            loop, DDPMScheduler(clip_sample=False), lambda x: x.square().mean(), [weight], checkpoint=checkpoint
        )
        after.append(torch.rand(3))
    assert torch.equal(*after)
