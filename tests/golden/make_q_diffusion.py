"""Make `q_diffusion.json`: numbers of the authors' quantizers on weights given by formula.

    python -m tests.golden.make_q_diffusion FOLDER_OF_THE_CLONE

Repository Xiuyu-Li/q-diffusion, files qdiff/quant_layer.py, qdiff/adaptive_rounding.py, qdiff/block_recon.py. Only the classes that
are compared are run: the rest imports the code of whole generators.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import nn

from tests.ptq import formula

COUNTS = (1, 20, 40, 60, 99)


def load(folder: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Union": Union}
    scope |= {"BaseQuantBlock": nn.Module, "QuantModel": nn.Module, "logger": __import__("logging").getLogger("x")}
    scope["warnings"] = __import__("warnings")
    for file in ("quant_layer", "adaptive_rounding", "block_recon"):
        body = ast.parse((folder / "qdiff" / f"{file}.py").read_text(encoding="utf-8")).body
        kept = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        exec(compile(ast.Module(kept, []), file, "exec"), scope)
    return scope


def main(folder: Path) -> None:
    theirs = load(folder)
    weight = formula(4, 24)
    runs: dict[str, Any] = {}
    for bits in (4, 8):
        for how in ("max", "mse"):
            quantizer = theirs["UniformAffineQuantizer"](bits, channel_wise=True, scale_method=how)
            runs[f"weight_{how}_{bits}"] = quantizer(weight).flatten().tolist()
    quantizer = theirs["UniformAffineQuantizer"](4, channel_wise=True, scale_method="max")
    quantizer(weight)
    rounder = theirs["AdaRoundQuantizer"](quantizer, weight, "learned_hard_sigmoid")
    runs["alpha"] = rounder.alpha.flatten().tolist()
    rounder.alpha.data += formula(4, 24, 1.0)
    runs["hard"] = rounder(weight).flatten().tolist()
    rounder.soft_targets = True
    runs["soft"] = rounder(weight).flatten().tolist()
    module = theirs["QuantModule"](nn.Linear(24, 4))
    module.weight_quantizer = rounder
    loss = theirs["LossFunction"](nn.Sequential(module), weight=0.01, max_count=100, b_range=(20, 2), warmup=0.2, p=2.0)
    values = [float(loss(formula(2, 4), formula(2, 4, 2.0))) for _ in range(max(COUNTS))]
    runs["loss"] = [values[count - 1] for count in COUNTS]
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    source = {
        "repository": "https://github.com/Xiuyu-Li/q-diffusion",
        "commit": commit,
        "files": "qdiff/quant_layer.py, qdiff/adaptive_rounding.py, qdiff/block_recon.py",
        "how": "python -m tests.golden.make_q_diffusion FOLDER: float32; quantized weights of two-sided rows, alpha at the "
        f"start, hard and soft weights after a change of alpha, and the loss at counts {COUNTS} of 100",
    }
    Path(__file__).with_name("q_diffusion.json").write_text(
        json.dumps({"source": source, "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
