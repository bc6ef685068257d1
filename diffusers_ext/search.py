"""Searches for samplers of few steps. Here: AutoDiffusion's, for timesteps (Li et al. 2023, arXiv 2309.10438).

    objective = dx.PictureObjective(pipe, seeds=range(32), prompt=prompts, guidance_scale=3.0)
    result = dx.TimestepSearch(objective, num_steps=5).run("search.json")
    pipe.scheduler = result.scheduler

What is found belongs to the model, the guidance scale and the number of steps that it was searched with, and fits the seeds
of the search better than others: judge it by an objective with seeds and prompts of its own.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np
import torch

from .evolution import Evolution, Evolved, Stage
from .schedulers.unified_solver import UnifiedSolverScheduler, named_schedule


class Objective(Protocol):
    """What a search minimises.

    Attributes:
        config: config of the scheduler that candidates are made from.
        identity: what scores depend on, as JSON.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, scheduler: Any, num_steps: int) -> float:
        """Score of a scheduler in runs of `num_steps` denoiser calls, the lower the better."""
        ...


class PictureObjective:
    """Score of the pictures that a pipeline draws with a scheduler, always from the same seeds.

    The pipeline is left as it is. Its own scheduler gives the process and the prediction type.

    Args:
        pipe: any pipeline that `UnifiedSolverScheduler` works in.
        seeds: one a picture.
        metric: score of all pictures, `(n, height, width, channels)` in [0, 1]: a distance to real pictures in features
            of a network, as in both papers. None is the root mean square error to the pictures of the same seeds that
            `reference_steps` steps give: it needs no data, and says how well the ODE is solved.
        reference_steps: see `metric`.
        batch_size: pictures drawn at a time.
        call: arguments of the pipeline; lists of one value a picture are cut into batches.

    Raises:
        ValueError: there are no seeds, or a list does not have one value a seed.
    """

    def __init__(
        self,
        pipe: Any,
        seeds: Iterable[int],
        metric: Callable[[np.ndarray], float] | None = None,
        reference_steps: int = 100,
        batch_size: int = 16,
        **call: Any,
    ) -> None:
        self.seeds = list(seeds)
        if not self.seeds:
            raise ValueError("`seeds` is empty; one seed a picture is needed.")
        for name, value in call.items():
            if isinstance(value, list) and len(value) != len(self.seeds):
                raise ValueError(
                    f"`{name}` has {len(value)} values; one for each of the {len(self.seeds)} seeds is needed."
                )
        for name, number in (("reference_steps", reference_steps), ("batch_size", batch_size)):
            if type(number) is not int or number < 1:
                raise ValueError(f"`{name}` is {number!r}; an integer of at least 1 is needed.")
        self._pipe = copy.copy(pipe)  # shares the models; a scheduler or a progress bar that is set stays here
        self._pipe.set_progress_bar_config(disable=True)
        self._metric, self._reference_steps, self._batch_size, self._call = metric, reference_steps, batch_size, call
        self._reference: np.ndarray | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self._pipe.scheduler.config

    @property
    def identity(self) -> Mapping[str, Any]:
        values = {
            name: value if isinstance(value, (bool, int, float, str, list)) else None
            for name, value in self._call.items()
        }
        metric = (
            "rmse" if self._metric is None else getattr(self._metric, "__qualname__", type(self._metric).__qualname__)
        )
        steps = self._reference_steps if self._metric is None else None
        return {"pipeline": type(self._pipe).__name__, "seeds": self.seeds, "call": values, "metric": metric, "reference_steps": steps}  # fmt: skip

    def pictures(self, scheduler: Any, num_steps: int) -> np.ndarray:
        """`(n, height, width, channels)` in [0, 1], one for each seed."""
        kept, self._pipe.scheduler = self._pipe.scheduler, scheduler
        takes_size = "batch_size" in inspect.signature(type(self._pipe).__call__).parameters
        pictures = []
        try:
            for start in range(0, len(self.seeds), self._batch_size):
                part = slice(start, start + self._batch_size)
                generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[part]]
                call = {name: value[part] if isinstance(value, list) else value for name, value in self._call.items()}
                call |= {"batch_size": len(generators)} if takes_size else {}
                call |= {"num_inference_steps": num_steps, "generator": generators, "output_type": "np"}
                pictures.append(self._pipe(**call).images)
        finally:
            self._pipe.scheduler = kept
        return np.concatenate(pictures)

    def __call__(self, scheduler: Any, num_steps: int) -> float:
        if self._metric is not None:
            return float(self._metric(self.pictures(scheduler, num_steps)))
        if self._reference is None:
            best = UnifiedSolverScheduler.from_config(self.config)
            self._reference = self.pictures(best, self._reference_steps)
        return float(np.sqrt(np.mean((self.pictures(scheduler, num_steps) - self._reference) ** 2)))


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        scheduler: a `UnifiedSolverScheduler` that holds it in its config.
        evolved: the best candidate with its score, and all others.
    """

    scheduler: UnifiedSolverScheduler
    evolved: Evolved


class Search:
    """What both searches share: candidates are lists of steps, and become schedulers."""

    def __init__(self, objective: Objective, num_steps: int) -> None:
        self.objective = objective
        made = UnifiedSolverScheduler.from_config(objective.config)
        self.config = {name: made.config[name] for name in inspect.signature(UnifiedSolverScheduler).parameters}
        self.bare = self.plain()
        limit = self.bare.config.num_train_timesteps
        if type(num_steps) is not int or not 1 <= num_steps < limit:
            raise ValueError(f"`num_steps` is {num_steps!r}; allowed are integers from 1 to {limit - 1}.")
        self.num_steps = num_steps
        # Whole timesteps; of a flow, 0 is clean data already.
        self.times = range(1, limit) if self.bare.config.use_flow_sigmas else range(limit)

    def identity(self, **settings: Any) -> dict[str, Any]:
        """What a file of scores is of."""
        return {
            **settings,
            "steps": self.num_steps,
            "objective": dict(self.objective.identity),
            "scheduler": self.config,
        }

    def plain(self, **options: Any) -> UnifiedSolverScheduler:
        """A scheduler without a search; of a flow, with the grid of no particular picture size."""
        fixed = {"solver_schedule": "ddim", "use_dynamic_shifting": False}
        return UnifiedSolverScheduler(**self.config | fixed | options)

    def grids(self) -> list[list[float]]:
        """Timesteps of the grids that there are without a search."""
        found = []
        options: list[dict[str, Any]] = [{}]
        if not self.bare.config.use_flow_sigmas:
            even = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
            options += [{**even, "timestep_spacing": spacing} for spacing in ("trailing", "linspace", "leading")]
        for option in options:
            scheduler = self.plain(**option)
            scheduler.set_timesteps(self.num_steps)
            found.append(scheduler.timesteps.tolist())
        return found

    def scheduler(self, steps: Sequence[Mapping[str, Any]]) -> UnifiedSolverScheduler:
        """The scheduler of a list of steps with timesteps."""
        return UnifiedSolverScheduler(**self.config | {"solver_schedule": [dict(step) for step in steps]})

    def score(self, steps: Sequence[Mapping[str, Any]]) -> float:
        return self.objective(self.scheduler(steps), self.num_steps)


class TimestepSpace:
    """Falling lists of `num_steps` distinct timesteps of `times` (arXiv 2309.10438, section 3.2)."""

    def __init__(self, num_steps: int, times: range) -> None:
        self.num_steps, self.times = num_steps, times

    def random(self, rng: Random) -> list[float]:
        return sorted(rng.sample(self.times, self.num_steps), reverse=True)

    def mutate(self, candidate: Sequence[float], rng: Random, rate: float) -> list[float]:
        return self._filled({time for time in candidate if rng.random() >= rate}, rng)

    def cross(self, one: Sequence[float], other: Sequence[float], rng: Random) -> list[float]:
        return self._filled({rng.choice(pair) for pair in zip(one, other, strict=True)}, rng)

    def _filled(self, times: set[float], rng: Random) -> list[float]:
        while len(times) < self.num_steps:
            times.add(rng.choice(self.times))
        return sorted(times, reverse=True)


class TimestepSearch(Search):
    """The timesteps with which a known solver does best (AutoDiffusion, its half without architectures).

    Args:
        objective: what to minimise; see `PictureObjective`.
        num_steps: number of timesteps.
        solver: any name of `UnifiedSolverScheduler`'s `solver_schedule`.
        seed: of the search.
        population, epochs: the search evaluates `population * (1 + epochs)` schedulers. The defaults are the paper's; the
            other settings are as there: 10 parents, half mutations with probability 0.25, 30% crossovers.

    Raises:
        ValueError: an argument has a wrong value.
    """

    def __init__(
        self,
        objective: Objective,
        num_steps: int,
        *,
        solver: str = "ddim",
        seed: int = 0,
        population: int = 50,
        epochs: int = 10,
    ) -> None:
        super().__init__(objective, num_steps)
        self.solver = solver
        self._steps = named_schedule(solver, num_steps)
        self.evolution = Evolution(
            [Stage(TimestepSpace(num_steps, self.times), epochs)],
            lambda times: self.score(self.steps(times)),
            seed=seed, first=self.grids(), population=population,
            identity=self.identity(search="timesteps", solver=solver),
        )  # fmt: skip

    def steps(self, times: Sequence[float]) -> list[dict[str, Any]]:
        """The solver's steps with given timesteps."""
        return [{"timestep": time, **step.to_dict()} for time, step in zip(times, self._steps, strict=True)]

    def run(self, file: str | os.PathLike[str] | None = None) -> SearchResult:
        """Search; arguments and errors as `Evolution.run`."""
        evolved = self.evolution.run(file)
        return SearchResult(self.scheduler(self.steps(evolved.best)), evolved)
