"""Make `adablock.json`: texts, block lengths and calls of the authors' decoder, with a network given by formula.

    python -m tests.golden.make_adablock FOLDER_OF_THE_CLONE

Repository lgxi24/AdaBlock-dLLM, commit 491b205, file llada/generate_adablock.py, function `generate_adablock`, whose import
of the authors' copy of LLaDA is left empty.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_adablock import DELIMITERS, GOLDEN, MASK, PROMPTS, RUNS, golden_logits


class Network:
    device = torch.device("cpu")

    def __call__(self, tokens):
        return SimpleNamespace(logits=golden_logits(tokens))


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    for name in ("model", "model.modeling_llada"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["model.modeling_llada"].LLaDAModelLM = None
    generate = importlib.import_module("generate_adablock").generate_adablock
    runs = {}
    for run, (number, threshold, delimiter_threshold, length) in RUNS.items():
        prompt = PROMPTS[number][None]
        tokens, calls, blocks = generate(
            Network(), prompt, gen_length=length, init_block_length=8, mask_id=MASK, threshold=threshold,
            delimiter_ids=list(DELIMITERS), delimiter_threshold=delimiter_threshold,
        )  # fmt: skip
        runs[run] = {"tokens": tokens[0, prompt.shape[1] :].tolist(), "calls": calls, "blocks": blocks}
    source = {
        "repository": "https://github.com/lgxi24/AdaBlock-dLLM",
        "commit": "491b20580ad90f6019f29e045f484b538581101a",
        "file": "llada/generate_adablock.py",
        "how": "python -m tests.golden.make_adablock: greedy, network by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
