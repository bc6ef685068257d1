"""`docs/quantization.md` says what is so."""

from __future__ import annotations

import pytest

from . import quantization_table
from .quantization_table import COLUMNS, REFUSED, ROWS

QUICK = {"native, int 4 / int 8", "quanto, int 8 / float", "torchao, int 8 / float", "bitsandbytes, nf 4 / float"}


def written() -> dict[str, list[str]]:
    """The rows of both tables by their first cell."""
    lines = quantization_table.FILE.read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: cells for name, *cells in found if name != "---"}


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[] if row.name in QUICK else pytest.mark.slow) for row in ROWS],
)
def test_what_the_table_says_of_a_format_is_so(row):
    if not row.is_here:
        pytest.skip(f"{row.backend} is not installed")
    assert dict(zip(COLUMNS, written()[row.name], strict=False)) == quantization_table.attempt(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_says_is_refused_is_refused(name):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    assert quantization_table.refusal(name).partition(":")[0] == written()[name][0].partition(":")[0]


def test_the_page_is_as_written():
    rows, text = written(), quantization_table.FILE.read_text(encoding="utf-8")
    cells = {row.name: dict(zip(COLUMNS, rows[row.name], strict=False)) for row in ROWS}
    tried = next(line for line in text.splitlines() if line.startswith("Tried with "))
    refused = {name: rows[name][0] for name in REFUSED}
    assert quantization_table.text(cells, refused, tried) == text, "write it again: python -m tests.quantization_table"
    assert {row.name for row in ROWS} >= QUICK
    assert all(cell["loads again"] != "no" and "fails" not in cell.values() for cell in cells.values())
