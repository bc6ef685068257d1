"""Make `quest.json`: numbers of the authors' quantizers on inputs given by formula.

    python -m tests.golden.make_quest FOLDER_OF_THE_CLONE

Repository hatchetProject/QuEST, files qdiff/quant_layer.py, qdiff/adaptive_rounding.py. Only the classes that are compared are
run.
"""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.ptq import formula

TIMES = (900, 600, 300)


def load(folder: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "np": np, "Union": Union, "warnings": warnings,
        "logger": logging.getLogger("quest"),
    }  # fmt: skip
    for file in ("quant_layer", "adaptive_rounding"):
        body = ast.parse((folder / "qdiff" / f"{file}.py").read_text(encoding="utf-8")).body
        kept = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        exec(compile(ast.Module(kept, []), file, "exec"), scope)
    return scope


def main(folder: Path) -> None:
    theirs = load(folder)
    runs: dict[str, Any] = {}
    weight = formula(4, 24)
    quantizer = theirs["UniformAffineQuantizer"](4, channel_wise=True, scale_method="max")
    quantizer(weight)
    rounder = theirs["AdaRoundQuantizer"](quantizer, weight, "learned_hard_sigmoid")
    rounder.alpha.data += formula(4, 24, 1.0)
    runs["alpha"] = rounder.alpha.flatten().tolist()
    free = (weight + 0.3 * formula(4, 24, 2.0)).requires_grad_(True)
    hard = rounder(free)
    runs["hard"] = hard.flatten().tolist()
    (gradient,) = torch.autograd.grad((hard * formula(4, 24, 3.0)).sum(), free)
    runs["gradient"] = gradient.flatten().tolist()
    timewise = theirs["TimewiseUniformQuantizer"](TIMES, n_bits=4, channel_wise=True, scale_method="max")
    for i, time in enumerate(TIMES):
        timewise(tokens(i), time)
    runs["tokens"] = [timewise(tokens(i + 0.5), time).flatten().tolist() for i, time in enumerate(TIMES)]
    timewise = theirs["TimewiseUniformQuantizer"](TIMES, n_bits=4, channel_wise=True, scale_method="max")
    for i, time in enumerate(TIMES):
        timewise(tokens(i).mT.reshape(2, 6, 2, 4), time)
    runs["pixels"] = [
        timewise(tokens(i + 0.5).mT.reshape(2, 6, 2, 4), time).flatten().tolist() for i, time in enumerate(TIMES)
    ]
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    source = {
        "repository": "https://github.com/hatchetProject/QuEST",
        "commit": commit,
        "files": "qdiff/quant_layer.py, qdiff/adaptive_rounding.py",
        "how": "python -m tests.golden.make_quest FOLDER: float32; weights of 4 bits that were trained away from where their "
        "rounding was learnt, and the gradient that reaches them; activations of 4 bits with a scale for each channel and "
        f"timestep of {TIMES}, channels with values of both signs",
    }
    Path(__file__).with_name("quest.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


def tokens(i: float) -> torch.Tensor:
    """`(2, 8, 6)`, larger at smaller i."""
    return formula(16, 6, float(i)).reshape(2, 8, 6) * (3 - i)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
