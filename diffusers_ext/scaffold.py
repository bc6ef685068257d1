"""`diffusers-ext new`: the files of a new method, by the template of its form. Needs a source checkout.

    python -m diffusers_ext.scaffold      # writes `diffusers_ext/__init__.py` again, from `registry.LAZY_NAMES`

A template is one text file, `templates/FORM.txt`. It begins with lines `name: value`:

- `entry`: public names that the catalogue lists. `names`: those that the file has, where they are others.
- `loadable`: those of them that `from_pretrained` of pipelines and of `AutoModel` look up.
- `package`: docstring of the folder, where that is new.
- `insert`: a file, the name of a dictionary in it, and an entry that the dictionary gets.
- `then`: what else is to be run.

A line `=== PATH` begins a file of the checkout; the first one is the method's own. `=== WORD` begins a text that other
parts hold as `$WORD`. `templates/_common.txt` has the parts that forms share; a part of a form takes the place of the common
one, and an empty part takes it out. `$key` is the method's key, `$Name` the same in CamelCase, `$paper` its title with the arXiv
number.
"""

from __future__ import annotations

import ast
import functools
import json
import keyword
import os
import re
import string
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registry import PACKAGE_DIR

ROOT = PACKAGE_DIR.parent
TEMPLATES = PACKAGE_DIR / "templates"
_COUNT = "python -m benchmarks.comparison (the table of areas counts one paper more)"
LINE_LENGTH = 120  # that of pyproject.toml
_REGISTRY, _INIT = "diffusers_ext/registry.py", "diffusers_ext/__init__.py"


@dataclass(frozen=True)
class Files:
    """What a new method makes of a checkout.

    Attributes:
        created: path -> text of each new file.
        edited: path -> new text of each file that is there.
        then: what else is to be run.
    """

    created: Mapping[Path, str]
    edited: Mapping[Path, str]
    then: tuple[str, ...]


def forms() -> list[str]:
    """Forms that have a template."""
    return sorted(file.stem for file in TEMPLATES.glob("[!_]*.txt"))


def plan(
    form: str,
    key: str,
    *,
    title: str | None = None,
    arxiv: str | None = None,
    area: str | None = None,
    root: Path = ROOT,
) -> Files:
    """Texts of the files of a new method. Nothing is written.

    Args:
        form: one of `forms()`.
        key: of an open row of the catalogue, or of a new one.
        title: of the paper, for a new row.
        arxiv: its number, for a new row; None where it has none.
        area: one of the catalogue's, for a new row.
        root: the checkout.

    Raises:
        ValueError: this is no source checkout, an argument is not allowed, or something of that name is there.
    """
    if not TEMPLATES.is_dir() or not (root / "tests" / "methods").is_dir():
        raise ValueError(
            "Adding a method needs a source checkout. A package of your own adds methods through the entry-point group "
            "`diffusers_ext.methods`."
        )
    if form not in forms():
        raise ValueError(f"`form` is {form!r}; allowed are {', '.join(forms())}.")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", key) or keyword.iskeyword(key):
        raise ValueError(
            f"`key` is {key!r}; allowed are words of lower-case letters and digits, joined by underscores."
        )
    file, row = _row(root, form, key, title, arxiv, area)
    paper = f"{row['title']} (arXiv {row['arxiv']})" if "arxiv" in row else row["title"]
    fields, parts = _filled(form, {"key": key, "Name": _camel_case(key), "paper": paper})
    created = {root / name: f"{text}\n" for name, text in parts.items() if "/" in name and text}
    own = next(iter(created))
    if "package" in fields and not own.parent.is_dir():
        created[own.parent / "__init__.py"] = f'"""{fields["package"]}"""\n'
    there = [str(path.relative_to(root)) for path in created if path.exists()]
    if there:
        raise ValueError(f"`key` is {key!r}, and there is {', '.join(there)} already, which is never written over.")
    edited = {file: _with_row(file.read_text(encoding="utf-8"), row, fields["entry"].split(), parts["call"])}
    edited |= _with_names(root, key, ".".join(own.relative_to(root).with_suffix("").parts), fields)
    if "insert" in fields:
        name, variable, line = fields["insert"].split(" ", 2)
        edited[root / name] = _insert((root / name).read_text(encoding="utf-8"), variable, line, in_order=False)
    then = [fields["then"]] if "then" in fields else []
    return Files(created, edited, (*then, _COUNT) if area is not None else tuple(then))


