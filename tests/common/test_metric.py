"""Every metric against the rules of `tests/common/metric.py`."""

from __future__ import annotations

import pytest

from tests.common.metric import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_metric(case, rule, world):
    SUITE.run(case, rule, world)
