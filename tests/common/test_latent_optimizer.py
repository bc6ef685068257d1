"""Every latent_optimizer against the rules of `tests/common/latent_optimizer.py`."""

from __future__ import annotations

import pytest

from tests.common.latent_optimizer import SUITE


@pytest.mark.parametrize(("case", "rule"), SUITE.params())
def test_latent_optimizer(case, rule, world):
    SUITE.run(case, rule, world)
