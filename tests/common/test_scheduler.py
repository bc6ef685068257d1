"""Every scheduler against the rules of `tests/common/scheduler.py`."""

from __future__ import annotations

import pytest

from tests.common.scheduler import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_scheduler(case, rule, world):
    SUITE.run(case, rule, world)
