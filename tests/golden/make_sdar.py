"""Make `sdar.json`: texts and calls of the authors' decoder with a network given by formula, and their training mask.

    python -m tests.golden.make_sdar FOLDER_OF_THE_CLONE

Repository JetAstra/SDAR, commit c2041a8, files generate.py (run as it is, but that draws take the likeliest token) and
training/model/SDAR-4B-Chat/modeling_sdar.py (one function out of it).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.golden._reference import functions
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_sdar import GOLDEN, RUNS


class Network:
    """Knows the blocks that were stored, as a cache would."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.stored, self.calls = torch.zeros(1, 0, dtype=torch.long), 0

    def eval(self) -> None:
        pass

    def __call__(self, tokens, store_kv, **_):
        whole = torch.cat([self.stored, tokens], 1)
        if store_kv:
            self.stored = whole
        else:
            self.calls += 1
        return SimpleNamespace(logits=golden_logits(whole)[:, -tokens.shape[1] :])


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    decoder = importlib.import_module("generate")
    draw, torch.multinomial = torch.multinomial, lambda p, num_samples: p.argmax(-1, keepdim=True)
    runs = {}
    for run, (length, block, steps, threshold) in RUNS.items():
        prompt, network = PROMPTS[2].repeat(2)[:length], Network()
        total = -(-(length + 14) // block) * block
        found = decoder.block_diffusion_generate(
            network, {"input_ids": prompt[None]}, MASK, gen_length=total - length, block_length=block,
            denoising_steps=steps, confidence_threshold=threshold,
            remasking_strategy="low_confidence_static" if threshold is None else "low_confidence_dynamic",
        )  # fmt: skip
        runs[run] = {"tokens": found[0, length:].tolist(), "calls": network.calls}
    torch.multinomial = draw
    file = Path(folder, "training/model/SDAR-4B-Chat/modeling_sdar.py")
    places = torch.arange(20)
    mask = functions(file)["block_diff_mask"](None, None, places[:, None], places[None], block_size=4, n=10)
    source = {
        "repository": "https://github.com/JetAstra/SDAR",
        "commit": "c2041a8333333d685f6e15122c84f60f51f85ebd",
        "files": ["generate.py", "training/model/SDAR-4B-Chat/modeling_sdar.py"],
        "how": "python -m tests.golden.make_sdar: greedy, network by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs, "mask": mask.long().tolist()}))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
