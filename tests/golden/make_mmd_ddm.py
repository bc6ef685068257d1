"""Make `mmd_ddm.json`: discrepancies and a short run of the authors' code, on inputs given by formula.

    python -m tests.golden.make_mmd_ddm FOLDER_OF_THE_CLONE

Repository diegovalsesia/MMD-DDM, files functions/losses.py (`KID` of degree 3 and 1, `KID_rbf`) and functions/denoising.py
(`generalized_steps_diff`). The package piq, of which they take a base class and a check of shapes, is stood in for.
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch import nn

from tests.methods.test_mmd_ddm import GOLDEN, golden_features, golden_network, golden_noise

FILES = ("functions/losses.py", "functions/denoising.py")


def load(clone: Path, file: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, clone / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(clone: Path) -> None:
    piq = {"base": {"BaseFeatureMetric": nn.Module}, "utils": {"_validate_input": lambda *_, **__: None}}
    for name, content in piq.items():
        sys.modules[f"piq.{name}"] = types.SimpleNamespace(**content)
    losses, denoising = (load(clone, file) for file in FILES)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()
    metrics = {"poly3": losses.KID(degree=3), "linear": losses.KID(degree=1), "rbf": losses.KID_rbf()}
    mmd = {kind: metric.compute_metric(*golden_features()).item() for kind, metric in metrics.items()}
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
    samples, _ = denoising.generalized_steps_diff(golden_noise(), range(0, 1000, 200), golden_network, betas, eta=0)
    source = {
        "repository": "https://github.com/diegovalsesia/MMD-DDM", "commit": commit, "files": list(FILES),
        "how": "python -m tests.golden.make_mmd_ddm FOLDER",
    }  # fmt: skip
    GOLDEN.write_text(
        json.dumps({"source": source, "mmd": mmd, "sample": samples[-1].flatten().tolist()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
