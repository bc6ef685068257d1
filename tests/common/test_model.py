"""Every model against the rules of `tests/common/model.py`."""

from __future__ import annotations

import pytest

from tests.common.model import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_model(case, rule, world):
    SUITE.run(case, rule, world)
