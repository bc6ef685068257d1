"""Make `ghvb_momentum.json`: states of the authors' samplers with momentum, on a network given by formula.

    python -m tests.golden.make_ghvb_momentum FOLDER_OF_THE_CLONE

Repository sWizad/momentum-diffusion, file stable_diffusion/diffusion/momentum_scheduler.py. Its linear multistep methods
wrap a `DDIMScheduler`. Its DPM-Solver++ is for another release of diffusers, so that its second-order update is called by
itself, after a first step of first order.
"""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from tests.methods.test_ghvb_momentum import BASE, LINEAR, TIMES, network, numbers, start


def main(folder: Path) -> None:
    file = "stable_diffusion/diffusion/momentum_scheduler.py"
    spec = importlib.util.spec_from_file_location("reference", folder / file)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    linear = {}
    for name, _, order in LINEAR:
        stock = DDIMScheduler(clip_sample=False, **BASE)
        stock.set_timesteps(len(TIMES))
        assert stock.timesteps.tolist() == TIMES
        method, seen = getattr(reference, name)(stock, order), [start()]
        for t in stock.timesteps:
            seen.append(method.step(network(seen[-1], t), t, seen[-1]))
        linear[f"{name} {order}"] = [numbers(x) for x in seen]
    dpm = {}
    for beta in (1.0, 0.8, 0.5):
        method, seen, outputs = reference.MomentumDPMSolverMultistepScheduler(**BASE), [start()], []
        method.initialize_momentum(beta)
        for i, (s, t) in enumerate(itertools.pairwise(TIMES)):
            x = seen[-1]
            outputs.append((x - method.sigma_t[s] * network(x, s)) / method.alpha_t[s])
            if i == 0:
                h = method.lambda_t[t] - method.lambda_t[s]
                x = method.sigma_t[t] / method.sigma_t[s] * x - method.alpha_t[t] * torch.expm1(-h) * outputs[-1]
            else:
                x = method.multistep_dpm_solver_second_order_update(outputs[-2:], [TIMES[i - 1], s], t, x)
            seen.append(x)
        dpm[str(beta)] = [numbers(x) for x in seen]
    source = {
        "repository": "https://github.com/sWizad/momentum-diffusion",
        "commit": "7d3241042f407f2a6f874901b1ff0bb3362291f8",
        "file": file,
        "how": "python -m tests.golden.make_ghvb_momentum FOLDER: float64 states, float32 coefficients; after each of 10 "
        "steps (9 of DPM-Solver++) the mean, the standard deviation and the first three values of the state",
    }
    content = {"source": source, "linear": linear, "dpm_solver": dpm}
    Path(__file__).with_name("ghvb_momentum.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
