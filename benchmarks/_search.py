"""Searched samplers: what is searched for the benchmarks of searches, and what was found.

    python -m benchmarks._search               # searches what `data/searched_samplers.json` does not have yet
    python -m benchmarks._search NAME ...      # these, again

A benchmark takes what the file has. Searches see starts and prompts of their own: other seeds than those of the studies, and
other captions. They can be broken off and go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._grounds import PROBLEMS
from benchmarks._quality import Variant
from benchmarks._samplers import OracleStudy, TrajectoryStudy
from benchmarks._zoo import ZooModel
from diffusers_ext.oracles import sampler_error

FOUND = Path(__file__).parent / "data" / "searched_samplers.json"
STARTS, PICTURES, SEED = 64, 16, 1000


class OracleObjective:
    """Root mean square error to the exact solution, of one start; an `Objective` for searches.

    Args:
        denoiser: with the exact score.
        scheduler: candidates are made from its config. The equation is solved from the last timestep of training, so that
            a candidate which starts later is not asked less.
        start: noise, `(n, channels, height, width)`.
        class_labels, guidance_scale: as in `sampler_error`.
    """

    def __init__(
        self,
        denoiser: Any,
        scheduler: Any,
        start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        self.denoiser, self.scheduler, self.start = denoiser, scheduler, start
        self.class_labels, self.guidance_scale = class_labels, guidance_scale
        first = scheduler.config.num_train_timesteps - 1
        self.exact = denoiser.exact_ode_solution(start, float(first), None, class_labels, guidance_scale)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.scheduler.config

    @property
    def identity(self) -> Mapping[str, Any]:
        starts = float(self.start.sum())
        return {"oracle": type(self.denoiser).__name__, "starts": starts, "guidance_scale": self.guidance_scale}

    def errors(self, scheduler: Any, num_steps: int) -> torch.Tensor:
        """Of each start, `(n,)`."""
        return sampler_error(
            scheduler, self.denoiser, num_steps, self.start, class_labels=self.class_labels,
            guidance_scale=self.guidance_scale, exact=self.exact,
        ).per_sample  # fmt: skip

    def __call__(self, scheduler: Any, num_steps: int) -> float:
        return float(self.errors(scheduler, num_steps).square().mean().sqrt())


def on_problem(name: str, seed: int = SEED) -> OracleObjective:
    """The objective of one of `PROBLEMS`, on starts of a seed; that of searches is not that of studies."""
    problem = PROBLEMS[name]
    scheduler = problem.scheduler()
    denoiser = problem.make(scheduler)
    start = torch.randn((STARTS, *denoiser.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.arange(STARTS) % denoiser.config.num_classes if problem.guidance_scale != 1 else None
    return OracleObjective(denoiser, scheduler, start, labels, problem.guidance_scale)


def on_pictures(model: str, guidance_scale: float | None) -> dx.PictureObjective:
    """The objective of a checkpoint, on seeds and captions of which its study has none."""
    zoo = ZooModel(model)
    call: dict[str, Any] = {}
    if guidance_scale is not None:
        call = {"prompt": zoo.conditions(64 + PICTURES)[64:], "guidance_scale": guidance_scale}
    return dx.PictureObjective(zoo.pipe, range(SEED, SEED + PICTURES), **call)


@dataclass(frozen=True)
class Searched:
    """One search: `make(objective, calls)` gives a search with `run`."""

    objective: Callable[[], Any]
    make: Callable[[Any, int], Any]
    calls: int
    title: str

    def run(self, name: str) -> dict[str, Any]:
        """What the file has of it."""
        work = OUTPUT / "searches"
        work.mkdir(parents=True, exist_ok=True)
        evolved = self.make(self.objective(), self.calls).run(work / f"{name}.json")
        steps = evolved.scheduler.config.solver_schedule
        return {"steps": [dict(step) for step in steps], "score": evolved.evolved.score, "evaluated": len(evolved.evolved.evaluated)}  # fmt: skip


def _solvers(objective: Any, calls: int) -> dx.SolverSearch:
    return dx.SolverSearch(objective, calls)


def _timesteps(objective: Any, calls: int) -> dx.TimestepSearch:
    return dx.TimestepSearch(objective, calls)


SEARCHES: dict[str, Searched] = {
    f"{method}-{ground}-{calls}": Searched(objective, make, calls, title)
    for method, make, title in (("usf_s3", _solvers, "S^3"), ("autodiffusion", _timesteps, "DDIM, searched timesteps"))
    for ground, objective, budgets in (
        ("low_rank", lambda: on_problem("low_rank"), (5, 10)),
        ("guided", lambda: on_problem("guided"), (5, 10)),
        ("avatars-sd", lambda: on_pictures("avatars-sd", 3.0), (5,)),
        ("fashion-ddpm", lambda: on_pictures("fashion-ddpm", None), (5,)),
    )
    for calls in budgets
}


def read() -> dict[str, Any]:
    """What was found, by name."""
    return json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}


def variants(method: str, ground: str) -> Mapping[int, Variant]:
    """By number of calls the sampler that a search of `method` on `ground` found; those that there are."""
    found, given = read(), {}
    for name, search in SEARCHES.items():
        if name == f"{method}-{ground}-{search.calls}" and name in found:
            options = {"solver_schedule": found[name]["steps"]}
            given[search.calls] = Variant(
                search.title, scheduler=dx.UnifiedSolverScheduler, scheduler_options=options, steps=search.calls
            )
    return given


def variant(method: str, ground: str, calls: int) -> Variant:
    """The sampler that one search found.

    Raises:
        ValueError: it was not run yet.
    """
    found = variants(method, ground)
    if calls not in found:
        name = f"{method}-{ground}-{calls}"
        raise ValueError(f"{FOUND.name} has no {name!r}; run `python -m benchmarks._search {name}`.")
    return found[calls]


def add_searched(benchmark: Benchmark, key: str, over: tuple[str, ...]) -> None:
    """The searched samplers that there are, on starts and pictures that the searches did not see."""
    for problem in ("low_rank", "guided"):
        found = variants(key, problem)
        if found and key == "usf_s3":  # its schedules begin where the studies do
            calls = tuple(found)
            benchmark.add(
                OracleStudy(
                    {"s3": found.__getitem__}, problems=(problem,), calls=calls, claim_calls=calls, over=over,
                    name=f"searched_{problem}",
                )
            )  # fmt: skip
    for model, scale in (("avatars-sd", 3.0), ("fashion-ddpm", None)):
        found = variants(key, model)
        if found:
            benchmark.add(
                TrajectoryStudy(
                    model, scale, {"searched": found.__getitem__}, calls=tuple(found), over=over, minutes=2,
                    name=f"searched_{model}",
                )
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SEARCHES)}")
    names = parser.parse_args(argv).names
    unknown = sorted(set(names) - set(SEARCHES))
    if unknown:
        parser.error(f"there is no search {unknown}; there are {', '.join(SEARCHES)}")
    for name in names or [name for name in SEARCHES if name not in read()]:
        print(name, flush=True)
        found = SEARCHES[name].run(name)
        content = {**read(), name: found}  # read after the search: another process may have written meanwhile
        ordered = {known: content[known] for known in SEARCHES if known in content}
        FOUND.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
