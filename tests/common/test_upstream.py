"""Every upstream against the rules of `tests/common/upstream.py`."""

from __future__ import annotations

import pytest

from tests.common.upstream import FAULTS, SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params(faults=FAULTS))
def test_upstream(case, rule, world):
    SUITE.run(case, rule, world)
