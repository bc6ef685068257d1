"""Make `radd.json`: texts of the authors' sampler, with a network and uniform numbers given by formula.

    python -m tests.golden.make_radd FOLDER_OF_THE_CLONE

Repository ML-GSAI/RADD, commit 60b772d, file sampling.py with catsample.py and noise_lib.py. Tokens are the likeliest
("top_k" of 1), so that which masks go, and when the network is called, is compared. Their sampler works in float32.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from tests.methods.test_radd import GOLDEN, LENGTH, ROWS, RUNS, VOCABULARY, golden_logits, golden_uniform


class Network:
    dtype = torch.float64

    def eval(self):
        pass

    def logits(self, x):
        return golden_logits(x)


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    sampling, noise_lib = importlib.import_module("sampling"), importlib.import_module("noise_lib")
    plain, runs = torch.rand, {}
    for run, (method, steps) in RUNS.items():
        sampler = sampling.DiffusionSampler(
            method, Network(), noise_lib.LogLinearNoise(), (ROWS, LENGTH), VOCABULARY, "top_k", 1, device="cpu"
        )
        numbers = iter(range(10**6))

        def draw(*shape):
            now = next(numbers)  # noqa: B023
            return torch.stack([golden_uniform(row, now) for row in range(ROWS)]).float()

        torch.rand = draw
        sequences = sampler.sample(steps)
        torch.rand = plain
        times = torch.linspace(1, sampler.eps, steps + 1)
        rates = [float(sampler.get_update_rate(t, steps)) for t in times[:-1]]
        runs[run] = {"sequences": sequences.tolist(), "calls": sampler.update_cnt, "rates": rates}
    source = {
        "repository": "https://github.com/ML-GSAI/RADD",
        "commit": "60b772df3ad4bc0213e867ec62923fe90359b93d",
        "file": "sampling.py",
        "how": "python -m tests.golden.make_radd: three rows of 8 tokens, network and uniform numbers by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
