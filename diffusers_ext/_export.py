"""One self-contained Python file from a class of this package, for repositories that load without it.

diffusers runs such a file under `trust_remote_code=True`. It imports nothing of ours: the shared cores (`_*.py`) that
the class's module imports are written into it. All files of that kind share one namespace in a process, and diffusers
finds imports by scanning the text, so that the name carries a hash of the content, and no docstring may look like an
import.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import symtable
import sys
from dataclasses import dataclass, field
from pathlib import Path

ALLOWED_PACKAGES = ("diffusers", "numpy", "torch", "transformers")
HASH_LENGTH = 10
# Where `model_index.json` keeps the names of exported classes: {"scheduler": "ClassName", "_class_name": "ClassName"}
CLASSES_KEY = "_dx_classes"

# What diffusers takes for an import, wherever it stands in the text.
_SCANNED = (
    re.compile(r"^\s*import\s+(\S+)\s*$", re.MULTILINE),
    re.compile(r"^\s*from\s+(\S+)\s+import", re.MULTILINE),
)


@dataclass(frozen=True)
class ExportedFile:
    """A self-contained file: `stem` is its name without `.py`, and `class_name` the class that it is for."""

    stem: str
    class_name: str
    source: str


@dataclass
class _Module:
    """A source file: the statements that stay, those that go, and the docstring."""

    name: str
    text: str
    kept: list[ast.stmt] = field(default_factory=list)
    dropped: list[ast.stmt] = field(default_factory=list)
    docstring: ast.stmt | None = None
    futures: set[str] = field(default_factory=set)


def export_class(cls: type) -> ExportedFile:
    """Write `cls` as one self-contained file.

    The result is a function of the sources only: the same sources give the same name and content.

    Args:
        cls: a class defined at the top level of a module.

    Raises:
        ValueError: the module cannot stand alone: it imports something other than the standard library, torch, numpy,
            transformers, diffusers and cores (`_*.py`); two of the files give one name two meanings; a core is imported
            in a way that has no equivalent in one file; or a text looks like an import.
    """
    if "." in cls.__qualname__:
        raise ValueError(f"`cls` is {cls.__qualname__}; only a class at the top level of a module can be exported.")
    modules: dict[str, _Module] = {}
    _collect(cls.__module__, modules, ())
    *cores, main = modules.values()
    if not any(isinstance(node, ast.ClassDef) and node.name == cls.__name__ for node in main.kept):
        raise ValueError(f"`cls` is {cls.__name__}, and {main.name} does not define it at its top level.")
    _refuse_two_meanings([*cores, main])
    source = _join(cores, main)
    _check_result(source, [*cores, main])
    digest = hashlib.sha256(source.encode()).hexdigest()[:HASH_LENGTH]
    return ExportedFile(f"{main.name.rpartition('.')[2]}_{digest}", cls.__name__, source)


def _collect(name: str, modules: dict[str, _Module], importers: tuple[str, ...]) -> None:
    """Read module `name` into `modules`, after the cores that it imports."""
    if name in modules:
        return
    if name in importers:
        raise ValueError(f"{name} and {importers[-1]} import each other, so that neither can come first in one file.")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"{name} has no Python source file, so it cannot be exported.")
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    module = _Module(name, Path(spec.origin).read_text(encoding="utf-8"))
    for index, node in enumerate(ast.parse(module.text, filename=spec.origin).body):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            module.futures |= {alias.name for alias in node.names}
            module.dropped.append(node)
        elif isinstance(node, ast.ImportFrom) and node.level:
            _collect(_core_name(node, name, package), modules, (*importers, name))
            module.dropped.append(node)
        elif index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            module.docstring = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            module.dropped.append(node)  # says nothing in a file that is loaded for one class
        else:
            _check_statement(node, name)
            module.kept.append(node)
    modules[name] = module


def _core_name(node: ast.ImportFrom, name: str, package: str) -> str:
    """Dotted name of the core that a relative import means."""
    statement = ast.unparse(node)
    if node.module is None or any(alias.name == "*" for alias in node.names):
        raise ValueError(f"{name}: `{statement}` has no equivalent in one file; write `from ._core import name, ...`.")
    if not node.module.rpartition(".")[2].startswith("_"):
        raise ValueError(
            f"{name}: `{statement}` imports a module that is not a core (`_*.py`); move what is shared to a core."
        )
    for alias in node.names:
        if alias.asname is not None:
            raise ValueError(
                f"{name}: `{statement}` renames {alias.name!r}; in one file a core's names stay as they are."
            )
    return importlib.util.resolve_name("." * node.level + node.module, package)


def _check_statement(statement: ast.stmt, name: str) -> None:
    """Refuse imports that a self-contained file cannot have, wherever they stand, and uses of the file's own place."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(
                    f"{name}: `{ast.unparse(node)}` must stand at the top level of the file to be exported."
                )
            imported = [node.module or ""]
        elif isinstance(node, ast.Name) and node.id in ("__file__", "__path__", "__package__"):
            raise ValueError(f"{name} uses `{node.id}`, and a self-contained file has no place beside other files.")
        else:
            continue
        for module in imported:
            top = module.partition(".")[0]
            if top not in ALLOWED_PACKAGES and top not in sys.stdlib_module_names:
                raise ValueError(
                    f"{name}: `{ast.unparse(node)}` imports {top!r}; a self-contained file may import the standard "
                    f"library, {', '.join(ALLOWED_PACKAGES)} and cores (`_*.py`)."
                )


