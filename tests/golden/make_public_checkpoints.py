"""Make `public_checkpoints.json`: logits of GIDD's and MDLM's own network with weights and inputs given by formula.

    git clone https://github.com/dvruette/gidd /some/folder
    python -m tests.golden.make_public_checkpoints /some/folder

Their files are imported as they are. A stand-in for `einops` does the two rearrangements that they use without a GPU. The
network is MDLM's (kuleshov-group/mdlm, `models/dit.py`), as the file says; MDLM's own needs a GPU package. Without that
package it cuts its table of angles along the wrong dimension, so that only texts of its full length run: 12 tokens here.
"""

import json
import sys
import types
from pathlib import Path

import torch

from tests.language_models import GIDD, masked_tokens, tiny

COMMIT = "f67acc961cc858cc69e8e6d91e7eb67a0a79151c"


def _rearrange(x, pattern, **sizes):
    if pattern.startswith("b s (three h d)"):
        return x.unflatten(-1, (3, sizes["h"], -1))
    if pattern == "b h s d -> b s (h d)":
        return x.transpose(1, 2).flatten(2)
    raise ValueError(f"`pattern` is {pattern!r}, which the files did not use.")


@torch.no_grad()
def main() -> None:
    sys.path.insert(0, sys.argv[1])
    sys.modules["einops"] = types.SimpleNamespace(rearrange=_rearrange)  # type: ignore[assignment]
    package = types.ModuleType("gidd")  # without what its `__init__` imports
    package.__path__ = [f"{sys.argv[1]}/gidd"]
    sys.modules["gidd"] = package
    from gidd.models.configuration_dit import DITConfig
    from gidd.models.modeling_dit import DIT

    settings = {name: value for name, value in GIDD.items() if name != "model_type"}
    network = DIT(DITConfig(**{**settings, "max_seq_len": 12})).eval()
    ours = tiny("gidd").network.state_dict()
    names = {name.replace("vocab_embed.weight", "vocab_embed.embedding"): value for name, value in ours.items()}
    found = network.load_state_dict(names, strict=False)
    assert not found.unexpected_keys and all(name.startswith("rotary_emb.") for name in found.missing_keys), found
    runs = {
        str(time): network(masked_tokens(), torch.full((2,), time)).double().flatten()[::37].tolist()
        for time in (0.0, 0.4)
    }
    source = {
        "repository": "https://github.com/dvruette/gidd",
        "commit": COMMIT,
        "file": "gidd/models/modeling_dit.py",
        "how": "python -m tests.golden.make_public_checkpoints FOLDER: every 37th logit of 2 texts of 12 tokens, at two times",
    }
    text = json.dumps({"source": source, "runs": runs}, indent=1)
    Path(__file__).with_name("public_checkpoints.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
