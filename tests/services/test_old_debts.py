"""A recovery that a pause or a long stop has outlasted: nobody is debited before a person decides."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.services.forecast.preview import preview
from billing_worker.services.reports.question import explain_any
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import banks_change_their_mind, events, replace, retry, sold_at

DAY = timedelta(days=1)
ANN = {"by": "ann", "why": "asked by phone"}
ONE_PERIOD = {"ends_after_periods": 1}
FOR_A_PERSON = "open, waiting for a person"


def paused_for(world, days):
    """A subscription that is declined once, paused for so long, and resumed."""
    world.subscribe("decline_insufficient_funds")
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", **ANN)
    world.clock.advance(days * DAY)
    banks_change_their_mind(world, "approved")
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=True, **ANN)


def forecast(world, invoice="sub-1-p0"):
    now = world.clock.now()
    return next(one for one in preview(world.store, now, now + DAY) if one.invoice == invoice)


def waits_for_a_person(world, invoice="sub-1-p0"):
    assert world.fate(invoice) == FOR_A_PERSON
    assert "older than 30 days" in world.explain(invoice)["why"]
    assert [one["rule"] for one in events(world, "recovery.ended")] == ["ladder.too_old"]
    assert "older than 30 days" in world.alerts()[-1]


def test_a_debt_that_a_pause_has_made_older_than_its_ladder_waits_for_a_person(world):
    paused_for(world, 300)
    promised = forecast(world)
    assert "older than 30 days" in promised.reason
    world.run_for(2 * DAY, step=DAY)
    assert len(sold_at(world)) == 1
    waits_for_a_person(world)
    assert forecast(world).reason == promised.reason


def test_a_person_who_decides_about_an_old_debt_has_it_charged(world):
    paused_for(world, 300)
    world.tick()
    retry(world)
    world.tick()
    assert world.fate() == "paid"
    assert world.discrepancies() == []


def test_a_new_card_pays_a_debt_that_waits_for_a_person_because_of_its_age(world):
    paused_for(world, 40)
    world.tick()
    assert replace(world, "approved")["tried"] == ["sub-1-p0"]
    world.tick()
    assert world.fate() == "paid"


def test_a_short_pause_leaves_the_ladder_as_it_was(world):
    paused_for(world, 10)
    assert forecast(world).reason is None
    world.tick()
    assert world.fate() == "paid"


@pytest.mark.parametrize("days", [32, 100])
def test_a_step_of_the_ladder_that_nobody_took_in_time_waits_for_a_person(world, days):
    world.subscribe("decline_insufficient_funds", **ONE_PERIOD)
    world.tick()
    world.clock.advance(days * DAY)
    banks_change_their_mind(world, "approved")
    world.run_for(2 * DAY, step=DAY)
    assert len(sold_at(world)) == 1
    waits_for_a_person(world)


def test_a_stop_shorter_than_the_ladder_is_made_up_for(world):
    world.subscribe("decline_insufficient_funds", **ONE_PERIOD)
    world.tick()
    world.clock.advance(29 * DAY)
    banks_change_their_mind(world, "approved")
    world.tick()
    assert world.fate() == "paid"


def test_an_attempt_that_a_dead_worker_left_prepared_is_not_gone_on_with_when_it_is_too_old(world):
    world.subscribe("decline_insufficient_funds", **ONE_PERIOD)
    world.tick()
    world.clock.advance(3 * DAY)
    world.transport.unreachable = True
    world.tick()
    assert world.attempts() == ["declined", "prepared"]
    world.transport.unreachable = False
    world.clock.advance(100 * DAY)
    banks_change_their_mind(world, "approved")
    world.run_for(2 * DAY, step=DAY)
    assert world.attempts() == ["declined", "not_charged"]
    assert len(sold_at(world)) == 1
    waits_for_a_person(world)


def test_the_attempt_after_an_expired_sale_is_not_made_when_nobody_looked_for_long(world):
    world.subscribe("answer_lost_before", **ONE_PERIOD)
    world.run_for(2 * DAY, step=timedelta(hours=1))
    assert world.attempts() == ["not_charged"]
    world.clock.advance(100 * DAY)
    banks_change_their_mind(world, "approved")
    world.run_for(2 * DAY, step=DAY)
    assert len(sold_at(world)) == 1
    waits_for_a_person(world)


def test_what_waited_behind_an_old_debt_goes_on_without_it(world):
    world.subscribe("decline_insufficient_funds", interval="week")
    world.run_for(8 * DAY, step=DAY)
    assert world.explain("sub-1-p1")["reason"] == "an older invoice comes first"
    world.clock.advance(26 * DAY)
    banks_change_their_mind(world, "approved")
    world.run_for(7 * DAY, step=timedelta(hours=6))
    waits_for_a_person(world)
    assert world.fate("sub-1-p1") == "paid"


def test_before_anybody_takes_an_old_debt_up_it_is_said_that_nobody_will(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    dated = world.explain()["next"]
    assert "It is charged at" in dated
    lifecycle.pause(world.store, world.clock, "sub-1", by="ann")
    world.clock.advance(300 * DAY)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="ann")
    told = world.explain()["next"]
    assert "because its first unpaid attempt is older than 30 days" in told
    assert "`invoices retry sub-1-p0`" in told
    world.tick()
    assert world.fate() == "open, waiting for a person"


def test_a_step_that_stopped_workers_did_not_take_is_not_promised_by_explain(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.clock.advance(100 * DAY)
    with world.store.reading() as connection:
        told = explain_any(connection, "sub-1-p0", world.clock.now())
    assert "older than 30 days" in told["next"]