def write(files: Files) -> None:
    """Write everything, or, where something fails, nothing.

    Raises:
        OSError: a file could not be written, or one of the new ones is there meanwhile.
    """
    undo: list[Callable[[], Any]] = []
    try:
        for path, text in files.created.items():
            for folder in reversed([folder for folder in path.parents if not folder.exists()]):
                folder.mkdir()
                undo.append(folder.rmdir)
            with path.open("x", encoding="utf-8", newline="\n") as file:
                undo.append(path.unlink)
                file.write(text)
        for path, text in files.edited.items():
            undo.append(functools.partial(_replace, path, path.read_text(encoding="utf-8")))
            _replace(path, text)
    except BaseException:
        for act in reversed(undo):
            act()
        raise


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# --- the template ----------------------------------------------------------------------------------------------------


def _camel_case(key: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in key.split("_"))


def _filled(form: str, values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Fields and parts of a template, with values in place of names. Texts that others hold come first."""
    fields, own = _read(TEMPLATES / f"{form}.txt")
    _, common = _read(TEMPLATES / "_common.txt")
    parts = own | {name: text for name, text in common.items() if name not in own}

    def fill(text: str) -> str:
        return string.Template(text).substitute(values)

    texts = {name: fill(text) for name, text in parts.items() if "/" not in name}
    values = values | texts
    parts = {fill(name): fill(text) for name, text in parts.items()}
    return {name: fill(value) for name, value in fields.items()}, parts


def _read(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    head, *sections = re.split(r"^=== ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fields = dict(line.split(": ", 1) for line in head.splitlines() if line)
    parts = {name: text.strip("\n") for name, _, text in (section.partition("\n") for section in sections)}
    return fields, parts


# --- the catalogue ---------------------------------------------------------------------------------------------------


def _row(
    root: Path, form: str, key: str, title: str | None, arxiv: str | None, area: str | None
) -> tuple[Path, dict[str, Any]]:
    """The file of a method's row, and the row without `entry`: an open one, or a new one with a `summary` to be written."""
    folder = root / "diffusers_ext" / "catalogue"
    given = {"title": title, "arxiv": arxiv, "area": area}
    files = {file: tomllib.loads(file.read_text(encoding="utf-8"))["paper"] for file in sorted(folder.glob("*.toml"))}
    for file, rows in files.items():
        for row in rows:
            if row["key"] != key:
                continue
            if row["form"] != form:
                raise ValueError(f"`form` is {form!r}; the row {key!r} of {file.name} has form {row['form']!r}.")
            if "entry" in row:
                raise ValueError(
                    f"`key` is {key!r}, and its row in {file.name} has the entry {row['entry']!r} already."
                )
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"`{name}` is {value!r}; the row {key!r} is in {file.name} already, with all of it."
                    )
            return file, row
    areas = sorted(file.stem for file in files)
    if area not in areas:
        raise ValueError(f"`area` is {area!r}; a new method needs one of {', '.join(areas)}.")
    if title is None or not title.strip() or not title.isprintable() or "\\" in title or '"""' in title:
        raise ValueError(f"`title` is {title!r}; a new method needs that of its paper, one line without backslashes.")
    if arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise ValueError(f"`arxiv` is {arxiv!r}; it must be a number like 2312.00858.")
    row = {name: value for name, value in ({"key": key} | given | {"form": form}).items() if value is not None}
    row["summary"] = (
        "Not written yet: say in ten to eighty words what the method changes, what it costs and where it helps."
    )
    return folder / f"{area}.toml", row


def _with_row(text: str, row: Mapping[str, Any], entry: list[str], usage: str) -> str:
    """A catalogue file with `entry` and `usage` of a row; a row that it has not comes to its end."""
    lines = f'entry = {json.dumps(entry[0] if len(entry) == 1 else entry)}\nusage = """\n{usage}\n"""'
    blocks = re.split(r"^(?=\[\[paper\]\]$)", text, flags=re.MULTILINE)
    keys = [table["key"] for block in blocks for table in tomllib.loads(block).get("paper", [])]
    if row["key"] in keys:
        number = keys.index(row["key"]) + (
            len(blocks) - len(keys)
        )  # what stands before the first row is a block as well
        block = blocks[number].rstrip("\n")
        blocks[number] = f"{block}\n{lines}" + blocks[number][len(block) :]
        return "".join(blocks)
    strings = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in row.items())
    return f"{text.rstrip()}\n\n[[paper]]\n{strings}\n{lines}\n"


