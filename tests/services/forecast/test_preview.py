"""What is foreseen, and what is said about it afterwards, on both databases."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.persistence import forecast, switches
from billing_worker.persistence.schema import tables
from billing_worker.services import kill_switch
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.forecast.line import Totals
from billing_worker.services.forecast.variance import Comparison, compare
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.invoicing import catch_up
from tests.support.forecast import DAY, Kept, charges, debited, do, foreseen, reasons, rows
from tests.support.world import START


def test_every_charge_until_the_date_and_no_other_is_foreseen(world):
    world.subscribe("approved", "weekly", interval="week")
    world.subscribe("approved", "monthly")
    lines = foreseen(world, 28 * DAY)
    assert [line.invoice for line in lines] == [
        "weekly-p0", "weekly-p1", "weekly-p2", "weekly-p3", "weekly-p4", "monthly-p0", "monthly-p1",
    ]  # fmt: skip
    assert charges(lines)["monthly-p1"] == START + 28 * DAY


def test_what_was_foreseen_is_what_is_debited_to_the_minute(world):
    world.subscribe("approved", "weekly", interval="week")
    world.subscribe("approved", "ends", interval="day", ends_after_periods=3)
    world.subscribe("approved", "late", anchor_at=(START - 45 * DAY).isoformat())
    do(world, "change", "late", catch_up="collect_all:4")  # now opened, on its old policy
    world.subscribe("approved", "later", anchor_at=(START - 45 * DAY).isoformat())
    planned = charges(foreseen(world))
    for moment in sorted(set(planned.values())):
        world.clock.advance(moment - world.clock.now())
        world.tick()
    world.clock.advance(START + 31 * DAY - world.clock.now())
    world.tick()
    assert debited(world) == planned


def test_each_reason_why_nothing_is_charged_is_told(world):
    for name in ("paused", "cancelled", "leaving", "ended", "kept", "held"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    world.subscribe(None, "cardless", anchor_at=(START + DAY).isoformat())
    do(world, "pause", "paused")
    do(world, "cancel", "cancelled", at_period_end=False)
    do(world, "cancel", "leaving", at_period_end=True)
    do(world, "end", "ended")
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "held")
            .values(held=True, next_billing_at=None)
        )
    world.subscribe("approved", "expiring", anchor_at=(START + DAY).isoformat(),
                    card={"token": "approved", "expiry_month": 1, "expiry_year": 2026})  # fmt: skip
    lines = foreseen(world, 28 * DAY)
    assert list(charges(lines)) == ["kept-p0"]
    assert reasons(lines) == {
        "paused-p0": "subscription is paused",
        "cancelled-p0": "subscription is cancelled",
        "leaving-p0": "cancelled by then",
        "ended-p0": "all its periods have been billed",
        "held-p0": "held since its import",
        "cardless-p0": "no card",
        "expiring-p0": "card_expired",
    }


def test_open_invoices_are_foreseen_with_their_next_step_or_their_reason(world):
    world.subscribe("answer_lost_after", "unknown")
    world.subscribe("rejects_token", "refused")
    world.tick()
    told = reasons(foreseen(world, DAY))
    assert told["unknown-p0"].startswith("in flight")
    assert told["refused-p0"].startswith("held: not_charged: gateway refused")


def test_while_sales_are_off_nothing_is_foreseen_to_be_charged(world):
    world.subscribe("approved")
    with world.store.transaction() as connection:
        switches.turn_sales(connection, on=False, by="ann", reason="audit", now=START)
    assert set(reasons(foreseen(world)).values()) == {"sales are switched off"}


def test_the_past_is_refused(world):
    with pytest.raises(InvalidInput, match="until"):
        foreseen(world, -DAY)


def test_totals_are_exact_by_currency_and_count_the_reasons(world):
    for number, (amount, currency) in enumerate(
        [("0.10", "USD"), ("0.20", "USD"), ("5", "JPY"), ("0.001", "KWD")]
    ):
        world.subscribe("approved", f"sub-{number}", amount=amount, currency=currency)
    world.subscribe(None, "cardless")
    totals = Totals()
    for line in foreseen(world, DAY):
        totals.add(line)
    sums = {s["currency"]: (s["count"], Decimal(s["amount"])) for s in totals.as_dict()["charged"]}
    assert sums == {
        "JPY": (1, Decimal(5)),
        "KWD": (1, Decimal("0.001")),
        "USD": (2, Decimal("0.30")),
    }
    assert totals.as_dict()["not_charged"] == {"no card": 1}


def long_overdue(world, days=1_100):
    """As if nobody had swept for years: an import would refuse it."""
    world.subscribe("approved", interval="day", anchor_at=(START - 10 * DAY).isoformat())
    with world.store.transaction() as connection:
        at = START - days * DAY
        connection.execute(update(tables.subscriptions).values(anchor_at=at, next_billing_at=at))


def test_more_periods_than_one_sweep_opens_are_foreseen_as_they_are_charged(world):
    long_overdue(world)
    lines = foreseen(world, timedelta(hours=1))
    assert len(lines) == 1_101
    planned = charges(lines)
    assert list(planned) == ["sub-1-p1100"]
    decided = list(catch_up.plan(world.store, world.clock.now(), catch_up.Answer()))
    assert [line.invoice for line in decided] == [line.invoice for line in lines]
    world.tick()
    world.tick()
    assert debited(world) == planned


def test_an_answer_is_complete_only_when_nothing_is_due_any_more(world):
    long_overdue(world)
    shown = list(catch_up.plan(world.store, world.clock.now(), catch_up.Answer()))
    done = catch_up.apply(
        world.store, world.clock, catch_up.Answer(), catch_up.Caps(), by="ann", why="outage"
    )
    assert (done.complete, done.lines) == (True, shown)
    with world.store.reading() as connection:
        [row] = connection.execute(select(tables.subscriptions)).all()
    assert row.next_billing_at > world.clock.now()


def nobody_charges_for(world, days):
    """Every worker is dead; the beat still opens what becomes due."""
    for _ in range(days):
        world.sweep()
        world.bell.messages.clear()
        world.clock.advance(DAY)


def run_through(world, planned, until):
    for moment in sorted({*planned.values(), until}):
        world.clock.advance(moment - world.clock.now())
        world.tick()


def test_first_charges_that_were_missed_are_foreseen_as_they_are_decided_again(world):
    busy = {"customer": {"reference_id": "busy"}, "card": {"token": "approved.busy"}}
    for policy in ("collect_latest", "collect_all:3", "hold", "forgive_older_than:2"):
        world.subscribe("approved", policy.partition(":")[0], interval="day", catch_up=policy,
                        ends_after_periods=8, **busy)  # fmt: skip
    world.subscribe("approved", "monthly", **busy)
    world.subscribe("approved", "alone", interval="week", catch_up="collect_all:9")
    nobody_charges_for(world, 5)
    kept = Kept(world, 40 * DAY)
    lines = foreseen(world, 40 * DAY)
    planned = charges(lines)
    assert len(set(planned.values())) > 5
    run_through(world, planned, kept.until)
    assert debited(world) == planned
    books = rows(world)
    told = {name: reason for name, reason in reasons(lines).items() if name in books}
    assert told == {name: books[name].reason for name in told}
    words = " ".join(told.values())
    assert "collect_latest" in words
    assert "hold" in words
    assert "older than 2 days" in words
    assert kept.compared()[0] == {}


def test_missed_first_charges_are_foreseen_from_when_the_first_of_them_is_rung_for(world):
    world.subscribe("approved", interval="day", ends_after_periods=3, catch_up="collect_latest")
    nobody_charges_for(world, 3)
    with world.store.transaction() as connection:
        number = tables.invoices.c.period_number
        for period, hours in enumerate((3, 2, 5)):
            rung = world.clock.now() + timedelta(hours=hours)
            connection.execute(
                update(tables.invoices).where(number == period).values(enqueue_at=rung)
            )
    planned = charges(foreseen(world))
    assert planned == {"sub-1-p2": world.clock.now() + timedelta(hours=2)}
    run_through(world, planned, world.clock.now() + DAY)
    assert debited(world) == planned


def test_missed_first_charges_that_cannot_be_planned_anew_are_foreseen_as_held(world, monkeypatch):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 2)

    def broken(*_, **__):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr("billing_worker.domain.catch_up.plan_missed", broken)
    told = reasons(foreseen(world, timedelta(hours=1)))
    assert told["sub-1-p0"] == "catch_up.trouble: ZeroDivisionError: our bug"
    world.tick()
    assert rows(world)["sub-1-p0"].reason == told["sub-1-p0"]


def test_what_was_missed_is_not_foreseen_as_charged_while_sales_are_off(world):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 3)
    kill_switch.switch(world.store, on=False, service=None, by="operator:ann", reason="audit",
                 now=world.clock.now())  # fmt: skip
    assert set(reasons(foreseen(world)).values()) == {"sales are switched off"}


def test_open_invoices_are_foreseen_as_void_once_a_cancellation_is_due(world):
    world.subscribe("approved", interval="day")
    nobody_charges_for(world, 1)
    world.clock.advance(-timedelta(hours=2))
    do(world, "cancel", "sub-1", at_period_end=True)
    world.clock.advance(timedelta(hours=3))
    told = reasons(foreseen(world))
    assert told["sub-1-p0"] == "subscription is cancelled"
    world.tick()
    assert rows(world)["sub-1-p0"].status == "void"


def test_late_debits_are_not_foreseen_after_the_cancellation_that_voids_them(world):
    for name in ("gone", "leaving"):
        world.subscribe("approved", name, interval="week", catch_up="collect_all:9",
                        anchor_at=(START + DAY).isoformat())  # fmt: skip
    do(world, "cancel", "gone", at_period_end=True)
    with world.store.transaction() as connection:
        name = tables.subscriptions.c.reference_id
        for reference, days in (("gone", 10), ("leaving", 30)):
            connection.execute(
                update(tables.subscriptions)
                .where(name == reference)
                .values(cancels_at=START + days * DAY)
            )
    world.clock.advance(16 * DAY)
    kept = Kept(world)
    told = reasons(foreseen(world))
    assert told["gone-p0"] == told["gone-p1"] == "subscription is cancelled"
    assert told["leaving-p2"] == "cancelled by then"
    planned = charges(foreseen(world))
    run_through(world, planned, kept.until)
    assert debited(world) == planned
    assert kept.compared()[0] == {}


def test_what_waits_for_an_older_invoice_is_not_foreseen_and_explained_once_that_is_paid(world):
    world.subscribe("decline_insufficient_funds", interval="day", ends_after_periods=3)
    world.tick()
    world.clock.advance(DAY)
    world.tick()
    kept = Kept(world, 20 * DAY)
    assert reasons(foreseen(world))["sub-1-p1"] == "an older invoice comes first"
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="sub-1", card=card, by="carl", why="new",
    )  # fmt: skip
    world.run_for(10 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert comparison.unexplained == 0
    assert "an older invoice came first" in deviations["sub-1-p1"].because


def test_an_invoice_with_a_page_in_front_of_the_customer_is_not_foreseen_as_charged(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert reasons(foreseen(world))["sub-1-p0"].startswith("in flight")


def test_an_invoice_whose_page_is_being_made_is_not_foreseen_as_charged(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()

    def dies(_):
        raise KeyboardInterrupt

    world.transport.before_send = dies
    with pytest.raises(KeyboardInterrupt):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert reasons(foreseen(world))["sub-1-p0"].startswith("a page for it is open")


def test_what_somebody_asked_for_is_foreseen_although_the_subscription_is_suspended(world):
    world.subscribe("decline_card_expired", interval="day", ends_after_periods=1)
    world.tick()
    world.clock.advance(world.ports.timings.decline_stands)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="suspended", next_billing_at=None)
        )
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="sub-1", card=card, by="carl", why="new",
    )  # fmt: skip
    planned = charges(foreseen(world))
    assert list(planned) == ["sub-1-p0"]
    world.tick()
    assert debited(world) == planned


def test_one_unreadable_invoice_costs_itself_and_is_shown(world):
    for name in ("broken", "fine", "tried"):
        world.subscribe("approved", name)
    kept = Kept(world, DAY)
    world.sweep()
    with world.store.transaction() as connection:
        name = tables.invoices.c.reference_id
        connection.execute(
            update(tables.invoices).where(name == "broken-p0").values(currency="XXX")
        )
    lines = foreseen(world, DAY)
    assert reasons(lines) == {
        "broken-p0": "cannot be read: InvalidInput: currency: must be an ISO 4217 code of a "
        "currency to pay in"
    }
    assert set(charges(lines)) == {"fine-p0", "tried-p0"}
    deviations, comparison = kept.compared()
    assert deviations["broken-p0"].kind == "unreadable"
    assert comparison.unexplained == 0
    assert sum(comparison.counts.values()) == 3


def test_open_invoices_of_an_unreadable_subscription_are_shown(world):
    world.subscribe("approved")
    world.sweep()
    world.bell.messages.clear()
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(timezone="Mars/Phobos"))
    told = reasons(foreseen(world))
    assert set(told) == {"sub-1-p0", "sub-1-p1"}
    assert all(reason.startswith("cannot be planned: InvalidInput") for reason in told.values())


def test_a_period_that_is_opened_while_the_book_is_read_is_listed_once(world, monkeypatch):
    world.subscribe("approved")
    agreements_of = forecast.agreements_of

    def overtaken(*arguments):
        found = agreements_of(*arguments)
        world.sweep()
        return found

    monkeypatch.setattr(forecast, "agreements_of", overtaken)
    assert [line.invoice for line in foreseen(world, DAY)] == ["sub-1-p0"]


def test_what_was_paid_while_the_preview_was_made_is_not_unforeseen(world):
    world.subscribe("approved", anchor_at=(START + timedelta(seconds=2)).isoformat())
    world.clock.advance(1)
    made_at = world.clock.now()
    world.clock.advance(1)
    world.tick()
    world.clock.advance(1)
    now = world.clock.now()
    for read_by, unexplained in ((now, 0), (made_at, 1)):
        comparison = Comparison()
        list(compare(world.store, now, made_at, read_by, made_at + DAY, [], comparison))
        assert comparison.unexplained == unexplained
