"""How a subscription ends: at once, at its period's end, at an agreed end, or while suspended."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.subscription import BILLABLE
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.schema import tables
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.doorbell import ring_due
from billing_worker.services.outbox.publish import publish
from tests.support.lifecycle import DAY, do, give_card, history, invoices, row, suspend
from tests.support.recovery import banks_change_their_mind
from tests.support.world import START


def test_cancelling_now_voids_what_is_open_and_nothing_becomes_due(world):
    world.subscribe("decline_insufficient_funds", interval="day")
    world.tick()
    do(world, "cancel", at_period_end=False)
    world.run_for(3 * DAY, step=DAY / 4)
    assert [(i.status, i.reason) for i in invoices(world)] == [("void", "cancelled")]
    assert world.attempts() == ["declined"]


def test_a_period_that_began_before_the_cancellation_is_on_record_and_void(world):
    world.subscribe("approved")
    do(world, "cancel", at_period_end=False)
    assert [(i.period_number, i.status) for i in invoices(world)] == [(0, "void")]


def test_a_charge_in_flight_when_cancelled_still_pays_its_invoice(world):
    world.subscribe("answer_lost_after")
    world.tick()
    do(world, "cancel", at_period_end=False)
    assert world.fate() == "unknown"
    world.run_for(timedelta(minutes=5))
    assert world.fate() == "paid"
    assert row(world).status == "cancelled"


def test_a_charge_in_flight_when_cancelled_that_ends_unpaid_leaves_a_void_invoice(world):
    world.subscribe("answer_lost_before")
    world.tick()
    do(world, "cancel", at_period_end=False)
    world.run_for(timedelta(hours=4), step=timedelta(minutes=10))
    assert world.attempts() == ["not_charged"]
    assert (world.fate(), world.explain()["reason"]) == ("void", "cancelled")


def test_money_that_arrives_after_a_cancellation_is_surplus_and_alerts(world):
    world.subscribe("flips_to_processed")
    world.tick()
    do(world, "cancel", at_period_end=False)
    world.run_for(1.5 * timedelta(hours=1), step=timedelta(minutes=10))
    assert world.attempts() == ["surplus"]
    assert any(event["alert"] for event in world.explain()["history"])


def test_a_cancellation_at_the_periods_end_takes_effect_at_its_boundary(world):
    world.subscribe("approved", interval="week")
    world.tick()
    outcome = do(world, "cancel", at_period_end=True)
    assert (outcome.status, outcome.cancels_at) == ("active", START + 7 * DAY)
    world.run_for(6 * DAY, step=DAY)
    assert row(world).status == "active"
    world.run_for(2 * DAY, step=DAY)
    assert row(world).status == "cancelled"
    assert world.debits().total() == 1


def test_a_cancellation_can_be_withdrawn_until_it_takes_effect(world):
    world.subscribe("approved", interval="week")
    world.tick()
    do(world, "cancel", at_period_end=True)
    do(world, "uncancel")
    world.run_for(8 * DAY, step=DAY)
    assert world.debits().total() == 2
    do(world, "cancel", at_period_end=True)
    world.clock.advance(7 * DAY)  # no sweep has run, and yet it is too late
    with pytest.raises(InvalidInput, match="status"):
        do(world, "uncancel")


def test_what_became_due_before_the_end_is_still_collected(world):
    world.subscribe("approved", interval="week")
    do(world, "end")
    world.run_for(8 * DAY, step=DAY)
    assert [i.status for i in invoices(world)] == ["paid"]
    assert row(world).status == "ended"


def forgotten(world):
    """References of what may be billed, is not held, and is never found by the sweep."""
    query = select(tables.subscriptions.c.reference_id).where(
        tables.subscriptions.c.status.in_(BILLABLE),
        tables.subscriptions.c.next_billing_at.is_(None),
        tables.subscriptions.c.held.is_(False),
    )
    with world.store.reading() as connection:
        return list(connection.execute(query).scalars())


def leave_and_suspend(world, **terms):
    world.subscribe("decline_insufficient_funds", **terms)
    world.tick()
    do(world, "cancel", at_period_end=True)
    world.run_for(25 * DAY, step=DAY)
    assert row(world).status == "suspended"


def test_a_suspended_one_that_pays_before_its_cancellation_is_cancelled_at_its_date(world):
    leave_and_suspend(world, interval="quarter")
    give_card(world)
    world.tick()
    paid = row(world)
    assert (paid.status, paid.next_billing_at) == ("active", paid.cancels_at)
    assert forgotten(world) == []
    world.run_for(70 * DAY, step=5 * DAY)
    assert (row(world).status, world.debits().total()) == ("cancelled", 1)


def test_a_cancellation_withdrawn_after_a_suspension_was_paid_off_is_billed_again(world):
    leave_and_suspend(world, interval="quarter")
    give_card(world)
    world.tick()
    do(world, "uncancel")
    assert forgotten(world) == []
    world.run_for(70 * DAY, step=5 * DAY)
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}


def test_a_suspended_one_is_cancelled_when_its_cancellation_comes(world):
    leave_and_suspend(world, interval="quarter")
    world.run_for(70 * DAY, step=5 * DAY)
    assert row(world).status == "cancelled"
    assert history(world)[-1].kind == "subscription.cancelled"
    give_card(world)
    world.tick()
    assert world.debits().total() == 0


def test_money_that_ends_a_suspension_after_the_cancellation_brings_nothing_back(world):
    """The sweep has not run between the cancellation's date and the payment."""
    leave_and_suspend(world, interval="quarter")
    give_card(world)
    world.clock.advance(80 * DAY)
    ring_due(world.ports)
    world.deliver()
    assert (row(world).status, row(world).cancels_at) == ("cancelled", None)
    world.run_for(100 * DAY, step=10 * DAY)
    assert world.debits() == {"sub-1-p0": 1}


