"""Make `cj_grpo.json`: the authors' loss of CJ-GRPO on numbers given by formula.

    python -m tests.golden.make_cj_grpo FILE

Repository yjyddq/EOSER-ASS-RL, commit 5affb4e; FILE is its cj-grpo/cj_grpo_trainer_eoser_ass.py, of which one function is run.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.golden._reference import functions
from tests.methods.test_eoser_ass_cj_grpo import CJ_GOLDEN, golden_run


def main(file: str) -> None:
    names = [node.name for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)]
    (name,) = [name for name in names if name.endswith("Trainer")]
    compute_loss = functions(Path(file), name)["compute_loss"]
    given = golden_run()
    tokens = torch.zeros(given["old"].shape[1:], dtype=torch.long)
    losses = {}
    for beta in (0.0, 0.04):
        trainer = SimpleNamespace(
            beta=beta, epsilon=0.5, num_iterations=12, control=SimpleNamespace(should_evaluate=False),
            accelerator=SimpleNamespace(gather_for_metrics=lambda x: x), _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps=lambda *_: list(given["log_prob"]),
        )  # fmt: skip
        inputs = {
            "reversed_traj": None, "reversed_traj_unmask_positions": list(given["committed"]),
            "reversed_traj_old_per_token_logps": list(given["old"]),
            "reversed_traj_ref_per_token_logps": list(given["reference"]), "prompt_ids": tokens, "prompt_mask": tokens,
            "completion_ids": tokens, "completion_mask": tokens,
            "advantages": given["rewards"] - given["rewards"].mean(),
        }  # fmt: skip
        losses[str(beta)] = float(compute_loss(trainer, None, inputs))
    source = {
        "repository": "https://github.com/yjyddq/EOSER-ASS-RL",
        "commit": "5affb4ec0db9d3819175c2011c94e38c74325624",
        "file": "cj-grpo/cj_grpo_trainer_eoser_ass.py",
        "how": "python -m tests.golden.make_cj_grpo: their loss of one group, numbers by formula",
    }
    CJ_GOLDEN.write_text(json.dumps({"source": source, "losses": losses}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