# --- public names ----------------------------------------------------------------------------------------------------


def _with_names(root: Path, key: str, module: str, fields: Mapping[str, str]) -> dict[Path, str]:
    """The registry and `__init__` with the public names of a module."""
    text = (root / _REGISTRY).read_text(encoding="utf-8")
    names = fields.get("names", fields["entry"]).split()
    taken = sorted(set(names) & _names(text).keys())
    if taken:
        raise ValueError(f"`key` is {key!r}, which gives the public name {taken[0]!r}, and that is taken.")
    for name in names:
        text = _insert(text, "LAZY_NAMES", f'"{name}": "{module}",', in_order=True)
    for name in fields.get("loadable", "").split():
        text = _insert(text, "PIPELINES_AND_MODELS", f'"{name}",', in_order=True)
    init = root / _INIT
    return {root / _REGISTRY: text, init: init_text(init.read_text(encoding="utf-8"), _names(text))}


def _names(registry: str) -> dict[str, str]:
    """`LAZY_NAMES` of the text of the registry."""
    return ast.literal_eval(_value_of(registry, "LAZY_NAMES"))


def _value_of(text: str, variable: str) -> ast.expr:
    """What a module assigns to a variable."""
    for node in ast.parse(text).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return node.value
    raise ValueError(f"There is no {variable} to add a name to.")


def _insert(text: str, variable: str, line: str, in_order: bool) -> str:
    """The text of a module with one more entry, `line`, in a dictionary or tuple that has one a line.

    Args:
        text: of the module.
        variable: what it is assigned to.
        line: begins with a string, by which entries are sorted.
        in_order: put it before the first that is greater, else at the end.
    """
    value, lines = _value_of(text, variable), text.splitlines(keepends=True)
    assert value.end_lineno is not None
    first, last = (
        value.lineno,
        value.end_lineno - 1,
    )  # from the line after the opening bracket to that of the closing one

    def string_of(line: str) -> str:
        return line.split('"')[1] if '"' in line else ""

    after = (i for i in range(first, last) if in_order and string_of(lines[i]) > string_of(line))
    lines.insert(next(after, last), f"    {line}\n")
    return "".join(lines)


def init_text(text: str, names: Mapping[str, str]) -> str:
    """The text of `diffusers_ext/__init__.py` with the imports of type checkers and the `__all__` of public names.

    Sorted and wrapped as `ruff` has them.

    Args:
        text: of the file as it is.
        names: public name -> module, as `registry.LAZY_NAMES`.
    """
    modules = defaultdict(list)
    for name, module in names.items():
        modules[module.removeprefix("diffusers_ext")].append(name)
    imports = "".join(
        _import(module, modules[module]) for module in sorted(modules, key=lambda module: _natural(module.lower()))
    )
    public = "".join(f'    "{name}",\n' for name in sorted(names, key=lambda name: (_kind(name), _natural(name))))
    for begin, end, new in (
        ("if TYPE_CHECKING:\n", "\n\ndef __getattr__", f"{imports}"),
        ("__all__ = [\n", "]\n\nregistry.register()", public),
    ):
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"{_INIT} has no {begin.strip()!r} that ends in {end.strip()!r}.")
        text = f"{head}{begin}{new}{end}{tail}"
    return text


def _import(module: str, names: list[str]) -> str:
    """One import, on one line where it fits."""
    names = sorted(names, key=lambda name: (_kind(name), _natural(name.lower()), name))
    line = f"    from {module} import {', '.join(names)}\n"
    if len(line) <= LINE_LENGTH + 1:
        return line
    return f"    from {module} import (\n" + "".join(f"        {name},\n" for name in names) + "    )\n"


def _kind(name: str) -> int:
    """Constants come first, then classes, then the rest."""
    return 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """For sorting by letters, and by the values of numbers."""
    parts = re.split(r"(\d+)", name)
    return [(not part.isdigit(), int(part), "") if part.isdigit() else (True, 0, part) for part in parts]


def write_init(root: Path = ROOT) -> bool:
    """Write `diffusers_ext/__init__.py` again from the registry's `LAZY_NAMES`; whether it was another."""
    init = root / _INIT
    before = init.read_text(encoding="utf-8")
    after = init_text(before, _names((root / _REGISTRY).read_text(encoding="utf-8")))
    if after != before:
        _replace(init, after)
    return after != before


if __name__ == "__main__":
    print(f"{_INIT}: {'written' if write_init() else 'as it was'}")
