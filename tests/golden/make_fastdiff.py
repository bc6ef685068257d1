"""Make `fastdiff.json`: what the authors' functions, and BDDM's, give on a network and a predictor given by formula.

    python -m tests.golden.make_fastdiff FASTDIFF_CLONE BDDM_CLONE

Repository Rongjiehuang/FastDiff, file modules/FastDiff/module/util.py: `sampling_given_noise_schedule`, `noise_scheduling`
and `phi_loss`. Its predictor network is not in the repository. Repository tencent-ailab/bddm, file bddm/trainer/loss.py:
`StepLoss`. Both call `.cuda()` everywhere, which does nothing here, and draw noise, which is given by formula.

`phi_loss` with more than one sample broadcasts the betas of all samples against all others; it is called with one at a time.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.methods.test_fastdiff import (
    PUBLISHED,
    RHO,
    STARTS,
    TAU,
    loss_inputs,
    network,
    noises,
    numbers,
    predicted_beta,
    table,
)


class Networks:
    """The vocoder and the predictor, as the authors' functions call them."""

    def __init__(self):
        self.calls = []

    def __call__(self, inputs):
        x, t = inputs[0], float(inputs[2].flatten()[0])
        self.calls.append([t, *numbers(x)])
        return network(x, t)

    def noise_pred(self, x, bounds):
        return predicted_beta(x, *(bound.flatten() for bound in bounds)).view(1, 1)

    schedule_net = noise_pred


def load(file: Path):
    spec = importlib.util.spec_from_file_location(f"{file.stem}_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commit_of(folder: Path) -> str:
    told = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return told.stdout.strip()


def main(fastdiff: Path, bddm: Path) -> None:
    torch.Tensor.cuda = lambda self: self
    torch.set_default_dtype(torch.float64)
    util, loss = load(fastdiff / "modules/FastDiff/module/util.py"), load(bddm / "bddm/trainer/loss.py")
    levels, size = {"T": len(table()), "alpha": table(), "tau": TAU, "rho": RHO}, (1, 1, 4)
    found = {"runs": {}, "walks": {}, "losses": []}
    for name, betas in PUBLISHED.items():
        for ddim in (False, True):
            net, drawn = Networks(), iter(noises(len(betas)))
            util.std_normal = lambda _size, drawn=drawn: next(drawn).clone()
            x = util.sampling_given_noise_schedule(net, size, levels, torch.tensor(betas), ddim=ddim)
            found["runs"][f"{name}{', ddim' if ddim else ''}"] = {"calls": net.calls, "end": numbers(x)}
    for name, (a, beta, most) in STARTS.items():
        util.std_normal = lambda _size: noises(1)[0].clone()
        settings = {**levels, "N": most, "betaN": beta, "alphaN": a}
        found["walks"][name] = util.noise_scheduling(Networks(), size, settings).tolist()
    for t, clean, noise in loss_inputs():
        util.std_normal = lambda _size, noise=noise: noise[None]
        torch.normal = lambda _mean, _std, size, noise=noise: noise[None]
        torch.randint = lambda *_args, t=t, **_kwargs: torch.tensor([t])
        one = util.phi_loss(Networks(), (torch.zeros(1), clean[None]), levels)
        other = loss.StepLoss(None, levels)(Networks(), None, clean[None])
        found["losses"].append([float(one), float(other)])
    source = {
        "repositories": {
            "https://github.com/Rongjiehuang/FastDiff": commit_of(fastdiff),
            "https://github.com/tencent-ailab/bddm": commit_of(bddm),
        },
        "files": ["modules/FastDiff/module/util.py", "bddm/trainer/loss.py"],
        "how": "python -m tests.golden.make_fastdiff FASTDIFF BDDM: float64; per network call of a run the timestep, the "
        "mean, the standard deviation and the first three values of the state; the betas of walks; both losses of samples",
    }
    file = Path(__file__).with_name("fastdiff.json")
    file.write_text(json.dumps({"source": source, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