def _meanings(module: _Module) -> dict[str, str]:
    """What each top-level name of a file is bound to: certain imports, or something of this file."""
    imports: dict[str, set[str]] = {}
    body = ast.Module(module.kept, type_ignores=[])
    for node in ast.walk(body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                top = alias.name if alias.asname or origin else alias.name.partition(".")[0]
                imports.setdefault(alias.asname or top, set()).add(f"{origin}:{top}")
    meanings = {}
    for symbol in symtable.symtable(ast.unparse(body), module.name, "exec").get_symbols():
        if symbol.is_assigned():
            meanings[symbol.get_name()] = module.name
        elif symbol.is_imported():
            meanings[symbol.get_name()] = " ".join(sorted(imports[symbol.get_name()]))
    return meanings


def _refuse_two_meanings(modules: list[_Module]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for module in modules:
        for name, meaning in _meanings(module).items():
            other_meaning, other = seen.setdefault(name, (meaning, module.name))
            if other_meaning != meaning:
                raise ValueError(
                    f"{name!r} is defined in {other} and in {module.name}; in one file they would be one. Rename one "
                    "of them."
                )


def _body(module: _Module, start: int = 0) -> str:
    """The lines of a module after line `start`, without its docstring and without what does not stay."""
    nodes = [*module.dropped, *([module.docstring] if module.docstring is not None else [])]
    gone = {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(module.text.splitlines(), start=1)
    return "\n".join(line for number, line in lines if number > start and number not in gone).strip("\n")


def _join(cores: list[_Module], main: _Module) -> str:
    parts, head = [], 0
    if main.docstring is not None:  # stays first, and so does a licence above it
        head = main.docstring.end_lineno or main.docstring.lineno
        parts.append("\n".join(main.text.splitlines()[:head]))
    parts.append(
        f"# Self-contained copy of {main.name}, made by diffusers_ext so that it loads without that package.\n"
        "# Improve it there, not here."
    )
    futures = sorted(set().union(*(module.futures for module in [*cores, main])))
    if futures:
        parts.append(f"from __future__ import {', '.join(futures)}")
    for core in cores:
        parts.append(f"# --- {core.name} ---\n\n{_body(core)}")
    parts.append(f"# --- {main.name} ---\n\n{_body(main, head)}")
    return "\n\n".join(parts) + "\n"


def _check_result(source: str, modules: list[_Module]) -> None:
    """The statements of the result are those of the sources, in order, and diffusers reads no import that is none."""
    tree = ast.parse(source)
    compile(source, "<exported>", "exec")
    kept = [node for module in modules for node in module.kept]
    made = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    if modules[-1].docstring is not None:
        made = made[1:]
    if [ast.dump(node) for node in made] != [ast.dump(node) for node in kept]:
        raise ValueError(
            f"{modules[-1].name} or a core of it has an import and another statement in one line; part them."
        )
    imports = {node.lineno for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    for pattern in _SCANNED:
        for match in pattern.finditer(source):
            found = match.group().lstrip()
            line = source.count("\n", 0, match.end() - len(found)) + 1
            if line not in imports:
                raise ValueError(
                    f"{modules[-1].name} or a core of it has a text in which diffusers sees an import: "
                    f"{found.strip()!r}. Word it differently."
                )
