"""Make `dkv_cache.json`: numbers of the authors' code on a tiny LLaDA with weights and inputs given by formula.

    git clone https://github.com/horseee/dKV-Cache /some/folder
    python -m tests.golden.make_dkv_cache /some/folder

Their files are imported as they are; only the class `Cache` of transformers, whose constructor takes other arguments today,
is replaced by an empty one, and the model's `tie_weights`, which today gets arguments. In each call the logits of the
masked tokens are noted.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import transformers.cache_utils

from diffusers_ext.models.public_checkpoints import checkpoint_format
from tests.language_models import LLADA, MASK, prompts, tiny

COMMIT = "49a76fcc43b744ec2d960137f216e419317138b1"
RUNS = {
    "none": ("decode", {"enable_cache": False}),
    "decode_2": ("decode", {"enable_cache": True, "cache_reloading_step": 2}),
    "decode_4": ("decode", {"enable_cache": True, "cache_reloading_step": 4}),
    "greedy_2_0": ("greedy", {"enable_cache": True, "cache_reloading_step": 2, "window_size": 0}),
    "greedy_4_3": ("greedy", {"enable_cache": True, "cache_reloading_step": 4, "window_size": 3}),
}


class _Cache:
    def __init__(self, *args, **kwargs) -> None:
        pass


def reference(module):
    """Their LLaDA with our weights, which notes its calls."""
    settings = {name: value for name, value in LLADA.items() if name != "model_type"}
    module.LLaDAModelLM.tie_weights = lambda self, *args, **kwargs: None
    model = module.LLaDAModelLM(module.LLaDAConfig(**settings, use_cache=False), init_params=True).eval()
    ours, rename = tiny("llada").network.state_dict(), checkpoint_format(LLADA)[1]
    model.load_state_dict({name: ours[rename(name)] for name in model.state_dict()})
    forward, calls = model.forward, []

    def noted(input_ids, **options):
        output = forward(input_ids, **options)
        chosen = output.logits[input_ids == MASK].double()
        calls.append([*chosen.shape[:1], chosen.mean().item(), chosen.std().item(), *chosen[0, :3].tolist()])
        return output

    model.forward = noted
    return model, calls


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    transformers.cache_utils.Cache = _Cache
    import generation_utils.llada_dkv_cache_decode as decode
    import generation_utils.llada_dkv_cache_greedy as greedy
    import models.modeling_llada_dkv_cache_decode as decode_model
    import models.modeling_llada_dkv_cache_greedy as greedy_model

    runs = {}
    for name, (kind, options) in RUNS.items():
        model, calls = reference(decode_model if kind == "decode" else greedy_model)
        torch.manual_seed(0)
        with contextlib.redirect_stdout(None):
            tokens = (decode if kind == "decode" else greedy).generate(
                model, None, prompts(), steps=16, gen_length=16, block_length=8, mask_id=MASK,
                remasking="low_confidence" if kind == "decode" else "random", **options,
            )  # fmt: skip
        runs[name] = {"tokens": tokens.tolist(), "calls": calls}
    source = {
        "repository": "https://github.com/horseee/dKV-Cache",
        "commit": COMMIT,
        "files": "generation_utils/llada_dkv_cache_{decode,greedy}.py, models/modeling_llada_dkv_cache_{decode,greedy}.py",
        "how": "python -m tests.golden.make_dkv_cache FOLDER: 2 prompts of 5 tokens, 16 tokens in blocks of 8, one a step, "
        "temperature 0; of each call: number, mean, standard deviation and the first three of the masked tokens' logits",
    }
    text = json.dumps({"source": source, "runs": runs}, indent=1)
    Path(__file__).with_name("dkv_cache.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
