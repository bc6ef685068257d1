"""Make `eoser_ass_cj_grpo.json`: texts and calls of the authors' decoders, with a network given by formula.

    python -m tests.golden.make_eoser_ass_cj_grpo FOLDER_OF_THE_CLONE

Repository yjyddq/EOSER-ASS-RL, commit 5affb4e, file eval/generate.py. Its mixed precision for CUDA is left out.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_eoser_ass_cj_grpo import EOS, GOLDEN, RUNS


class Network:
    dtype = torch.float64
    calls = 0

    def __call__(self, tokens):
        self.calls += 1
        return SimpleNamespace(logits=golden_logits(tokens))


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    theirs = importlib.import_module("generate")
    theirs.dist = SimpleNamespace(get_rank=lambda: 1)
    torch.autocast = lambda **_: contextlib.nullcontext()
    runs = {}
    for run, (name, prompt, length, steps, blocks) in RUNS.items():
        network, tokens = Network(), PROMPTS[prompt][None]
        sizes = {"block_length": length} if name == "eoser" else {"block_num": blocks}
        found = getattr(theirs, f"{name}_generate")(
            network, tokens, SimpleNamespace(eos_token_id=EOS), steps=steps, gen_length=length, mask_id=MASK, **sizes
        )
        runs[run] = {"tokens": found[0, tokens.shape[1] :].tolist(), "calls": network.calls}
    source = {
        "repository": "https://github.com/yjyddq/EOSER-ASS-RL",
        "commit": "5affb4ec0db9d3819175c2011c94e38c74325624",
        "file": "eval/generate.py",
        "how": "python -m tests.golden.make_eoser_ass_cj_grpo: greedy, network by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
