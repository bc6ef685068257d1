"""Data that the zoo, the judges and the benchmarks use, and how it is split.

`avatars.npz` ships with the source. Fashion-MNIST and the King James Bible come out of Debian packages:

    python -m benchmarks.data.fetch --all
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FASHION_MNIST, KJV = FOLDER / "fashion_mnist.npz", FOLDER / "kjv.txt"
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load_fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `uint8 (n, 28, 28)` and labels `int64 (n,)` of one split; no picture is in two.

    Args:
        split: `generator` (the first 30,000 training pictures), `judge` (the last 30,000) or `reference` (the 10,000
            test pictures).

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the data is not there; the message says how to get it.
    """
    ranges = json.loads((FOLDER / "fashion_splits.json").read_text())
    if split not in (*ranges, "reference"):
        raise ValueError(f"`split` is {split!r}; allowed are {', '.join(ranges)}, reference.")
    name, rows = ("test", slice(None)) if split == "reference" else ("train", slice(*ranges[split].values()))
    with np.load(_there(FASHION_MNIST, "fashion-mnist"), allow_pickle=False) as data:
        return data[f"{name}_images"][rows], data[f"{name}_labels"][rows].astype(np.int64)


def load_kjv(split: str) -> list[str]:
    """Chapters of the King James Bible, each a text of one line a verse, without the verses' names.

    Args:
        split: `generator` (what models are trained on) or `reference` (every twentieth chapter, and only those).

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the text is not there; the message says how to get it.
    """
    if split not in ("generator", "reference"):
        raise ValueError(f"`split` is {split!r}; allowed are generator, reference.")
    chapters: dict[str, list[str]] = {}
    for line in _there(KJV, "kjv").read_text(encoding="utf-8").splitlines():
        name, _, verse = line.partition(" ")
        chapters.setdefault(name.partition(":")[0], []).append(verse)
    texts = ["\n".join(verses) for verses in chapters.values()]
    return [text for i, text in enumerate(texts) if (i % 20 == 19) == (split == "reference")]


def _there(file: Path, name: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file.name} is not there: python -m benchmarks.data.fetch {name}")
    return file
