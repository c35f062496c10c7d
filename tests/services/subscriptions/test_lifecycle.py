"""Change, pause, resume, cancel, un-cancel and end, on both databases."""

from __future__ import annotations

import itertools
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.invoice import SUSPENDED
from billing_worker.domain.secret import Secret
from billing_worker.domain.subscription import BILLABLE
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.rows import subscription_from
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.doorbell import ring_due
from billing_worker.services.dunning import choose_policy, give_up_overdue
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.subscription import (
    BadRecord,
    CardRecord,
    parse_record,
)
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import banks_change_their_mind, retry
from tests.support.world import START

DAY = timedelta(days=1)
ANN = {"by": "operator:ann", "why": "asked by phone"}


def do(world, what, reference="sub-1", **options):
    return getattr(lifecycle, what)(world.store, world.clock, reference, **(ANN | options))


def row(world, reference="sub-1"):
    with world.store.reading() as connection:
        return stored.find(connection, reference)


def invoices(world, reference="sub-1"):
    query = (
        select(tables.invoices)
        .join(tables.subscriptions)
        .where(tables.subscriptions.c.reference_id == reference)
        .order_by(tables.invoices.c.period_number)
    )
    with world.store.reading() as connection:
        return connection.execute(query).all()


def history(world, reference="sub-1"):
    query = select(tables.events).where(tables.events.c.subscription_id == row(world, reference).id)
    with world.store.reading() as connection:
        return connection.execute(query.order_by(tables.events.c.id)).all()


def everything(world):
    with world.store.reading() as connection:
        return [
            connection.execute(select(table).order_by(table.c.id)).all()
            for table in (tables.subscriptions, tables.invoices, tables.attempts, tables.events)
        ]


class _Delegate:
    """A gateway that lets something happen between the create and the commit."""

    def __init__(self, gateway, interfere):
        self._gateway, self._interfere = gateway, interfere

    def __getattr__(self, name):
        return getattr(self._gateway, name)

    def create(self, order, calls):
        statement = self._gateway.create(order, calls)
        self._interfere()
        return statement


def interrupted(world, what, **options):
    """A worker in whose way `what` comes, right before it would arm the charge."""
    return world.ports_of_a_worker(
        gateway=_Delegate(world.ports.gateway, lambda: do(world, what, **options))
    )


# --- the billing day -------------------------------------------------------------------------


def next_dates(world, count):
    """The local days of the next periods, without billing them."""
    with world.store.reading() as connection:
        subscription = subscription_from(stored.find(connection, "sub-1"))
    numbers = range(subscription.next_period, subscription.next_period + count)
    return [f"{subscription.start_of(number):%d %b %Y}" for number in numbers]


def test_the_31st_is_kept_from_month_to_year_and_back(world):
    world.subscribe("approved")  # on 31 Jan
    world.tick()
    do(world, "change", interval="year")
    assert next_dates(world, 4) == ["28 Feb 2026", "28 Feb 2027", "29 Feb 2028", "28 Feb 2029"]
    world.run_for(30 * DAY, step=DAY)
    do(world, "change", interval="month")
    assert next_dates(world, 3) == ["28 Feb 2027", "31 Mar 2027", "30 Apr 2027"]


@pytest.mark.parametrize("again", [1, 3])
def test_the_31st_is_kept_through_short_pauses_that_shift_the_anchor(world, again):
    world.subscribe("approved")
    world.tick()
    for _ in range(again):
        do(world, "pause")
        world.clock.advance(timedelta(minutes=1))
        do(world, "resume", shift_anchor=True)
    assert next_dates(world, 3) == ["28 Feb 2026", "31 Mar 2026", "30 Apr 2026"]


def test_a_pause_that_moves_the_day_makes_another_day_the_wanted_one(world):
    world.subscribe("approved")
    world.tick()
    do(world, "pause")
    world.clock.advance(10 * DAY)
    do(world, "resume", shift_anchor=True)
    assert next_dates(world, 3) == ["10 Mar 2026", "10 Apr 2026", "10 May 2026"]


