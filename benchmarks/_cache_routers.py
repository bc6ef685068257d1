"""Routers of HarmoniCa that the benchmark uses: how they are trained, and what was made.

    python -m benchmarks._cache_routers            # trains what `data/cache_routers` does not have yet
    python -m benchmarks._cache_routers MODEL ...  # these, again

A training can be broken off and goes on from its last checkpoint. On one idle core it takes about 8 minutes on fashion-dit and
15 on avatars-flow. The authors train 2,000 runs of 32 pictures at learning rate 0.01; here it is fewer runs of fewer pictures
at a higher rate, so that the router can move as far: its numbers are clamped to [-5, 5] and begin about 0. The price of a
sublayer is the authors' for DiT-XL/2 at 10 steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import diffusers_ext as dx
from benchmarks._bench import OUTPUT
from benchmarks.zoo import _avatars
from diffusers_ext import proofs
from diffusers_ext.training.train_harmonica import main as train_router

FOLDER = Path(__file__).parent / "data" / "cache_routers"
STEPS, BATCH = 20, 4
FLUX_CALL = {"height": 32, "width": 32, "max_sequence_length": 32, "negative_prompt": ""}


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        model: checkpoint of the zoo.
        guidance_scale: of its runs.
        beta: price of a sublayer.
        runs: how many.
    """

    model: str
    guidance_scale: float
    beta: float
    runs: int

    def arguments(self) -> list[str]:
        """Of the trainer, without where it writes."""
        flags = [
            f"--num_inference_steps={STEPS}", f"--beta={self.beta:g}", f"--train_batch_size={BATCH}",
            f"--max_train_steps={self.runs}", "--learning_rate=0.1", "--lambda_every=1000", "--checkpointing_steps=5",
            "--checkpoints_total_limit=2", "--resume_from_checkpoint=latest", "--seed=0",
        ]  # fmt: skip
        if self.model == "avatars-flow":
            call = {**FLUX_CALL, "true_cfg_scale": self.guidance_scale}
            return [*flags, f"--pipeline_arguments={json.dumps(call)}"]
        return [*flags, f"--guidance_scale={self.guidance_scale:g}"]

    def run(self, work: Path) -> Path:
        """Train in a folder; returns it."""
        flags = [
            f"--pretrained_model_name_or_path={dx.zoo_path(self.model)}",
            f"--output_dir={work}",
            *self.arguments(),
        ]
        if self.model == "avatars-flow":
            work.mkdir(parents=True, exist_ok=True)
            prompts = work / "prompts.txt"
            prompts.write_text("\n".join(_avatars.captions("generator")[:1000]), encoding="utf-8")
            flags.append(f"--prompts={prompts}")
        train_router(flags)
        return work


TRAININGS = {
    training.model: training
    for training in (Trained("fashion-dit", 4.0, 7e-8, 120), Trained("avatars-flow", 3.0, 7e-8, 100))
}


def folder_of(name: str) -> Path:
    """Where the router of a checkpoint is.

    Raises:
        FileNotFoundError: it was not trained.
    """
    if not (FOLDER / name / "config.json").is_file():
        raise FileNotFoundError(f"There is no router {name!r}: run `python -m benchmarks._cache_routers {name}`.")
    return FOLDER / name


def table_of(name: str) -> torch.Tensor | None:
    """What a router computes, bool `(steps, sublayers)`; None where it was not trained."""
    if not (FOLDER / name / "config.json").is_file():
        return None
    return dx.CacheRouter.from_pretrained(FOLDER / name).table(dx.HarmonicaConfig("x/y").threshold)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRAININGS)}")
    names = parser.parse_args(argv).names
    unknown = sorted(set(names) - set(TRAININGS))
    if unknown:
        parser.error(f"there is no training {unknown}; there are {', '.join(TRAININGS)}")
    for name in names or [name for name in TRAININGS if table_of(name) is None]:
        print(name, flush=True)
        source = proofs.source_hash("diffusers_ext.training.train_harmonica")
        work = TRAININGS[name].run(OUTPUT / "cache_routers" / f"{name}-{source[:12]}")
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            shutil.copy(work / file, FOLDER / name / file)
        table = table_of(name)
        assert table is not None
        print(f"{name}: {table.float().mean():.1%} of the sublayers run")


if __name__ == "__main__":
    main()
