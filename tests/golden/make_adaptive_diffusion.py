"""Make `adaptive_diffusion.json`: latents and skipped steps of the authors' pipeline on formula weights and inputs.

    python -m tests.golden.make_adaptive_diffusion FOLDER_OF_THE_CLONE

Repository UniModal4Reasoning/AdaptiveDiffusion, commit cc143ad, file
examples/AdaptiveDiffusion/acceleration/sparse_pipeline.py, class StableDiffusionPipeline. `mask` has True where a
prediction is computed, from step 4 on; its last entry is about a step after the run.
"""

import json
import sys
import types
from pathlib import Path

from tests.golden._reference import Pipe, functions
from tests.methods.test_adaptive_diffusion import RUNS, scheduler

FILE = "examples/AdaptiveDiffusion/acceleration/sparse_pipeline.py"


def main(folder: Path) -> None:
    theirs = functions(folder / FILE, "StableDiffusionPipeline")
    runs = {}
    for name, (kind, steps, threshold, cap) in RUNS.items():
        pipe = Pipe(scheduler(kind))
        pipe.threshold, pipe.max_skip_steps = threshold, cap
        pipe.estimate_skipping = types.MethodType(theirs["estimate_skipping"], pipe)
        theirs["reset_cache"](pipe)
        theirs["__call__"](pipe, prompt="", num_inference_steps=steps, output_type="latent", return_dict=False)
        skipped = [4 + i for i, computed in enumerate(pipe.mask[:-1]) if not computed]
        runs[name] = {"skipped": skipped, "latents": pipe.seen}
    source = {
        "repository": "https://github.com/UniModal4Reasoning/AdaptiveDiffusion",
        "commit": "cc143ad8777af50ae1e45b5997237cdcb0dba648",
        "file": FILE,
        "how": "python -m tests.golden.make_adaptive_diffusion: guided runs in float64; per step the mean, the standard "
        "deviation and the first three values of the latents",
    }
    content = json.dumps({"source": source, "runs": runs}, indent=1) + "\n"
    Path(__file__).with_name("adaptive_diffusion.json").write_text(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
