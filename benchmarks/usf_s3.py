"""What the unified solver is worth: its default at any number of steps, and what S^3 finds for 5 and 10.

    python -m benchmarks._search           # once: the searches, on seeds and captions of their own
    diffusers-ext bench usf_s3             # records diffusers_ext/results/usf_s3.json

The default (Taylor order 3 of the data prediction with correctors, order 2 for long steps) was fixed on mixtures of other
seeds, on grids even in log-SNR. It is the second: the first, of order 3 throughout, was changed after a trial of this
benchmark had shown it to fail at 5 calls. Searched schedules are for one model, number of calls and guidance scale; they are measured on noise that the search did not see.
"""

from __future__ import annotations

import diffusers_ext as dx
from benchmarks import _search
from benchmarks._bench import Benchmark
from benchmarks._quality import Variant
from benchmarks._samplers import OracleStudy, TrajectoryStudy

KEY = "usf_s3"
BENCHMARK = Benchmark(KEY)
DEFAULT = {"default": Variant("Taylor 3, corrected", scheduler=dx.UnifiedSolverScheduler)}
RIVALS = ("dpm_solver_pp_2m", "unipc")
BENCHMARK.add(OracleStudy(DEFAULT, problems=("mixture", "low_rank", "guided", "flow"), over=RIVALS))
BENCHMARK.add(TrajectoryStudy("avatars-sd", 3.0, DEFAULT, over=("best",), minutes=9))
BENCHMARK.add(TrajectoryStudy("fashion-ddpm", None, DEFAULT, over=("best",), minutes=6))
_search.add_searched(BENCHMARK, KEY, ("best",))

if __name__ == "__main__":
    BENCHMARK.main()
