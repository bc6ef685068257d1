"""What searched timesteps are worth: DDIM on the list that AutoDiffusion found, against DDIM on an even one.

    python -m benchmarks._search           # once: the searches, on seeds and captions of their own
    diffusers-ext bench autodiffusion      # records diffusers_ext/results/autodiffusion.json

The paper's claim is of DDIM at 4 steps by Fréchet distance. Here it is the distance to the solution of the same seeds, on
noise that the search did not see; the table has the other samplers as well. A list may begin late, which is the list's
error: also on exact scores the solution is the one from the last timestep of training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import diffusers_ext as dx
from benchmarks import _search
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder
from diffusers_ext.metrics import bootstrap_interval

KEY, HELD_OUT, PROBLEMS, CALLS = "autodiffusion", 0, ("low_rank", "guided"), (5, 10)
SPACINGS = ("trailing", "linspace", "leading")
EVEN = {"solver_schedule": "ddim", "use_exponential_sigmas": False}
BENCHMARK = Benchmark(KEY, settings={"held_out_seed": HELD_OUT, "even": list(SPACINGS)})
_search.add_searched(BENCHMARK, KEY, ("ddim",))


@BENCHMARK.part(*(f"searched_{problem}_at_{n}_over_even" for problem in PROBLEMS for n in CALLS), minutes=1)
def exact_scores(recorder: Recorder) -> None:
    """Gain in dB on DDIM with the best of three even lists, as the mean over the starts."""
    rows = []
    for problem in PROBLEMS:
        ground = _search.on_problem(problem, HELD_OUT)
        for n in CALLS:
            even = [_errors(ground, n, **EVEN, timestep_spacing=name) for name in SPACINGS]
            best = min(even, key=lambda errors: float(errors.mean()))
            ours = _errors(ground, n, **_search.variant(KEY, problem, n).scheduler_options)
            gains = (20 * (best / ours).log10()).numpy()
            rows.append([problem, n, float(ours.mean()), *(float(errors.mean()) for errors in even)])
            recorder.claim(
                f"searched_{problem}_at_{n}_over_even",
                f"{problem}: error of DDIM on searched timesteps below that on the best even ones, {n} calls",
                float(gains.mean()), "dB", bootstrap_interval(gains, np.mean), (">=", 0.0),
            )  # fmt: skip
    recorder.table("mean error on exact scores", ["problem", "calls", "searched", *SPACINGS], rows)


def _errors(ground: _search.OracleObjective, calls: int, **options: Any) -> torch.Tensor:
    return ground.errors(dx.UnifiedSolverScheduler.from_config(ground.config, **options), calls)


if __name__ == "__main__":
    BENCHMARK.main()
