"""What a method's status rests on: the five proofs, its recorded result, and a hash of the sources behind both.

Standard library only, so that listing methods stays light.

A result is one JSON file, `results/<key>.json`, with a digest of its own content. It holds what was measured
(`claims`, `tables`, and the `source_hash` of the sources they were measured with) and which proofs passed (`proofs`,
and the `proofs_hash` of the sources they passed with). Nobody types a status: `method_status` computes it from there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._sources import source_hash

if TYPE_CHECKING:
    from .registry import Method

PROOFS = ("exact", "reference", "claim", "loads", "card")
OUTCOMES = ("passed", "failed", "missing")
SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

# A list of numbers in indented JSON. Strings in JSON hold no line end, so there is no match in one.
_NUMBERS = re.compile(r"\[\n([-+.\w\s,]+)\]")
_HASHES = {"measured": "source_hash", "proved": "proofs_hash"}  # parts of a result, and the hash that each carries
_GOALS = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}


def required_proofs(form: str) -> tuple[str, ...]:
    """The proofs that a method of this form needs."""
    if form == "none":
        return ()
    if form in ("metric", "upstream"):
        return ("exact", "card")
    return PROOFS


def method_status(row: Method) -> str:
    """`works`, `open`, `stale`, `upstream` or `none`.

    - `none`: there is no system in the paper. `upstream`: diffusers has it.
    - `open`: it has no entry, no recorded result, or a proof that it needs has not passed.
    - `stale`: it was measured or proved with other sources or another version of the method than these.
    - `works`: every proof that it needs passed with these sources. A claim that was measured and does not hold leaves
      the status as it is: the proof is that it was measured and recorded, and cards and tables show that it fails.

    Raises:
        ValueError: the recorded result was edited, or `row.entry` is no public name.
    """
    if row.form in ("none", "upstream"):
        return row.form
    result = read_result(row.key) if row.entry else None
    if result is None:
        return "open"
    if row.module is None:
        raise ValueError(f"`entry` of method {row.key!r} is {row.entry!r}; allowed are public names or dotted names.")
    if staleness(row, result):
        return "stale"
    needed = required_proofs(row.form)
    measured = "claim" not in needed or result["source_hash"] is not None
    return "works" if measured and all(result["proofs"].get(name) == "passed" for name in needed) else "open"


def staleness(row: Method, result: Mapping[str, Any], parts: Sequence[str] = tuple(_HASHES)) -> list[str]:
    """Why a recorded result is not about this version and these sources of the method; empty where it is.

    Args:
        row: the method.
        result: as `read_result` gives it.
        parts: what of it to look at: what was `measured`, what was `proved`.

    Raises:
        ValueError: see `source_hash`.
    """
    reasons = []
    if result["method_version"] != row.version:
        reasons.append(f"version {result['method_version']} was measured, this is {row.version}")
    current = None if row.module is None else source_hash(row.module)
    return reasons + [f"other sources were {part}" for part in parts if result[_HASHES[part]] not in (None, current)]


# --- results ---------------------------------------------------------------------------------------------------------


def claim(
    name: str,
    statement: str,
    value: float,
    unit: str,
    interval: Sequence[float] | None = None,
    goal: tuple[str, float] | None = None,
    samples: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """One measured claim, as a result holds it.

    Whether it `holds` is computed: the value and both ends of its interval meet the goal. A value that meets it by luck
    of the draw is not enough. Without a goal, `holds` is None.

    Args:
        name: short name, unique in a result.
        statement: what the paper claims, in words.
        value: what was measured, in `unit`.
        unit: such as `"x"`, `"dB"` or `"MACs"`.
        interval: its two ends, in `unit`. None for a count, which is the same each time.
        goal: comparison and bound that `value` is to meet, such as `("<=", 0.6)`.
        samples: the numbers, one a picture or seed, that `value` and `interval` follow from.
        quick: whether `bench KEY --quick` measures it again.

    Returns:
        What the result holds. `samples` and `quick` are left out where they are not given.

    Raises:
        ValueError: a number is not finite, `interval` is not two ends in order, or the comparison is unknown.
    """
    low, high = (value, value) if interval is None else interval
    if not all(math.isfinite(number) for number in (value, low, high)) or low > high:
        raise ValueError(
            f"`value` and `interval` of claim {name!r} are {value!r} and {interval!r}; allowed are a finite number and "
            "two finite ends in order."
        )
    holds = None
    if goal is not None:
        if goal[0] not in _GOALS or not math.isfinite(goal[1]):
            raise ValueError(f"`goal` of claim {name!r} is {goal!r}; allowed are {', '.join(_GOALS)} and a number.")
        holds = all(_GOALS[goal[0]](float(number), float(goal[1])) for number in (value, low, high))
    more: dict[str, Any] = ({"quick": True} if quick else {}) | ({} if samples is None else {"samples": samples})
    return {
        "name": name,
        "statement": statement,
        "value": float(value),
        "interval": [float(low), float(high)],
        "unit": unit,
        "goal": None if goal is None else {"op": goal[0], "value": float(goal[1])},
        "holds": holds,
        **more,
    }


def describe_claim(entry: Mapping[str, Any]) -> str:
    """A claim of a result in one line: its value, interval, goal, and whether it holds."""
    low, high = entry["interval"]
    interval = f" [{low:.4g}, {high:.4g}]" if low < high else ""
    text = f"{entry['name']}: {entry['value']:.4g}{interval} {entry['unit']}".rstrip()
    goal = entry["goal"]
    if goal is None:
        return f"{text}, no goal"
    return f"{text}, goal {goal['op']} {goal['value']:.4g}: {'holds' if entry['holds'] else 'does not hold'}"


def write_result(
    key: str,
    *,
    method_version: int,
    source_hash: str,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    settings: Mapping[str, Any],
    seeds: Mapping[str, Any],
    claims: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Record what was measured for a method. Replaces the result that was there, with its proofs: verify again.

    Args:
        key: the method.
        method_version: version of the method that was measured.
        source_hash: `source_hash` of its module when it was measured.
        machine: what it ran on.
        versions: of Python and packages.
        settings: all that the numbers depend on besides the seeds.
        seeds: name -> seed or seeds.
        claims: made with `claim`.
        tables: name -> `{"columns": [...], "rows": [[...], ...]}` of plain values.

    Returns:
        The file written.

    Raises:
        ValueError: there is no claim, two have one name, a table is not rectangular, or a value is not plain JSON.
    """
    names = [entry["name"] for entry in claims]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`claims` of {key!r} are named {names}; allowed are one or more, each name once.")
    for name, table in tables.items():
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise ValueError(f"Table {name!r} of `tables` has rows that do not fit its columns {table['columns']}.")
    return _save(
        _empty_result(key, method_version)
        | {
            "recorded": datetime.date.today().isoformat(),
            "source_hash": source_hash,
            "machine": machine,
            "versions": versions,
            "settings": settings,
            "seeds": seeds,
            "claims": claims,
            "tables": tables,
        }
    )


