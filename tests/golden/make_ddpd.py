"""Make `ddpd.json`: texts of the authors' sampler, with networks and random numbers given by formula.

    python -m tests.golden.make_ddpd FOLDER_OF_THE_CLONE

Repository liusulin/DDPD, commit b87c7c0, file owt/sampling.py. Positions and tokens are the likeliest in place of draws, so that
what is compared is which positions are masked, chosen and written; the final step of denoising is on.
"""

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from tests.methods.test_ddpd import (
    GOLDEN,
    LENGTH,
    ROWS,
    RUNS,
    VOCABULARY,
    golden_denoiser,
    golden_planner,
    golden_start,
    golden_uniform,
)


def main(folder: str) -> None:
    sys.path.insert(0, str(Path(folder) / "owt"))
    package, utils = ModuleType("model"), ModuleType("model.utils")  # theirs needs packages that nothing here uses
    utils.get_model_fn = lambda model, train: model
    package.utils = utils
    sys.modules |= {"model": package, "model.utils": utils}
    sampling = importlib.import_module("sampling")
    sampling.sample_categorical = lambda probabilities: probabilities.argmax(-1)
    runs, plain = {}, torch.bernoulli
    for run, steps in RUNS.items():
        numbers = itertools.count()
        torch.bernoulli = lambda p, numbers=numbers: (golden_uniform(next(numbers)) < p).double()
        sampler = sampling.get_ddpd_sampler(
            SimpleNamespace(dim=VOCABULARY), SimpleNamespace(sample_limit=lambda *_: golden_start(), absorb=True),
            lambda t: (t, t), (ROWS, LENGTH), "none", steps,
        )  # fmt: skip
        denoiser = lambda tokens, sigma: golden_denoiser(tokens).log_softmax(-1)  # noqa: E731
        found = sampler(denoiser, lambda tokens, sigma: golden_planner(tokens)[..., None])
        torch.bernoulli = plain
        runs[run] = found.tolist()
    source = {
        "repository": "https://github.com/liusulin/DDPD",
        "commit": "b87c7c0e6544d0c9418777d29d9ce692d3a39197",
        "file": "owt/sampling.py",
        "how": "python -m tests.golden.make_ddpd: three rows of 8 tokens, networks and uniform numbers by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
