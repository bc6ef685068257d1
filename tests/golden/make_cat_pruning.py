"""Make `cat_pruning.json`: which tokens the authors' code chooses, and what their attention and feed-forward parts give.

    pip install torch_geometric scikit-learn && python -m tests.golden.make_cat_pruning FOLDER_OF_THE_CLONE

Repository ada-cheng/CAT-Pruning, files qcache/modules/proj_out.py (64 x 64 tokens are written into it), attn.py and ff.py.
What proj_out.py has at the end of a call is read from its local variables. Tokens of equal counts are in any order there, so
one call is made with counts that all differ.

It asks torch_geometric for the sum of mean, mean and maximum over neighbours; version 2.8.1, where it computes these three
together, gives the sum of all in place of the second mean. Here they are computed one by one, as asked for.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tests.common.models import sd3
from tests.methods.test_cat_pruning import (
    distinct_counts,
    given_noise,
    given_tokens,
    noises,
    packed,
    sd3_inputs,
)

STOP = 5
CONFIG = SimpleNamespace(
    stop_idx_dict={"proj": STOP, "joint_attn": STOP, "ff": STOP},
    select_factor={"proj": 0.3},
    select_mode={
        "proj": "convergence_stale_cpp",
        "joint_attn": "convergence_t_noise",
        "ff": "convergence_t_noise",
    },
)


def choices(proj_out, manager) -> dict:
    """The first choice (call 7), one among many equal counts (call 8) and one with distinct counts (call 9)."""
    found = {}

    def watch(frame, event, _):
        if event == "return" and frame.f_code is type(layer).forward.__code__:
            found["locals"] = dict(frame.f_locals)

    to = nn.Module.to
    nn.Module.to = lambda module, *args, **kwargs: module  # it asks for a GPU
    layer = proj_out.QCacheProjOut(nn.Identity(), CONFIG)
    nn.Module.to = to
    layer.graph_pool.aggr_module.is_fused_aggr = [False] * 3
    layer.set_cache_manager(manager)
    calls = {}
    for call in range(STOP + 5):
        if call == 9:
            layer.counts = distinct_counts()
        sys.setprofile(watch)
        layer(noises(call))
        sys.setprofile(None)
        if call > STOP + 1:
            seen = found["locals"]
            calls[call] = {
                "clusters": layer.cluster_vals.argsort(descending=True).tolist(),
                "candidates": [packed(tokens, 4096) for tokens in seen["idx_list_all"]],
                "chosen": packed(seen["indices"], 4096),
                "number": len(seen["indices"]),
            }
            if call > STOP + 2:
                calls[call]["stale"] = packed(seen["indices_stale"], 4096)
    labels = layer.labels
    features = proj_out.add_positional_encoding(noises(7)[1], (64, 64))
    centres = torch.stack([features[labels == k].mean(0) for k in range(20)])
    inertia = (features - centres[labels]).square().sum().item()
    return {"labels": "".join(chr(97 + k) for k in labels.tolist()), "inertia": inertia, "calls": calls}


def given(attn, ff, manager) -> dict:
    """Noise of calls 8 to 11 with tokens that are given."""
    model = sd3()
    for block in model.transformer_blocks:
        block.attn = attn.QCacheJointAttention(block.attn, CONFIG)
        block.ff = ff.QCacheFeedForward(block.ff, CONFIG)
        block.attn.set_cache_manager(manager)
        block.ff.set_cache_manager(manager)
    manager.attn_cache_indices = {str(call): given_tokens(call) for call in range(8, 12)}
    layer, last = model.proj_out, []
    layer.register_forward_hook(lambda _m, _a, output: last.append(output[1]))
    with torch.no_grad():
        for call in range(12):
            model(**sd3_inputs(call))
    return {call: given_noise(call, last[call]) for call in range(8, 12)}


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    from qcache.modules import attn, ff, proj_out
    from qcache.utils import PatchCacheManager

    manager = PatchCacheManager(CONFIG)
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    source = {
        "repository": "https://github.com/ada-cheng/CAT-Pruning",
        "commit": commit.stdout.strip(),
        "files": ["qcache/modules/proj_out.py", "qcache/modules/attn.py", "qcache/modules/ff.py"],
        "how": "python -m tests.golden.make_cat_pruning FOLDER: sets of tokens in hexadecimal digits; of noise the mean, the "
        "standard deviation and the first channel of every ninth token",
    }
    content = {"source": source, "choices": choices(proj_out, manager), "given": given(attn, ff, manager)}
    Path(__file__).with_name("cat_pruning.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
