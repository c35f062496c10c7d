"""Public events: what is told, in which order, with which state, and what is never told."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from datetime import timedelta

import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import func, select

from billing_worker.domain.public_events import LARGEST_EVENT, PublicType
from billing_worker.domain.public_schema import schema
from billing_worker.persistence.outbox import pending
from billing_worker.persistence.schema import outgoing, tables
from billing_worker.persistence.store import Within
from billing_worker.services.outbox import publish as publishing
from billing_worker.services.outbox.publish import publish
from billing_worker.services.subscriptions import lifecycle

DAY = timedelta(days=1)


def test_a_paid_period_is_told_as_created_opened_and_paid(world, listener):
    world.subscribe()
    world.tick()
    assert listener.types() == [
        "subscription.created",
        "invoice.opened",
        "invoice.paid",
        "payment.receipt",
    ]
    paid = listener.bodies()[-1]
    assert paid["data"]["invoice"] == "sub-1-p0"
    assert paid["data"]["customer"] == "customer-of-sub-1"
    state = paid["data"]["state"]
    assert (state["invoice"]["status"], state["invoice"]["amount"]) == ("paid", "9.99")
    assert state["subscription"]["status"] == "active"


def test_a_failed_recovery_is_told_step_by_step_until_the_subscription_is_suspended(
    world, listener
):
    world.subscribe("decline_insufficient_funds")
    world.run_for(40 * DAY, step=timedelta(hours=12))
    told = [b for b in listener.bodies() if b["data"]["invoice"] == "sub-1-p0"]
    failed = [b["data"] for b in told if b["type"] == "invoice.failed"]
    assert [one["attempt"] for one in failed] == list(range(1, failed[0]["of"] + 1))
    assert failed[0]["next_attempt_at"]
    assert failed[-1]["next_attempt_at"] is None
    types = [b["type"] for b in told]
    assert "subscription.past_due" in types
    assert types.index("invoice.uncollectible") < types.index("subscription.suspended")


def test_what_people_decide_about_a_subscription_is_told_once_each(world, listener):
    world.subscribe()
    world.tick()
    ask = (world.store, world.clock, "sub-1")
    lifecycle.pause(*ask, by="ann", why="holiday")
    lifecycle.pause(*ask, by="ann")
    lifecycle.resume(*ask, shift_anchor=False, by="ann")
    lifecycle.change(*ask, amount="12.00", by="ann")
    lifecycle.cancel(*ask, at_period_end=True, by="ann")
    lifecycle.uncancel(*ask, by="ann")
    lifecycle.cancel(*ask, at_period_end=False, by="ann")
    assert listener.types()[4:] == [
        "subscription.paused",
        "subscription.resumed",
        *["subscription.changed"] * 3,
        "subscription.cancelled",
    ]
    paused = listener.bodies()[4]["data"]
    assert paused["why"] == "holiday"


def test_the_last_period_of_an_agreement_tells_that_it_has_ended(world, listener):
    world.subscribe(ends_after_periods=1)
    world.tick()
    assert "subscription.ended" in listener.types()


def test_a_sequence_counts_by_one_in_each_subscription_and_numbers_have_no_gap(world, listener):
    for reference in ("sub-1", "sub-2", "sub-3"):
        world.subscribe(reference=reference)
    world.run_for(35 * DAY, step=DAY)
    told = listener.bodies()
    assert [b["data"]["number"] for b in told] == list(range(1, len(told) + 1))
    of = defaultdict(list)
    for one in told:
        of[one["data"]["subscription"]].append(one["data"]["sequence"])
    assert set(of) == {"sub-1", "sub-2", "sub-3"}
    assert all(seen == list(range(1, len(seen) + 1)) for seen in of.values())


def test_the_newest_event_of_each_subscription_says_what_the_books_say(world, listener):
    """Whoever takes only the newest is right, however the events before it came."""
    for number, token in enumerate(
        ("approved", "decline_insufficient_funds", "decline_stolen_card")
    ):
        world.subscribe(token, reference=f"sub-{number}")
    world.run_for(65 * DAY, step=timedelta(hours=12))
    states, invoices = {}, {}
    for one in listener.bodies():
        state = one["data"]["state"]
        if state["subscription"]:
            states[one["data"]["subscription"]] = state["subscription"]["status"]
        if state["invoice"]:
            invoices[one["data"]["invoice"]] = state["invoice"]["status"]
    with world.store.reading() as connection:
        for told, table in ((states, tables.subscriptions), (invoices, tables.invoices)):
            rows = connection.execute(select(table.c.reference_id, table.c.status)).all()
            assert told == dict(map(tuple, rows))


def test_every_body_is_what_its_schema_promises_and_small(world, listener):
    world.subscribe(description="é" * 500)
    world.subscribe("decline_stolen_card", reference="sub-2")
    world.run_for(20 * DAY, step=timedelta(hours=12))
    lifecycle.cancel(
        world.store, world.clock, "sub-1", at_period_end=False, by="ann", why="x" * 60_000
    )
    bodies = listener.bodies()
    assert len(bodies) > 5
    for one in bodies:
        Draft202012Validator(schema(PublicType(one["type"]))).validate(one)
        assert len(json.dumps(one, ensure_ascii=False).encode()) < LARGEST_EVENT


@pytest.mark.parametrize("kind", PublicType)
def test_every_schema_is_one(kind):
    Draft202012Validator.check_schema(schema(kind))


def test_no_event_holds_a_token_or_more_of_a_card_than_four_digits(world, listener):
    card = {"token": "approved.secret-77", "mask": "512381******0042", "brand": "visa",
            "expiry_month": 3, "expiry_year": 2026}  # fmt: skip
    world.subscribe(card=card)
    world.run_for(40 * DAY, step=DAY)
    text = json.dumps(listener.bodies())
    assert '"0042"' in text
    assert "secret-77" not in text
    assert not re.search(r"512381|\*{3}", text)
    assert "Bearer" not in text


def test_a_fact_that_is_rolled_back_is_not_told(world, listener):
    world.subscribe()

    before = listener.bodies()

    def pause_and_die():
        with world.store.transaction() as connection:
            lifecycle.pause(Within(connection), world.clock, "sub-1", by="ann")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pause_and_die()
    assert listener.bodies() == before


def test_an_event_that_cannot_be_rendered_alerts_and_holds_back_its_subscription_alone(
    world, listener, monkeypatch
):
    world.subscribe(reference="sub-1")
    world.subscribe(reference="sub-2")
    render = publishing.subscription_state

    def breaks(row):
        if row.reference_id == "sub-1":
            raise ValueError("no such currency")
        return render(row)

    monkeypatch.setattr(publishing, "subscription_state", breaks)
    world.tick()
    assert listener.types("sub-1") == []
    assert listener.types("sub-2") == [
        "subscription.created",
        "invoice.opened",
        "invoice.paid",
        "payment.receipt",
    ]
    with world.store.reading() as connection:
        [stuck] = pending.in_trouble(connection, 10)
        assert stuck.trouble == "ValueError: no such currency"
    monkeypatch.undo()
    assert listener.types("sub-1") == []  # not at each sweep
    world.clock.advance(publishing.PUBLISH_AGAIN_AFTER)
    assert listener.types("sub-1") == [
        "subscription.created",
        "invoice.opened",
        "invoice.paid",
        "payment.receipt",
    ]


def test_publishing_leaves_nothing_in_the_outbox_and_publishes_nothing_twice(world, monkeypatch):
    monkeypatch.setattr(publishing, "PUBLISH_BATCH", 2)
    for number in range(5):
        world.subscribe(reference=f"sub-{number}")
    assert publish(world.store, world.clock) == 5
    assert publish(world.store, world.clock) == 0
    with world.store.reading() as connection:
        assert connection.execute(select(func.count()).select_from(outgoing.outbox)).scalar() == 0
