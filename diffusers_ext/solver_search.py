"""S^3: search for all decisions of a solver (Liu et al. 2023, arXiv 2312.07243, section 4).

    objective = dx.PictureObjective(pipe, seeds=range(32), prompt=prompts, guidance_scale=3.0)
    pipe.scheduler = dx.SolverSearch(objective, num_steps=5).run("search.json").scheduler

The first population has the known solvers, so that the result is no worse than the best of them on the seeds that it was
searched with. The authors' code has an evolution without a predictor; the predictor is built after the paper's words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import nn

from .evolution import Evolution, Stage
from .schedulers.unified_solver import SolverStep, named_schedule
from .search import Objective, Search, SearchResult

# Shares of the decisions, and the steps of a mutation, as in the authors' code.
_ORDERS = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}
_FIRST_POINTS = {1: 0.5, 2: 0.5}
_TIME_NOISE, _SCALING_NOISE = 0.08, 0.03
_STARTS = {-1: 0.9, -2: 0.1}


class SolverSpace:
    """Schedules with timesteps: all decisions of `UnifiedSolverScheduler` (arXiv 2312.07243, section 3).

    Args:
        num_steps: number of steps.
        times: allowed timesteps; runs begin at the last of them.
        to_clean: the last step ends in clean data and so has nothing to decide but its timestep.
        fine: all decisions; else timesteps, prediction types and orders only, for a first stage.
    """

    def __init__(self, num_steps: int, times: range, to_clean: bool = True, fine: bool = True) -> None:
        self.num_steps, self.times, self.to_clean, self.fine = num_steps, times, to_clean, fine

    def random(self, rng: Random) -> list[dict[str, Any]]:
        inner = rng.sample(self.times[:-1], self.num_steps - 1)
        times = [self.times[-1], *sorted(inner, reverse=True)]
        start = [SolverStep()] * self.num_steps
        return self.fit(times, [self._changed(step, rng, 1.0) for step in start])

    def mutate(self, candidate: Sequence[Mapping[str, Any]], rng: Random, rate: float) -> list[dict[str, Any]]:
        steps = [SolverStep(**step) for step in candidate]
        times = [_time(step) for step in steps]
        for i, time in enumerate(times):
            if i and rng.random() < rate:
                moved = round(time * (1 + rng.gauss(0, _TIME_NOISE)) + rng.gauss(0, 1))
                moved = min(max(moved, self.times[0]), self.times[-1])
                if moved not in times:
                    times[i] = moved
        return self.fit(sorted(times, reverse=True), [self._changed(step, rng, rate) for step in steps])

    def cross(
        self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], rng: Random
    ) -> list[dict[str, Any]]:
        """Timesteps of one parent, and each step's other decisions of either."""
        times = [_time(SolverStep(**step)) for step in rng.choice((one, other))]
        return self.fit(times, [SolverStep(**rng.choice(pair)) for pair in zip(one, other, strict=True)])

    def _changed(self, step: SolverStep, rng: Random, rate: float) -> SolverStep:
        """Each decision drawn anew with probability `rate`."""

        def drawn(old: Any, shares: Mapping[Any, float]) -> Any:
            return rng.choices(list(shares), list(shares.values()))[0] if rng.random() < rate else old

        order = drawn(step.order, _ORDERS)
        prediction = drawn(step.prediction, {"data": 0.5, "noise": 0.5})
        scaling, first, start, corrects = step.scaling, (step.points or (1,))[0], step.start, step.corrector > 0
        if self.fine:
            if rng.random() < rate:
                scaling = (0.0 if isinstance(scaling, str) else scaling) + rng.gauss(0, _SCALING_NOISE)
            first = drawn(first, _FIRST_POINTS)
            start = drawn(start, _STARTS)
            corrects = drawn(corrects, {True: 0.5, False: 0.5})
        scaling = scaling if isinstance(scaling, str) else round(scaling, 4)
        points = tuple(min(first, order - 1) if k == 1 else order - 1 for k in range(1, order))
        return SolverStep(
            prediction=prediction, order=order, points=points, scaling=scaling, start=start,
            corrector=order + 1 if corrects else 0, corrector_scaling=step.corrector_scaling,
        )  # fmt: skip

    def fit(self, times: Sequence[float], steps: Sequence[SolverStep]) -> list[dict[str, Any]]:
        """The steps with these timesteps, each with no more points than it has, and nothing said that has no effect."""
        found = []
        for i, (time, step) in enumerate(zip(times, steps, strict=True)):
            last = i + 1 == self.num_steps
            order = 1 if last and self.to_clean else min(step.order, i + 1)
            corrector = 0 if last or not step.corrector else order + 1
            fitted = SolverStep(
                timestep=time,
                prediction="data" if last and self.to_clean else step.prediction,
                order=order,
                points=tuple(
                    min(n, i, order - 1 if order < step.order else n) for n in (step.points or ())[: order - 1]
                ),
                scaling=step.scaling if order > 1 else 0.0,
                second_scale=step.second_scale if order > 2 else 1.0,
                start=-1 if last and self.to_clean else max(step.start, -i - 1),
                corrector=corrector,
                corrector_scaling=step.corrector_scaling if corrector else 0.0,
            )
            found.append(fitted.to_dict())
        return found


