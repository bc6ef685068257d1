r"""The search for a noise schedule of few steps with a trained predictor (FastDiff, arXiv 2204.09934, section 3.3).

    predictor = dx.NoiseSchedulePredictor.from_pretrained("my-predictor")
    objective = dx.PictureObjective(pipe, seeds=range(64), metric=distance_to_real_pictures)
    found = dx.search_noise_schedule(pipe, predictor, objective, num_steps=4)
    pipe.scheduler = found.scheduler

A walk takes a start :math:`(a_N, \beta_N)`. It goes from noise down by steps without noise, and asks the predictor after each
how large the next beta is. Which start is best the objective says: of a grid, and then of starts near the best. That is how
BDDM (arXiv 2203.13508) searches, with measures of speech; FastDiff leaves the start to the user. BDDM's grid is even in a and
in beta, and has nothing above the noise of a = 0.1, where pictures begin. Here it is even in the timesteps of training: those
of the first level and of the second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from .evolution import Evolution, Evolved, Stage
from .models.noise_schedule_predictor import NoiseSchedulePredictor
from .schedulers._model_statistics import weight_marks
from .schedulers._statistics import GuideScheduler, Walk, calls, clean_samples, denoiser_of, lead
from .schedulers.fastdiff import FastDiffScheduler
from .search import Objective

BINS = 9  # that the grid of starts divides the timesteps into
SPREAD = 0.05  # of all timesteps: how far from the best more starts are tried


@dataclass(frozen=True)
class NoiseScheduleResult:
    """What a search found.

    Attributes:
        noise_schedule: the betas, beta_1 first.
        scheduler: a `FastDiffScheduler` that has them.
        score: what the objective says of it.
        start: a_N and beta_N that the predictor went from.
        evolved: all starts, as timesteps of the first two levels, with their scores; infinite where a walk ended early.
    """

    noise_schedule: list[float]
    scheduler: FastDiffScheduler
    score: float
    start: tuple[float, float]
    evolved: Evolved


class _Guide(GuideScheduler):
    """Leads the pipeline to levels given by `a`, at the timesteps where `FastDiffScheduler` asks for them."""

    def lay_levels(self, scheduler: FastDiffScheduler, a: float) -> None:
        ratio = np.array([math.sqrt((1 - a) * (1 + a)) / a])
        self.lay(ratio)
        self.times = scheduler._time_at(ratio)


class ScheduleWalk:
    """Goes from a start to a noise schedule, always from the same noise.

    Args:
        pipe: any pipeline with a beta schedule. It stays as it is.
        predictor: trained for its denoiser.
        conditions: prompts or class labels, one a sample; for an unconditional pipeline the number of samples. The
            predicted beta is the mean over them. BDDM takes one sample.
        rho: a walk ends where beta is smaller.
        seed: of the noise.
        call: more arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ValueError: the pipeline does not take such conditions, it is of rectified flow, or `rho` is negative.
    """

    def __init__(
        self,
        pipe: Any,
        predictor: NoiseSchedulePredictor,
        conditions: Sequence[Any] | int,
        *,
        rho: float = 0.0,
        seed: int = 0,
        **call: Any,
    ) -> None:
        if not rho >= 0:
            raise ValueError(f"`rho` is {rho!r}; it must be at least 0.")
        self.scheduler = FastDiffScheduler.from_config(pipe.scheduler.config, noise_schedule=None)
        self.pipe, self.predictor, self.rho = pipe, predictor, rho
        total = conditions if isinstance(conditions, int) else len(conditions)
        ((self.count, self.arguments),) = calls(pipe, conditions, max(total, 1), seed, call)
        like = clean_samples(pipe, self.arguments, self.count, 1)
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        self.noise = noise.to(like.device)

    def start_at(self, first: float, second: float) -> tuple[float, float]:
        """The start `(a_N, beta_N)` of a walk whose first two levels are those of these timesteps of training."""
        ratios = self.scheduler._ratio_at(np.array([first, second]))
        a, following = 1 / np.hypot(1, ratios)
        return float(a), float(1 - (a / following) ** 2)

    def __call__(self, start: tuple[float, float], num_steps: int) -> list[float]:
        """The betas from a start `(a_N, beta_N)`, beta_1 first; fewer than `num_steps` where the walk ends early."""
        a, beta = start
        betas, x, guide = [beta], self.noise, _Guide.from_config(self.pipe.scheduler.config)
        while len(betas) < num_steps:
            guide.lay_levels(self.scheduler, a)
            delta = math.sqrt((1 - a) * (1 + a))
            x = (x - beta / delta * self._predicted(guide, x)) / math.sqrt(1 - beta)
            a /= math.sqrt(1 - beta)
            if a >= 1:
                break
            beta = self._beta(x, beta, (1 - a) * (1 + a))
            if beta < self.rho or beta == 0:
                break
            betas.append(beta)
        return betas[::-1]

    def _predicted(self, guide: _Guide, x: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def walk() -> Walk:
            found.append((yield x))

        lead(self.pipe, guide, walk(), [0], self.arguments, self.count)
        return found[0].to(x)

    @torch.no_grad()
    def _beta(self, x: torch.Tensor, beta_next: float, delta_squared: float) -> float:
        x = x.to(self.predictor.device)
        levels = (torch.full((len(x),), value, device=x.device) for value in (beta_next, delta_squared))
        return float(self.predictor(x, *levels).mean())


class _Starts:
    """The space of starts: real timesteps of the first level and of the second, up to the last one of training."""

    def __init__(self, last: int) -> None:
        self.last = last

    def allowed(self, first: float, second: float) -> bool:
        return 0 <= second < first <= self.last

    def grid(self, bins: int) -> list[list[float]]:
        times = [self.last * i / bins for i in range(bins + 1)]
        return [[first, second] for first in times for second in times if second < first]

    def random(self, rng: Random) -> list[float]:
        return sorted((rng.uniform(0, self.last), rng.uniform(0, self.last)), reverse=True)

    def mutate(self, candidate: Sequence[float], rng: Random, rate: float) -> list[float]:
        width = SPREAD * self.last
        moved = [min(max(time + rng.uniform(-width, width), 0.0), self.last) for time in candidate]
        return moved if self.allowed(*moved) else list(candidate)

    def cross(self, one: Sequence[float], other: Sequence[float], rng: Random) -> list[float]:
        return list(one)  # the search does not ask for it


def search_noise_schedule(
    pipe: Any,
    predictor: NoiseSchedulePredictor,
    objective: Objective,
    num_steps: int,
    *,
    conditions: Sequence[Any] | int = 8,
    starts: Iterable[Sequence[float]] | None = None,
    attempts: int = 10,
    eta: float = 1.0,
    rho: float = 0.0,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    **call: Any,
) -> NoiseScheduleResult:
    r"""Find the betas of a run of few steps. Equal arguments give equal betas.

    It makes 55 walks of about `2 * num_steps` calls of the denoiser, and draws the objective's pictures for each.

    Args:
        pipe: any pipeline with a beta schedule, whatever its prediction type. It stays as it is.
        predictor: trained for its denoiser by `diffusers_ext.training.train_noise_schedule_predictor`.
        objective: score of a scheduler in runs of `num_steps` calls, the lower the better. A `PictureObjective` without a
            metric says how near pictures are to those of many deterministic steps, which fits `eta=0` only.
        num_steps: N.
        conditions, rho, call: see `ScheduleWalk`.
        starts: where walks begin: pairs of timesteps of training, falling, real numbers. They are those of the first two
            levels, which mean :math:`a_N` and :math:`\beta_N`. None takes all 45 pairs of 10 that are evenly spread.
        attempts: how many starts near the best are tried afterwards.
        eta: of the `FastDiffScheduler` that is searched for.
        seed: of the walks' noise and of the attempts.
        file: where scores are kept as they come; a search that was broken off goes on from there.

    Raises:
        ValueError: an argument has a wrong value, no walk has N steps, or `file` is of another search.
    """
    walk = ScheduleWalk(pipe, predictor, conditions, rho=rho, seed=seed, **call)
    limit = walk.scheduler.config.num_train_timesteps
    if type(num_steps) is not int or not 1 <= num_steps <= limit:
        raise ValueError(f"`num_steps` is {num_steps!r}; allowed are integers from 1 to {limit}.")
    if type(attempts) is not int or attempts < 0:
        raise ValueError(f"`attempts` is {attempts!r}; an integer of at least 0 is needed.")
    space = _Starts(limit - 1)
    first = space.grid(BINS) if starts is None else [[float(value) for value in start] for start in starts]
    if not first or not all(len(start) == 2 and space.allowed(*start) for start in first):
        raise ValueError(f"`starts` is {first!r}; falling pairs of timesteps from 0 to {limit - 1} are needed.")

    def scheduler(betas: list[float]) -> FastDiffScheduler:
        return FastDiffScheduler.from_config(pipe.scheduler.config, noise_schedule=betas, eta=eta)

    def score(start: list[float]) -> float:
        betas = walk(walk.start_at(*start), num_steps)
        return objective(scheduler(betas), num_steps) if len(betas) == num_steps else math.inf

    marks = {name: weight_marks(model).tolist() for name, model in (("predictor", predictor), ("model", denoiser_of(pipe)))}  # fmt: skip
    evolution = Evolution(
        [Stage(space, epochs=1 if attempts else 0)], score, seed=seed, first=first, population=max(attempts, 1),
        parents=1, mutations=1.0, crossovers=0.0,
        identity={"search": "noise schedule", "steps": num_steps, "conditions": repr(conditions), "eta": eta, "rho": rho,
                  "seed": seed, "call": repr(sorted(call.items(), key=repr)), "objective": dict(objective.identity), **marks},
    )  # fmt: skip
    evolved = evolution.run(file)
    if not math.isfinite(evolved.score):
        raise ValueError(f"`num_steps` is {num_steps!r}; no walk of `starts` has as many steps before it ends.")
    best = walk.start_at(*evolved.best)
    betas = walk(best, num_steps)
    return NoiseScheduleResult(betas, scheduler(betas), evolved.score, best, evolved)
