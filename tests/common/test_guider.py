"""Every guider against the rules of `tests/common/guider.py`."""

from __future__ import annotations

import pytest

from tests.common.guider import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_guider(case, rule, world):
    SUITE.run(case, rule, world)
