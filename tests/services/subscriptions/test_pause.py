"""A paused subscription opens and charges nothing, and goes on where it was."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest

from billing_worker.persistence.schema import tables
from billing_worker.services.dunning import choose_policy, give_up_overdue
from tests.support.lifecycle import ANN, DAY, do, give_card, invoices, next_dates, row, suspend
from tests.support.recovery import banks_change_their_mind, retry
from tests.support.world import START


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


@pytest.mark.by_hand
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
