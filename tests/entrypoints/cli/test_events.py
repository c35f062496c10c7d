from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.cli import events as command
from billing_worker.services.outbox.publish import publish


@pytest.fixture
def run(database_url, monkeypatch):
    monkeypatch.setenv("BILLING_DATABASE_URL", database_url)

    def run(*arguments):
        result = CliRunner().invoke(cli, ["events", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_events_are_listed_after_a_number(world, run):
    for number in range(3):
        world.subscribe(reference=f"sub-{number}")
    publish(world.store, world.clock)
    told = json.loads(run("list", "--after", "1", "--json"))
    assert [one["data"]["subscription"] for one in told] == ["sub-1", "sub-2"]
    assert run("list", "--limit", "1").split() == [
        "1", "2026-01-31T12:00:00+00:00", "subscription.created", "sub-0",
    ]  # fmt: skip


def test_a_reader_that_follows_is_told_what_comes_later_one_line_each(world, run, monkeypatch):
    world.subscribe(reference="sub-1")
    publish(world.store, world.clock)
    pauses = []

    def pause(_seconds):
        pauses.append(1)
        if len(pauses) > 1:
            raise KeyboardInterrupt
        world.subscribe(reference="sub-2")
        publish(world.store, world.clock)

    monkeypatch.setattr(command.time, "sleep", pause)
    lines = run("list", "--follow", "--json").splitlines()
    assert [json.loads(line)["data"]["subscription"] for line in lines] == ["sub-1", "sub-2"]


def test_the_list_says_what_a_person_has_to_look_at(world, run):
    world.subscribe("wrong_amount")
    world.tick()
    publish(world.store, world.clock)
    line = next(line for line in run("list").splitlines() if "attention.needed" in line)
    assert line.endswith("sub-1-p0  attempt.quarantined: amount is 10.99, expected 9.99")


def test_every_schema_is_printed(run):
    assert json.loads(run("schema", "invoice.paid"))["title"] == "invoice.paid"
    assert "invoice.failed" in json.loads(run("schema"))
    assert json.loads(run("stuck", "--json")) == []
