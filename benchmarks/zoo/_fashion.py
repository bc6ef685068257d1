"""How close pictures are to Fashion-MNIST: distances on two unrelated feature nets, and classes read by the judge."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.data import FASHION_MNIST, FOLDER, load_fashion_mnist
from diffusers_ext import zoo_path
from diffusers_ext.metrics import EfficientNetLite0, FashionJudge, frechet_distance, kernel_distance

# The first 30,000 training pictures; the judge is trained on the others.
DATA = (
    "--train_data_dir", str(FASHION_MNIST), "--image_column", "train_images", "--label_column", "train_labels",
    "--split_file", str(FOLDER / "fashion_splits.json"), "--split", "generator", "--resolution", "28",
)  # fmt: skip
STEPS, PICTURES = 20, 1000


def judge() -> FashionJudge:
    return FashionJudge.from_pretrained(zoo_path("fashion-judge"))


def distances(pictures: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Distances to 2,000 reference pictures, by feature net and kind.

    Args:
        pictures: `(n, 28, 28, 1)` in [0, 1], to be measured.
        others: of the same model with other seeds; how far they are from `pictures` is the noise.
    """
    reference = load_fashion_mnist("reference")[0][:2000, :, :, None]
    measured: dict[str, Any] = {}
    for name, net, resamples in (("judge", judge(), 200), ("EfficientNet-lite0", EfficientNetLite0.from_package(), 20)):
        first, second, real = (net.features(x) for x in (pictures, others, reference))
        trained_on = net.features(load_fashion_mnist("generator")[0][: len(pictures), :, :, None])
        noise = (first, second)
        measured[name] = {
            "frechet": frechet_distance(first, real, noise=noise, resamples=resamples).to_dict(),
            "kernel": kernel_distance(first, real, noise=noise).to_dict(),
            "training pictures, frechet": frechet_distance(trained_on, real, resamples=2).value,
            "training pictures, kernel": kernel_distance(trained_on, real, resamples=2).value,
        }
    return measured


def table(measured: dict[str, Any]) -> str:
    rows = [
        "| distance | features | value | interval | two seeds of the model | as many training pictures |",
        "|---" * 6 + "|",
    ]
    for net, kinds in measured.items():
        for kind in ("frechet", "kernel"):
            found = kinds[kind]
            low, high = found["interval"]
            rows.append(
                f"| {kind} | {net} | {found['value']:.4g} | {low:.4g} to {high:.4g} | {found['noise']:.4g} | "
                f"{kinds[f'training pictures, {kind}']:.4g} |"
            )
    return "\n".join(rows)