def test_cancelling_again_what_is_suspended_cancels_it(world):
    leave_and_suspend(world, interval="quarter")
    assert do(world, "cancel", at_period_end=True).status == "cancelled"


def test_a_cancellation_at_the_end_of_a_past_due_period_says_that_the_debt_is_still_collected(
    world,
):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    for outcome in (
        do(world, "cancel", at_period_end=True),
        do(world, "cancel", at_period_end=True),
    ):
        assert outcome.details["still_collected"] == ["sub-1-p0"]
        assert "--and-void" in outcome.details["to_void_them"]
    banks_change_their_mind(world, "approved")
    world.run_for(3 * DAY, step=DAY)
    assert world.fate() == "paid"  # as it was said


def test_a_cancellation_that_voids_the_debt_has_nothing_more_to_say(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    do(world, "cancel", at_period_end=True)
    outcome = do(world, "cancel", at_period_end=True, void_open=True)
    assert "still_collected" not in outcome.details
    banks_change_their_mind(world, "approved")
    world.run_for(3 * DAY, step=DAY)
    assert world.debits() == {}


def test_a_cancellation_of_who_owes_nothing_speaks_of_no_debt(world):
    world.subscribe("approved")
    world.tick()
    assert "still_collected" not in do(world, "cancel", at_period_end=True).details


def send(world, task, **arguments):
    return carry_out(world.ports, Message(f"billing.{task}", arguments)).as_json()


def test_a_suspended_one_that_is_forgiven_owes_nothing_and_is_billed_from_its_next_period(world):
    suspend(world)
    banks_change_their_mind(world, "approved")
    answer = send(world, "forgive", reference_id="f-1", subscription="sub-1", why="goodwill")
    assert (answer["status"], answer["subscription"]["status"]) == ("done", "active")
    publish(world.store, world.clock)
    with world.store.reading() as connection:
        told = [json.loads(row.body) for row in feed.after(connection, 0, 100)]
    of_it = [one for one in told if one["type"].startswith("subscription.")]
    assert of_it[-1]["data"]["state"]["subscription"]["status"] == "active", "others are not told"
    assert of_it[-1]["type"] == "subscription.recovered"
    assert {one.status for one in invoices(world, "sub-1")} == {"void"}
    assert "goodwill" in world.explain("sub-1-p0")["why"]
    world.run_for(35 * DAY, step=DAY)
    assert sum(world.debits().values()) >= 1
    assert not [name for name in world.debits() if name == "sub-1-p0"]


def test_only_a_suspended_one_is_forgiven(world):
    world.subscribe("approved")
    answer = send(world, "forgive", reference_id="f-1", subscription="sub-1")
    assert (answer["status"], answer["errors"][0]["field"]) == ("refused", "status")


def test_a_cancellation_is_withdrawn_an_end_is_made_and_a_debt_is_retried_by_command(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    at_end = {"subscription": "sub-1", "at_period_end": True}
    send(world, "cancel", reference_id="c-1", **at_end)
    kept = send(world, "uncancel", reference_id="k-1", subscription="sub-1")
    assert kept["subscription"]["cancels_at"] is None
    ended = send(world, "end", reference_id="e-1", subscription="sub-1", why="moves away")
    assert ended["subscription"]["status"] == "ended"
    banks_change_their_mind(world, "approved")
    world.clock.advance(timedelta(hours=1))
    tried = send(world, "retry", reference_id="r-1", invoice="sub-1-p0")
    assert (tried["status"], tried["invoice"]["reference_id"]) == ("done", "sub-1-p0")
    world.tick()
    assert world.fate() == "paid"
    refused = send(world, "retry", reference_id="r-2", invoice="sub-1-p0")
    assert (refused["status"], refused["errors"][0]["field"]) == ("refused", "invoice")


def test_no_period_that_begins_at_the_agreed_end_is_charged(world):
    world.subscribe("approved", interval="week")
    do(world, "change", ends_at=(START + 14 * DAY).isoformat())
    world.run_for(30 * DAY, step=DAY)
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}
    assert row(world).status == "ended"


def test_an_agreed_end_that_passes_in_a_pause_ends_the_subscription(world):
    world.subscribe("approved", interval="week")
    world.tick()
    do(world, "change", ends_at=(START + 10 * DAY).isoformat())
    do(world, "pause")
    world.clock.advance(30 * DAY)
    outcome = do(world, "resume", shift_anchor=False)
    assert (outcome.status, outcome.details["skipped_periods"]) == ("ended", [1, 1])


def test_an_agreed_end_can_be_taken_back(world):
    world.subscribe("approved", interval="week")
    do(world, "change", ends_at=(START + 14 * DAY).isoformat())
    do(world, "change", ends_at="")
    world.run_for(15 * DAY, step=DAY)
    assert world.debits().total() == 3
