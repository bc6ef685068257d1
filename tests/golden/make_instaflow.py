"""Make `instaflow.json`: latents of the authors' pipeline at each step, on formula weights and inputs.

    python -m tests.golden.make_instaflow FOLDER_OF_THE_CLONE

Repository gnobitab/InstaFlow, file code/pipeline_rf.py, the call of `RectifiedFlowPipeline`, which has its Euler steps inside.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests import tiny_sd
from tests.golden._reference import Pipe, functions
from tests.methods.test_instaflow import RUNS


class Scheduler:
    order, init_noise_sigma = 1, 1.0

    def step(self):
        raise AssertionError("the pipeline steps by itself")


def main(folder: Path) -> None:
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    call = functions(folder / "code/pipeline_rf.py", "RectifiedFlowPipeline")["__call__"]
    runs = {}
    for steps, scale in RUNS:
        pipe, seen = Pipe(Scheduler()), []
        with torch.no_grad():
            call(
                pipe, prompt="a", num_inference_steps=steps, guidance_scale=scale, output_type="latent", height=8, width=8,
                callback=lambda i, t, latents, seen=seen: seen.append(tiny_sd.numbers(latents)), return_dict=False,
            )  # fmt: skip
        runs[f"{steps} {scale}"] = seen
    content = {
        "source": {
            "repository": "https://github.com/gnobitab/InstaFlow",
            "commit": commit.stdout.strip(),
            "file": "code/pipeline_rf.py",
            "how": "python -m tests.golden.make_instaflow FOLDER: float64; mean, standard deviation and first three values of "
            "the latents after each step",
        },
        "runs": runs,
    }
    Path(__file__).with_name("instaflow.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
