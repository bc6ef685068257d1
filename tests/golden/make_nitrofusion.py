"""Make `nitrofusion.json`: latents of runs with the authors' scheduler at each step, on formula weights and inputs.

    python -m tests.golden.make_nitrofusion FOLDER_OF_THE_CLONE

Repository ChenDarYen/NitroFusion, file README.md: the class `TimestepShiftLCMScheduler` of its first Python block, a subclass of
the installed diffusers' `LCMScheduler`.
"""

import json
import re
import sys
from pathlib import Path

from tests.methods.test_nitrofusion import RUNS, run

COMMIT = "75ce562f1e07470fbb5866b4ff0b711c0056ac9a"


def main(folder: Path) -> None:
    (code, *_) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    make = scope["TimestepShiftLCMScheduler"]
    runs = {
        f"{steps} {shift}": run(make(original_inference_steps=4, shifted_timestep=shift), steps)
        for steps, shift in RUNS
    }
    content = {
        "source": {
            "repository": "https://github.com/ChenDarYen/NitroFusion",
            "commit": COMMIT,
            "file": "README.md",
            "how": "python -m tests.golden.make_nitrofusion FOLDER: float64; mean, standard deviation and first three values of "
            "the latents after each step, by number of steps and shifted timestep",
        },
        "runs": runs,
    }
    Path(__file__).with_name("nitrofusion.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
