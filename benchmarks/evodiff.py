"""What EVODiff is worth: against DPM-Solver++ 2M and UniPC at equal calls, on exact scores and on the zoo.

    diffusers-ext bench evodiff            # records diffusers_ext/results/evodiff.json

It has no settings. The paper's claim is of Fréchet distances of imperfect networks. Here it is distances to the solution of
the same seeds: on exact scores, where only the solver can err, and on networks.
"""

from __future__ import annotations

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import Variant
from benchmarks._samplers import OracleStudy, TrajectoryStudy

BENCHMARK = Benchmark("evodiff")
VARIANTS = {"evodiff": Variant("EVODiff", scheduler=dx.EVODiffScheduler)}
RIVALS = ("dpm_solver_pp_2m", "unipc")
BENCHMARK.add(OracleStudy(VARIANTS, problems=("mixture", "low_rank", "guided", "flow"), over=RIVALS[:1]))
BENCHMARK.add(TrajectoryStudy("avatars-sd", 3.0, VARIANTS, over=RIVALS, minutes=9))
BENCHMARK.add(TrajectoryStudy("fashion-ddpm", None, VARIANTS, over=RIVALS, minutes=6))

if __name__ == "__main__":
    BENCHMARK.main()
