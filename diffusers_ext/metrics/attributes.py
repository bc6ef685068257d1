"""The attributes of the avatars: their classes, how a caption states them, and how predictions of them are scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# The order of the attributes and of their classes is the order of the outputs of `AvatarJudge`: append, never reorder.
CLASSES: dict[str, tuple[bool, ...] | tuple[str, ...]] = {
    "hat": (False, True),
    "glasses": (False, True),
    "beard": (False, True),
    "smile": (False, True),
    "long_hair": (False, True),
    "hair_color": ("auburn", "black", "blond", "blue", "brown", "green", "light brown", "red"),
    "clothes_color": (
        "blue", "coral", "cream", "crimson", "dark red", "golden", "green", "light blue", "mint", "navy", "yellow",
    ),
    "skin": ("brown", "dark brown", "light", "pale", "tan"),
}  # fmt: skip
ATTRIBUTES: tuple[str, ...] = tuple(CLASSES)

# What captions also tell, and no judge is asked about.
HAT_COLORS = ("black", "blue", "green", "grey", "pink", "purple", "red")
GLASSES_KINDS = ("clear", "dark")


def _one_of(names: Sequence[Any]) -> str:
    return "|".join(re.escape(name) for name in names)


_CAPTION = re.compile(
    rf"a person with (?P<skin>{_one_of(CLASSES['skin'])}) skin"
    rf" and (?P<length>short|long) (?P<hair_color>{_one_of(CLASSES['hair_color'])}) hair"
    rf"(?:, a (?P<hat_color>{_one_of(HAT_COLORS)}) hat)?"
    r"(?:, (?P<glasses>clear glasses|dark sunglasses))?"
    r"(?P<beard>, a beard)?"
    r", (?P<mouth>a happy smile|a sad mouth)"
    rf", (?P<clothes_color>{_one_of(CLASSES['clothes_color'])}) clothes"
)
_GRAMMAR = (
    "a person with SKIN skin and short|long COLOR hair[, a COLOR hat][, clear glasses|dark sunglasses][, a beard], "
    "a happy smile|a sad mouth, COLOR clothes"
)


def parse_caption(caption: str) -> dict[str, bool | str | None]:
    """What a caption of the avatars says.

    Returns:
        Every attribute of `ATTRIBUTES` (bool or class name), and `hat_color` (of `HAT_COLORS`) and `glasses_kind` (of
        `GLASSES_KINDS`), each None where there is no hat or are no glasses.

    Raises:
        ValueError: `caption` does not follow the grammar of the avatars' captions to the letter.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"`caption` is {caption!r}; allowed is {_GRAMMAR!r} with the classes of this module.")
    glasses = match["glasses"]
    return {
        "hat": match["hat_color"] is not None,
        "glasses": glasses is not None,
        "beard": match["beard"] is not None,
        "smile": match["mouth"] == "a happy smile",
        "long_hair": match["length"] == "long",
        "hair_color": match["hair_color"],
        "clothes_color": match["clothes_color"],
        "skin": match["skin"],
        "hat_color": match["hat_color"],
        "glasses_kind": glasses.split()[0] if glasses else None,
    }


def hair_shows(attributes: dict[str, bool | str | None]) -> bool:
    """Whether the hair of an avatar with these attributes can be seen, so that its colour can be judged.

    A hat covers short hair in more than half of such pictures, whatever their caption says. Of long hair under a hat
    something shows in 99 of 100.
    """
    return bool(attributes["long_hair"] or not attributes["hat"])


def balanced_accuracy(predicted: Sequence[Any], true: Sequence[Any]) -> float:
    """Mean recall over the classes that occur in `true`: 1 is perfect, `1 / number of classes` is chance.

    Args:
        predicted, true: one label a picture: sequences, arrays or one-dimensional CPU tensors of equal length.

    Raises:
        ValueError: the lengths differ, or both are empty.
    """
    predicted, true = _labels(predicted), _labels(true)
    if len(predicted) != len(true):
        raise ValueError(f"`predicted` has {len(predicted)} labels and `true` has {len(true)}; they must pair up.")
    if not true:
        raise ValueError("`true` is empty; balanced accuracy needs at least one label.")
    total = Counter(true)
    right = Counter(label for guess, label in zip(predicted, true, strict=True) if guess == label)
    return sum(right[label] / total[label] for label in total) / len(total)


def _labels(labels: Any) -> list[Any]:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)
