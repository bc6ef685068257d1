"""The world that the rules work in."""

from __future__ import annotations

import pytest

from .models import World
from .suite import Suite


@pytest.fixture(scope="session")
def world(request, tmp_path_factory) -> World:
    """Stock models and pipelines. All cases whose rule `travels` was collected go on one journey."""
    travellers = []
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        suite = getattr(item.module, "SUITE", None)
        travels = getattr(params.get("rule"), "name", None) == "travels" and not item.get_closest_marker("skip")
        if isinstance(suite, Suite) and travels:
            travellers.append((suite, params["case"]))
    return World(tmp_path_factory.mktemp("common"), travellers)
