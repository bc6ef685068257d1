"""The Python in a method's card, run as a reader would."""

from __future__ import annotations

import re
from typing import Any

from diffusers_ext.cards import method_card


def run_card(key: str) -> tuple[str, dict[str, Any]]:
    """The card of a method, and the names that its snippets leave, run one after the other.

    Raises:
        AssertionError: there is no snippet in it.
    """
    card = method_card(key)
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, f"card of {key}", "exec"), names)
    return card, names