def test_a_kept_billing_day_moves_with_the_book(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", interval="quarter")
    with world.store.reading() as connection:
        record = record_from(stored.whole(connection, ["sub-1"])[0], world.vault)
    there = parse_record(record.as_json(with_token=True))
    assert there.digest == record.digest
    dates = [there.schedule.boundary(n) for n in range(2)]
    assert [f"{at:%d %b}" for at in dates] == ["28 Feb", "31 May"]


@pytest.mark.parametrize("anchor", ["2026-02-27", "2026-01-31"])
def test_a_billing_day_that_the_anchor_is_not_cut_from_is_refused(world, anchor):
    with pytest.raises(BadRecord, match="billing_day"):
        world.subscribe("approved", anchor_at=f"{anchor}T12:00:00Z", billing_day=31)


# --- change ----------------------------------------------------------------------------------


def test_a_new_amount_is_charged_from_the_next_period_on(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", amount="19.99")
    world.run_for(29 * DAY, step=DAY)
    assert [(i.amount_minor, i.status) for i in invoices(world)] == [(999, "paid"), (1999, "paid")]


def test_a_change_never_reaches_a_period_that_began_before_it_however_late_the_sweep(world):
    world.subscribe("approved", description="old")
    world.clock.advance(5 * DAY)
    do(world, "change", amount="19.99", description="new")
    world.tick()
    [first] = invoices(world)
    assert (first.amount_minor, first.description, first.status) == (999, "old", "paid")
    assert row(world).description == "new"


def test_a_new_interval_starts_a_series_at_the_next_period_and_the_numbers_go_on(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", interval="week")
    world.run_for(30 * DAY, step=DAY / 2)
    starts = [(i.reference_id, i.period_start.date().isoformat()) for i in invoices(world)]
    assert starts == [("sub-1-p0", "2026-01-31"), ("sub-1-p1", "2026-02-28")]
    world.run_for(8 * DAY, step=DAY / 2)
    assert invoices(world)[2].period_start.date().isoformat() == "2026-03-07"
    assert row(world).series_start == 1


def test_a_new_currency_keeps_the_31st_although_the_next_period_begins_on_the_28th(world):
    world.subscribe("approved")
    world.tick()
    do(world, "change", amount="500", currency="JPY")
    world.run_for(60 * DAY, step=DAY / 2)
    kept = [(i.currency, i.period_start.date().isoformat()) for i in invoices(world)]
    assert kept == [("USD", "2026-01-31"), ("JPY", "2026-02-28"), ("JPY", "2026-03-31")]


def test_a_change_of_interval_in_the_trial_counts_from_the_end_of_the_trial(world):
    trial_end = world.clock.now() + 10 * DAY
    world.subscribe("approved", trial_end=trial_end.isoformat())
    do(world, "change", interval="year")
    assert row(world).next_billing_at == trial_end
    world.run_for(10 * DAY, step=DAY)
    assert row(world).next_billing_at == trial_end.replace(year=2027)


def test_a_change_is_told_with_who_when_and_why(world):
    world.subscribe("approved")
    outcome = do(world, "change", amount="19.99")
    event = history(world)[-1]
    assert (event.kind, event.by, event.at) == ("subscription.changed", "operator:ann", START)
    assert event.data["why"] == "asked by phone"
    assert event.data["changes"] == {"amount": ["9.99 USD", "19.99 USD"]}
    assert outcome.details["from_period"] == 1  # period 0 had begun


# --- pause and resume ------------------------------------------------------------------------


def test_while_paused_nothing_becomes_due_and_nothing_is_charged(world):
    world.subscribe("approved", interval="day")
    world.tick()
    do(world, "pause")
    world.run_for(5 * DAY, step=DAY / 4)
    assert world.debits().total() == 1
    assert len(invoices(world)) == 1


def test_resume_without_shift_keeps_the_dates_and_tells_which_periods_were_skipped(world):
    world.subscribe("approved", interval="week")
    world.tick()
    do(world, "pause")
    world.clock.advance(20 * DAY)
    outcome = do(world, "resume", shift_anchor=False)
    assert outcome.details["skipped_periods"] == [1, 2]
    assert row(world).next_billing_at == START + 21 * DAY
    assert row(world).next_period == 3


def test_a_period_that_begins_at_the_instant_of_resuming_is_billed(world):
    world.subscribe("approved", interval="week")
    world.tick()
    do(world, "pause")
    world.clock.advance(14 * DAY)
    assert do(world, "resume", shift_anchor=False).details["skipped_periods"] == [1, 1]
    world.tick()
    assert [i.period_number for i in invoices(world)] == [0, 2]


def test_resume_with_shift_moves_the_next_period_by_exactly_the_paused_time(world):
    world.subscribe("approved")
    world.tick()
    before = row(world).next_billing_at
    world.clock.advance(3 * DAY)
    do(world, "pause")
    world.clock.advance(timedelta(days=40, hours=5, minutes=7))
    do(world, "resume", shift_anchor=True)
    after = row(world)
    assert after.next_billing_at == before + timedelta(days=40, hours=5, minutes=7)
    assert (after.next_period, after.anchor_at) == (1, after.next_billing_at)


def test_a_trial_that_was_paused_and_shifted_lasts_as_long_as_it_was_promised(world):
    trial_end = world.clock.now() + 10 * DAY
    world.subscribe("approved", trial_end=trial_end.isoformat())
    do(world, "pause")
    world.clock.advance(30 * DAY)
    outcome = do(world, "resume", shift_anchor=True)
    assert (outcome.status, outcome.next_billing_at) == ("trialing", trial_end + 30 * DAY)


def instalments(world, **terms):
    """Three instalments, the first of which is paid."""
    world.subscribe("approved", ends_after_periods=3, **terms)
    world.tick()


def test_instalments_that_a_pause_passes_over_go_on_at_the_later_dates(world):
    instalments(world)
    do(world, "pause")
    world.clock.advance(60 * DAY)
    outcome = do(world, "resume", shift_anchor=False)
    assert (outcome.status, outcome.details["skipped_periods"]) == ("active", None)
    assert next_dates(world, 2) == ["30 Apr 2026", "31 May 2026"]
    world.run_for(100 * DAY, step=DAY)
    assert world.debits() == {f"sub-1-p{number}": 1 for number in range(3)}
    assert row(world).status == "ended"


def test_instalments_that_a_suspension_passes_over_go_on_at_the_later_dates(world):
    world.subscribe("decline_insufficient_funds", ends_after_periods=3)
    world.run_for(70 * DAY, step=DAY)
    assert row(world).status == "suspended"
    banks_change_their_mind(world, "approved")
    retry(world)
    world.tick()
    world.run_for(100 * DAY, step=DAY)
    assert world.debits() == {f"sub-1-p{number}": 1 for number in range(3)}


def test_instalments_whose_interval_changes_in_a_pause_are_all_owed(world):
    instalments(world)
    do(world, "pause")
    world.clock.advance(70 * DAY)
    do(world, "change", interval="week")
    do(world, "resume", shift_anchor=False)
    assert next_dates(world, 2) == ["30 Apr 2026", "07 May 2026"]
    world.run_for(40 * DAY, step=DAY)
    assert world.debits().total() == 3


def test_a_pause_stops_an_open_invoice_and_resuming_rings_for_it_again(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.run_for(timedelta(minutes=10))
    assert world.attempts() == ["prepared"]
    do(world, "pause")
    world.transport.unreachable = False
    world.run_for(2 * DAY, step=timedelta(hours=6))
    assert (world.fate(), world.explain()["reason"]) == ("open, paused", "paused")
    assert world.attempts() == ["not_charged"]
    do(world, "resume", shift_anchor=False)
    world.tick()
    assert world.fate() == "paid"


def test_a_pause_does_not_revive_what_waits_for_a_person(world):
    world.subscribe(None)
    world.tick()
    do(world, "pause")
    do(world, "resume", shift_anchor=False)
    world.run_for(DAY, step=timedelta(hours=6))
    assert world.explain()["reason"] == "card_missing"


def test_a_charge_in_flight_when_paused_is_settled_and_not_tried_again_before_resume(world):
    world.subscribe("answer_lost_before")
    world.tick()
    do(world, "pause")
    world.run_for(timedelta(hours=8), step=timedelta(minutes=30))
    assert world.attempts() == ["not_charged"]
    assert world.explain()["reason"] == "paused"
    do(world, "resume", shift_anchor=False)
    assert row(world).status == "past_due"
    world.run_for(timedelta(days=3), step=timedelta(hours=6))
    assert len(world.attempts()) == 2


@pytest.mark.parametrize(
    ("what", "options"),
    [("pause", {}), ("cancel", {"at_period_end": False})],
)
def test_what_comes_before_the_arming_commit_wins_and_no_sale_is_sent(world, what, options):
    world.subscribe("approved")
    world.sweep()
    world.deliver(interrupted(world, what, **options))
    world.run_for(timedelta(hours=3), step=timedelta(minutes=10))
    assert world.sales("sub-1-p0-a1") == 0
    assert world.attempts() == ["not_charged"]


@pytest.mark.parametrize("status", ["paused", "cancelled", "suspended"])
def test_arming_refuses_by_the_status_alone(world, status):
    """The second lock: even if the attempt had been left as it was."""

    def sneak():
        with world.store.transaction() as connection:
            connection.execute(
                tables.subscriptions.update().values(status=status, next_billing_at=None)
            )

    world.subscribe("approved")
    world.sweep()
    world.deliver(world.ports_of_a_worker(gateway=_Delegate(world.ports.gateway, sneak)))
    assert world.sales("sub-1-p0-a1") == 0


# --- cancel, un-cancel and end ---------------------------------------------------------------


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


# --- suspended, and about to be cancelled ------------------------------------------------------


def forgotten(world):
    """References of what may be billed, is not held, and is never found by the sweep."""
    query = select(tables.subscriptions.c.reference_id).where(
        tables.subscriptions.c.status.in_(BILLABLE),
        tables.subscriptions.c.next_billing_at.is_(None),
        tables.subscriptions.c.held.is_(False),
    )
    with world.store.reading() as connection:
        return list(connection.execute(query).scalars())


def suspend(world, **terms):
    world.subscribe("decline_insufficient_funds", **terms)
    for _ in range(40):
        world.tick()
        if row(world).status == "suspended":
            return
        world.clock.advance(DAY)
    raise AssertionError("the ladder has no end")


def give_card(world, token="approved", reference="sub-1"):
    card = CardRecord(Secret(f"{token}.{reference}"), None, None, 12, 2040)
    return replace_card(world.store, world.vault, world.clock, subscription_reference=reference,
                        card=card, **ANN)  # fmt: skip


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


# --- what waits while nothing is billed --------------------------------------------------------


def test_a_pause_longer_than_the_patience_takes_nothing_of_it(world):
    world.subscribe(None)
    world.tick()
    until = invoices(world)[0].give_up_at
    world.clock.advance(5 * DAY)
    do(world, "pause")
    world.clock.advance(100 * DAY)
    do(world, "resume", shift_anchor=True)
    give_up_overdue(world.store, world.clock)
    [invoice] = invoices(world)
    assert (invoice.status, invoice.give_up_at) == ("open", until + 100 * DAY)


def test_younger_invoices_of_a_suspended_subscription_are_taken_up_when_it_is_paid(world):
    suspend(world, interval="week")
    assert {i.reason for i in invoices(world)[1:]} == {"suspended"}
    give_card(world)
    world.run_for(3 * DAY, step=timedelta(hours=6))
    first, *others, youngest = invoices(world)
    assert (first.status, youngest.status) == ("paid", "paid")
    assert others
    assert {i.status for i in others} == {"void"}
    assert all("collect_latest" in i.reason for i in others)
    one, other = sorted(debit.at for debit in world.sandbox.ledger)
    assert other - one >= DAY


def test_what_waited_for_an_older_one_is_collected_after_it_a_day_apart(world):
    world.subscribe("decline_insufficient_funds", interval="week")
    world.run_for(15 * DAY, step=DAY)
    give_card(world)
    world.run_for(4 * DAY, step=timedelta(hours=6))
    assert {i.status for i in invoices(world)} == {"paid"}
    dates = sorted(debit.at for debit in world.sandbox.ledger)
    assert len(dates) == 3
    assert all(after - before >= DAY for before, after in itertools.pairwise(dates))


def test_a_card_given_in_a_pause_is_charged_when_it_is_resumed(world):
    world.subscribe(None)
    world.tick()
    do(world, "pause")
    give_card(world)
    world.run_for(2 * DAY, step=timedelta(hours=12))
    assert (invoices(world)[0].reason, world.debits().total()) == ("paused", 0)
    do(world, "resume", shift_anchor=False)
    world.tick()
    assert world.fate() == "paid"


def test_a_ladder_that_cancels_leaves_no_invoice_open(world):
    world.subscribe("decline_insufficient_funds", interval="week")
    choose_policy(world.store, world.clock, subscription_reference="sub-1", policy="classic", **ANN)
    world.run_for(25 * DAY, step=DAY)
    assert row(world).status == "cancelled"
    assert {i.status for i in invoices(world)} == {"uncollectible", "void"}


@pytest.mark.parametrize("shift", [False, True])
def test_an_interval_changed_in_a_pause_is_not_counted_from_before_the_change(world, shift):
    world.subscribe("approved")
    world.tick()
    do(world, "pause")
    world.clock.advance(70 * DAY)
    do(world, "change", interval="day")
    outcome = do(world, "resume", shift_anchor=shift)
    assert outcome.status == "active"
    assert (row(world).next_period, outcome.next_billing_at.date().isoformat()) == (3, "2026-04-30")


def test_an_interval_changed_while_suspended_is_not_counted_from_before_the_change(world):
    suspend(world)
    world.clock.advance(60 * DAY)
    do(world, "change", interval="day")
    for invoice in give_card(world)["for_a_person"]:
        retry(world, invoice)
    world.tick()
    after = row(world)
    assert (after.status, after.next_period) == ("active", 3)
    assert after.next_billing_at.date().isoformat() == "2026-04-30"


# --- what a cancellation does not stop ------------------------------------------------------------


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


# --- an agreed end ----------------------------------------------------------------------------


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


# --- a start that must be a typing error -------------------------------------------------------


@pytest.mark.parametrize(
    ("anchor", "interval"),
    [("0026-01-31T00:00:00Z", "year"), ("1926-01-31T00:00:00Z", "day"),
     ("2023-01-31T00:00:00Z", "day"), ("2020-12-31T00:00:00Z", "year")],
)  # fmt: skip
def test_a_start_so_long_ago_is_refused_by_field_and_opens_nothing(world, anchor, interval):
    done = world.subscribe("approved", anchor_at=anchor, interval=interval)
    assert done.outcomes == ("refused",)
    assert done.refused[0].field == "anchor_at"
    assert everything(world) == [[], [], [], []]


def test_an_old_start_is_welcome_with_what_was_charged_before(world):
    done = world.subscribe("approved", anchor_at="1926-01-31T00:00:00Z", interval="day",
                           paid_through=START.isoformat())  # fmt: skip
    assert done.outcomes == ("added",)
    world.subscribe("approved", anchor_at="1926-01-31T00:00:00Z", interval="day",
                    paid_through=START.isoformat())  # fmt: skip
    assert len(everything(world)[0]) == 1


def test_a_record_that_was_taken_once_is_unchanged_however_old_it_gets(world):
    terms = {"interval": "day", "anchor_at": START.isoformat()}
    world.subscribe("approved", **terms)
    world.clock.advance(2_000 * DAY)
    assert world.subscribe("approved", **terms).outcomes == ("unchanged",)


def test_a_decision_opens_no_more_periods_than_one_transaction_may_take(world):
    world.subscribe("approved", interval="day")
    world.tick()
    world.clock.advance(1_500 * DAY)
    with pytest.raises(InvalidInput, match="ask again"):
        do(world, "pause")
    assert len(invoices(world)) == 1
    world.tick()
    assert do(world, "pause").status == "paused"


# --- asked twice, and asked wrongly ----------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("change", {"amount": "19.99", "interval": "year"}),
        ("change", {"ends_at": "2027-01-31T12:00:00Z"}),
        ("pause", {}),
        ("cancel", {"at_period_end": False}),
        ("cancel", {"at_period_end": True}),
        ("end", {}),
    ],
)
def test_asking_twice_changes_nothing_the_second_time(world, what, options):
    world.subscribe("approved")
    world.tick()
    assert do(world, what, **options).outcome == "changed"
    before = everything(world)
    assert do(world, what, **options).outcome == "unchanged"
    assert everything(world) == before


def test_resuming_what_runs_and_keeping_what_is_not_cancelled_change_nothing(world):
    world.subscribe("approved")
    world.tick()
    before = everything(world)
    assert do(world, "resume", shift_anchor=True).outcome == "unchanged"
    assert do(world, "uncancel").outcome == "unchanged"
    assert everything(world) == before


@pytest.mark.parametrize(
    ("field", "terms"),
    [
        ("amount", {"amount": "9.999"}),
        ("amount", {"amount": "1.5", "currency": "JPY"}),
        ("amount", {"amount": "0"}),
        ("amount", {"amount": "-1"}),
        ("amount", {"amount": "1e9"}),
        ("amount", {"amount": "99999999999"}),
        ("amount", {"currency": "EUR"}),
        ("currency", {"amount": "1.00", "currency": "usd"}),
        ("currency", {"currency": "ZZZ"}),
        ("interval", {"interval": "fortnight"}),
        ("interval_count", {"interval_count": 0}),
        ("interval_count", {"interval": "day", "interval_count": -1}),
        ("description", {"description": "x" * 501}),
        ("catch_up", {"catch_up": "collect_all"}),
        ("ends_at", {"ends_at": "2026-01-31"}),
        ("ends_at", {"ends_at": "2026-02-28T12:00:00"}),
        ("ends_at", {"ends_at": "2026-02-28T12:00:00Z"}),
        ("ends_at", {"ends_at": "next year"}),
        ("by", {"amount": "1.00", "by": ""}),
        ("reference_id", {"amount": "1.00", "reference": "sub-2"}),
    ],
    ids=str,
)
def test_bad_terms_are_refused_by_field_and_change_nothing(world, field, terms):
    world.subscribe("approved")  # its first period is due, and not opened by a refused change
    before = everything(world)
    with pytest.raises(InvalidInput) as refused:
        do(world, "change", **terms)
    assert refused.value.field == field
    assert everything(world) == before


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        ("cancel", "change", {"amount": "1.00"}),
        ("cancel", "pause", {}),
        ("cancel", "resume", {"shift_anchor": True}),
        ("cancel", "uncancel", {}),
        ("cancel", "end", {}),
        ("end", "cancel", {"at_period_end": True}),
        ("end", "pause", {}),
    ],
)
def test_what_is_over_stays_over(world, first, then, options):
    world.subscribe("approved")
    world.tick()
    do(world, first, **({"at_period_end": False} if first == "cancel" else {}))
    before = everything(world)
    with pytest.raises(InvalidInput) as refused:
        do(world, then, **options)
    assert refused.value.field == "status"
    assert everything(world) == before


