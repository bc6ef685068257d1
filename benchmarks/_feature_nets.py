"""The two feature nets of Fréchet distances, with what they see in real pictures."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import numpy as np
import torch

import diffusers_ext as dx
from benchmarks.data import FOLDER, load_fashion_mnist
from benchmarks.zoo import _fashion
from diffusers_ext.metrics import EfficientNetLite0

FASHION = 2000  # real pictures of clothes
Nets = dict[str, tuple[Callable[[np.ndarray], torch.Tensor], torch.Tensor]]


@functools.cache
def nets(model: str = "avatars-sd") -> Nets:
    """Two unrelated feature nets, each with its features of held-out real pictures of the kind that a checkpoint draws.

    Args:
        model: of the zoo. Its judge is one net, the other was trained on photographs.
    """
    if model.startswith("fashion"):
        judge, real = _fashion.judge(), load_fashion_mnist("reference")[0][:FASHION, :, :, None]
    else:
        judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).eval()
        rows = json.loads((FOLDER / "avatars_splits.json").read_text())["reference"]
        real = np.load(FOLDER / "avatars.npz")["image"][rows] / 255.0
    features = {"judge": judge.features, "efficientnet": EfficientNetLite0.from_package().features}
    return {name: (net, net(real)) for name, net in features.items()}
