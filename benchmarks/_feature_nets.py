"""The two feature nets of Fréchet distances between portraits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import numpy as np
import torch

import diffusers_ext as dx
from benchmarks.data import FOLDER
from diffusers_ext.metrics import EfficientNetLite0


@functools.cache
def nets() -> dict[str, tuple[Callable[[np.ndarray], torch.Tensor], torch.Tensor]]:
    """Two unrelated feature nets, each with its features of real pictures of held-out captions."""
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())["reference"]
    real = np.load(FOLDER / "avatars.npz")["image"][rows] / 255.0
    judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).eval()
    features = {"judge": judge.features, "efficientnet": EfficientNetLite0.from_package().features}
    return {name: (net, net(real)) for name, net in features.items()}
