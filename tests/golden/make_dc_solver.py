"""Make `dc_solver.json`: states of the authors' scheduler with given ratios, and its regression, by formula.

    python -m tests.golden.make_dc_solver FOLDER_OF_THE_CLONE

Repository wl-zhao/DC-Solver, file diffusers/src/diffusers/schedulers/scheduling_dcsolver_multistep.py, loaded beside the
installed diffusers. Its search is not compared: its reference states are a step later than their timesteps say, and it
keeps the last ratio and not the best.
"""

import json
import sys
import tempfile
import types
from pathlib import Path

import diffusers
import numpy as np

from tests.methods.test_dc_solver import BASE, RATIOS, RUNS, network, numbers, planted, start


def main(folder: Path) -> None:
    file = "diffusers/src/diffusers/schedulers/scheduling_dcsolver_multistep.py"
    name = f"{diffusers.__name__}.schedulers.scheduling_dcsolver_multistep"
    module = types.ModuleType(name)
    module.__package__ = f"{diffusers.__name__}.schedulers"
    sys.modules[name] = module
    exec(compile((folder / file).read_text(), file, "exec"), module.__dict__)
    runs = {}
    for title, (options, number) in RUNS.items():
        scheduler = module.DCSolverMultistepScheduler(disable_corrector=[0], **BASE, **options)
        scheduler.set_timesteps(number)
        scheduler.dc_ratios = RATIOS[:number]
        seen = [start()]
        for t in scheduler.timesteps:
            seen.append(scheduler.step(network(seen[-1], t), t, seen[-1]).prev_sample)
        runs[title] = [numbers(x) for x in seen]
    with tempfile.TemporaryDirectory() as place:
        np.save(f"{place}/coefficients.npy", planted().ravel())
        regression = {
            f"{w}, {n}": scheduler.cascade_polynomial_regression(w, n, f"{place}/coefficients.npy")
            for w, n in ((7.5, 5), (3.0, 10), (12.0, 20), (1.5, 3))
        }
    source = {
        "repository": "https://github.com/wl-zhao/DC-Solver",
        "commit": "f82d0601851b483d1dc06fc97e443588c6c9d9b0",
        "file": file,
        "how": "python -m tests.golden.make_dc_solver FOLDER: float32; after each step the "
        "mean, the standard deviation and the first three values of the state; ratios of planted coefficients",
    }
    content = {"source": source, "runs": runs, "regression": regression}
    Path(__file__).with_name("dc_solver.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
