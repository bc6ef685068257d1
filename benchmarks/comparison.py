"""All methods side by side, from the recorded results: one page, its drawings, and the table of areas in the README.

    python -m benchmarks.comparison            # writes docs/comparison.md, docs/comparison-*.png, and a part of README.md
    python -m benchmarks.comparison --check    # exit code 1 where one of the texts is not what it would write

Nothing is measured here. A method whose code has changed since its record is marked stale, as everywhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ext import plots, proofs, registry
from diffusers_ext.cards import name_of, table
from diffusers_ext.plots import Records
from diffusers_ext.registry import Method

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = Path("docs") / "comparison.md", Path("README.md")
STATUSES = {"works": "work", "stale": "stale", "upstream": "in diffusers", "open": "open", "none": "no system"}
BEGIN, END = "<!-- areas: written by python -m benchmarks.comparison -->", "<!-- end of areas -->"


def records() -> list[tuple[Method, dict[str, Any]]]:
    """Rows and results of all methods that were measured, by area and key.

    Raises:
        ValueError: a recorded result was edited.
    """
    rows = sorted(registry.methods(), key=lambda row: (row.area, row.key))
    found = [(row, proofs.read_result(row.key)) for row in rows]
    return [(row, result) for row, result in found if result is not None and result["claims"]]


# --- texts -----------------------------------------------------------------------------------------------------------


def area_table() -> str:
    """Papers of each area, counted by status."""
    lines: list[list[Any]] = []
    for area in registry.areas():
        found = [row.status for row in registry.methods(area)]
        lines.append([area, len(found), *(found.count(status) or "" for status in STATUSES)])
    total = [sum(line[i] or 0 for line in lines) for i in range(1, len(STATUSES) + 2)]
    return table(["area", "papers", *STATUSES.values()], [*lines, ["all", *total]])


def page(found: Records) -> str:
    """The page, as markdown."""
    parts = [
        "# Method comparison",
        "Written by `python -m benchmarks.comparison` from what `diffusers-ext bench` recorded; nothing here is typed. Goals "
        "and settings were fixed before measuring. Intervals are of 95 %, by a bootstrap over pictures, starts or training "
        "runs, paired where two runs share them. A claim that does not hold here is shown like any other. What was measured "
        "on small models need not hold for yours: run the benchmark.",
        area_table(),
    ]
    for area in dict.fromkeys(row.area for row, _ in found):
        here = [(row, result) for row, result in found if row.area == area]
        parts += [f"## {area.capitalize()}", _summary(here)]
        parts += [f"![{title}]({file_name(name)})" for name, title, _ in drawings(here)]
        for row, result in here:
            parts += [f"### {name_of(row)}", _origin(row, result), _claims(result)]
    return "\n\n".join(parts) + "\n"


def _summary(found: Records) -> str:
    lines = []
    for row, result in found:
        goals = [claim for claim in result["claims"] if claim["goal"]]
        held = sum(claim["holds"] for claim in goals)
        lines.append([
            f"[{name_of(row)}](#{_anchor(name_of(row))})", f"`{row.key}`", row.form, row.status, f"{held} of {len(goals)}",
            len(result["claims"]) - len(goals) or "",
        ])  # fmt: skip
    return table(["method", "key", "form", "status", "claims that hold", "measured without a goal"], lines)


def _anchor(heading: str) -> str:
    """As Python-Markdown makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _origin(row: Method, result: Mapping[str, Any]) -> str:
    machine, paper = result["machine"], f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
    where = ", ".join(
        f"{machine[part]} {unit}".strip()
        for part, unit in (("cpu", ""), ("gpu", ""), ("threads", "threads"), ("system", ""))
        if machine.get(part)
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    seeds = "; ".join(f"{name}: {_run(numbers)}" for name, numbers in result["seeds"].items())
    text = f"{paper}. Recorded {result['recorded']} on {where}; {versions}."
    text += f" Seeds: {seeds}." if seeds else ""
    reasons = proofs.staleness(row, result)
    return f"{text}\n\n**Stale**: {', '.join(reasons)}." if reasons else text


def _run(numbers: Any) -> str:
    """Seeds, the run of them where they follow one another."""
    if isinstance(numbers, list) and len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) if isinstance(numbers, list) else str(numbers)


def _claims(result: Mapping[str, Any]) -> str:
    lines = []
    for claim in result["claims"]:
        low, high = claim["interval"]
        goal = claim["goal"]
        lines.append([
            claim["statement"], f"{claim['value']:.4g} {claim['unit']}".strip(),
            f"{low:.4g} to {high:.4g}" if low < high else "",
            f"{goal['op']} {goal['value']:.4g}" if goal else "", claim["holds"] if goal else "",
        ])  # fmt: skip
    return table(["claim", "measured", "interval", "goal", "holds here"], lines)


def with_areas(readme: str) -> str:
    """The README with its table of areas written anew.

    Raises:
        ValueError: the marks about the table are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"`readme` has no table of areas; allowed is a text with {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{area_table()}\n\n{END}{after}"


# --- drawings --------------------------------------------------------------------------------------------------------


def file_name(name: str) -> str:
    return f"comparison-{name}.png"


def drawings(found: Records) -> Iterator[tuple[str, str, plots.Panels]]:
    """Name, title, and lines by panel, of the drawings of one area."""
    area = found[0][0].area
    for kind, title, panels in plots.drawings(found):
        yield f"{area}-{kind}", f"{area.capitalize()}: {title}", panels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit code 1 where a text would change.")
    args = parser.parse_args(argv)
    found = records()
    readme = (ROOT / README).read_text(encoding="utf-8")
    texts = {PAGE: page(found), README: with_areas(readme)}
    changed = [file for file, text in texts.items() if not _holds(ROOT / file, text)]
    if args.check:
        for file in changed:
            print(f"{file} is not what the records say; run python -m benchmarks.comparison", file=sys.stderr)
        return bool(changed)
    for file in changed:
        (ROOT / file).write_text(texts[file], encoding="utf-8")
    written = [str(file) for file in changed]
    for area in dict.fromkeys(row.area for row, _ in found):
        for name, title, panels in drawings([(row, result) for row, result in found if row.area == area]):
            target = PAGE.with_name(file_name(name))
            plots.draw(name, title, panels).savefig(ROOT / target)
            written.append(str(target))
    print("\n".join(written))
    return 0


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
