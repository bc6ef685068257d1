"""Make `usf_s3.json`: where the authors' sampler ends on a denoiser given by formula, by three mixed schedules.

    python -m tests.golden.make_usf_s3 FOLDER_OF_THE_CLONE

Repository thu-nics/USF, commit 5b89ef5, file codebases/edm/uni_sampler/uni_sampler.py, which takes any noise schedule. Its
statistics of DPM-Solver-v3 and its average clean sample are left out: these runs do not use them. Correctors are its
"pseudo" ones; its "implicit" ones never run, since it compares a dict with their name.
"""

import json
import sys
import types
from pathlib import Path

import torch

from diffusers_ext.schedulers.unified_solver import SolverStep, UnifiedSolverScheduler
from tests.methods.test_usf_s3 import RUNS, network, start_state

NAMES = {"exp": "0.5exp", "-exp": "-0.5exp", "midpoint": "dpmsolver-2", "bh1": "unipc-bh1"}


def derivatives(order, counts, scaling, active=None):
    """The authors' description of the differences."""
    found = [{"estimate": f"Difference_{n}", "active_points": active, "relaxation": None} for n in counts[: order - 1]]
    if found and scaling:
        named = isinstance(scaling, str)
        found[0] |= (
            {"relaxation": NAMES[scaling]} if named else {"relaxation": "linear", "relaxation_coefficient": scaling}
        )
    return found


def corrector(step):
    if not step.corrector:
        return {"type": "no_corrector"}
    start, n = step.start - 1, step.corrector - 1
    active = [-1, *range(start + 1, -1), *range(start - 1, -9, -1)][:n]
    rule = derivatives(step.corrector, (n,) * n, 0.0, active)
    return {"type": "pseudo", "start_point": start, "taylor_order": step.corrector, "derivative_type": rule}


def run(theirs, schedule):
    steps = [SolverStep(**step) for step in schedule]
    levels = theirs.NoiseScheduleVP(
        "discrete", alphas_cumprod=UnifiedSolverScheduler().alphas_cumprod.double(), dtype=torch.float64
    )
    levels.t_array = torch.arange(1, 1001, dtype=torch.float64).reshape(1, -1) / 1000  # they have it in float32
    sampler = theirs.uni_sampler.__new__(theirs.uni_sampler)
    sampler.noise_schedule, sampler.correcting_x0_fn, sampler.correcting_xt_fn = levels, None, None
    sampler.model = lambda x, t: network(x, float(t.reshape(-1)[0]) * 1000 - 1)
    sampler.f_prediction_from_noise = lambda x, noise, t: noise
    differences = sampler.get_diff_derivative

    def with_numbers(lambdas, *args, **kwargs):  # their Vandermonde matrix wants numbers; times have shape (1,)
        return differences([None if value is None else value.reshape(()) for value in lambdas], *args, **kwargs)

    sampler.get_diff_derivative = with_numbers
    decisions = {
        "timesteps": torch.tensor([[(step.timestep + 1) / 1000] for step in steps] + [[0.001]]),
        "orders": [step.order for step in steps],
        "prediction_types": [f"{step.prediction}_prediction" for step in steps],
        "start_points": [step.start for step in steps],
        "derivative_types": [derivatives(step.order, step.points, step.scaling) for step in steps],
        "corrector_types": [corrector(step) for step in steps],
    }
    return sampler.sample(start_state(), decisions)


def main(clone: Path) -> None:
    torch.set_default_dtype(torch.float64)
    theirs = types.ModuleType("uni_sampler")
    code = (clone / "codebases/edm/uni_sampler/uni_sampler.py").read_text(encoding="utf-8")
    exec(compile(code, "uni_sampler.py", "exec"), theirs.__dict__)
    content = {
        "source": "thu-nics/USF 5b89ef5, codebases/edm/uni_sampler/uni_sampler.py, run by tests/golden/make_usf_s3.py",
        "final": {name: run(theirs, schedule).flatten().tolist() for name, schedule in RUNS.items()},
    }
    Path(__file__).with_name("usf_s3.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
