"""Make `ecodiff.json`: masks, penalties and pruned layers of the authors' code, on inputs given by formula.

    python -m tests.golden.make_ecodiff FOLDER_OF_THE_CLONE

Repository YaNgZhAnG-V5/EcoDiff, file src/sdib/utils/utils.py: `hard_concrete_distribution` with u of ours, `calculate_reg_loss`,
`linear_layer_pruning` and `ffn_linear_layer_pruning`. Layers that lose everything are left out: theirs return their input.
"""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from tests.methods.test_ecodiff import (
    GOLDEN,
    GOLDEN_KEPT,
    GOLDEN_SCORES,
    GOLDEN_U,
    golden_modules,
    golden_states,
)

FILE = "src/sdib/utils/utils.py"


def main(clone: Path) -> None:
    spec = importlib.util.spec_from_file_location("theirs", clone / FILE)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()

    scores = torch.tensor(GOLDEN_SCORES, requires_grad=True)
    found = {"masks": {}, "slopes": {}, "penalties": {}, "outputs": {}}
    for eps in (0.5, 0.1):
        with mock.patch.object(torch, "rand", lambda *_: torch.tensor(GOLDEN_U)):
            masks = theirs.hard_concrete_distribution(scores, eps=eps)
        found["masks"][str(eps)] = masks.tolist()
        found["slopes"][str(eps)] = torch.autograd.grad(masks.sum(), scores)[0].tolist()
    for kind, squashed in (("l1", False), ("sigmoid", True)):
        value = theirs.calculate_reg_loss(torch.zeros(()), [scores[:2], scores[2:]], 1, mean=True, reg=squashed)
        found["penalties"][kind] = value.item()
    layers = golden_modules()
    for name, kept in GOLDEN_KEPT.items():
        layer = copy.deepcopy(layers[name])
        units = layer.heads if name == "attention" else layer.net[2].in_features
        mask = torch.zeros(units)
        mask[kept] = 1
        pruned = theirs.linear_layer_pruning(layer, mask, "sdxl") if name == "attention" else theirs.ffn_linear_layer_pruning(layer, mask)  # fmt: skip
        with torch.no_grad():
            found["outputs"][name] = pruned(golden_states()).flatten().tolist()
    source = {
        "repository": "https://github.com/YaNgZhAnG-V5/EcoDiff",
        "commit": commit,
        "file": FILE,
        "how": "python -m tests.golden.make_ecodiff FOLDER",
    }
    GOLDEN.write_text(json.dumps({"source": source, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