def record_proofs(row: Method, outcomes: Mapping[str, str]) -> Path:
    """Record which proofs of a method passed with the present sources. What was measured is left as it is.

    Args:
        row: the method.
        outcomes: proof -> `passed`, `failed` or `missing`.

    Returns:
        The file written.

    Raises:
        ValueError: a proof or an outcome is unknown, or the recorded result was edited.
    """
    for name, outcome in outcomes.items():
        if name not in PROOFS or outcome not in OUTCOMES:
            raise ValueError(
                f"`outcomes` has {name!r}: {outcome!r}; allowed are {', '.join(PROOFS)} and {', '.join(OUTCOMES)}."
            )
    result = read_result(row.key)
    if result is None or result["source_hash"] is None:  # nothing measured that another version would belong to
        result = _empty_result(row.key, row.version)
    hashed = None if row.module is None else source_hash(row.module)
    return _save(result | {"proofs": dict(outcomes), "proofs_hash": hashed})


def read_result(key: str) -> dict[str, Any] | None:
    """The recorded result of a method, or None where there is none.

    Raises:
        ValueError: the file is not as it was written.
    """
    path = result_path(key)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Results are written by benchmarks, not edited.") from error
    if not isinstance(result, dict) or result.get("digest") != _digest(result):
        raise ValueError(f"{path} was edited: its digest does not fit its content. Measure again to change it.")
    found = result.get("schema"), result.get("key")
    if found != (SCHEMA, key):
        raise ValueError(f"{path} holds schema and key {found!r}; allowed are {(SCHEMA, key)!r}.")
    return result


def result_path(key: str) -> Path:
    """The file that holds a method's result, whether or not it is there.

    Raises:
        ValueError: `key` is not lower-case letters, digits and underscores.
    """
    if not re.fullmatch(r"[a-z0-9_]+", key):
        raise ValueError(f"`key` is {key!r}; allowed are lower-case letters, digits and underscores.")
    return RESULTS / f"{key}.json"


def as_json(what: str, value: Any) -> Any:
    """`value` as it will be read back from JSON: tuples are lists then, and all keys strings.

    Raises:
        ValueError: it holds what JSON cannot, such as an array or an infinity; the message starts with `what`.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} holds what JSON cannot: {error}") from error


def _empty_result(key: str, method_version: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "key": key,
        "method_version": method_version,
        "recorded": None,
        "source_hash": None,
        "machine": {},
        "versions": {},
        "settings": {},
        "seeds": {},
        "claims": [],
        "tables": {},
        "proofs": {},
        "proofs_hash": None,
    }


def _save(result: Mapping[str, Any]) -> Path:
    path = result_path(result["key"])
    plain = as_json(f"The result of {result['key']!r}", result)
    plain["digest"] = _digest(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(plain, indent=1, ensure_ascii=False)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def _digest(result: Mapping[str, Any]) -> str:
    content = {name: value for name, value in result.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
