"""An unknown blocks its own period; the later ones go on after a while, and a person is told."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.timings import Timings
from billing_worker.services.forecast.preview import preview
from billing_worker.services.operators.resolve import resolve_unknown
from tests.support.recovery import banks_change_their_mind, events
from tests.support.world import World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LATER = "sub-1-p1"
WAITS = "an older invoice comes first"


def recovered_into_the_unknown(world):
    """The first period was declined, and the step of its ladder is left undecided for ever."""
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=100_000_000)
    world.subscribe("decline_insufficient_funds", interval="week")
    world.tick()
    banks_change_their_mind(world, "pending_forever.later")
    world.run_for(3 * DAY, step=6 * HOUR)
    assert (world.attempts(), world.fate()) == (["declined", "submitted"], "unknown")
    banks_change_their_mind(world, "approved.again")
    return world


@pytest.fixture
def stuck(world):
    return recovered_into_the_unknown(world)


def alerts(world, reference):
    return [e["kind"] for e in world.explain(reference)["history"] if e["alert"]]


def test_the_next_period_waits_for_a_week_of_it_and_then_goes_on_with_an_alert(stuck):
    stuck.run_for(5 * DAY, step=6 * HOUR)
    assert stuck.explain(LATER)["reason"] == WAITS
    assert "BILLING_UNKNOWN_BLOCKS_SECONDS" in stuck.explain(LATER)["next"]
    stuck.run_for(4 * DAY, step=6 * HOUR)
    assert stuck.fate(LATER) == "paid"
    assert alerts(stuck, LATER) == ["invoice.goes_on"]
    assert events(stuck, "invoice.goes_on")[0]["unknown_since"].startswith("2026-02-0")
    assert (stuck.attempts(), stuck.fate()) == (["declined", "submitted"], "unknown")


def test_each_further_period_is_charged_once_while_the_first_stays_unknown(stuck):
    stuck.run_for(70 * DAY, step=6 * HOUR)
    later = {f"sub-1-p{number}": 1 for number in range(1, 10)}
    assert later.items() <= dict(stuck.debits()).items()
    assert stuck.debits()["sub-1-p0"] == 0


def test_a_person_s_word_lets_it_go_on_at_once(stuck):
    stuck.run_for(5 * DAY, step=6 * HOUR)
    resolve_unknown(
        stuck.ports, reference="sub-1-p0", paid=True, evidence="portal", by="ann", why="called"
    )
    stuck.tick()
    assert stuck.fate(LATER) == "paid"
    assert events(stuck, "invoice.goes_on") == []


def test_an_older_invoice_that_is_recovered_is_waited_for_however_long(world):
    world.subscribe("decline_insufficient_funds", interval="week")
    world.run_for(13 * DAY, step=6 * HOUR)
    assert world.explain(LATER)["reason"] == WAITS
    assert events(world, "invoice.goes_on") == []


def test_how_long_is_a_setting(store):
    world = recovered_into_the_unknown(World(store, timings=Timings(unknown_blocks=DAY)))
    world.run_for(5 * DAY, step=6 * HOUR)
    assert world.fate(LATER) == "paid"


def test_the_preview_says_the_same(stuck):
    def foreseen():
        now = stuck.clock.now()
        lines = preview(stuck.store, now, now + DAY, stuck.ports.timings)
        return {line.invoice: line.reason for line in lines if line.invoice == LATER}

    stuck.run_for(5 * DAY, step=6 * HOUR)
    assert foreseen() == {LATER: WAITS}
    stuck.clock.advance(3 * DAY)
    assert foreseen() == {LATER: None}
    stuck.tick()
    stuck.run_for(DAY, step=6 * HOUR)
    assert stuck.fate(LATER) == "paid"
