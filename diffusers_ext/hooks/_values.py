"""What settings may be: whole numbers and numbers, of which Python's booleans are none."""

from __future__ import annotations

import math
from typing import Any


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number from `least` to `most`."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and math.isfinite(value) and least <= value <= most
