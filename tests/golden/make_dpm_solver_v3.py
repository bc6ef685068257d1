"""Numbers of the authors' DPM-Solver-v3, for `dpm_solver_v3.json`.

    git clone https://github.com/thu-ml/DPM-Solver-v3 && python -m tests.golden.make_dpm_solver_v3 DPM-Solver-v3/codebases/score_sde/samplers/dpm_solver_v3.py

Their solver runs on a network and statistics that are formulas (`network`, `statistics`), on Stable Diffusion's noise levels
in equal steps of log-SNR. Its calls of `.cuda()` are left out. The network is called at points of the grid of statistics, so
nothing is rounded.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

POINTS, STEPS, SHAPE = 4801, 8, (1, 2, 2)
# Half the log-SNR at the ends of Stable Diffusion's schedule.
LOW, HIGH = -2.6820242193399095, 3.53469906619468


def network(x: torch.Tensor, lambda_: float) -> torch.Tensor:
    """Predicted noise."""
    return 0.6 * x + 0.4 * torch.tanh(2 * x + 0.3 * lambda_) - 0.2 * math.sin(lambda_)


def statistics() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """l, s and b."""
    lambdas = torch.linspace(LOW, HIGH, POINTS, dtype=torch.float64).view(-1, 1, 1, 1)
    place = torch.arange(4, dtype=torch.float64).view(1, *SHAPE)
    l = torch.sigmoid(-lambdas) + 0.1 * torch.cos(lambdas + place)  # noqa: E741  # the paper's symbol
    return l, 0.4 * torch.sin(0.7 * lambdas + place) - 0.3, 0.5 * torch.cos(lambdas - 0.5 * place)


def start() -> torch.Tensor:
    return torch.linspace(-1.7, 1.9, 8, dtype=torch.float64).view(2, *SHAPE)


OPTIONS = [
    {"order": order, "corrector": corrector, "p_pseudo": p_pseudo, "c_pseudo": c_pseudo, "lower_order_final": final}
    for order, corrector, p_pseudo, c_pseudo, final in itertools.product(
        (1, 2, 3), (False, True), (False, True), (False, True), (True, False)
    )
    if corrector or not c_pseudo
]


class Schedule:
    """What their solver asks of a noise schedule, with sigma / alpha for the time."""

    T, total_N = math.exp(-LOW), math.exp(HIGH)

    def marginal_lambda(self, t):
        return -torch.log(t.double())

    def inverse_lambda(self, lambda_):
        return torch.exp(-lambda_.double())

    def marginal_alpha(self, t):
        return torch.rsqrt(1 + t.double() ** 2)

    def marginal_std(self, t):
        return t.double() * self.marginal_alpha(t)


def main(file: str) -> None:
    module = types.ModuleType("reference")
    exec(compile(Path(file).read_text().replace(".cuda()", ""), file, "exec"), module.__dict__)
    schedule, results = Schedule(), []
    with tempfile.TemporaryDirectory() as folder:
        l, s, b = (value.numpy() for value in statistics())  # noqa: E741
        np.savez(f"{folder}/l.npz", l=l)
        np.savez(f"{folder}/sb.npz", s=s, b=b)
        model = lambda x, t: network(x, -math.log(float(t.flatten()[0])))  # noqa: E731
        for options in OPTIONS:
            solver = module.DPM_Solver_v3(folder, model, schedule, steps=STEPS, device="cpu")
            end = solver.sample(
                start(), options["order"], options["p_pseudo"], options["corrector"], options["c_pseudo"],
                options["lower_order_final"],
            )  # fmt: skip
            results.append({**options, "end": end.flatten().tolist()})
    source = {
        "repository": "https://github.com/thu-ml/DPM-Solver-v3",
        "commit": "ba168717cef161d3b0b0fae1d69f8ff66838aee3",
        "file": "codebases/score_sde/samplers/dpm_solver_v3.py",
        "how": "python -m tests.golden.make_dpm_solver_v3: where 8 steps of equal log-SNR end, with a network and statistics "
        "by formula, in float64",
    }
    target = Path(__file__).with_name("dpm_solver_v3.json")
    target.write_text(json.dumps({"source": source, "runs": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
