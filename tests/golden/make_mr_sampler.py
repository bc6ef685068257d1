"""Make `mr_sampler.json`: ends of the authors' sampler, of a network and noise given by formula.

    python -m tests.golden.make_mr_sampler FOLDER_OF_THE_CLONE

Repository grrrute/mr-sampler, commit 896764c, files universal-image-restoration/utils/sampler.py and sde_utils.py. They
import libraries for writing pictures and for other solvers, which are left out here. The network gets doubles, their
coefficients are float32.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import diffusers_ext as dx
from tests.methods.test_mr_sampler import GOLDEN, RUNS, degraded, golden_network, golden_noise

TARGETS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}


def main(folder: Path) -> None:
    package = types.ModuleType("utils")
    package.__path__ = [str(folder / "universal-image-restoration" / "utils")]
    left_out = {name: mock.MagicMock() for name in ("cv2", "torchvision", "torchvision.utils", "scipy")}
    with mock.patch.dict(sys.modules, left_out | {"utils": package}), mock.patch.object(np, "int", int, create=True):
        reference = importlib.import_module("utils.sampler")
    options = {"sde": {"max_sigma": 50, "T": 100, "schedule": "cosine", "eps": 0.005}}
    runs = {}
    for name, (kind, parameterization, order, target) in RUNS.items():
        scheduler = dx.MRSamplerScheduler(prediction_type=target)
        process = reference.IRSDE(**options["sde"])
        process.set_model(lambda x, mu, t, **_: golden_network(scheduler, x, t, mu))  # noqa: B023
        sampler = reference.MRSampler(
            process, options, 10, solver_type=kind, parameterization=parameterization, order=order,
            fit_target=TARGETS[target],
        )  # fmt: skip
        numbers = iter(range(1, 100))
        with mock.patch.object(torch, "randn_like", lambda x: golden_noise(next(numbers))):  # noqa: B023
            end = sampler.sampling(degraded(), noisy_state=degraded() + 50 / 255 * golden_noise(0))[0]
        runs[name] = end.flatten().tolist()
    source = {
        "repository": "https://github.com/grrrute/mr-sampler",
        "commit": "896764cfa1f4ad979a81493a7a468d238aad07de",
        "files": "universal-image-restoration/utils/sampler.py, universal-image-restoration/utils/sde_utils.py",
        "how": "python -m tests.golden.make_mr_sampler: two pictures of 16 pixels, 10 steps, noise by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
