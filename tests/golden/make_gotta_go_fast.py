"""Make `gotta_go_fast.json`: pictures of the authors' solver, of networks and noise given by formula, in float64.

    python -m tests.golden.make_gotta_go_fast FOLDER_OF_THE_CLONE FOLDER_OF_SCORE_SDE_PYTORCH

Repository AlexiaJM/score_sde_fast_sampling, commit 5da8f3f, file sde_sampling_torch.py, which needs sde_lib.py of
yang-song/score_sde_pytorch, commit cb1f359. Exploding noise is its `VESDE`. The beta schedule of a scheduler is none of its
processes: it is written below by its formulas, and the solver is theirs. They count attempts and not calls.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from tests.methods.test_gotta_go_fast import GOLDEN, RUNS, coefficients, golden_noise, golden_pipe


def main(folder: str, library: str) -> None:
    sys.path[:0] = [folder, library]
    solver, sde_lib = importlib.import_module("sde_sampling_torch"), importlib.import_module("sde_lib")
    torch.set_default_dtype(torch.float64)

    class BetaSchedule(sde_lib.SDE):
        def __init__(self, scheduler):
            super().__init__(1000)
            self.scheduler = scheduler

        T = 1

        def _of(self, t):
            return torch.tensor(np.array([coefficients(self.scheduler, time) for time in t.tolist()])).T

        def sde(self, x, t):
            beta = self._of(t)[2]
            return -0.5 * beta[:, None, None, None] * x, beta.sqrt()

        def marginal_prob(self, x, t):
            alpha, sigma, _ = self._of(t)
            return alpha[:, None, None, None] * x, sigma

        def prior_sampling(self, shape):
            raise NotImplementedError

        def prior_logp(self, z):
            raise NotImplementedError

    runs = {}
    for run, (name, eps_rel, eps_abs) in RUNS.items():
        pipe = golden_pipe(name)
        if name == "preserving":
            sde, end, start = BetaSchedule(pipe.scheduler), 1e-3, 1.0

            def score(x, t):
                return -pipe.unet(x, 999 * t)[0] / sde._of(t)[1][:, None, None, None]  # noqa: B023
        else:
            sde, end, start = sde_lib.VESDE(0.01, 50.0), 1e-5, 50.0

            def score(x, t):
                return pipe.unet(x, 0.01 * 5000.0**t)[0]  # noqa: B023

        number = iter(range(1, 10**6))

        def draw(x):
            now = next(number)  # noqa: B023
            return torch.stack([golden_noise(picture, now) for picture in range(len(x))])

        plain, torch.randn_like = torch.randn_like, draw
        shape = (3, 1, 4, 4)
        sample = solver.get_pc_sampler(
            sde,
            shape,
            solver.get_predictor("adaptive"),
            device="cpu",
            eps=end,
            abstol=eps_abs,
            reltol=eps_rel,
            adaptive=True,
        )
        states, attempts = sample(score, prior=start * torch.stack([golden_noise(i, 0) for i in range(3)]))
        torch.randn_like = plain
        runs[run] = {"attempts": attempts - 1, "states": states.flatten(1).tolist()}
    source = {
        "repository": "https://github.com/AlexiaJM/score_sde_fast_sampling",
        "commit": "5da8f3fe103ee5ac3c3a336f16cc06c9541f0ed9",
        "file": "sde_sampling_torch.py",
        "how": "python -m tests.golden.make_gotta_go_fast: three pictures of 16 pixels in float64, noise by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(*(str(Path(path).resolve()) for path in sys.argv[1:]))
