"""Make `evodiff.json`: states at which the authors' sampler calls the network, on a grid and a network given by formula.

    python -m tests.golden.make_evodiff FOLDER_OF_THE_CLONE

Repository ShiguiLi/EVODiff, commit fc1417b, file code_demo/edm_cifar10/samplers/evodiff.py, which takes any noise schedule.
Its rule for the last step (the state times `1 - sqrt(sigma_t sigma_0)`) is for the tiny last noise level of EDM; it is not
compared.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

from tests.methods.test_evodiff import RUNS, network, numbers, run_grid, start


class Schedule:
    """Looks the process up by time: `all` has a row `(time, alpha, sigma)` for each point of the grid."""

    def __init__(self, rows):
        self.times, self.alphas, self.sigmas = torch.tensor(rows, dtype=torch.float64).T

    def _of(self, t, values):
        return values[(self.times - t.double().reshape(-1, 1)).abs().argmin(1)].reshape(t.shape)

    def marginal_alpha(self, t):
        return self._of(t, self.alphas)

    def marginal_std(self, t):
        return self._of(t, self.sigmas)

    def marginal_kappa(self, t):
        return self._of(t, self.sigmas / self.alphas)


def main(folder: Path) -> None:
    package = types.ModuleType("reference")
    package.__path__ = [str(folder / "code_demo/edm_cifar10/samplers")]
    sys.modules["reference"] = package
    sampler = importlib.import_module("reference.evodiff").EVODiff_edm
    runs = {}
    for name in RUNS:
        rows = run_grid(name)
        schedule, seen = Schedule(rows), []

        class OnGrid(sampler):
            def get_time_steps(self, **kwargs):
                return schedule.times  # noqa: B023

        def model(x, t):
            i = int((schedule.times - t.flatten()[0]).abs().argmin())  # noqa: B023
            seen.append(x)  # noqa: B023
            return network(x, schedule.alphas[i], schedule.sigmas[i])  # noqa: B023

        ends = {"t_start": schedule.times[0], "t_end": schedule.times[-1]}
        OnGrid(schedule).sample(model, start(), steps=len(rows) - 1, order=2, **ends)
        runs[name] = [numbers(x) for x in seen]
    source = {
        "repository": "https://github.com/ShiguiLi/EVODiff",
        "commit": "fc1417bcb9280f62eb8380fc0e620aec2ac2add8",
        "file": "code_demo/edm_cifar10/samplers/evodiff.py",
        "how": "python -m tests.golden.make_evodiff FOLDER: float64; per network call the mean, the standard deviation and "
        "the first three values of the state",
    }
    Path(__file__).with_name("evodiff.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
