"""What benchmarks train: where it is kept, and that it is trained once."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._bench import OUTPUT
from diffusers_ext import proofs
from diffusers_ext.training._loop import Task, train

Script = Callable[[list[str]], None]


def training_folder(key: str, module: str, settings: Any) -> Path:
    """Folder in the cache for trainings of a method: another one when its sources or the settings change.

    Args:
        key: of the method; begins the folder's name.
        module: dotted name of the trainer.
        settings: all that the result depends on, as JSON; what is no JSON counts as its text.
    """
    told = json.dumps([proofs.source_hash(module), settings], sort_keys=True, default=str)
    return OUTPUT / "cache" / f"{key}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def trained_once(script: Script, folder: Path, values: Mapping[str, Any], flags: Sequence[str] = ()) -> Path:
    """`folder` of what a training makes; trains, or goes on, where that is not finished.

    Args:
        script: `main` of a training script that writes a card, or `with_task`.
        folder: of the result.
        values: arguments of the script by name, without the folder; True is a flag.
        flags: more arguments, as they are.
    """
    if not (folder / "README.md").is_file():  # the last that is written
        given = {**values, "output_dir": folder, "resume_from_checkpoint": "latest"}
        script([*flags, *(f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items())])
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        shutil.rmtree(checkpoint)
    return folder


def with_task(parse_args: Callable[[list[str]], argparse.Namespace], task: Callable[..., Task]) -> Script:
    """The script of a trainer with another task in place of its own."""

    def main(argv: list[str]) -> None:
        args = parse_args(argv)
        train(args, task(args))

    return main


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    """A text file, in a folder that is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file
