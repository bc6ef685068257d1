"""Pages of the documentation that are rendered at each build: one a method, and the reference of public names.

MkDocs calls `on_config` and `on_files` (mkdocs.yml names this file under `hooks`). What is written by hand lies in `docs`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from diffusers_ext import cards, plots, registry  # noqa: E402
from diffusers_ext.cards import name_of, table  # noqa: E402

WRITTEN = {
    "index.md": "Start",
    "forms.md": "Forms",
    "training.md": "Training",
    "comparison.md": "Comparison",
    "caches.md": "Where caches work",
    "caches_measured.md": "Caches side by side",
    "samplers.md": "Where samplers work",
    "sampler_defaults.md": "Samplers with their defaults",
    "quantization.md": "Where quantization works",
    "composition.md": "What combines",
    "proofs.md": "Proofs",
    "add_a_paper.md": "Add a paper",
}
_TITLES = {"hub": "hub and recipes", "metrics": "metrics", "registry": "registry"}


def with_card() -> list[registry.Method]:
    """Rows that have a written card, by area and key."""
    rows = sorted(registry.methods(), key=lambda row: (row.area, row.key))
    return [row for row in rows if (cards.TEMPLATES / f"{row.key}.md").is_file()]


def public_names() -> dict[str, list[str]]:
    """Part of the package -> dotted names of what it offers, sorted."""
    found = defaultdict(list)
    for name, module in registry.LAZY_NAMES.items():
        part = module.split(".")[1]
        found[part].append(f"{module}.{name}")
    return {part: sorted(names, key=str.lower) for part, names in sorted(found.items())}


def method_page(row: registry.Method) -> str:
    """The method's card without the metadata that only the Hub reads."""
    return cards.method_card(row.key).split("---\n", 2)[2]


def methods_page() -> str:
    parts = [
        "# Methods",
        "Each page is the method's card, rendered from the catalogue and the recorded result. A status is computed: see "
        "[proofs](../proofs.md). Papers without a page are open; `diffusers-ext methods --all` lists them.",
    ]
    rows = with_card()
    for area in dict.fromkeys(row.area for row in rows):
        lines = [
            [f"[{name_of(row)}]({row.key}.md)", row.form, row.status, row.summary] for row in rows if row.area == area
        ]
        parts += [f"## {area.capitalize()}", table(["method", "form", "status", "what it does"], lines)]
    return "\n\n".join(parts) + "\n"


def reference_page(part: str, names: list[str]) -> str:
    return "\n\n".join([f"# {_title(part)}", *(f"::: {name}" for name in names)]) + "\n"


def _title(part: str) -> str:
    return f"diffusers_ext: {part.replace('_', ' ')}"


def pages() -> dict[str, str]:
    """Path under `docs` -> text of every rendered page."""
    found = {"methods/index.md": methods_page()}
    found |= {f"methods/{row.key}.md": method_page(row) for row in with_card()}
    found |= {f"reference/{part}.md": reference_page(part, names) for part, names in public_names().items()}
    return found


def pictures() -> dict[str, bytes]:
    """Path under `docs` -> content of the plots on the pages of methods."""
    return {f"methods/{name}": content for row in with_card() for name, content in plots.files(row.key).items()}


def navigation() -> list[dict[str, Any]]:
    areas: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in with_card():
        areas[row.area].append({name_of(row): f"methods/{row.key}.md"})
    methods: list[Any] = [{"All": "methods/index.md"}]
    methods += [{area.capitalize(): rows} for area, rows in areas.items()]
    reference = [{part: f"reference/{part}.md"} for part in public_names()]
    written: list[dict[str, Any]] = [{title: file} for file, title in WRITTEN.items()]
    return [*written, {"Methods": methods}, {"Reference": reference}]


def on_config(config: Any) -> Any:
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, content in {**pages(), **pictures()}.items():
        files.append(File.generated(config, path, content=content))
    return files
