"""`docs/caches.md` says what is so."""

from __future__ import annotations

import pytest

from . import caches_table


def written() -> dict[str, list[str]]:
    """The rows of the committed table by their first cell; the head is "denoiser"."""
    lines = caches_table.FILE.read_text(encoding="utf-8").splitlines()
    found = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    return {name: cells for name, *cells in found if name != "---"}


@pytest.mark.slow
@pytest.mark.parametrize("name", caches_table.DENOISERS)
def test_what_the_table_says_of_a_denoiser_is_so(name):
    found = caches_table.row(name)
    assert dict(zip(written()["denoiser"], written()[name], strict=True)) == found


def test_the_table_has_every_cache_and_every_denoiser():
    rows = written()
    wanted = [case.name for case in caches_table.cases()]
    assert rows["denoiser"] == wanted, "write it again: python -m tests.caches_table"
    assert list(rows) == ["denoiser", *caches_table.DENOISERS]


def test_every_cache_works_somewhere_and_fails_nowhere():
    """What `supports` accepts must work."""
    rows = written()
    for i, key in enumerate(rows["denoiser"]):
        cells = [cells[i] for name, cells in rows.items() if name != "denoiser"]
        assert caches_table.FAILS not in cells, key
        assert {caches_table.YES, caches_table.TRAINED} & set(cells), key
