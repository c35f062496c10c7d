from __future__ import annotations

import pytest


@pytest.fixture
def declined(world):
    """An invoice that the automatic charge did not get, with its next step days away."""
    world.subscribe("decline_insufficient_funds.17")
    world.tick()
    assert world.attempts() == ["declined"]
    assert world.explain()["next_attempt_at"] is not None
    return world
