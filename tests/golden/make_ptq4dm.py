"""Make `ptq4dm.json`: numbers of the authors' quantizer on weights and inputs given by formula.

    python -m tests.golden.make_ptq4dm FOLDER_OF_THE_CLONE

Repository 42Shawn/PTQ4DM, file PTQ4DM/QDrop/quant/quant_layer.py. It searches with the power 2.4, which the paper does not
name; the test asks our search for the same.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.ptq import formula


def main(folder: Path) -> None:
    if not hasattr(torch, "_aminmax"):
        torch._aminmax = lambda x, dim=None: tuple(torch.aminmax(x) if dim is None else torch.aminmax(x, dim=dim))
    file = folder / "PTQ4DM/QDrop/quant/quant_layer.py"
    spec = importlib.util.spec_from_file_location("reference", file)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    runs = {}
    for bits in (4, 6, 8):
        quantizer = theirs.UniformAffineQuantizer(bits, symmetric=True, channel_wise=True)
        quantizer.set_inited(False)
        runs[f"weight_{bits}"] = quantizer(formula(4, 24)).flatten().tolist()
        quantizer = theirs.UniformAffineQuantizer(bits, symmetric=True)
        quantizer.set_inited(False)
        runs[f"input_{bits}"] = quantizer(formula(8, 24, 1.0, positive=True)).flatten().tolist()
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    source = {
        "repository": "https://github.com/42Shawn/PTQ4DM",
        "commit": commit,
        "file": "PTQ4DM/QDrop/quant/quant_layer.py",
        "how": "python -m tests.golden.make_ptq4dm FOLDER: float32; weights by rows on symmetric grids, and a tensor without "
        "negative values, at 4, 6 and 8 bits",
    }
    Path(__file__).with_name("ptq4dm.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
