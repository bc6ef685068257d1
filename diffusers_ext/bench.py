"""`diffusers-ext bench`: runs benchmarks, and chooses the claim that a commit measures again. Needs a source checkout.

Each benchmark runs in a process of its own, as `python -m benchmarks.KEY`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import proofs, registry

ROOT = Path(__file__).resolve().parents[1]


def keys() -> list[str]:
    """Keys of the methods that have a benchmark here.

    Raises:
        ValueError: this is no source checkout.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "_record.py").is_file():  # other packages also install a folder of this name
        raise ValueError(
            "Measuring needs a source checkout. `diffusers-ext show KEY` shows what is recorded for a method."
        )
    rows = {row.key for row in registry.methods()}
    return sorted(rows & {file.stem for file in folder.glob("*.py")})


def chosen(name: str) -> list[str]:
    """Keys of the benchmarks that a name stands for: a method's own, or all of an area.

    Raises:
        ValueError: there is none; the message names those that there are. Or this is no source checkout.
    """
    there = keys()
    if name in there:
        return [name]
    in_area = [key for key in there if registry.get_method(key).area == name]
    if in_area:
        return in_area
    known = ", ".join(f"{key} (area {registry.get_method(key).area})" for key in there)
    raise ValueError(f"`name` is {name!r}; there are benchmarks for {known or 'no method'}.")


def run(key: str, options: Sequence[str] = ()) -> int:
    """Run one benchmark with the package of this checkout; returns its exit code."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"benchmarks.{key}", *options]
    return subprocess.call(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(search)})


def head() -> str:
    """Hash of the commit that is checked out.

    Raises:
        ValueError: this is no git checkout, or git cannot tell.
    """
    reason = "there is no .git"
    if (ROOT / ".git").exists():  # a folder above may be another project's
        try:
            command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
            ran = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            reason = "there is no program git"
        else:
            if ran.returncode == 0:
                return ran.stdout.strip()
            reason = (ran.stderr.strip().splitlines() or [f"git left with code {ran.returncode}"])[-1]
    raise ValueError(f"The commit is not known ({reason}). Give its hash: --commit HASH")


def claims() -> tuple[list[tuple[str, str]], list[str]]:
    """The recorded claims that a quick run measures again, and the methods left out since their records are stale.

    Returns:
        Pairs (key of the method, name of the claim) in order, and keys in order.

    Raises:
        ValueError: a recorded result was edited, or this is no source checkout.
    """
    found, stale = [], []
    for key in keys():
        result = proofs.read_result(key)
        quick = [(key, entry["name"]) for entry in result["claims"] if entry.get("quick")] if result else []
        if quick and result and proofs.staleness(registry.get_method(key), result, ["measured"]):
            stale.append(key)
        else:
            found += quick
    return sorted(found), stale


def claim_of(commit: str) -> tuple[str, str]:
    """The claim that a commit measures again: the same one at each run, and any one at the next commit.

    Args:
        commit: its full hash.

    Returns:
        Key of the method, and name of the claim.

    Raises:
        ValueError: `commit` is no full hash, there is no claim to choose, or see `claims`.
    """
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        raise ValueError(f"`commit` is {commit!r}; allowed is the full hash of a commit, 40 or 64 hexadecimal digits.")
    candidates, stale = claims()
    if not candidates:
        left_out = f"; stale: {', '.join(stale)}" if stale else ""
        raise ValueError(f"There is no recorded claim that a quick run measures again{left_out}.")
    number = int.from_bytes(hashlib.sha256(commit.encode()).digest())
    return candidates[number % len(candidates)]
