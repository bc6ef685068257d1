"""What a scheduler's `step` itself costs, without a model.

BENCHMARK.add(StepOverhead({"ours": Variant("order 3", scheduler=dx.OurScheduler)}))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from benchmarks._bench import Selection
from benchmarks._grounds import PROBLEMS, OracleGround
from benchmarks._quality import Variant
from benchmarks._record import Recorder
from benchmarks._sampler_peers import Sampler, variant_of
from diffusers_ext.metrics import time_ratio


class StepOverhead:
    """A part of a benchmark: the time of `step` itself over that of diffusers' DPM-Solver++ of order 2.

    Two claims a variant: `NAME_time_LABEL` is the median ratio, and `NAME_not_slower_LABEL` the lower end of its interval
    less the upper end of that of upstream against itself, which is to be at most zero.

    Args:
        variants: label -> sampler with a scheduler.
        peer: what they are compared with.
        rows: of the state; each has 16 numbers.
        steps: of a run; only `step` is timed, on a scheduler that has made a run of as many steps before, as from the second
            picture on: what a scheduler keeps from one run to the next, it has.
        rounds: that count.
        minutes: that it takes on two idle cores.
        name: begins the names of claims and tables.
    """

    quick = False
    seeds: Mapping[str, Any] = {}

    def __init__(
        self,
        variants: Mapping[str, Sampler],
        *,
        peer: Variant = Variant("DPM-Solver++ 2M", scheduler=DPMSolverMultistepScheduler),  # noqa: B008
        rows: int = 4096,
        steps: int = 20,
        rounds: int = 21,
        minutes: float = 0.5,
        name: str = "step",
    ) -> None:
        if not variants:
            raise ValueError("`variants` is empty; there is nothing to compare.")
        self.variants, self.peer, self.rows = dict(variants), peer, rows
        self.steps, self.rounds, self.minutes, self.name = steps, rounds, minutes, name

    @property
    def claims(self) -> list[str]:
        return [f"{self.name}_{what}_{label}" for label in self.variants for what in ("time", "not_slower")]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.name: {"rows": self.rows, "steps": self.steps, "rounds": self.rounds, "peer": self.peer.settings()}
        }

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Time the runs and add the claims and a table."""
        everyone = {"upstream": self.peer, **{f"ours {label}": sampler for label, sampler in self.variants.items()}}
        runs = {name: self._run(variant_of(sampler, self.steps)) for name, sampler in everyone.items()}
        result = time_ratio(runs, baseline="upstream", repeats=self.rounds, warmup=2)
        spread = result.noise.interval
        rows = []
        for label in self.variants:
            ratio, title = result[f"ours {label}"], variant_of(self.variants[label], self.steps).title or label
            recorder.claim(
                f"{self.name}_time_{label}", f"time of a step over that of {self.peer.title}, {title}",
                ratio.median, "x", ratio.interval,
            )  # fmt: skip
            recorder.claim(
                f"{self.name}_not_slower_{label}",
                f"lower end of the interval of that ratio less the upper end of upstream's against itself, {title}",
                ratio.interval[0] - spread[1], "x", goal=("<=", 0.0),
            )  # fmt: skip
            seconds = result.seconds[f"ours {label}"] / self.steps
            rows.append([title, 1e6 * seconds, ratio.median, *ratio.interval, *spread])
        columns = ["sampler", "a step (microseconds)", "over upstream", "low", "high", "upstream again, low", "high "]
        recorder.table(f"{self.name}: time", columns, rows)

    def _run(self, variant: Variant) -> Callable[[], None]:
        """A function that makes all steps of a run, each time on another scheduler that is ready."""
        ground = OracleGround(PROBLEMS["mixture"], 1)
        x = torch.randn(self.rows, *ground.pipe.unet.shape, generator=torch.Generator().manual_seed(0))
        output = 0.1 * x

        @torch.no_grad()
        def walk(scheduler: Any) -> None:
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(output, t, state, return_dict=False)[0]

        with variant.on(ground.pipe) as pipe:
            pipe.scheduler.set_timesteps(self.steps)
            walk(pipe.scheduler)
            pipe.scheduler.set_timesteps(self.steps)
            ready = [copy.deepcopy(pipe.scheduler) for _ in range(2 * (self.rounds + 2))]
        return lambda: walk(ready.pop())

    def draw(self, title: str, stem: Path) -> list[Path]:
        return []
