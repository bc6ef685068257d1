"""Every adapter against the rules of `tests/common/adapter.py`."""

from __future__ import annotations

import pytest

from tests.common.adapter import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_adapter(case, rule, world):
    SUITE.run(case, rule, world)
