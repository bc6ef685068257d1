"""What a method's status rests on: the five proofs, its recorded result, and a hash of the sources behind both.

Standard library only, so that listing methods stays light.

A result is one JSON file, `results/<key>.json`, with a digest of its own content. It holds what was measured
(`claims`, `tables`, and the `source_hash` of the sources they were measured with) and which proofs passed (`proofs`,
and the `proofs_hash` of the sources they passed with). Nobody types a status: `method_status` computes it from there.
"""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registry import Method

PROOFS = ("exact", "reference", "claim", "loads", "card")
OUTCOMES = ("passed", "failed", "missing")
SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGE = "diffusers_ext"
# No part of any one method: the table of all methods, and what records results and writes cards about them. A row added or a
# card worded differently must not make results stale. They have tests of their own.
_ABOUT_METHODS = tuple(f"{_PACKAGE}.{name}" for name in ("registry", "proofs", "cards", "training._card"))
_RUN_BY = "RUN_BY"  # in a module: dotted names of modules that call it
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


# --- sources ---------------------------------------------------------------------------------------------------------


def source_hash(module: str) -> str:
    """Hash of the code that `module` runs: its own and that of all modules of ours that it imports, transitively.

    Comments, docstrings, other bare strings and layout do not count, nor does the version of Python that parses them.

    Args:
        module: dotted name of the module that defines a method. It is not imported.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: see `module_sources`.
    """
    lines = [f"{name} {_read(name, path).digest}" for name, path in module_sources(module).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def module_sources(module: str) -> dict[str, Path]:
    """Source files of `module` and of all modules that it imports from its own package and from `diffusers_ext`.

    Imports inside functions count; those for type checkers only and those by computed names do not. What calls a module
    without being imported by it counts where the module names it: `RUN_BY = ("diffusers_ext.what",)`. A name imported from a package counts as the module that defines it: the package's `__init__` is searched for where it takes the
    name from (also under `TYPE_CHECKING`, where lazy packages say so), and itself counts only if it defines the name,
    or if the package is imported as a whole. The `__init__` files that Python runs on the way to a submodule do not
    count, and neither do the registry, a table of all methods, and what records results and writes cards.

    Args:
        module: dotted name. It is not imported.

    Returns:
        Dotted name -> file, sorted by name.

    Raises:
        ValueError: there is no source of `module`, or of a module or name of ours that it imports.
    """
    return dict(sorted(_Walk(module).found.items()))


@dataclass(frozen=True)
class _Source:
    """What one module contributes.

    Attributes:
        digest: hash of its syntax tree.
        uses: imports that run: (dotted module, name imported from it or None for the module itself).
        typing_uses: imports for type checkers only.
        origins: for names that module-level imports bind, where from.
        names: other names that it binds at module level.
    """

    digest: str
    uses: tuple[tuple[str, str | None], ...]
    typing_uses: tuple[tuple[str, str | None], ...]
    origins: Mapping[str, tuple[str, str | None]]
    names: frozenset[str]


class _Walk:
    """Follows imports from one module and collects the files of the modules met."""

    def __init__(self, module: str):
        self.roots = {module.partition(".")[0], _PACKAGE}
        self.found: dict[str, Path] = {}
        self._resolved: set[tuple[str, str]] = set()
        self._add(module, module)

    def _add(self, module: str, user: str) -> None:
        if module in self.found or module in _ABOUT_METHODS:
            return
        path = _find(module)
        if path is None:
            if _is_package(module):  # a folder without `__init__.py` has no code
                return
            raise ValueError(f"There is no source file of module {module!r}, needed to hash the sources of {user!r}.")
        self.found[module] = path
        source = _read(module, path)
        # A package as a whole is used through attributes, which may be lazy: what it says to type checkers, it has.
        for base, name in source.uses + (source.typing_uses if path.name == "__init__.py" else ()):
            self._use(base, name, module)

    def _use(self, base: str, name: str | None, user: str) -> None:
        if base.partition(".")[0] not in self.roots:
            return
        if name is None or name == "*" or not _is_package(base):
            self._add(base, user)
        elif (base, name) not in self._resolved:
            self._resolved.add((base, name))
            self._resolve(base, name, user)

    def _resolve(self, package: str, name: str, user: str) -> None:
        submodule = f"{package}.{name}"
        known = _find(submodule) is not None or _is_package(submodule)
        if known:
            self._add(submodule, user)
        path = _find(package)
        if path is not None:
            source = _read(package, path)
            if name in source.origins:
                known = True
                self._use(*source.origins[name], user=package)
            elif name in source.names:
                known = True
                self._add(package, user)
        if not known:
            raise ValueError(f"{user!r} imports {name!r} from package {package!r}, which does not define it.")


def _locations(module: str) -> Iterator[Path]:
    """Where a module's source would lie, without a suffix. Only the top-level package is looked up by Python."""
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        if spec.origin is not None and not rest:
            yield Path(spec.origin).with_suffix("")
        return
    for folder in spec.submodule_search_locations:
        yield Path(folder, *rest.split(".")) if rest else Path(folder)


def _find(module: str) -> Path | None:
    for location in _locations(module):
        for path in (location / "__init__.py", location.parent / f"{location.name}.py"):
            if path.is_file():
                return path
    return None


def _is_package(module: str) -> bool:
    return any(location.is_dir() for location in _locations(module))


def _read(module: str, path: Path) -> _Source:
    stat = path.stat()
    return _parse(module, path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _parse(module: str, path: Path, mtime_ns: int, size: int) -> _Source:
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    uses: list[tuple[str, str | None]] = []
    typing_uses: list[tuple[str, str | None]] = []
    for statement, typing_only in _walk_imports(tree):
        (typing_uses if typing_only else uses).extend(origin for _, origin in _bindings(statement, package))
    origins: dict[str, tuple[str, str | None]] = {}
    names: set[str] = set()
    for node in _module_level(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origins.update(_bindings(node, package))
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == _RUN_BY:
            uses += [(name, None) for name in ast.literal_eval(node.value)]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    digest = hashlib.sha256(canonical_dump(tree).encode()).hexdigest()
    return _Source(digest, tuple(uses), tuple(typing_uses), origins, frozenset(names))


def _walk_imports(node: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """All import statements, and whether only type checkers see them."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, typing_only
        return
    for_typing = node.body if isinstance(node, ast.If) and _is_type_checking(node.test) else []
    for child in ast.iter_child_nodes(node):
        yield from _walk_imports(child, typing_only or child in for_typing)


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _bindings(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Names that an import statement binds, each with (module, name in it or None)."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], (alias.name, None)
        return
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    for alias in node.names:
        yield alias.asname or alias.name, (base, alias.name)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when a module is imported, without the insides of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _module_level(child)


def canonical_dump(tree: ast.AST) -> str:
    """Text of a syntax tree that is the same for the same code under every supported version of Python.

    As `ast.dump`, without positions, comments, type comments, and statements that are only a string (docstrings).
    `ast.dump` itself differs: fields come and go (`type_params`), empty ones are left out by some versions, and
    f-strings are cut at other places.
    """
    parts: list[str] = []
    _dump(tree, parts)
    return "".join(parts)


def _dump(value: Any, parts: list[str]) -> None:
    if isinstance(value, ast.Constant):
        parts.append(f"Constant({value.value!a})")  # not `repr`: what it escapes depends on the version
    elif isinstance(value, ast.AST):
        parts.append(f"{type(value).__name__}(")
        for name, field in sorted(ast.iter_fields(value)):
            if isinstance(field, list):
                field = _join_strings(field) if isinstance(value, ast.JoinedStr) else field
                field = [item for item in field if not _is_bare_string(item)]
            # `ctx` follows from the place; the other two are about how the code is written.
            if name in ("ctx", "type_comment", "type_ignores") or field is None or field == []:
                continue
            parts.append(f"{name}=")
            _dump(field, parts)
            parts.append(",")
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            _dump(item, parts)
            parts.append(",")
        parts.append("]")
    else:
        parts.append(ascii(value))


def _is_bare_string(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _join_strings(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string with neighbouring literals joined and empty ones dropped."""
    joined: list[ast.expr] = []
    for value in values:
        if isinstance(value, ast.Constant):
            if joined and isinstance(joined[-1], ast.Constant):
                value = ast.Constant(joined.pop().value + value.value)  # type: ignore[attr-defined]
            elif not value.value:
                continue
        joined.append(value)
    return joined


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
