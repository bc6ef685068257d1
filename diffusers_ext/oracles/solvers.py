"""How far a scheduler ends from the exact solution of the equation it solves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..metrics.macs import CallCounter
from ._mixture import MixtureDenoiser
from ._process import read_scheduler


@dataclass(frozen=True)
class SamplerError:
    """Result of `sampler_error`.

    Attributes:
        rmse: root of the mean squared difference of all elements to the exact solution.
        per_sample: the same of each sample, `(batch,)`, for paired comparisons.
        calls: forward passes of the denoiser. A guided one, with conditional and unconditional halves in one batch,
            counts once.
        result: where the scheduler ended, `(batch, channels, height, width)`.
    """

    rmse: float
    per_sample: torch.Tensor
    calls: int
    result: torch.Tensor


@torch.no_grad()
def sampler_error(
    scheduler: Any,
    denoiser: MixtureDenoiser,
    num_inference_steps: int,
    x_T: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    t_end: float | None = None,
    exact: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SamplerError:
    """Run a scheduler as pipelines do and compare its end with the exact solution of the probability-flow ODE.

    The scheduler starts from `x_T` at its own first timestep, and so does the exact solution: what is measured is the
    error of the solver, not that of starting late. Schedulers whose state is scaled (`scale_model_input`, as Euler's)
    start from the state that the denoiser sees as `x_T`.

    Args:
        scheduler: configured for the process and the prediction type of the denoiser. Its state is left as after a run.
        denoiser: one of the exact denoisers.
        num_inference_steps: as for a pipeline.
        x_T: state at the scheduler's first timestep, `(batch, channels, height, width)`: noise, or
            `denoiser.sample(n, scheduler.timesteps[0])`.
        class_labels: as in the denoiser's `forward`; needed for guidance.
        guidance_scale: weight of classifier-free guidance; 1 is none, and one half of the work.
        t_end: timestep at which the scheduler ends; None for clean data. A scheduler with
            `final_sigmas_type="sigma_min"` ends at 0.
        exact: the exact solution, where it is known from an earlier call.
        generator: for schedulers whose steps are random.

    Raises:
        ValueError: the scheduler integrates another process than the denoiser, guidance without labels, or as the
            denoiser.
    """
    if guidance_scale != 1 and class_labels is None:
        raise ValueError(f"`guidance_scale` is {guidance_scale!r} without `class_labels`; guidance needs both.")
    _check_match(scheduler, denoiser)
    scheduler.set_timesteps(num_inference_steps, device=x_T.device)
    timesteps = scheduler.timesteps
    if exact is None:
        exact = denoiser.exact_ode_solution(x_T, float(timesteps[0]), t_end, class_labels, guidance_scale)

    def scaled(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state

    scale = float(scaled(torch.ones((), dtype=torch.float64, device=x_T.device), timesteps[0]))
    state = x_T / scale
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if guidance_scale != 1:
        labels = torch.as_tensor(class_labels, device=x_T.device).reshape(-1).expand(len(x_T))
        both = torch.cat([labels, torch.full_like(labels, denoiser.config.num_classes)])
    with CallCounter(denoiser) as counter:
        for t in timesteps:
            seen = scaled(state, t)
            if guidance_scale == 1:
                output = denoiser(seen, t, class_labels).sample
            else:
                conditional, unconditional = denoiser(torch.cat([seen, seen]), t, both).sample.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            state = scheduler.step(output, t, state, **options).prev_sample
    if scale != 1:  # such a scheduler keeps x / alpha
        state = state * float(denoiser.noise_process(t_end, 1, x_T.device)[0])
    squares = (state.double() - exact).square().flatten(1).mean(1)
    return SamplerError(float(squares.mean().sqrt()), squares.sqrt(), counter.calls[""], state)


def convergence_order(errors: Sequence[float], steps: Sequence[int]) -> float:
    """Order p of a solver whose error falls as `steps ** -p`: the least-squares slope on logarithmic axes.

    Raises:
        ValueError: fewer than two pairs, different lengths, equal steps only, or a value that is not positive.
    """
    if len(errors) != len(steps) or len(set(steps)) < 2 or not min(*errors, *steps) > 0:
        raise ValueError(
            f"`errors` is {list(errors)!r} and `steps` {list(steps)!r}; they must be equally many positive numbers, of "
            "at least two different steps."
        )
    x = [math.log(step) for step in steps]
    y = [math.log(error) for error in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return -slope


def _check_match(scheduler: Any, denoiser: MixtureDenoiser) -> None:
    read, table = read_scheduler(scheduler)
    for name, value in read.items():
        if denoiser.config[name] != value:
            raise ValueError(
                f"`scheduler` has {name} {value!r} and the denoiser {denoiser.config[name]!r}; build the denoiser for "
                "this scheduler."
            )
    if table is not None:
        own = denoiser.noise_process.alphas_cumprod.double().cpu()
        # Some classes give the last entry of a zero terminal SNR a tiny value, to be able to divide by it.
        if not torch.allclose(own, table, rtol=1e-5, atol=1e-7):
            raise ValueError(
                "`scheduler` has another noise schedule than the denoiser; build the denoiser for this one."
            )