class SolverPredictor(nn.Module):
    """Ranks schedules by their scores: a GRU over the steps and a small MLP, trained by pairs (paper, section 4).

    The size is ours: the paper's predictor is not in the authors' code.
    """

    def __init__(self, num_train_timesteps: int, width: int = 32) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        self.encoder = nn.GRU(self._features([{"timestep": 0}]).shape[-1], width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def _features(self, candidate: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """`(steps, features)`."""
        rows = []
        for step in (SolverStep(**step) for step in candidate):
            orders = [float(step.order == order) for order in (1, 2, 3, 4)]
            number = 0.0 if isinstance(step.scaling, str) else step.scaling
            rows.append(
                [_time(step) / self.num_train_timesteps, *orders, float(step.prediction == "data"), float(step.corrector > 0),
                 (step.points or (0,))[0] / 2, 10 * number, float(isinstance(step.scaling, str)), float(step.start == -1)]
            )  # fmt: skip
        return torch.tensor(rows)

    def forward(self, candidates: Sequence[Sequence[Mapping[str, Any]]]) -> torch.Tensor:
        """`(n,)`, lower for those that should have a lower score."""
        hidden = self.encoder(torch.stack([self._features(candidate) for candidate in candidates]))[1][0]
        return self.head(hidden).squeeze(-1)

    @classmethod
    def ranking(
        cls, num_train_timesteps: int, seed: int, updates: int = 100
    ) -> Callable[[Sequence[tuple[Any, float]], Sequence[Any]], list[int]]:
        """A `Rank` for `Evolution`: a new predictor trained on all scores so far, from the same weights each time."""

        def rank(evaluated: Sequence[tuple[Any, float]], pool: Sequence[Any]) -> list[int]:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed)
                model = cls(num_train_timesteps)
                scores = torch.tensor([score for _, score in evaluated])
                better = scores[:, None] < scores[None, :]
                inputs = torch.stack([model._features(candidate) for candidate, _ in evaluated])
                optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
                for _ in range(updates):
                    found = model.head(model.encoder(inputs)[1][0]).squeeze(-1)
                    margin = torch.relu(0.1 + found[:, None] - found[None, :])
                    loss = margin[better].mean() if bool(better.any()) else 0.0 * found.sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with torch.no_grad():
                return torch.argsort(model(pool), stable=True).tolist()

        return rank


def _time(step: SolverStep) -> float:
    assert step.timestep is not None, "candidates have timesteps"
    return step.timestep


class SolverSearch(Search):
    """The solver schedule that does best (S^3): evolution in two stages, guided by a predictor.

    The first population has the known solvers on the known grids, so the result is no worse than all of these, on the seeds
    of the objective. The first stage decides timesteps, prediction types and orders, the second everything.

    Args:
        objective: what to minimise; see `PictureObjective`.
        num_steps: number of steps, each of one denoiser call.
        seed: of the search.
        population, epochs: the search evaluates `population * (1 + epochs[0] + epochs[1])` schedulers.
        pool: candidates that the predictor sees for each one that is evaluated; 1 is evolution without a predictor.

    Raises:
        ValueError: an argument has a wrong value.
    """

    def __init__(
        self,
        objective: Objective,
        num_steps: int,
        *,
        seed: int = 0,
        population: int = 30,
        epochs: tuple[int, int] = (4, 6),
        pool: int = 8,
    ) -> None:
        super().__init__(objective, num_steps)
        to_clean = self.bare.config.final_sigmas_type == "zero"
        space = SolverSpace(num_steps, self.times, to_clean)
        stages = [Stage(SolverSpace(num_steps, self.times, to_clean, fine=False), epochs[0]), Stage(space, epochs[1])]
        known = [
            named_schedule(name, num_steps)
            for name in (
                "taylor3-corrected",
                "taylor3",
                "unipc3",
                "dpmsolver++2m-midpoint",
                "unipc2",
                "taylor2",
                "ddim",
            )
        ]
        self.evolution = Evolution(
            stages, self.score,
            seed=seed, first=[space.fit(times, steps) for times in self.grids() if times[0] == self.times[-1] for steps in known],
            population=population, parents=15, mutations=0.6, crossovers=0.3, rate=0.3, first_rate=0.3,
            rank=SolverPredictor.ranking(self.bare.config.num_train_timesteps, seed) if pool > 1 else None, pool=pool,
            identity=self.identity(search="solver"),
        )  # fmt: skip

    def run(self, file: str | os.PathLike[str] | None = None) -> SearchResult:
        """Search; arguments and errors as `Evolution.run`."""
        evolved = self.evolution.run(file)
        return SearchResult(self.scheduler(evolved.best), evolved)
