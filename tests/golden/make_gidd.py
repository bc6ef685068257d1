"""Make `gidd.json`: losses, steps and corrections of the authors' code, with logits and random numbers given by formula.

    python -m tests.golden.make_gidd FOLDER_OF_THE_CLONE

Repository dvruette/gidd, commit f67acc9, files gidd/diffusion_process.py, loss.py, sampling.py and pipeline.py, in float64.
"""

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_gidd import (
    GOLDEN,
    LENGTH,
    PROCESSES,
    STEPS,
    TIMES,
    VOCABULARY,
    golden_logits,
    golden_tokens,
    golden_uniform,
)


class Tokenizer:
    mask_token_id = VOCABULARY - 1

    def __init__(self, ids=None):
        self.ids = ids

    def __len__(self):
        return VOCABULARY

    def __call__(self, texts, **_):
        return {"input_ids": self.ids}

    def batch_decode(self, rows, **_):
        return [row.tolist() for row in rows]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t):
        return golden_logits(z)


def losses(process, loss):
    clean, noisy = golden_tokens()
    result = {}
    for weighting in ("none", "dynamic"):
        config = SimpleNamespace(loss_weighting=weighting, min_loss_weight=0.0, max_loss_weight=2.0)
        module = loss.GiddLoss(SimpleNamespace(loss=config), Tokenizer(), process)
        found, _, _ = module.loss(
            golden_logits(noisy), clean, torch.ones_like(clean), noisy, torch.tensor(TIMES, dtype=torch.float64)
        )
        result[weighting] = found.mean(-1).tolist()
    return result


def steps(process, sampling):
    _, noisy = golden_tokens()
    sampling.sample_categorical = lambda probabilities: probabilities
    step = sampling.GiddSampler.DenoisingStep(Network(), process, Tokenizer())
    times = {name: [torch.full((1,), time, dtype=torch.float64) for time in pair] for name, pair in STEPS.items()}
    return {name: step(noisy, t, s).flatten().tolist() for name, (t, s) in times.items()}


def corrections(pipeline):
    clean, _ = golden_tokens()
    numbers, plain = itertools.count(), torch.rand
    torch.rand = lambda *_, **__: golden_uniform(next(numbers))
    fake = SimpleNamespace(model=Network(), tokenizer=Tokenizer(clean), config=SimpleNamespace(max_seq_len=LENGTH))
    sequences = pipeline.GiddPipeline.self_correction(
        fake, [""] * len(clean), num_inference_steps=24, temperature=0.5, early_stopping_patience=4, show_progress=False
    )
    torch.rand = plain
    return {"sequences": sequences, "calls": next(numbers)}


def main(folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, folder)
    process, loss, sampling, pipeline = (
        importlib.import_module(f"gidd.{name}") for name in ("diffusion_process", "loss", "sampling", "pipeline")
    )
    result = {"corrections": corrections(pipeline), "losses": {}, "steps": {}}
    for name, p_uniform in PROCESSES.items():
        hybrid = process.HybridDiffusion(Tokenizer(), p_uniform=p_uniform)
        result["losses"][name] = losses(hybrid, loss)
        result["steps"][name] = steps(hybrid, sampling)
    source = {
        "repository": "https://github.com/dvruette/gidd",
        "commit": "f67acc961cc858cc69e8e6d91e7eb67a0a79151c",
        "files": "gidd/diffusion_process.py, gidd/loss.py, gidd/sampling.py, gidd/pipeline.py",
        "how": "python -m tests.golden.make_gidd: three rows of 8 tokens, logits and uniform numbers by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
