"""What every trainer must do: a script that resumes exactly and shares what it made.

The script is `diffusers_ext/training/train_<key>.py`, or the module of the row's first entry, with `main(argv)`,
`parse_args(argv)` and a loss that can be imported (an entry of the row).

`COMMON` of a trainer: `inputs`, `(folder) -> arguments` of a run of a few seconds, a mapping of names to values without
`output_dir`, `max_train_steps` and `seed` (left out where twelve captioned avatars and the zoo's `avatars-sd` will do).

A method of another form that has a trainer too asks for the same rules in its own tests, with `hold_to_the_rules`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from diffusers import SchedulerMixin

import diffusers_ext as dx
from diffusers_ext.registry import get_method
from tests.tiny_models import VERSES, masked_lm

from .models import World
from .suite import Case, CommonCase, Suite, refused, require

ROOT = Path(__file__).parents[2]
NAMES = (
    "output_dir", "seed", "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "mixed_precision", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
    "logging_dir", "push_to_hub", "hub_model_id", "hub_token",
)  # fmt: skip


def _is_trained_with(entry: Any) -> bool:
    """Not what only draws with the result."""
    return callable(entry) and not (isinstance(entry, type) and issubclass(entry, SchedulerMixin))


SUITE = Suite("trainer", "a loss, a function that can be imported and tested", _is_trained_with)


def script(case: Case) -> ModuleType:
    name = f"diffusers_ext.training.train_{case.row.key}"
    return importlib.import_module(name if importlib.util.find_spec(name) is not None else case.cls.__module__)


def given(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Arguments of a short run."""
    if case.common.inputs is not None:
        return dict(case.common.inputs(folder))
    with np.load(ROOT / "benchmarks" / "data" / "avatars.npz") as avatars:
        np.savez(folder / "few.npz", image=avatars["image"][:12], text=avatars["caption"][:12])
    model = dx.zoo_path("avatars-sd")
    return {
        "pretrained_model_name_or_path": model,
        "train_data_dir": folder / "few.npz",
        "resolution": 32,
        "train_batch_size": 2,
    }


def flags(values: dict[str, Any]) -> list[str]:
    result = []
    for name, value in values.items():
        result += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return result


def masked_texts(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a training on two short texts from a tiny masked language model, both written to `folder`."""
    masked_lm(folder / "start")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in VERSES))
    base = {"pretrained_model_name_or_path": folder / "start", "train_data_dir": texts}
    return {**base, "max_seq_length": 8, "train_batch_size": 2, **more}


def hold_to_the_rules(
    key: str, inputs: Callable[[Path], Mapping[str, Any]], root: Path, loss: Callable[..., Any] | None = None
) -> Path:
    """Hold the trainer of a method of another form to all rules.

    Args:
        key: of the method.
        inputs: as in `COMMON`.
        root: a folder that is new; all that the rules write lies in it.
        loss: a function of the script, where that is not `train_<key>`.

    Returns:
        The folder of a finished run of two steps.

    Raises:
        Broken: a rule does not hold.
    """
    case, world = Case(get_method(key), loss, (loss,), CommonCase(inputs=inputs), key), World(root)
    for rule in SUITE.rules.values():
        if rule.name != "entry":  # the row's form has an entry of its own kind
            SUITE.run(case, rule, world)
    (straight,) = root.glob("*/straight")
    return straight


def run(case: Case, values: dict[str, Any], output: Path, steps: int, **more: Any) -> dict[str, str]:
    """Train; hashes of the weights that were written, without those of checkpoints."""
    everything = {"seed": 3, "learning_rate": 1e-3, **values, "output_dir": output, "max_train_steps": steps, **more}
    script(case).main(flags(everything))
    files = [file for file in output.rglob("*.safetensors") if "checkpoint" not in str(file.relative_to(output))]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@SUITE.rule()
def interface(case: Case, world: World) -> None:
    """The script has `main` and `parse_args`, with the argument names of diffusers' example scripts."""
    module, folder = script(case), world.folder()
    for name in ("main", "parse_args"):
        require(callable(getattr(module, name, None)), f"{module.__name__} has no `{name}(argv)`")
    args = vars(module.parse_args(flags({**given(case, world, folder), "output_dir": folder / "out"})))
    missing = [name for name in NAMES if name not in args]
    require(not missing, f"it takes no {', '.join(f'--{name}' for name in missing)}")


@SUITE.rule()
def wrong_arguments(case: Case, world: World) -> None:
    """Wrong values are ValueErrors that name the argument, before anything is written."""
    folder = world.folder()
    values = given(case, world, folder)
    for name in ("train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps"):
        wrong = {**values, "output_dir": folder / "out", name: 0}
        refused(f"--{name} 0", script(case).main, flags(wrong), names=(name,))
    wrong = {**values, "output_dir": folder / "out", "push_to_hub": True}
    refused("--push_to_hub alone", script(case).main, flags(wrong), names=("hub_model_id",))
    require(not list(folder.glob("out/*")), "a refused run has written files")


@SUITE.rule()
def exact_resume(case: Case, world: World) -> None:
    """A run that is stopped and resumed writes the same bits as one that is not; the result is safetensors with a card."""
    folder = world.folder()
    values = given(case, world, folder) | {"checkpointing_steps": 1}
    straight = run(case, values, folder / "straight", 2)
    require(straight, "it writes no safetensors")
    run(case, values, folder / "resumed", 1)
    resumed = run(case, values, folder / "resumed", 2, resume_from_checkpoint="latest")
    wrong = [name for name in straight if resumed.get(name) != straight[name]]
    require(not wrong, f"resumed after one of two steps, other bits in {wrong}")
    other = run(case, values, folder / "other", 2, seed=4)
    require(other != straight, "another seed writes the same weights: nothing is trained, or nothing is random")
    card = folder / "straight" / "README.md"
    require(card.is_file(), "it writes no card")
    text = card.read_text()
    require(str(folder) not in text and str(ROOT) not in text, "its card holds a path of this machine")
