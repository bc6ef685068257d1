"""Make `prodiff.json`: the authors' noise levels, structural similarity and distillation loss, on formulas and inputs of ours.

    python -m tests.golden.make_prodiff FOLDER_OF_THE_CLONE

Repository Rongjiehuang/ProDiff: `get_noise_schedule_list` of usr/diff/shallow_diffusion_tts.py, `ssim` of modules/commons/ssim.py
and `forward` of modules/ProDiff/model/ProDiff.py, without its text encoder.
"""

import ast
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tests.golden._reference import functions
from tests.methods.test_prodiff import KINDS, maps, student_formula, teacher_formula

COMMIT = "8e63ef62f519ea000b5cd4146320bbce2c9d57d5"


SCHEDULE = "usr/diff/shallow_diffusion_tts.py"


def helpers(folder: Path) -> dict:
    """Functions of a file whose others need the settings of an experiment."""
    names = {"vpsde_beta_t", "get_noise_schedule_list", "extract", "exists", "default"}
    body = ast.parse((folder / SCHEDULE).read_text()).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope: dict = {"np": np, "isfunction": callable}
    exec(compile(ast.Module(found, []), SCHEDULE, "exec"), scope)
    return scope


def distillation_losses(folder: Path, betas: np.ndarray) -> dict[str, float]:
    scope = functions(folder / "modules/ProDiff/model/ProDiff.py", "GaussianDiffusion")
    scope |= {name: helpers(folder)[name] for name in ("extract", "default", "exists")} | {"F": torch.nn.functional}
    names = ("forward", "get_schedule", "diffuse_fn", "q_sample", "norm_spec", "q_posterior_sample", "q_posterior")
    model = type("Model", (), {name: scope[name] for name in names})()
    levels = torch.from_numpy(np.cumprod(1 - betas))
    before = torch.cat([torch.ones(1).double(), levels[:-1]])
    model.num_timesteps, model.time_scale = 2, 2
    model.sqrt_alphas_cumprod, model.sqrt_one_minus_alphas_cumprod = levels.sqrt(), (1 - levels).sqrt()
    model.posterior_mean_coef1 = model.posterior_mean_coef2 = model.posterior_variance = before
    model.posterior_log_variance_clipped = before
    scope["noise_like"] = lambda shape, device, repeat: torch.zeros(shape)
    model.fs2 = lambda *_, **__: {"decoder_inp": torch.zeros(3, 1, 1)}
    model.denoise_fn = lambda x, t, c: student_formula(x)
    teacher = SimpleNamespace(denoise_fn=lambda x, t, c: teacher_formula(x, t))
    mels, losses = maps()[0][:, 0].transpose(1, 2), {}
    for kind in KINDS:
        model.loss_type = kind
        torch.manual_seed(0)
        mel2ph = torch.ones(3, mels.shape[1])
        tokens = torch.zeros(3, 1, dtype=torch.long)
        losses[kind] = float(model.forward(tokens, teacher_fn=teacher, mel2ph=mel2ph, ref_mels=mels)["mel_out"])
    return losses


def main(folder: Path) -> None:
    betas = helpers(folder)["get_noise_schedule_list"]("vpsde", 5, min_beta=0.1, max_beta=40)
    similarity = functions(folder / "modules/commons/ssim.py")
    similarity |= {"F": torch.nn.functional, "exp": math.exp, "Variable": lambda x: x, "window": None}
    a, b = (each.float() for each in maps())
    content = {
        "source": {
            "repository": "https://github.com/Rongjiehuang/ProDiff",
            "commit": COMMIT,
            "files": [
                SCHEDULE,
                "modules/commons/ssim.py",
                "modules/ProDiff/model/ProDiff.py",
            ],
            "how": "python -m tests.golden.make_prodiff FOLDER: betas of 5 levels; mean SSIM of maps plus 6; losses of a student "
            "that does not heed its label, in float64",
        },
        "betas": betas.tolist(),
        "similarity": float(similarity["ssim"](a + 6, b + 6)),
        "losses": distillation_losses(folder, betas),
    }
    Path(__file__).with_name("prodiff.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
