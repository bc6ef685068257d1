"""Make `deepcache.json`: numbers of the authors' package on weights and inputs given by formula.

    pip install DeepCache==0.1.1 && python -m tests.golden.make_deepcache

Package DeepCache 0.1.1, repository horseee/DeepCache, file DeepCache/extension/deepcache.py. Its step counter looks
timesteps up in a list and its branch numbers assume 3 levels with 2 layers; the model here has just these.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler

from tests.methods.test_deepcache import golden_run
from tests.unets import conditional


def main() -> None:
    runs = {}
    for branch in range(9):
        unet, scheduler = conditional(), DDIMScheduler(clip_sample=False)
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
        helper.set_params(cache_interval=3, cache_branch_id=branch)
        helper.enable()
        runs[str(branch)] = golden_run(
            unet, scheduler, lambda unet, x, t, states: unet(x, t, encoder_hidden_states=states, return_dict=False)[0]
        )
    source = {
        "package": "DeepCache 0.1.1 (PyPI)",
        "repository": "https://github.com/horseee/DeepCache",
        "file": "DeepCache/extension/deepcache.py",
        "how": "python -m tests.golden.make_deepcache: 9 DDIM steps, interval 3, cache_branch_id 0 to 8; "
        "per step the mean, the standard deviation and the first three values of the latents",
    }
    Path(__file__).with_name("deepcache.json").write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
