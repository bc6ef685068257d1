"""Make `disback.json`: the authors' distribution matching loss and its gradient, of formula networks on inputs of ours.

    python -m tests.golden.make_disback FOLDER_OF_THE_CLONE

Repository SYZhang0805/DisBack: `compute_distribution_matching_loss` and `predict_noise` of main/sd_guidance.py and
`get_x0_from_noise` of main/utils.py.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler

from tests.golden._reference import functions
from tests.methods.test_disback import SCALE, fake_formula, latents, real_formula

COMMIT = "d015b5e5c552666881a967cbee245ca5e895190b"


def network(formula):
    def call(x, t, states, added_cond_kwargs=None):
        return SimpleNamespace(sample=formula(x, t, states))

    return call


def main(folder: Path) -> None:
    scope = functions(folder / "main/sd_guidance.py", "SDGuidance")
    scope |= {
        "predict_noise": functions(folder / "main/sd_guidance.py")["predict_noise"],
        "get_x0_from_noise": functions(folder / "main/utils.py")["get_x0_from_noise"],
        "F": torch.nn.functional,
    }
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    model = SimpleNamespace(
        min_step=20, max_step=980, num_train_timesteps=1000, scheduler=scheduler, alphas_cumprod=scheduler.alphas_cumprod,
        fake_unet=network(fake_formula), real_unet=network(real_formula), fake_guidance_scale=1, real_guidance_scale=SCALE,
        use_fp16=False,
    )  # fmt: skip
    torch.manual_seed(0)
    given, empty = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    loss, log = scope["compute_distribution_matching_loss"](model, latents(), given, empty, None, None)
    content = {
        "source": {
            "repository": "https://github.com/SYZhang0805/DisBack",
            "commit": COMMIT,
            "files": ["main/sd_guidance.py", "main/utils.py"],
            "how": "python -m tests.golden.make_disback FOLDER: loss, and gradient by sample (mean of absolute values, first three)",
        },
        "loss": float(loss["loss_dm"]),
        "gradient": [[float(each.abs().mean()), *each.flatten()[:3].tolist()] for each in log["dmtrain_grad"]],
    }
    Path(__file__).with_name("disback.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
