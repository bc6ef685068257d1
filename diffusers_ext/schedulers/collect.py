r"""Measure the empirical model statistics of DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268, section 3.1 and appendix).

All is per element of the sample, over samples x of the noised data, at each :math:`\lambda` of a uniform grid:

- :math:`l = E[\sigma\, \mathrm{diag}(\partial \epsilon / \partial x)]`, by :math:`v \odot J v` with random signs v;
- with :math:`f = (\sigma \epsilon - l x) / \alpha` and its derivative along the probability-flow ODE,
  :math:`f' = e^{-\lambda} ((l - 1) \epsilon + \epsilon') - l' x / \alpha`, the linear regression of f' on f:
  :math:`s = \mathrm{Cov}(f, f') / \mathrm{Var}(f)` and :math:`b = E f' - s\, E f`.

The authors have not published their code for it. Here :math:`x / \alpha`, :math:`\epsilon` and :math:`\epsilon'` are kept
as sums of their products, of which s and b follow once l is known: one pass does it all. Both derivatives are differences.
:math:`\epsilon'` is that between the neighbouring points of the grid: the derivative proper would not do, since networks
learn whole timesteps and wiggle between them, so that on a U-Net of ours the two differ by as much as either is.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ._model_statistics import DPMSolverV3Statistics, weight_marks
from ._statistics import Checkpoint, GuideScheduler, Walk, calls, clean_samples, denoiser_of, lead

# What is summed: sigma v J v; predicted noise e, y = x / alpha, and the derivative d of e along the ODE; their products.
_SUMS = ("l", "e", "y", "d", "ee", "ey", "yy", "ed", "yd")
_NUDGE = 0.05  # of a state along signs, relative to its noise: enough for bfloat16, and small for the curvature
_NO_VARIANCE = 1e-8  # of f, relative to that of its two terms: what is left of rounding


def collect_statistics(
    pipe: Any,
    conditions: Sequence[Any] | int,
    *,
    samples: torch.Tensor | None = None,
    num_lambdas: int = 120,
    batch_size: int = 16,
    sample_steps: int = 20,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    **call: Any,
) -> DPMSolverV3Statistics:
    """Measure a pipeline's denoiser, with the guidance that it will be used with.

        statistics = dx.collect_statistics(pipe, prompts, guidance_scale=5.0, checkpoint="statistics.safetensors")

    It costs about `len(conditions) * (5 * num_lambdas + sample_steps)` calls of the denoiser. The paper takes 1,024 to
    4,096 samples and 120 to 1,200 noise levels.

    Args:
        pipe: any pipeline with a `unet` or a `transformer`. It stays as it is.
        conditions: prompts or class labels, one a sample; for an unconditional pipeline the number of samples.
        samples: clean data as the denoiser sees them (latents, where it works on latents), one a condition,
            `(n, *shape)`. None takes what the pipeline makes itself.
        num_lambdas: points of the grid of log-SNR.
        batch_size: samples in one call of the pipeline.
        sample_steps: steps to make samples with, where there are none.
        seed: of all noise.
        checkpoint: file to keep what is done in, after each batch; if it exists, the rest is done. Remove it afterwards.
        call: more arguments of the pipeline's call: `guidance_scale`, `height`, `negative_prompt`, ...

    Raises:
        ValueError: the pipeline does not take such conditions, a number is out of range, `samples` does not have one
            sample a condition, or the checkpoint is one of other settings.
    """
    total = conditions if isinstance(conditions, int) else len(conditions)
    if num_lambdas < 3 or sample_steps < 1:
        raise ValueError(f"`num_lambdas` is {num_lambdas!r} and `sample_steps` {sample_steps!r}; at least 3 and 1.")
    if samples is not None and len(samples) != total:
        raise ValueError(f"`samples` has {len(samples)} samples and `conditions` {total}; one each is needed.")
    batches = calls(pipe, conditions, batch_size, seed, call)
    marks = weight_marks(denoiser_of(pipe))
    guide = GuideScheduler.from_config(pipe.scheduler.config)
    low, high = (-math.log(ratio) for ratio in guide.ends)
    lambdas = np.linspace(low, high, num_lambdas)
    guide.lay(np.exp(-lambdas))
    settings = repr((conditions, num_lambdas, batch_size, sample_steps, seed, sorted(call.items(), key=repr)))
    kept = Checkpoint(checkpoint, settings, [marks] if samples is None else [marks, samples])
    found, done = kept.load()
    sums = found.get("sums")
    plan = _plan(num_lambdas)
    with tqdm(total=len(batches) * num_lambdas, initial=done * num_lambdas, desc="statistics") as bar:
        first = done * batch_size
        for number, (count, arguments) in enumerate(batches[done:], start=done):
            clean = samples[first : first + count] if samples is not None else clean_samples(pipe, arguments, count, sample_steps)  # fmt: skip
            first += count
            generator = torch.Generator().manual_seed(seed + number)
            noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
            signs = torch.randint(0, 2, clean.shape, generator=generator).to(clean) * 2 - 1
            if sums is None:
                sums = torch.zeros(num_lambdas, len(_SUMS), *clean.shape[1:], dtype=torch.float64, device=clean.device)
            sums = sums.to(clean.device)
            lead(pipe, guide, _walk(guide, clean, noise, signs, sums, bar), plan, arguments, count)
            kept.save({"sums": sums}, number + 1)
    assert sums is not None
    coefficients = fit(sums.cpu() / total, lambdas)
    default = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    scale = call.get("guidance_scale", default.default if default is not None else None)
    return DPMSolverV3Statistics.from_tensors(
        *coefficients, low, high, marks=marks, num_samples=total, guidance_scale=scale
    )


def _walk(
    guide: GuideScheduler, clean: torch.Tensor, noise: torch.Tensor, signs: torch.Tensor, sums: torch.Tensor, bar: Any
) -> Walk:
    """At each level look along random signs, and at the neighbours along the ODE. The same noise throughout keeps l smooth."""
    last, width = len(guide.levels) - 1, -math.log(guide.ratios[1] / guide.ratios[0])
    for level, (alpha, sigma) in enumerate(guide.levels):
        x = alpha * clean + sigma * noise
        e = yield x
        above, below = (yield x + _NUDGE * sigma * signs), (yield x - _NUDGE * sigma * signs)
        diagonal = signs * (above - below) / (2 * _NUDGE)
        velocity = guide.drift(level) * x - sigma * e  # dx / dlambda
        up, down = level < last, level > 0
        after, before = (yield x + width * velocity * up), (yield x - width * velocity * down)
        d = (after.double() - before.double()) / (width * (up + down))
        e, y = e.double(), x.double() / alpha
        for k, value in enumerate((diagonal.double(), e, y, d, e * e, e * y, y * y, e * d, y * d)):
            sums[level, k] += value.sum(0)
        bar.update()


def _plan(num_lambdas: int) -> list[int]:
    """Levels of the visits of `_walk`."""
    last = num_lambdas - 1
    return [
        visit
        for level in range(num_lambdas)
        for visit in (level, level, level, min(level + 1, last), max(level - 1, 0))
    ]


def fit(means: torch.Tensor, lambdas: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """l, s and b, each `(num_lambdas, *shape)`, from the means of what is summed.

    Args:
        means: `(num_lambdas, 9, *shape)` in float64, of the entries of `_SUMS`.
        lambdas: the uniform grid.
    """
    l, e, y, d, ee, ey, yy, ed, yd = means.unbind(1)  # noqa: E741  # the paper's symbol
    p = torch.from_numpy(np.exp(-lambdas)).view(-1, *[1] * (l.ndim - 1))  # sigma / alpha
    slope = torch.gradient(l, spacing=float(lambdas[1] - lambdas[0]), dim=0)[0]
    # f = p e - l y and f' = u e + p d - slope y
    u = p * (l - 1)
    ee, ey, yy, ed, yd = ee - e * e, ey - e * y, yy - y * y, ed - e * d, yd - y * d  # now covariances
    variance = p * p * ee - 2 * p * l * ey + l * l * yy
    covariance = p * (u * ee + p * ed - slope * ey) - l * (u * ey + p * yd - slope * yy)
    varies = variance > _NO_VARIANCE * (p * p * ee + l * l * yy)
    s = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
    b = u * e + p * d - slope * y - s * (p * e - l * y)
    return l, s, b
