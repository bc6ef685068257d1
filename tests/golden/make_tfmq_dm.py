"""Make `tfmq_dm.json`: numbers of the authors' temporal block on weights given by formula.

    python -m tests.golden.make_tfmq_dm FOLDER_OF_THE_CLONE

Repository ModelTC/TFMQ-DM, files quant/quant_layer.py, quant/adaptive_rounding.py, quant/quant_block.py,
quant/reconstruction_util.py. Only the classes that are compared are run: the rest imports the code of whole generators.
"""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.small_denoiser import embedding, small

COUNTS = (1, 20, 40, 60, 99)
TIMES = (900.0, 600.0, 300.0, 10.0)
_CLASSES = {
    "quant_layer": None,
    "adaptive_rounding": None,
    "quant_block": {"BaseQuantBlock", "QuantTemporalInformationBlockDDIM"},
    "reconstruction_util": None,
}


def load(folder: Path) -> dict[str, Any]:
    """Classes, functions and enumerations of the release's files."""
    scope: dict[str, Any] = {
        "torch": torch, "th": torch, "nn": nn, "F": F, "np": np, "Union": Union, "Enum": Enum, "List": list, "Tuple": tuple,
        "logger": logging.getLogger("tfmq"), "QuantResBlock": nn.Module, "QuantTemporalInformationBlock": type("T", (), {}),
        "nonlinearity": F.silu, "get_timestep_embedding": lambda t, _: embedding(t),
    }  # fmt: skip
    for file, wanted in _CLASSES.items():
        body = ast.parse((folder / "quant" / f"{file}.py").read_text(encoding="utf-8")).body
        kept = [
            node
            for node in body
            if (isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (wanted is None or node.name in wanted))
            or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") != "logger")
        ]
        exec(compile(ast.Module(kept, []), file, "exec"), scope)
    return scope


def main(folder: Path) -> None:
    theirs = load(folder)
    model, times = small(), torch.tensor(TIMES)
    weights = {"bits": 4, "symmetric": False, "channel_wise": True, "scaler": theirs["Scaler"].MINMAX}
    acts = {"bits": 6, "symmetric": False, "channel_wise": False, "scaler": theirs["Scaler"].MINMAX, "leaf_param": True}
    layers = [
        theirs["QuantLayer"](layer, dict(weights), dict(acts))
        for layer in (model.time_1, model.time_2, *(block.time_proj for block in model.blocks))
    ]
    temb = nn.Module()
    temb.dense = nn.ModuleList(layers[:2])
    block = theirs["QuantTemporalInformationBlockDDIM"](temb, {}, 8)
    for layer in layers[2:]:
        block.add_temb_proj(layer)
    sample = torch.zeros(len(times), 1)
    runs: dict[str, Any] = {}
    with torch.no_grad():
        targets = block(sample, times)
        runs["full"] = [target.tolist() for target in targets]
        block.set_quant_state(use_wq=True, use_aq=False)
        block(sample, times)
        for layer in layers:
            layer.wqtizer = theirs["AdaRoundQuantizer"](
                layer.wqtizer, layer.original_w.data, theirs["RMODE"].LEARNED_HARD_SIGMOID
            )
            alpha = layer.wqtizer.alpha.data
            alpha += torch.sin(torch.arange(alpha.numel(), dtype=torch.float32)).reshape(alpha.shape)
            layer.wqtizer.soft_tgt = True
        runs["soft"] = [found.tolist() for found in block(sample, times)]
        loss = theirs["LossFuncTimeEmbedding"](
            block, theirs["RLOSS"].RELAXATION, 0.01, theirs["RLOSS"].MSE, 100, (20, 2), 0.0, 0.2, 2.0
        )
        found = [float(loss(block(sample, times), targets)) for _ in range(max(COUNTS))]
        runs["loss"] = [found[count - 1] for count in COUNTS]
        for layer in layers:
            layer.wqtizer.soft_tgt = False
        # Finite set calibration: the release forgets the ranges of activations and finds them anew for each timestep.
        block.set_quant_state(use_wq=True, use_aq=True)
        rows = []
        for time in times:
            for layer in layers:
                layer.aqtizer = theirs["UniformAffineQuantizer"](**acts)
            rows.append(torch.cat(block(sample[:1], time[None]), 1)[0])
        runs["by_timestep"] = torch.stack(rows).tolist()
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    source = {
        "repository": "https://github.com/ModelTC/TFMQ-DM",
        "commit": commit,
        "files": "quant/quant_layer.py, quant/adaptive_rounding.py, quant/quant_block.py, quant/reconstruction_util.py",
        "how": "python -m tests.golden.make_tfmq_dm FOLDER: float32; the layers of tests/small_denoiser.py that see the timestep "
        f"alone, at timesteps {TIMES}: features in full precision, with soft weights of 4 bits, the loss at counts {COUNTS} "
        "of 100, and with hard weights and inputs of 6 bits whose ranges are found at each timestep",
    }
    Path(__file__).with_name("tfmq_dm.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
