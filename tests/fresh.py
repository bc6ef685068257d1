"""Run code in a fresh Python process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_fresh(code: str, env: dict[str, str] | None = None, timeout: float = 300) -> str:
    """Run `code` (indented text is fine) and return its output; fails with the output where it exits non-zero.

    `env` is added to the environment, without `HF_HUB_OFFLINE`, which huggingface_hub reads at import.
    """
    environment = (
        {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"PYTHONPATH": str(ROOT)} | (env or {})
    )
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
