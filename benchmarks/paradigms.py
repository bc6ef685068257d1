"""What ParaDiGMS is worth: passes one after another, against steps, and how near the pictures are to the sequential run.

    diffusers-ext bench paradigms            # records diffusers_ext/results/paradigms.json
    diffusers-ext bench paradigms --quick    # a few of the pictures, compared with the record

Settings were fixed before measuring: the paper's tolerance 0.1 and its 10 steps at once, and 32. Each picture is made alone,
since a batch waits for the slowest of its pictures, and waiting is what the method is against. The rivals are the cheap ways
to wait less: sequential runs with as many steps as the picture took passes, of the same scheduler (DDIM) and of
DPM-Solver++ 2M. All are compared with the sequential run of all steps. Time is measured on a CPU, where larger batches are
worth little: it tells the cost, and not what an idle GPU gains.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark, Selection
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel, scheduler_name, weights
from diffusers_ext.metrics import rmse, time_ratio

TOLERANCE, PARALLEL, STEPS = 0.1, (10, 32), (50, 100)
GUIDANCE = {"avatars-sd": 3.0, "fashion-dit": 4.0}
PICTURES = 16
MEASURES = ("passes", "rmse", "rmse_over_multistep")
TIMING: dict[str, Any] = {"model": "avatars-sd", "steps": 50, "rounds": 5}


class Passes:
    """A part of the benchmark: passes and errors of one model.

    Args:
        model: checkpoint of the zoo.
        minutes: on two idle cores.
    """

    quick = True

    def __init__(self, model: str, minutes: float) -> None:
        self.model, self.minutes = model, minutes
        self.runs = [(steps, parallel) for steps in STEPS for parallel in PARALLEL]

    @property
    def claims(self) -> Sequence[str]:
        return [f"{what}_{self._label(*run)}" for run in self.runs for what in MEASURES]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.model: {
                "tolerance": TOLERANCE, "parallel": list(PARALLEL), "steps": list(STEPS), "pictures": PICTURES,
                "guidance_scale": GUIDANCE[self.model], "scheduler": scheduler_name(self.model),
                "weights": weights(self.model),
            }
        }  # fmt: skip

    @property
    def seeds(self) -> dict[str, Any]:
        return {f"{self.model} pictures": list(range(PICTURES))}

    def _label(self, steps: int, parallel: int) -> str:
        return f"{self.model}_{steps}_P{parallel}"

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        units = list(range(PICTURES)) if selection is None else selection.units(PICTURES)
        wanted = [
            run
            for run in self.runs
            if selection is None or selection.wants([f"{what}_{self._label(*run)}" for what in MEASURES])
        ]
        zoo, rows = ZooModel(self.model), []
        conditions, pipe = zoo.conditions(PICTURES), dx.ParadigmsPipeline.from_pipe(zoo.pipe)
        pipe.set_progress_bar_config(disable=True)
        multistep = type(zoo.pipe).from_pipe(zoo.pipe, dtype=zoo.pipe.dtype)
        multistep.scheduler = DPMSolverMultistepScheduler.from_config(zoo.pipe.scheduler.config)
        multistep.set_progress_bar_config(disable=True)

        def draw(by: Any, unit: int, steps: int, **options: Any) -> np.ndarray:
            return zoo.generate(by, [conditions[unit]], [unit], steps, GUIDANCE[self.model], **options)

        @functools.cache
        def sequential(unit: int, steps: int) -> np.ndarray:
            return draw(zoo.pipe, unit, steps)

        bar = tqdm(total=len(wanted) * len(units), desc=self.model)
        for steps, parallel in wanted:
            passes: list[int] = []
            ours: list[float] = []
            fewer: list[float] = []
            faster: list[float] = []
            for unit in units:
                full = sequential(unit, steps)
                found = draw(pipe, unit, steps, parallel=parallel, tolerance=TOLERANCE)
                passes.append(pipe.num_passes)
                ours.append(float(rmse(found, full)[0]))
                fewer.append(float(rmse(sequential(unit, pipe.num_passes), full)[0]))
                faster.append(float(rmse(draw(multistep, unit, pipe.num_passes), full)[0]))
                bar.update()
            label, setting = self._label(steps, parallel), f"{steps} steps, {parallel} at once, {self.model}"
            recorder.paired(
                f"passes_{label}", f"passes, one after another, a step of the sequential run: {setting}",
                Samples("value", {"ours": [count / steps for count in passes]}, 2.5 / steps, units=units),
                "", goal=("<=", 0.5),
            )  # fmt: skip
            for name, rival, theirs in (("rmse", "", fewer), ("rmse_over_multistep", "DPM-Solver++ 2M, ", faster)):
                recorder.paired(
                    f"{name}_{label}",
                    f"RMSE to the sequential run less that of {rival}as many steps as passes: {setting}",
                    Samples("difference", {"ours": ours, "theirs": theirs}, 2e-3, each=False, units=units),
                    "", goal=("<=", 0.0),
                )  # fmt: skip
            means = [np.mean(errors) for errors in (ours, fewer, faster)]
            rows.append([steps, parallel, np.mean(passes), max(passes), means[0], max(ours), *means[1:]])
        bar.close()
        recorder.table(
            f"passes and errors, {self.model}",
            ["steps", "at once", "passes", "of the slowest picture", "RMSE", "of the worst picture", "RMSE of as few steps",
             "of DPM-Solver++ 2M"],
            rows,
        )  # fmt: skip

    def draw(self, title: str, stem: Path) -> list[Path]:
        return []


BENCHMARK = Benchmark("paradigms", settings={"timing": TIMING})
BENCHMARK.add(Passes("avatars-sd", minutes=4))
BENCHMARK.add(Passes("fashion-dit", minutes=5))


@BENCHMARK.part(*(f"time_P{parallel}" for parallel in PARALLEL), minutes=1)
def time(recorder: Recorder) -> None:
    """Time of one picture over that of the sequential run, on this CPU; no goal."""
    zoo = ZooModel(TIMING["model"])
    pipe, condition, steps = dx.ParadigmsPipeline.from_pipe(zoo.pipe), zoo.conditions(1), TIMING["steps"]
    pipe.set_progress_bar_config(disable=True)
    scale = GUIDANCE[TIMING["model"]]
    runs = {"sequential": functools.partial(zoo.generate, zoo.pipe, condition, [0], steps, scale)} | {
        f"P{parallel}": functools.partial(
            zoo.generate, pipe, condition, [0], steps, scale, parallel=parallel, tolerance=TOLERANCE
        )
        for parallel in PARALLEL
    }
    result = time_ratio(runs, baseline="sequential", repeats=TIMING["rounds"])
    for parallel in PARALLEL:
        ratio = result[f"P{parallel}"]
        recorder.claim(
            f"time_P{parallel}",
            f"time of one picture over that of the sequential run, {steps} steps, {parallel} at once, CPU",
            ratio.median, "x", ratio.interval,
        )  # fmt: skip
    recorder.table(
        "time of one picture on the CPU", ["run", "seconds"], [[name, result.seconds[name]] for name in runs]
    )


if __name__ == "__main__":
    BENCHMARK.main()