# --- any order -------------------------------------------------------------------------------


class Model:
    """The rules once more, in plain Python: days are 24 h, and only one thing is owed at a time."""

    def __init__(self, start, days, cents):
        self.state = "runs"
        self.next_start, self.next_number = start, 0
        self.days, self.cents = days, cents
        self.leaves_at = self.paused_at = None
        self.owed = {}  # number -> (start, cents), collected sooner or later
        self.waived = {}  # never collected, for sure

    def catch_up_to(self, now):
        due = {}
        while self.state == "runs" and self.next_start <= now:
            if self.leaves_at == self.next_start:
                self.over("cancelled")
                self.next_start = None
                break
            due[self.next_number] = (self.next_start, self.cents)
            self.next_number += 1
            self.next_start += self.days * DAY
        for number in sorted(due):
            latest = number == max(due)
            (self.owed if latest else self.waived)[number] = due[number]

    def over(self, state):
        self.state, self.leaves_at, self.paused_at = state, None, None

    @property
    def is_over(self):
        return self.state in {"cancelled", "ended"}


class Walk(RuleBasedStateMachine):
    """Subclassed with the world that it walks in."""

    world = None
    names = itertools.count()

    def __init__(self):
        super().__init__()
        self.world.clock._now = START
        self.walked = []
        self.subscribe()

    def subscribe(self):
        self.reference = f"walk-{next(self.names)}"
        start = self.world.clock.now() + DAY
        self.world.subscribe("approved", self.reference, interval="day", interval_count=3,
                        anchor_at=start.isoformat())  # fmt: skip
        self.model = Model(start, 3, 999)
        self.walked.append((self.reference, self.model))

    @precondition(lambda self: self.model.is_over)
    @rule()
    def begin_again(self):
        self.subscribe()

    def ask(self, what, allowed, **options):
        self.model.catch_up_to(self.world.clock.now())
        if allowed():
            do(self.world, what, self.reference, **options)
            return True
        with pytest.raises(InvalidInput):
            do(self.world, what, self.reference, **options)
        # Nothing was written, not even the periods that a decision would have opened first.
        self.world.tick()
        return False

    @rule(hours=st.integers(1, 200))
    def time_passes(self, hours):
        self.world.clock.advance(timedelta(hours=hours))

    @rule()
    def workers_run(self):
        debits = self.debits()
        self.model.catch_up_to(self.world.clock.now())
        self.world.tick()
        if self.model.state in {"paused", "cancelled"}:
            assert self.debits() == debits

    def debits(self):
        return {
            name: n
            for name, n in self.world.debits().items()
            if name.startswith(f"{self.reference}-")
        }

    @rule(cents=st.integers(1, 9999))
    def change_amount(self, cents):
        model = self.model
        if self.ask("change", lambda: not model.is_over, amount=f"{cents / 100:.2f}"):
            model.cents = cents

    @rule(days=st.integers(1, 9))
    def change_interval(self, days):
        model = self.model
        if self.ask("change", lambda: not model.is_over, interval_count=days):
            if model.state == "paused" and days != model.days:
                # What the pause has passed over is skipped by its old length, and it counts anew.
                now = self.world.clock.now()
                while model.next_start < now:
                    model.next_start += model.days * DAY
                    model.next_number += 1
                model.paused_at = now
            model.days = days

    @precondition(lambda self: self.model.state == "runs")
    @rule()
    def pause(self):
        model = self.model
        if self.ask("pause", lambda: not model.is_over and model.leaves_at is None):
            model.state, model.paused_at = "paused", self.world.clock.now()

    @precondition(lambda self: self.model.state == "paused")
    @rule(hours=st.integers(0, 300), shift=st.booleans())
    def resume(self, hours, shift):
        self.world.clock.advance(timedelta(hours=hours))
        model, now = self.model, self.world.clock.now()
        if self.ask("resume", lambda: True, shift_anchor=shift):
            if shift:
                model.next_start += now - model.paused_at
            while model.next_start < now:
                model.next_start += model.days * DAY
                model.next_number += 1
            model.state, model.paused_at = "runs", None

    @precondition(lambda self: self.model.owed)
    @rule(at_period_end=st.booleans())
    def cancel(self, at_period_end):
        model = self.model
        if self.ask("cancel", lambda: model.state != "ended", at_period_end=at_period_end):
            if at_period_end and model.state == "runs":
                model.leaves_at = model.next_start
            elif not model.is_over:
                model.over("cancelled")

    @precondition(lambda self: self.model.leaves_at is not None)
    @rule()
    def uncancel(self):
        model = self.model
        if self.ask("uncancel", lambda: not model.is_over):
            model.leaves_at = None

    @rule(what=st.sampled_from(["pause", "resume", "uncancel"]))
    def ask_what_may_make_no_sense(self, what):
        model = self.model
        senseless = {"pause": {"paused"}, "resume": {"runs"}, "uncancel": {"paused", "runs"}}
        if model.state in senseless[what] and model.leaves_at is None:
            options = {"shift_anchor": True} if what == "resume" else {}
            before = row(self.world, self.reference).status
            if self.ask(what, lambda: not model.is_over, **options):
                assert row(self.world, self.reference).status in {before, "past_due", "active"}

    @precondition(lambda self: self.model.owed)
    @rule()
    def end(self):
        model = self.model
        if self.ask("end", lambda: model.state != "cancelled"):
            model.over("ended")

    @invariant()
    def the_terms_agree(self):
        kept, model = row(self.world, self.reference), self.model
        state = {"active": "runs", "past_due": "runs"}.get(kept.status, kept.status)
        assert (state, kept.amount_minor) == (model.state, model.cents)
        assert kept.next_period == model.next_number
        assert kept.cancels_at == model.leaves_at
        assert kept.next_billing_at == (model.next_start if model.state == "runs" else None)

    @invariant()
    def every_period_is_where_the_model_has_it(self):
        kept = {i.period_number: i for i in invoices(self.world, self.reference)}
        for number, invoice in kept.items():
            expected = self.model.waived.get(number) or self.model.owed[number]
            assert (invoice.period_start, invoice.amount_minor) == expected
            if number in self.model.waived:
                assert invoice.status == "void"
            elif self.model.state != "cancelled" and not self.was_overtaken(invoice, kept):
                assert invoice.status in {"open", "paid"}

    def was_overtaken(self, invoice, kept):
        """Nobody ran in time to charge it, and when somebody did a later one was there."""
        reason = invoice.reason or ""
        if not reason.startswith("waived by catch_up.collect_latest"):
            return False
        assert invoice.period_number < max(kept)
        assert self.world.explain(invoice.reference_id)["attempts"] == []
        return True

    def teardown(self):
        if self.ask("end", lambda: self.model.state != "cancelled"):
            self.model.over("ended")
        for _ in range(12):
            self.world.tick()
            self.world.clock.advance(DAY)
        for reference, model in self.walked:
            found = {i.period_number: i for i in invoices(self.world, reference)}
            kept = {
                number: "overtaken" if self.was_overtaken(invoice, found) else invoice.status
                for number, invoice in found.items()
            }
            settled = {"paid"} if model.state == "ended" else {"paid", "void"}
            assert set(kept) == {*model.owed, *model.waived}
            assert {kept[number] for number in model.owed} <= settled | {"overtaken"}


