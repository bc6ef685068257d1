"""Make `grokfast.json`: gradients that the authors' filters make of gradients given by formula.

    python -m tests.golden.make_grokfast FOLDER_OF_THE_CLONE

Repository ironjr/grokfast, commit 93b2248, file grokfast.py. Numbers are the settings of a filter and, per step, the filtered
gradient.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from tests.methods.test_grokfast import GOLDEN_RUNS, STEPS, golden_gradient


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("reference", folder / "grokfast.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    runs = {}
    for name, (kind, settings) in GOLDEN_RUNS.items():
        module = torch.nn.Linear(3, 1, bias=False)
        grads, found = None, []
        given = {"window_size" if key == "window" else key: value for key, value in settings.items()}
        for step in range(STEPS):
            module.weight.grad = golden_gradient(step)
            grads = getattr(reference, f"gradfilter_{kind}")(module, grads=grads, **given)
            found.append(module.weight.grad.flatten().tolist())
        runs[name] = found
    source = {
        "repository": "https://github.com/ironjr/grokfast",
        "commit": "93b2248e351d4bb9e4dda8ac32a6999b8970404b",
        "file": "grokfast.py",
        "how": "python -m tests.golden.make_grokfast FOLDER",
    }
    file = Path(__file__).with_name("grokfast.json")
    file.write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
