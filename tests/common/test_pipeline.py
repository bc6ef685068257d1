"""Every pipeline against the rules of `tests/common/pipeline.py`."""

from __future__ import annotations

import pytest

from tests.common.pipeline import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_pipeline(case, rule, world):
    SUITE.run(case, rule, world)