def test_any_order_of_decisions_leaves_what_the_plain_model_says(world):
    examples = 25 if world.store.is_sqlite else 8
    run_state_machine_as_test(
        type("WalkHere", (Walk,), {"world": world}),
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),  # a walk is short enough to be read; shrinking takes minutes
        ),
    )  # fmt: skip
    assert all(count == 1 for count in world.debits().values())


class RoughWalk(RuleBasedStateMachine):
    """Cards that refuse, outages, months, ends: no model could say what happens, but a few things
    must be true whatever does. Subclassed with the world that it walks in.
    """

    world = None
    names = itertools.count()
    visited: ClassVar[set[str]] = set()

    def __init__(self):
        super().__init__()
        self.world.transport.unreachable = False
        self.reference = f"rough-{next(self.names)}"

    @initialize(
        begins=st.sampled_from(["active", "past_due", "suspended"]),
        interval=st.sampled_from(["week", "month", "quarter"]),
        ends_after=st.sampled_from([None, None, 1, 4]),
    )
    def subscribe(self, begins, interval, ends_after):
        token = "approved" if begins == "active" else "decline_insufficient_funds"
        self.world.subscribe(token, self.reference, interval=interval,
                             ends_after_periods=ends_after)  # fmt: skip
        self.sweep()
        if begins == "suspended":
            self.nobody_answers_until_the_ladder_ends()

    @rule(days=st.sampled_from([1, 4, 20, 30]))
    def days_pass(self, days, steps=3):
        for _ in range(steps):
            self.world.clock.advance(days * DAY / steps)
            self.sweep()

    @precondition(lambda self: row(self.world, self.reference).status == "past_due")
    @rule()
    def nobody_answers_until_the_ladder_ends(self):
        self.days_pass(32, 8)

    @rule(days=st.sampled_from([1, 4, 30, 100]))
    def everything_is_down(self, days):
        self.world.clock.advance(days * DAY)

    @rule()
    def the_gateway_comes_and_goes(self):
        self.world.transport.unreachable = not self.world.transport.unreachable

    @rule()
    def sweep(self):
        before = row(self.world, self.reference).status
        known = len(self.world.sandbox.ledger)
        self.world.tick()
        new = [debit.reference_id for debit in list(self.world.sandbox.ledger)[known:]]
        made = [attempt for attempt in new if attempt.startswith(f"{self.reference}-")]
        if before in {"paused", "cancelled"}:
            assert made == []
        with self.world.store.reading() as connection:
            query = select(tables.attempts.c.origin).where(tables.attempts.c.reference_id.in_(made))
            origins = list(connection.execute(query).scalars())
        assert origins.count("scheduled") <= 1, "two first charges in one sweep"

    @rule(approved=st.booleans())
    def give_a_card(self, approved):
        give_card(self.world, "approved" if approved else "decline_insufficient_funds",
                  self.reference)  # fmt: skip

    @rule(
        what=st.sampled_from(
            [
                ("pause", {}),
                ("pause", {}),
                ("resume", {"shift_anchor": True}),
                ("resume", {"shift_anchor": False}),
                ("cancel", {"at_period_end": True}),
                ("cancel", {"at_period_end": True}),
                ("uncancel", {}),
                ("change", {"interval": "week"}),
                ("change", {"interval": "month"}),
                ("change", {"ends_at": "2027-01-31T00:00:00Z"}),
            ]
        )
    )
    def somebody_asks(self, what):
        name, options = what
        with suppress(InvalidInput):  # refused, and then nothing has changed
            do(self.world, name, self.reference, **options)

    @invariant()
    def what_may_be_billed_is_found_by_the_sweep(self):
        kept = row(self.world, self.reference)
        if kept is not None:
            self.visited.add(kept.status)
            assert (kept.next_billing_at is not None) == (kept.status in set(BILLABLE))

    @invariant()
    def periods_follow_each_other(self):
        kept = invoices(self.world, self.reference)
        assert all(one.period_end <= other.period_start for one, other in itertools.pairwise(kept))

    @invariant()
    def nothing_of_what_is_over_or_waits_is_due(self):
        kept = row(self.world, self.reference)
        for invoice in invoices(self.world, self.reference):
            if invoice.status == "open":
                assert invoice.reason or invoice.next_attempt_at or invoice.enqueue_at is None
                assert kept.status != "cancelled"
                if kept.status in {"paused", "suspended"} and invoice.next_attempt_at:
                    assert invoice.next_origin == "new_card"

    def teardown(self):
        """Whatever happened: with a good card and time, nothing is left that nobody decides."""
        self.world.transport.unreachable = False
        if row(self.world, self.reference).status == "paused":
            do(self.world, "resume", self.reference, shift_anchor=False)
        given = give_card(self.world, "approved", self.reference)
        for invoice in given["for_a_person"]:  # too old for a new card to collect by itself
            retry(self.world, invoice)
        for _ in range(10):
            self.sweep()
            self.world.clock.advance(1.5 * DAY)
        self.what_may_be_billed_is_found_by_the_sweep()
        assert row(self.world, self.reference).status not in {"past_due", "suspended", "paused"}
        waiting = [i.reason for i in invoices(self.world, self.reference) if i.status == "open"]
        assert all(reason and reason.startswith("catch_up.") for reason in waiting)
        with suppress(InvalidInput):  # over
            do(self.world, "cancel", self.reference, at_period_end=False)


def test_cards_that_refuse_outages_and_decisions_in_any_order_lose_and_double_nothing(world):
    examples = 10 if world.store.is_sqlite else 4
    walk = type("RoughWalkHere", (RoughWalk,), {"world": world, "visited": set()})
    run_state_machine_as_test(
        walk,
        settings=settings(
            max_examples=examples, stateful_step_count=15, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
        ),
    )  # fmt: skip
    assert all(count == 1 for count in world.debits().values())
    assert walk.visited >= {"active", "past_due", "suspended"}


def test_a_backup_step_of_a_suspended_subscription_waits_for_the_way_back(world):
    """Found by reading: it was left due, refused when armed, and held for a person."""
    world.subscribe("approved")
    renew_due(world.ports)
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_origin="backup"))
        subscription_id = connection.execute(select(tables.subscriptions.c.id)).scalar_one()
        pause_collection.put_aside(
            connection,
            subscription_id,
            pause_collection.Moment(world.clock.now(), "test"),
            SUSPENDED,
        )
        kept = connection.execute(select(tables.invoices)).one()
    assert (kept.next_attempt_at, kept.reason) == (None, SUSPENDED)
    assert kept.paused_attempt_at is not None
