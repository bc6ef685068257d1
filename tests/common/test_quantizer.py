"""Every quantizer against the rules of `tests/common/quantizer.py`."""

from __future__ import annotations

import pytest

from tests.common.quantizer import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_quantizer(case, rule, world):
    SUITE.run(case, rule, world)
