"""What the planted classes share, as the cores of the package are shared."""

from __future__ import annotations

from typing import Any


def check_number(name: str, value: Any, low: float, high: float, integer: bool = False) -> None:
    """Refuse what is no number from `low` to `high`."""
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if integer else "a number"
        raise ValueError(f"`{name}` is {value!r}; it must be {kind} from {low} to {high}.")


def check_word(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not one of the words."""
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(map(repr, allowed))}.")
