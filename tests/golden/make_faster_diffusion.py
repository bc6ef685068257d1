"""Make `faster_diffusion.json`: latents of the authors' sequential and parallel pipelines on formula weights and inputs.

    python -m tests.golden.make_faster_diffusion FOLDER_OF_THE_CLONE

Repository hutaiHang/Faster-Diffusion, commit d64bfed, file utils_sd.py. Their pipelines always inject noise, from t = 499
on; their parallel one calls the network at a key step before it injects, so only its steps before that are compared.
"""

import json
import sys
from pathlib import Path

from tests.golden._reference import Pipe, functions
from tests.methods.test_faster_diffusion import RUNS, ddim


def main(folder: Path) -> None:
    theirs = functions(folder / "utils_sd.py")
    runs = {}
    for name, (steps, keys, parallel) in RUNS.items():
        pipe = Pipe(ddim())
        mod = "50ls" if keys == "paper" else keys
        theirs["register_faster_forward"](pipe.unet, mod)
        if parallel:
            theirs["register_parallel_pipeline"](pipe, mod)
        else:
            theirs["register_normal_pipeline"](pipe)
        pipe.call(prompt="", num_inference_steps=steps, output_type="latent", return_dict=False)
        runs[name] = pipe.seen
    source = {
        "repository": "https://github.com/hutaiHang/Faster-Diffusion",
        "commit": "d64bfed8e8ba5d99c3014aa2508b4db3f49261e2",
        "file": "utils_sd.py",
        "how": "python -m tests.golden.make_faster_diffusion: guided DDIM runs in float64; per step the mean, the standard "
        "deviation and the first three values of the latents",
    }
    content = json.dumps({"source": source, "runs": runs}, indent=1) + "\n"
    Path(__file__).with_name("faster_diffusion.json").write_text(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
