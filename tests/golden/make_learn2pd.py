"""Make `learn2pd.json`: texts and calls of the authors' decoder, with a network and a filter given by formula.

    python -m tests.golden.make_learn2pd FOLDER

Repository ims-kdks/Learning-to-Parallel-Decoding, commit 342293c, file llada/generate.py, function `generate_learn2parallel`:
FOLDER holds that file without its import of the authors' copy of LLaDA.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_learn2pd import BLOCK, GOLDEN, MASK, PROMPTS, RUNS, formula_filter, golden_logits


class Network:
    device = torch.device("cpu")
    calls = 0

    def __call__(self, tokens):
        self.calls += 1
        return SimpleNamespace(logits=golden_logits(tokens))


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    theirs, runs = importlib.import_module("generate"), {}
    for run, (prompt, accepted) in RUNS.items():
        network, tokens = Network(), PROMPTS[prompt][None]
        found = theirs.generate_learn2parallel(
            network, formula_filter(), accepted, tokens, steps=32, gen_length=32, block_length=BLOCK, mask_id=MASK
        )
        runs[run] = {"tokens": found[0, tokens.shape[1] :].tolist(), "calls": network.calls}
    source = {
        "repository": "https://github.com/ims-kdks/Learning-to-Parallel-Decoding",
        "commit": "342293ce0a69d3e9917e445c647bed359e99aa80",
        "file": "llada/generate.py",
        "how": "python -m tests.golden.make_learn2pd: greedy, network and filter by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
