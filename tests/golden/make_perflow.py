"""Make `perflow.json`: what the authors' scheduler and ODE solver give on formulas.

    python -m tests.golden.make_perflow FOLDER_OF_THE_CLONE

Repository magic-research/piecewise-rectified-flow, files src/scheduler_perflow.py and src/pfode_solver.py. The solver is
compared where the number of windows times that of sub-steps divides 1000: else its steps end elsewhere than the next ones
begin, which is not copied.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler

from tests import tiny_sd
from tests.golden._reference import functions
from tests.methods.test_perflow import (
    GRIDS,
    PROCESS,
    RUNS,
    SOLVED,
    TIMES,
    network,
    noised_inputs,
    numbers,
    solver_inputs,
    start,
)


def main(folder: Path) -> None:
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    spec = importlib.util.spec_from_file_location("perflow_reference", folder / "src/scheduler_perflow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    grids, runs, windows = {}, {}, {}
    for windows_count, number in GRIDS:
        scheduler = module.PeRFlowScheduler(num_time_windows=windows_count)
        scheduler.set_timesteps(number)
        grids[f"{windows_count} {number}"] = scheduler.timesteps.tolist()
    for kind, windows_count, number in RUNS:
        scheduler = module.PeRFlowScheduler(prediction_type=kind, num_time_windows=windows_count)
        scheduler.set_timesteps(number)
        x, seen = start(), []
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0].reshape(x.shape)
            seen.append(numbers(x))
        runs[f"{kind} {windows_count} {number}"] = seen
    for windows_count in (1, 3, 4, 5):
        scheduler = module.PeRFlowScheduler(num_time_windows=windows_count)
        found = scheduler.get_window_alpha(torch.tensor(TIMES))
        windows[str(windows_count)] = [found[i].tolist() for i in (0, 1, 5, 6)]
    x, noise, t = noised_inputs()
    noised = module.PeRFlowScheduler().add_noise(x, noise, t)
    methods = functions(folder / "src/pfode_solver.py", "PFODESolver")
    solved = []
    scheduler = DDIMScheduler(**PROCESS)
    scheduler.num_train_timesteps = 1000  # which today's schedulers have in their config alone
    solver = SimpleNamespace(scheduler=scheduler, t_initial=1, t_terminal=0, stepsize=-1 / -1000)
    solver.get_timesteps = lambda *args: methods["get_timesteps"](solver, *args)
    pipe, given = tiny_sd.make(scheduler), solver_inputs()
    for scale, steps in SOLVED:
        found = methods["solve"](
            solver,
            given["x"],
            pipe.unet,
            given["start"],
            given["end"],
            given["states"],
            given["empty"],
            scale,
            steps,
            4,
        )
        solved.append([numbers(row) for row in found])
    content = {
        "source": {
            "repository": "https://github.com/magic-research/piecewise-rectified-flow",
            "commit": commit.stdout.strip(),
            "files": ["src/scheduler_perflow.py", "src/pfode_solver.py"],
            "how": "python -m tests.golden.make_perflow FOLDER: states after each step, windows of times with the alphas of "
            "their ends, noised data, and states that the solver ends in, as mean, standard deviation and first values",
        },
        "grids": grids, "runs": runs, "windows": windows, "noised": numbers(noised), "solved": solved,
    }  # fmt: skip
    Path(__file__).with_name("perflow.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
