"""What the scripts that make zoo checkpoints share: run a trainer, embed what it made, and say how big it is."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from benchmarks._record import machine, versions

FOLDER = Path(__file__).parent
# Every trainer of the zoo: warm up, then cosine; the averaged weights are what is kept.
COMMON = ("--lr_scheduler", "cosine", "--lr_warmup_steps", "100", "--adam_weight_decay", "0", "--use_ema",
          "--ema_decay", "0.999", "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "2")  # fmt: skip


def run_trainer(name: str, start: Path, output: Path, options: Sequence[str]) -> None:
    """Train `start` into `output` with `diffusers_ext.training.train_<name>`; continues where it was stopped."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
    command += [f"diffusers_ext.training.train_{name}", "--pretrained_model_name_or_path", str(start)]
    subprocess.run([*command, "--output_dir", str(output), *COMMON, *options], check=True)


def embed(pipe, folder: Path) -> None:
    """Write a pipeline of half-precision parts to `folder`, to be loaded in float32 by default.

    Files of the folder that are no part of the pipeline stay.
    """
    for part in pipe.components:
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder)
    for config in (folder / "model_index.json", *folder.glob("*/config.json")):
        clean_config(config)


def clean_config(config: Path) -> None:
    """Drop the path that a model was loaded from, and have transformers load it in float32: CPUs are slow at less."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    if "dtype" in content:
        content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")


def size_in_millions(folder: Path) -> float:
    """Parameters of all safetensors files below `folder`, in millions."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return total / 1e6


def write_quality(folder: Path, measured: dict[str, Any], card: Callable[[dict[str, Any]], str]) -> None:
    """Write what was measured to `quality.json`, and the card that shows it."""
    quality = {**measured, "machine": machine(), "versions": versions()}
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    (folder / "README.md").write_text(card(quality))


def main(
    description: str | None,
    start: Callable[[Path], None],
    make: Callable[[Path], None],
    finish: Callable[[Path], None],
) -> None:
    """The command line of a script that makes a checkpoint.

    Args:
        description: the script's docstring.
        start: writes the untrained model to a folder.
        make: does all, in a folder that holds what was done so far.
        finish: embeds a trained model, measures it and writes its card.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("start", "make", "finish"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    {"start": start, "make": make, "finish": finish}[args.step](args.folder)
