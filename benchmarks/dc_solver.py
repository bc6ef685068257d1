"""What DC-Solver is worth: against UniPC and DPM-Solver++ 2M at equal calls, with ratios found on ten other pictures.

    python -m benchmarks._dc_ratios          # once: searches the ratios
    diffusers-ext bench dc_solver            # records diffusers_ext/results/dc_solver.json

Settings are the paper's: ten pictures, 20 iterations of AdamW at 0.1, a reference run of 200 steps of DDIM. The last is what
the search follows; what is measured is the distance to the exact solution, and on the zoo to a run of 200 steps of
DPM-Solver++. The plain UniPC of diffusers corrects the first step too, so that a UniPC which does not is among the peers:
what the ratios gain is the difference to that.
"""

from __future__ import annotations

from diffusers import UniPCMultistepScheduler

from benchmarks._bench import Benchmark
from benchmarks._dc_ratios import sampler
from benchmarks._quality import Variant
from benchmarks._sampler_peers import PEERS, fitting
from benchmarks._samplers import OracleStudy, TrajectoryStudy

BENCHMARK = Benchmark("dc_solver")
RIVALS = ("unipc", "unipc_uncorrected_first", "dpm_solver_pp_2m")
UNIPC = Variant(
    "UniPC, first step not corrected", scheduler=fitting(UniPCMultistepScheduler), scheduler_options={"disable_corrector": [0]}
)  # fmt: skip
OTHERS = {"unipc": PEERS["unipc"], "unipc_uncorrected_first": UNIPC, "dpm_solver_pp_2m": PEERS["dpm_solver_pp_2m"]}

for problem in ("mixture", "guided", "guided_low_rank"):
    searched, calls = sampler(problem)
    if calls:
        BENCHMARK.add(
            OracleStudy(
                {"dc_solver": searched}, OTHERS, problems=(problem,), calls=calls, claim_calls=calls, over=RIVALS,
                name=problem,
            )
        )  # fmt: skip
for scale in (3.0, 7.5):
    searched, calls = sampler("avatars-sd", scale)
    if calls:
        BENCHMARK.add(
            TrajectoryStudy("avatars-sd", scale, {"dc_solver": searched}, OTHERS, calls=calls, over=RIVALS, minutes=3)
        )

if __name__ == "__main__":
    BENCHMARK.main()
