"""`diffusers-ext verify`: runs the proofs of methods and prints one line a proof. Needs a source checkout.

The tests of all methods asked for run in one process of their own, since importing torch costs more than most of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import proofs
from .registry import Method, get_method, methods

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
_STYLES = {"passed": "green", "missing": "yellow", "failed": "red"}  # from best to worst


@dataclass
class _Proof:
    """What became of one proof of one method.

    Attributes:
        outcome: one of `proofs.OUTCOMES`.
        tests: its tests, as `--proofs-json` writes them.
        notes: lines to print below it.
    """

    outcome: str
    tests: list[dict[str, Any]]
    notes: list[str]


def verify(keys: Iterable[str], stream: TextIO | None = None, record: bool = False) -> int:
    """Run the proofs of methods and print one line for each, and a summary.

    A proof is `passed` when at least one of its tests passed and none failed, and `missing` when none ran. Two are more
    than their tests: `claim` needs a recorded result, unedited and measured with these sources, and may then do without
    tests; `card` needs a card that renders.

    Args:
        keys: methods, each with its tests in `tests/methods/test_<key>.py`.
        stream: where to print; None is standard output.
        record: also write the outcomes to the methods' recorded results. What was measured is left as it is.

    Returns:
        Exit code: 0 if every method has all the proofs that it needs, and none failed; else 1.

    Raises:
        ValueError: this is no source checkout, or a key is unknown or of form `none`. Nothing has run then.
    """
    from rich.console import Console

    rows = [get_method(key) for key in dict.fromkeys(keys)]
    for row in rows:
        if row.form == "none":
            raise ValueError(f"`keys` has {row.key!r}, which has no system to verify: {row.reason}")
    require_checkout()
    console = Console(file=stream, soft_wrap=True, highlight=False)  # a line is a line, also in a log file
    report = _run_tests([_test_file(row) for row in rows if (ROOT / _test_file(row)).is_file()], console)
    if report is None:
        return 1
    outcomes: Counter[str] = Counter()
    lacking: dict[str, list[str]] = {}
    for row in rows:
        checked = _check(row, report)
        outcomes.update(proof.outcome for proof in checked.values())
        console.print(f"{row.key} ({row.form}, version {row.version})", style="bold")
        for name, proof in checked.items():
            _print_proof(console, name, proof)
        if record:
            try:
                proofs.record_proofs(row, {name: proof.outcome for name, proof in checked.items()})
            except ValueError as error:  # an edited result: `claim` has failed for it, and it is not written over
                console.print(f"  not recorded: {error}", style="red", markup=False)
        if missed := [f"{name} {proof.outcome}" for name, proof in checked.items() if proof.outcome != "passed"]:
            lacking[row.key] = missed
    counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in proofs.OUTCOMES)
    console.print(f"{len(rows) - len(lacking)} of {len(rows)} methods have all their proofs: {counts}.", style="bold")
    for key, missed in lacking.items():
        console.print(f"  {key}: {', '.join(missed)}", style="red")
    return 1 if lacking else 0


def verifiable() -> list[str]:
    """Keys of the methods that have tests or a recorded result: what `verify --all` runs.

    Raises:
        ValueError: this is no source checkout.
    """
    require_checkout()
    return [
        row.key
        for row in methods()
        if row.form != "none" and ((ROOT / _test_file(row)).is_file() or proofs.result_path(row.key).is_file())
    ]


def require_checkout() -> None:
    """Check that the package lies in a source checkout, with its tests.

    Raises:
        ValueError: it does not.
    """
    if not (ROOT / "tests" / "methods").is_dir():
        raise ValueError(
            f"Verifying needs a source checkout, and there is no folder {ROOT / 'tests' / 'methods'}. "
            "`diffusers-ext show KEY` shows what is recorded for a method."
        )


def _test_file(row: Method) -> str:
    return f"tests/methods/test_{row.key}.py"


def _run_tests(files: list[str], console: Console) -> dict[str, Any] | None:
    """What `--proofs-json` wrote for these files, or None, with the output printed, where pytest broke off."""
    if not files:
        return {"files": {}, "errors": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "proofs.json")
        command = [sys.executable, "-m", "pytest", *files, "--proofs-json", str(path), "--rootdir", str(ROOT), "-q"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(search)}  # the tests see the package of this checkout
        ran = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        # 0: all passed, 1: some failed, 5: there was no test. Else pytest gave up or died.
        if ran.returncode in (0, 1, 5) and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    console.print(ran.stdout, markup=False)
    console.print(f"pytest broke off with exit code {ran.returncode}; no proof was checked.", style="red")
    return None


def _check(row: Method, report: dict[str, Any]) -> dict[str, _Proof]:
    """The proofs that a method needs, and others for which it has tests."""
    file = _test_file(row)
    tests = report["files"].get(file, {})
    needed = proofs.required_proofs(row.form)
    checked = {}
    for name in proofs.PROOFS:
        if name not in needed and name not in tests:
            continue
        marked = tests.get(name, [])
        parts = []
        if name == "claim" and "claim" in needed:
            parts.append(_check_recorded(row))
        if name == "card":
            parts.append(_check_card(row))
        if marked or name != "claim" or file in report["errors"]:
            parts.append(_check_tests(marked, file, report["errors"].get(file)))
        worst = max((outcome for outcome, _ in parts), key=list(_STYLES).index)
        checked[name] = _Proof(worst, marked, [note for _, notes in parts for note in notes])
    return checked


def _check_tests(tests: list[dict[str, Any]], file: str, import_error: str | None) -> tuple[str, list[str]]:
    if not (ROOT / file).is_file():
        return "missing", [f"there is no {file}"]
    if import_error is not None:
        return "failed", [f"{file} cannot be imported: {import_error}"]
    if not tests:
        return "missing", [f"{file} has no test of it"]
    outcomes = {test["outcome"] for test in tests}
    outcome = "failed" if "failed" in outcomes else "passed" if "passed" in outcomes else "missing"
    return outcome, [f"{test['name']}: {test['message']}" for test in tests if test["outcome"] != "passed"]


def _check_recorded(row: Method) -> tuple[str, list[str]]:
    """Whether the method's claims were measured with these sources. Whether they hold is shown, and no proof."""
    try:
        result = proofs.read_result(row.key)
    except ValueError as error:
        return "failed", [str(error)]
    if result is None or result["source_hash"] is None:
        return "missing", [f"nothing is measured: there is no benchmarks/{row.key}.py, or it has not been run"]
    notes = [f"measured {result['recorded']}"] + [proofs.describe_claim(entry) for entry in result["claims"]]
    stale = proofs.staleness(row, result, ["measured"])
    return "failed" if stale else "passed", [*notes, *(f"stale: {reason}" for reason in stale)]


def _check_card(row: Method) -> tuple[str, list[str]]:
    from . import cards

    try:
        cards.method_card(row.key)
    except Exception as error:  # whatever stops it, the method has no card, and the next method is still verified
        return "failed", [f"the card does not render: {type(error).__name__}: {error}"]
    return "passed", []


def _print_proof(console: Console, name: str, proof: _Proof) -> None:
    from rich.text import Text

    count, seconds = len(proof.tests), sum(test["seconds"] for test in proof.tests)
    failing = ", ".join(test["name"] for test in proof.tests if test["outcome"] == "failed")
    console.print(
        Text.assemble(
            f"  {name:<10}",
            (f"{proof.outcome:<8}", _STYLES[proof.outcome]),
            f"{count:>4} test{'s' if count != 1 else ' '} {seconds:>7.1f} s  {failing}".rstrip(),
        )
    )
    for note in proof.notes:
        console.print(f"    {note}", style="dim", markup=False)
