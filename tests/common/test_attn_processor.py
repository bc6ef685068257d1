"""Every attn_processor against the rules of `tests/common/attn_processor.py`."""

from __future__ import annotations

import pytest

from tests.common.attn_processor import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_attn_processor(case, rule, world):
    SUITE.run(case, rule, world)
