"""Make `autodiffusion.json`: where the authors' DDIM ends on chosen timesteps, with a denoiser given by formula.

    python -m tests.golden.make_autodiffusion FOLDER_OF_THE_CLONE

Repository lilijiangg/AutoDiffusion, commit 1292082, folder examples/guided_diffusion/guided_diffusion: `SpacedDiffusion`,
which computes the betas of the chosen timesteps as the `reset_diffusion` of its searches does. On the linear schedule of
DDPM, without clipping. Its searches list timesteps in any order; the sampler takes them as a set.
"""

import json
import sys
from pathlib import Path

from tests.methods.test_autodiffusion import LISTS, network, start_state


def main(clone: Path) -> None:
    sys.path.insert(0, str(clone / "examples" / "guided_diffusion"))
    from guided_diffusion import gaussian_diffusion as theirs
    from guided_diffusion.respace import SpacedDiffusion

    final = {}
    for name, timesteps in LISTS.items():
        diffusion = SpacedDiffusion(
            use_timesteps=set(timesteps), betas=theirs.get_named_beta_schedule("linear", 1000),
            model_mean_type=theirs.ModelMeanType.EPSILON, model_var_type=theirs.ModelVarType.FIXED_SMALL,
            loss_type=theirs.LossType.MSE,
        )  # fmt: skip
        start = start_state()
        found = diffusion.ddim_sample_loop(
            lambda x, t, **_: network(x, float(t[0])), start.shape, noise=start, clip_denoised=False, device="cpu"
        )
        final[name] = found.double().flatten().tolist()
    source = "lilijiangg/AutoDiffusion 1292082, examples/guided_diffusion, run by tests/golden/make_autodiffusion.py"
    content = json.dumps({"source": source, "final": final}, indent=1)
    Path(__file__).with_name("autodiffusion.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
