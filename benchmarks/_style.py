"""A small LoRA training for a new style of the zoo's model, with its held-out loss along the way, for callbacks to be tried on.

The style is the negative of the avatars: the pictures of the judge's split, whose captions the model does not know.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import diffusers_ext as dx
from benchmarks.data import FOLDER
from diffusers_ext.training._loop import Callback, train
from diffusers_ext.training.fast_forward import FastForward
from diffusers_ext.training.train_fast_forward_lora import FastForwardTask, First, parse_args

MODEL, STEPS, BATCH, EVERY = "avatars-sd", 60, 32, 2
TRAINED, VALIDATED, HELD_OUT = 768, 32, 64

Callbacks = Callable[[list[torch.nn.Parameter]], Sequence[Callback]]


@dataclass
class Curve:
    """A training: after which steps it was looked at, what it had cost by then, and the held-out loss.

    Costs are forward passes of one picture; a backward pass counts as two.
    """

    steps: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def cost_to(self, loss: float) -> float:
        """What it had cost when the loss was first at most this; infinite if it never was."""
        return next((cost for cost, found in zip(self.costs, self.losses, strict=True) if found <= loss), float("inf"))


class _Meter(Callback):
    """Looks at the held-out loss every few steps; what that costs does not count."""

    def __init__(self, look: Callable[[], float], forward: FastForward | None) -> None:
        self.look, self.forward, self.curve, self.step = look, forward, Curve(), 0

    def around_step(self, step: Callable[[], Any]) -> None:
        step()
        self.step += 1
        if self.step % EVERY == 0:
            validations = 0 if self.forward is None else self.forward.validations
            self.curve.steps.append(self.step)
            self.curve.costs.append(3 * BATCH * self.step + VALIDATED * validations)
            self.curve.losses.append(self.look())


class _StyleTask(FastForwardTask):
    def __init__(self, args: Any, full: bool, callbacks: Callbacks | None) -> None:
        super().__init__(args)
        self.make = callbacks
        if full:
            self.lora.detach()
            self.trained = {"unet": self.pipeline.unet.requires_grad_(True)}

    def dataset(self, args: Any) -> First:
        everything = super().dataset(args)  # without the pictures of the validations
        return First(everything.dataset, len(everything) - HELD_OUT)

    def prepare(self, dataset: First, accelerator: Accelerator) -> None:
        validated = First(dataset.dataset, len(dataset.dataset) - VALIDATED)
        super().prepare(validated, accelerator)
        rows = range(len(dataset), len(validated))
        (forward,) = self.callbacks
        assert isinstance(forward, FastForward)
        goes = self.args.fast_forward_interval < float("inf")
        parameters = [parameter for module in self.trained.values() for parameter in module.parameters()]
        own = self.make(parameters) if self.make is not None else []
        self.meter = _Meter(
            lambda: self.fixed_loss(dataset.dataset, rows, accelerator).item(), forward if goes else None
        )
        self.callbacks = (*own, forward, self.meter)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # nothing is kept, but the loop writes a card

    def card(self, args: Any, summary: dict[str, Any]) -> str:
        return ""


def pictures(folder: Path) -> Path:
    """The negatives with their captions, as .npz."""
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())["judge"][: TRAINED + HELD_OUT + VALIDATED]
    with np.load(FOLDER / "avatars.npz") as avatars:
        np.savez(folder / "negatives.npz", image=255 - avatars["image"][rows], text=avatars["caption"][rows])
    return folder / "negatives.npz"


def curve(
    seed: int,
    learning_rate: float,
    interval: float = float("inf"),
    full: bool = False,
    callbacks: Callbacks | None = None,
    options: Iterable[str] = (),
) -> Curve:
    """Train with Adam at a constant rate.

    Args:
        seed: of the training.
        learning_rate: of Adam.
        interval: of Fast Forward; infinite: without.
        full: the whole U-Net in place of a LoRA of rank 4.
        callbacks: makes more of them, from the parameters.
        options: more flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "pretrained_model_name_or_path": dx.zoo_path(MODEL), "train_data_dir": pictures(Path(folder)), "resolution": 32,
            "output_dir": Path(folder, "out"), "rank": 4, "train_batch_size": BATCH, "max_train_steps": STEPS,
            "learning_rate": learning_rate, "adam_weight_decay": 0, "seed": seed, "fast_forward_interval": interval,
            "fast_forward_pictures": VALIDATED, "checkpointing_steps": 10**6,
        }  # fmt: skip
        args = parse_args([*(f"--{name}={value}" for name, value in flags.items()), *options])
        task = _StyleTask(args, full, callbacks)
        train(args, task)
    return task.meter.curve
