"""The documentation: its code runs, it builds without a network, its links lead somewhere, and its tables are the records'."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks import comparison, docs_pages
from diffusers_ext import cards, plots, registry

from .fresh import ROOT, run_fresh

DOCS = ROOT / "docs"
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for page in docs_pages.WRITTEN
}


def test_code_runs(tmp_path):
    """In one process, since a fresh one costs more than the code."""
    blocks = [block for page in BLOCKS.values() for block in page]
    assert blocks
    run_fresh("\n".join(["import os", f"os.chdir({str(tmp_path)!r})", *blocks]))
    assert (tmp_path / "avatar.png").is_file() and (tmp_path / "my-avatars" / "README.md").is_file()


def test_it_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {str(file.relative_to(tmp_path / "site")) for file in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "methods/deepcache.html", "reference/hooks.html"} <= pages
    text = "".join((tmp_path / "site" / page).read_text(encoding="utf-8") for page in ("index.html", "forms.html"))
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!www\.sitemaps)[^"]*\.(?:js|css)"', text)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(docs_pages.pages().values())
    missing = [name for name, module in registry.LAZY_NAMES.items() if f"::: {module}.{name}\n" not in text]
    assert not missing


def test_pages_that_are_written_are_all_in_the_navigation():
    assert {file.name for file in DOCS.glob("*.md")} == set(docs_pages.WRITTEN)


def test_tables_are_what_the_records_say(capsys):
    assert comparison.main(["--check"]) == 0, capsys.readouterr().err


def test_a_claim_that_does_not_hold_is_shown(recorded):
    text = comparison.page(recorded)
    assert "| loses | 1 dB | -1 to 2 | >= 3 | no |" in text
    assert "| 1 of 2 | 1 |" in text
    assert "**Stale**" in text


def test_lines_of_ours_and_of_peers_are_told_apart(recorded, tmp_path):
    ((name, title, panels),) = comparison.drawings(recorded)
    assert name == "samplers-calls"
    assert panels == {"ground": {"EVODiff: Ours": ("evodiff", (5, 8), (0.5, 0.2)), "DDIM": (None, (5,), (0.4,))}}
    plots.draw(name, title, panels).savefig(tmp_path / "figure.png")


def test_fewer_steps_are_plain_runs_and_studies_of_one_model_are_lines_of_their_own(tmp_path):
    row = registry.get_method("delta_dit")
    name = cards.name_of(row)
    columns = ["run", "GMACs a picture", "PSNR to the full run (dB)"]
    paper = [
        ["20 steps", 6.0, "inf"],
        [f"{name}, paper", 4.0, 30.0],
        ["13 steps", 4.0, 33.0],
        ["others, 20 steps", 4.0, 20.0],
    ]
    continued = [["20 steps", 6.0, "inf"], [f"{name}, all blocks", 3.0, 40.0], ["10 steps", 3.0, 31.0]]
    record = {
        "settings": {study: {"model": "a-model", "steps": 20} for study in ("flow", "flow_continued")},
        "tables": {
            "flow: quality": {"columns": columns, "rows": paper},
            "flow: at equal cost": {"columns": ["run"], "rows": [[f"{name}, paper"]]},
            "flow_continued: at equal cost": {"columns": ["run"], "rows": [[f"{name}, all blocks"]]},
            "flow_continued: quality": {"columns": columns, "rows": continued},
        },
    }
    ((kind, title, panels),) = plots.drawings([(row, record)])
    assert kind == "macs" and panels == {
        "a-model, 20 steps": {
            name: ("delta_dit", (4.0,), (30.0,)),
            "fewer steps": (None, (3.0, 4.0), (31.0, 33.0)),
            f"{name}, flow continued": ("delta_dit", (3.0,), (40.0,)),
        }
    }
    figure = plots.draw(kind, title, panels)
    figure.savefig(tmp_path / "figure.png")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["3", "4"], "an axis of costs has numbers"


def test_the_readme_keeps_what_is_around_its_table():
    text = comparison.with_areas(f"before {comparison.BEGIN} old {comparison.END} after")
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    with pytest.raises(ValueError, match="readme"):
        comparison.with_areas("no marks")


@pytest.fixture
def recorded():
    """One method whose result has a claim that holds, one that does not, one without a goal, and errors by calls."""
    goals = [("wins", 4.0, {"op": ">=", "value": 3.0}, True), ("loses", 1.0, {"op": ">=", "value": 3.0}, False)]
    claims = [
        {"name": name, "statement": name, "value": value, "interval": [-1.0, 2.0], "unit": "dB", "goal": goal, "holds": held}
        for name, value, goal, held in [*goals, ("is seen", 1.0, None, None)]
    ]  # fmt: skip
    result = {
        "key": "evodiff", "method_version": 0, "recorded": "2026-01-01", "source_hash": "0", "proofs_hash": "0",
        "machine": {"cpu": "one", "threads": 1}, "versions": {"torch": "2"}, "seeds": {"pictures": [0, 1, 2]}, "settings": {},
        "claims": claims, "proofs": {},
        "tables": {
            "ground: error by calls": {
                "columns": ["sampler", "calls made", "error", "5 calls", "8 calls", "order"],
                "rows": [["Ours", "as asked", "mean", 0.5, 0.2, 1.0], ["Ours", "as asked", "median", 0.4, 0.1, 1.0],
                         ["DDIM", "as asked", "mean", 0.4, "inf", 1.0]],
            },
            "ground: against each peer": {"columns": ["sampler", "peer"], "rows": [["Ours", "DDIM"]]},
        },
    }  # fmt: skip
    return [(registry.get_method("evodiff"), result)]
