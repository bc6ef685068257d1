"""Make `sft_pg.json`: noise levels, means, widths and log-densities of the authors' steps, on inputs given by formula.

    python -m tests.golden.make_sft_pg FOLDER_OF_THE_CLONE

Repository UW-Madison-Lee-Lab/SFT-PG, file finetune.py: `get_VAR_noise`, `_precompute_VAR_steps`, `VAR_get_params` and
`VAR_log_prob` at 10 quadratic steps. The functions are taken out of the file, whose imports are not installed,
and get betas of float64: with float32 the time of the last level comes out as 0.5 on a CPU, which their own check refuses.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Normal

from tests.methods.test_sft_pg import GOLDEN, golden_network, golden_states

FILE, STEPS = "finetune.py", 10
PROCESS = {"beta_0": 1e-4, "beta_T": 0.02, "T": 1000}


def main(clone: Path) -> None:
    body = ast.parse((clone / FILE).read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    scope = {
        "torch": torch, "np": np, "Normal": Normal, "diffusion_config": PROCESS, "map_gpu": lambda x: x,
        "unsqueeze3x": lambda x: x[..., None, None, None],
    }  # fmt: skip
    exec(compile(ast.fix_missing_locations(ast.Module(functions, [])), FILE, "exec"), scope)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()
    process = scope["calc_diffusion_hyperparams"](**PROCESS)
    process["Beta"] = process["Beta"].double()
    eta = scope["get_VAR_noise"](STEPS, "quadratic")
    times = scope["_precompute_VAR_steps"](process, eta)
    x_factors, factors, stds, _ = scope["VAR_get_params"]((2, 1, 2, 2), process, eta, 1.0, times)
    means, log_probs = [], []
    for k, (x, after) in enumerate(golden_states(STEPS)):
        which = torch.full((2,), k)
        epsilon = golden_network(x, torch.full((2,), times[k]))
        means.append((x_factors[k] * x + factors[k] * epsilon).flatten().tolist())
        density = scope["VAR_log_prob"](
            golden_network, x, after, which, x_factors, factors, stds, torch.tensor(times), None, None
        )
        log_probs.append(density.tolist())
    source = {
        "repository": "https://github.com/UW-Madison-Lee-Lab/SFT-PG", "commit": commit, "file": FILE,
        "how": "python -m tests.golden.make_sft_pg FOLDER",
    }  # fmt: skip
    content = {
        "source": source, "times": [float(t) for t in times], "levels": np.cumprod(1 - eta).tolist(), "stds": stds.tolist(),
        "means": means, "log_probs": log_probs,
    }  # fmt: skip
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
