"""Make `tiue_loopfree.json`: latents and divergences of the authors' student on formula weights and inputs.

    python -m tests.golden.make_tiue_loopfree FOLDER_OF_THE_CLONE

Repository sen-mao/Loopfree, commit 9a232a9, files utils/se_parallel_utils.py and train_loopfree.py. Written for diffusers 0.25:
their copy of the forward of a U-Net runs here on the blocks of this version.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import deprecate, scale_lora_layers, unscale_lora_layers

from tests import tiny_sd
from tests.golden._reference import functions
from tests.methods.test_tiue_loopfree import RUNS, ddim, noise, states
from tests.unets import conditional


def main(folder: Path) -> None:
    sharing, training = functions(folder / "utils" / "se_parallel_utils.py"), functions(folder / "train_loopfree.py")
    sharing |= {
        "USE_PEFT_BACKEND": False, "UNet2DConditionOutput": UNet2DConditionOutput, "deprecate": deprecate,
        "scale_lora_layers": scale_lora_layers, "unscale_lora_layers": unscale_lora_layers,
    }  # fmt: skip
    runs = {}
    for name, (steps, parallel) in RUNS.items():
        unet, scheduler, seen = conditional(1, 2).double(), ddim(), []
        scheduler.set_timesteps(steps)
        step = scheduler.step

        def noted(*args, step=step, seen=seen):
            result = step(*args)
            seen.append(tiny_sd.numbers(result.prev_sample))
            return result

        scheduler.step = noted
        store = {"use_parallel": parallel, "timesteps": scheduler.timesteps if parallel else [], "bs": len(noise())}
        sharing["register_se_forward"](unet, store)
        with torch.no_grad():
            _, predicted = training["predict_original"](unet, scheduler, noise(), states(), store)
        divergence = training["kl_divergence"](predicted, lambda_kl=1.0)
        runs[name] = {"latents": seen, "divergence": float(divergence)}
    source = {
        "repository": "https://github.com/sen-mao/Loopfree",
        "commit": "9a232a9bbd88998cd5a8d7eef8979a383bfbf18f",
        "files": ["utils/se_parallel_utils.py", "train_loopfree.py"],
        "how": "python -m tests.golden.make_tiue_loopfree: DDIM runs of a batch of two in float64; per step the mean, the "
        "standard deviation and the first three values of the latents; the divergence of the noise that was predicted last",
    }
    content = json.dumps({"source": source, "runs": runs}, indent=1) + "\n"
    Path(__file__).with_name("tiue_loopfree.json").write_text(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
