from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sqlalchemy import update

from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import invariants as command
from billing_worker.persistence.schema.tables import attempts
from billing_worker.services.monitoring.invariants import INVARIANTS


@pytest.fixture
def run(database_url, world, monkeypatch):
    monkeypatch.setenv("BILLING_DATABASE_URL", database_url)
    monkeypatch.setattr(command, "SystemClock", lambda: world.clock)
    return lambda *arguments: CliRunner().invoke(cli, ["invariants", *arguments])


@pytest.mark.by_hand
def test_a_book_in_order_passes_and_a_broken_one_names_the_row_and_the_command(world, run):
    world.subscribe("approved")
    world.tick()
    answer = run()
    assert answer.exit_code == 0, answer.output
    assert answer.output.count("ok    ") == len(INVARIANTS)
    with world.store.transaction() as connection:
        connection.execute(update(attempts).values(currency="EUR"))
    answer = run()
    assert answer.exit_code == 1
    assert "broken by sub-1-p0\n      look: billing-worker explain sub-1-p0" in answer.output
    [broken] = [one for one in json.loads(run("--json").output) if one["holds"] is False]
    assert broken["invariant"] == "paid_once_and_in_full"
    assert broken["broken_by"] == ["sub-1-p0"]
