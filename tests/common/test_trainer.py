"""Every trainer against the rules of `tests/common/trainer.py`."""

from __future__ import annotations

import pytest

from tests.common.trainer import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_trainer(case, rule, world):
    SUITE.run(case, rule, world)
