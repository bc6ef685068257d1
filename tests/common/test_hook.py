"""Every hook against the rules of `tests/common/hook.py`."""

from __future__ import annotations

import pytest

from tests.common.hook import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_hook(case, rule, world):
    SUITE.run(case, rule, world)
