"""Make `agd.json`: what the authors' adapters add, on weights and inputs given by formula.

    python -m tests.golden.make_agd FOLDER_OF_THE_CLONE

Repository cristianpjensen/agd, files agd/models/attention.py and agd/models/additive.py. The factor `cfg_mult` of the additive
adapter, 1000 unless given, is 1 here; see the notes of the catalogue.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tests.methods.test_agd import HIDDEN, PROMPT, TIME, WIDTH, golden_adapter, golden_inputs

# Their names of our weights.
NAMES = {
    "cross_attention": {
        "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj",
        "scale_encoder.net.0": "guidance_scale_embedder.net.1.net.0", "scale_encoder.net.3": "guidance_scale_embedder.net.1.net.2",
        "scale_encoder.net.4": "guidance_scale_embedder.net.2", "embedders.0": "timestep_proj", "prompt_embedder": "prompt_proj",
    },
    "additive": {
        "scale_encoder.net.0": "guidance_scale_embedder.net.1.net.0", "scale_encoder.net.2": "guidance_scale_embedder.net.1.net.3",
        "scale_encoder.net.3": "guidance_scale_embedder.net.1.net.4", "scale_encoder.net.4": "guidance_scale_embedder.net.2", "embedders.0": "timestep_proj", "prompt_embedder": "prompt_proj",
        "net.0": "out_proj.net.0", "net.2": "out_proj.net.3", "to_out": "out_proj.net.4",
    },
}  # fmt: skip


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    from agd.models.additive import AdditiveCFGAdapter
    from agd.models.attention import CrossAttentionCFGAdapter

    h, w, time, prompt = golden_inputs()
    options = {
        "use_timestep": True, "timestep_embedder": lambda t: time, "timestep_dim": TIME, "use_prompt": True,
        "prompt_dim": PROMPT,
    }  # fmt: skip
    added = {}
    for kind, make, more in (
        ("cross_attention", CrossAttentionCFGAdapter, {}), ("additive", AdditiveCFGAdapter, {"cfg_mult": 1}),
    ):  # fmt: skip
        theirs, ours = make(nn.Identity(), WIDTH, HIDDEN, **options, **more).eval(), golden_adapter(kind)
        for ours_name, their_name in NAMES[kind].items():
            theirs.get_submodule(their_name).load_state_dict(ours.get_submodule(ours_name).state_dict())
        encoding = theirs.guidance_scale_embedder.net[0]
        encoding.frequencies.copy_(ours.scale_encoder.frequencies)
        encoding.phases.copy_(ours.scale_encoder.phases)
        with torch.no_grad():
            added[kind] = theirs._adapter_forward(h, w, torch.zeros(3), None, prompt).tolist()
    torch.manual_seed(0)
    drawn = CrossAttentionCFGAdapter(nn.Identity(), WIDTH, HIDDEN, zero_init=True)
    faults = {
        "largest last weight with zero_init": drawn.out_proj.weight.abs().max().item(),
        "positions": len(drawn.pos_enc.pe),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()
    source = {
        "repository": "https://github.com/cristianpjensen/agd",
        "commit": commit or "17ebcde5580a61d216a824a5271b7f95b8f81d94",
        "files": ["agd/models/attention.py", "agd/models/additive.py"],
        "how": "python -m tests.golden.make_agd: what an adapter adds to 3 rows of 4 tokens, with time and prompt, at scales 1, 4 "
        "and 7.5; weights and inputs by formula",
    }
    Path(__file__).with_name("agd.json").write_text(
        json.dumps({"source": source, "added": added, "faults": faults}) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
