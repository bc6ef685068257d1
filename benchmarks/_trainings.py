"""Where benchmarks keep what they train."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks._bench import OUTPUT
from diffusers_ext import proofs


def training_folder(key: str, module: str, settings: Any) -> Path:
    """Folder in the cache for trainings of a method: another one when its sources or the settings change.

    Args:
        key: of the method; begins the folder's name.
        module: dotted name of the trainer.
        settings: all that the result depends on, as JSON; what is no JSON counts as its text.
    """
    told = json.dumps([proofs.source_hash(module), settings], sort_keys=True, default=str)
    return OUTPUT / "cache" / f"{key}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
