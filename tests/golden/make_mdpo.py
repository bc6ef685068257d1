"""Make `mdpo.json`: texts of the authors' decoder with a network given by formula, their advantages and their loss.

    python -m tests.golden.make_mdpo FOLDER_OF_THE_CLONE

Repository autonomousvision/mdpo, commit e6ae439, files src/mdlm_generation_utils.py (run as it is) and
src/open_r1/mdpo/mdpo_trainer.py (functions out of it: the file needs trl and a GPU).
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.golden._reference import functions
from tests.methods.test_adablock import MASK, PROMPTS, golden_logits
from tests.methods.test_mdpo import GOLDEN, RUNS, golden_numbers


def theirs(file: Path, rewards: torch.Tensor) -> torch.Tensor:
    """Their advantages: the statements that make them, one after the other."""
    scope = {
        "torch": torch,
        "all_step_rewards": rewards,
        "diffusion_steps": rewards.shape[1],
        "gather": lambda x: x,
        "self": SimpleNamespace(num_generations=len(rewards)),
    }
    names = {
        "all_step_advantages", "gathered_all_advantages", "mean_grouped_advantages", "std_grouped_advantages", "advantages"
    }  # fmt: skip
    trainer = next(
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and "Trainer" in node.name
    )
    make = next(node for node in trainer.body if getattr(node, "name", "") == "_generate_and_score_completions")
    for node in make.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in names:
            exec(compile(ast.Module([node], []), str(file), "exec"), scope)
    return scope["advantages"]


def loss(function, given: dict[str, torch.Tensor], advantage: torch.Tensor, beta: float) -> float:
    tokens = torch.where(given["masked"], MASK, 0)
    trainer = SimpleNamespace(
        beta=beta, epsilon=0.2, num_iterations=2, max_completion_length=tokens.shape[1], _metrics=defaultdict(lambda: defaultdict(list)),
        processing_class=SimpleNamespace(mask_token_id=MASK), control=SimpleNamespace(should_evaluate=False),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x),
        _get_per_token_logps=lambda *_: given["log_prob"],
    )  # fmt: skip
    model = SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(model_type="llada")))
    inputs = {
        "input_ids": tokens, "target_ids": tokens, "input_mask": None, "conf": given["old"].exp(),
        "ref_per_token_logps": given["reference"], "old_per_token_logps": given["old"],
        "advantages": advantage[:, None].expand_as(tokens),
    }  # fmt: skip
    return float(function(trainer, model, inputs))


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    decoder = importlib.import_module("src.mdlm_generation_utils")
    runs = {}
    for run, (schedule, prompt, length, steps) in RUNS.items():
        text, _, _, inputs = decoder.diffusion_generate(
            lambda tokens, attention_mask: SimpleNamespace(logits=golden_logits(tokens).float()), PROMPTS[prompt][None], MASK,
            steps=steps, gen_length=length, block_length=length, temperature=0.0, conf_alg="low_confidence", mode=schedule,
            rcr=True,
        )  # fmt: skip
        runs[run] = {"tokens": text[0].tolist(), "inputs": [one[0].tolist() for one in inputs]}
    file, given = Path(folder, "src/open_r1/mdpo/mdpo_trainer.py"), golden_numbers()
    advantages = theirs(file, given["rewards"])
    trainer = next(node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and "Trainer" in node.name)  # fmt: skip
    compute_loss = functions(file, trainer)["compute_loss"]
    found = {
        "source": {
            "repository": "https://github.com/autonomousvision/mdpo",
            "commit": "e6ae439",
            "files": ["src/mdlm_generation_utils.py", "src/open_r1/mdpo/mdpo_trainer.py"],
            "how": "python -m tests.golden.make_mdpo: greedy, network by formula; loss and advantages on numbers by formula",
        },
        "runs": runs,
        "advantages": advantages.tolist(),
        "loss": loss(compute_loss, given, advantages[:, 1], 0.0),
        "loss with reference": loss(compute_loss, given, advantages[:, 1], 0.1),
    }
    GOLDEN.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
