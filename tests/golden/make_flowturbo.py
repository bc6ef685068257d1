"""Make `flowturbo.json`: states at which the authors' sampler calls the network, for a velocity given by formula.

    python -m tests.golden.make_flowturbo FOLDER_OF_THE_CLONE

Repository shiml20/FlowTurbo, file models_assemble.py, classes VelocityBlock and FlowTurboAssemble, which put a Heun or
pseudo-corrector step around a network; of the network itself nothing runs. transport/integrators.py is not used: its
pseudo-corrector passes an argument that does not exist. Their time runs from noise at 0 to data at 1, and they also call
the network at 1.
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_flowturbo import RUNS, numbers, start, velocity


def main(folder: Path) -> None:
    for name in ("timm", "timm.models", "timm.models.vision_transformer", "einops"):  # what builds the network
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("PatchEmbed", "Mlp", "Attention"):
        setattr(sys.modules["timm.models.vision_transformer"], name, object)
    spec = importlib.util.spec_from_file_location("models_assemble", folder / "models_assemble.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    runs = {}
    for name, (n_heun, number) in RUNS.items():
        seen = []

        def network(x, t, y, cfg_scale):
            seen.append(x)  # noqa: B023
            return -velocity(x, 1 - float(t.flatten()[0]))

        times = torch.linspace(0, 1, number + 1, dtype=torch.float64)
        state = [start(), torch.tensor(0), None, None, None]
        for i in range(number):
            step = SimpleNamespace(_forward=network, t=times, delta_t=times[1] - times[0], use_cache=i >= n_heun)
            state = list(reference.VelocityBlock.forward(step, state))
        runs[name] = [numbers(x) for x in seen[:-1]]  # the last is at clean data
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    source = {
        "repository": "https://github.com/shiml20/FlowTurbo",
        "commit": commit.stdout.strip(),
        "file": "models_assemble.py",
        "how": "python -m tests.golden.make_flowturbo FOLDER: float64; per network call the mean, the standard deviation "
        "and the first three values of the state",
    }
    Path(__file__).with_name("flowturbo.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
