"""Which sources a method rests on, and a hash of them that comments, layout and the version of Python leave as it is.

Standard library only, and nothing of this package, so that any Python can compute it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = "diffusers_ext"
# No part of any one method: the table of all methods, and what records results and writes cards about them. A row added or a
# card worded differently must not make results stale. They have tests of their own.
_ABOUT_METHODS = tuple(f"{_PACKAGE}.{name}" for name in ("registry", "proofs", "_sources", "cards", "training._card"))
_RUN_BY = "RUN_BY"  # in a module: dotted names of modules that call it


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
    without being imported by it counts where the module names it: `RUN_BY = ("diffusers_ext.what",)`. A name imported
    from a package counts as the module that defines it: the package's `__init__` is searched for where it takes the
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
