"""`docs/samplers.md` says what is so."""

from __future__ import annotations

import re

import pytest
from diffusers.utils import is_scipy_available

from . import samplers_table
from .common.models import is_here

CASES = samplers_table.cases()


def written() -> dict[str, list[str]]:
    """The rows of the committed table, by class."""
    lines = samplers_table.FILE.read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {re.sub("`", "", name): cells for name, *cells in found if name not in ("sampler", "---")}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
def test_what_the_table_says_of_a_sampler_is_so(case):
    assert is_here("avatars-sd")
    found = list(samplers_table.row(case).values())
    count = len(found) if is_scipy_available() else len(found) - 1  # the last is of beta grids, which need scipy
    assert written()[case.cls.__name__][:count] == found[:count]


def test_the_table_has_every_sampler_and_is_as_written():
    rows = written()
    assert list(rows) == [case.cls.__name__ for case in CASES], "write it again: python -m tests.samplers_table"
    columns = [*samplers_table.PIPELINES, "image-to-image", *samplers_table.PREDICTIONS, "flow", *samplers_table.GRIDS]
    cells = {name: dict(zip(columns, values, strict=True)) for name, values in rows.items()}
    assert samplers_table.text(cells) == samplers_table.FILE.read_text(encoding="utf-8")


def test_of_ours_nothing_that_is_for_diffusion_fails_in_stable_diffusion():
    rows = written()
    for case in CASES:
        if case.own and "diffusion" in samplers_table.scheduler.processes(case):
            assert rows[case.cls.__name__][0] == "yes", case.cls.__name__
