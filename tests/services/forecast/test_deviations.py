"""What became of a preview: every deviation is found, and explained by what caused it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema import tables
from billing_worker.services import kill_switch
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.dunning import choose_policy, retry_invoice
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.operators.debts import mark_paid
from tests.support.forecast import DAY, Kept, do, foreseen, reasons, rows
from tests.support.world import START


def test_a_month_as_foreseen_has_no_deviation(world):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", interval="week")
    kept = Kept(world)
    world.run_for(31 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations == {}
    assert comparison.counts == {"as_planned": 15}


def test_before_its_time_a_planned_charge_is_not_a_deviation(world):
    world.subscribe("approved", interval="week")
    kept = Kept(world)
    world.tick()
    deviations, comparison = kept.compared()
    assert deviations == {}
    assert comparison.counts == {"as_planned": 1, "not_due_yet": 4}


def test_every_deviation_of_an_eventful_month_is_explained(world):
    cards = {"declines": "decline_card_expired", "unknown": "never_answers_after"}
    names = ("cancels", "pauses", "changes", "resumes", "ends", "faster", *cards)
    for name in names:
        world.subscribe(cards.get(name, "approved"), name, interval="week",
                        anchor_at=(START + DAY).isoformat())  # fmt: skip
    do(world, "pause", "resumes")
    kept = Kept(world)
    world.clock.advance(timedelta(hours=12))
    do(world, "cancel", "cancels", at_period_end=False)
    do(world, "pause", "pauses")
    do(world, "resume", "resumes", shift_anchor=False)
    do(world, "change", "changes", amount="1.00")
    do(world, "change", "faster", interval="day")
    do(world, "end", "ends")
    world.subscribe("approved", "newcomer")
    world.run_for(3 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert comparison.unexplained == 0
    kinds = {invoice: deviation.kind for invoice, deviation in deviations.items()}
    assert kinds["cancels-p0"] == kinds["pauses-p0"] == kinds["ends-p0"] == "not_due"
    assert kinds["changes-p0"] == "changed"
    assert kinds["resumes-p0"] == "charged"
    assert kinds["declines-p0"] == "open"
    assert kinds["faster-p1"] == "moved"
    assert kinds["newcomer-p0"] == "unforeseen"
    assert "subscription.cancelled by operator:ann" in deviations["cancels-p0"].because
    assert "asked by phone" in deviations["changes-p0"].because
    assert "card_expired" in deviations["declines-p0"].because
    assert deviations["newcomer-p0"].because.startswith("subscribed after")


def test_a_charge_in_flight_is_unknown_and_says_so(world):
    world.subscribe("needs_3ds")
    kept = Kept(world, DAY)
    world.tick()
    deviations, comparison = kept.compared()
    assert (deviations["sub-1-p0"].kind, comparison.unexplained) == ("unknown", 0)


@pytest.mark.by_hand
def test_what_nobody_decided_is_unexplained(world):
    for name in ("never-opened", "never-charged", "other-amount", "uninvited"):
        world.subscribe("approved", name)
    do(world, "pause", "uninvited")
    kept = Kept(world, DAY)
    with world.store.transaction() as connection:
        moved = update(tables.subscriptions).where(
            tables.subscriptions.c.reference_id == "never-opened"
        )
        connection.execute(moved.values(next_billing_at=START + 40 * DAY))
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "other-amount")
            .values(amount_minor=1)
        )
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "uninvited")
            .values(status="active", paused_at=None)
        )
        connection.execute(
            update(tables.invoices)
            .where(tables.invoices.c.reference_id == "uninvited-p0")
            .values(next_attempt_at=START, enqueue_at=START)
        )
    world.tick()
    with world.store.transaction() as connection:
        world_forgets = update(tables.invoices).where(
            tables.invoices.c.reference_id == "never-charged-p0"
        )
        connection.execute(world_forgets.values(status="open", paid_at=None, next_attempt_at=START))
    world.clock.advance(timedelta(hours=2))
    deviations, comparison = kept.compared()
    unexplained = {d.invoice for d in deviations.values() if d.because is None}
    assert unexplained == {
        "never-opened-p0", "never-charged-p0", "other-amount-p0", "uninvited-p0",
    }  # fmt: skip
    assert comparison.unexplained == 4
    with world.store.transaction() as connection:  # as the ledger knows it
        connection.execute(world_forgets.values(status="paid", paid_at=START, next_attempt_at=None))


def test_a_card_that_was_given_explains_a_charge_that_had_none_and_no_other(world):
    for name in ("cardless", "paused"):
        world.subscribe(
            None if name == "cardless" else "approved",
            name,
            anchor_at=(START + 5 * DAY).isoformat(),
        )
    do(world, "pause", "paused")
    kept = Kept(world, 20 * DAY)
    world.clock.advance(DAY)
    for name in ("cardless", "paused"):
        card = CardRecord(Secret(f"approved.{name}"), None, None, 12, 2040)
        replace_card(
            world.store, world.vault, world.clock,
            subscription_reference=name, card=card, by="carl", why="new",
        )  # fmt: skip
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "paused")
            .values(status="active", paused_at=None, next_billing_at=START + 5 * DAY)
        )
    world.run_for(6 * DAY, step=DAY)
    deviations, comparison = kept.compared()
    assert "card.added by carl" in deviations["cardless-p0"].because
    assert deviations["paused-p0"].because is None
    assert comparison.unexplained == 1


def test_another_dunning_policy_is_a_change_that_explains_nothing_and_ends_no_comparison(world):
    world.subscribe("approved", anchor_at=(START + 5 * DAY).isoformat())
    kept = Kept(world, 20 * DAY)
    world.clock.advance(DAY)
    for policy in ("short", "slow"):
        choose_policy(
            world.store, world.clock,
            subscription_reference="sub-1", policy=policy, by="ann", why="vip",
        )  # fmt: skip
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(next_billing_at=START + 99 * DAY))
    world.clock.advance(10 * DAY)
    deviations, _ = kept.compared()
    assert deviations["sub-1-p0"].because is None


def cannot_be_planned(world, reference):
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == reference)
            .values(timezone="Mars/Phobos")
        )


def test_a_subscription_that_is_stuck_explains_its_missing_charges(world):
    for name in ("stuck", "missing"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    cannot_be_planned(world, "stuck")
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "missing")
            .values(next_billing_at=START + 9 * DAY)
        )
    world.run_for(4 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations["stuck-p0"].because.startswith("subscription.stuck by renew")
    assert "InvalidInput" in deviations["stuck-p0"].because
    assert deviations["missing-p0"].because is None
    assert comparison.unexplained == 1


def test_a_stuck_subscription_that_was_told_of_before_explains_its_missing_charges(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    made_before = Kept(world, 3 * DAY)
    cannot_be_planned(world, "sub-1")
    world.run_for(2 * DAY, step=DAY / 2)
    made_before.made_at = world.clock.now()  # as if it had been mended and broken again
    deviations, comparison = made_before.compared()
    assert "the sweep cannot plan it" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_trouble_that_is_over_explains_the_charge(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    cannot_be_planned(world, "sub-1")
    kept = Kept(world, 3 * DAY)
    with world.store.transaction() as connection:
        connection.execute(update(tables.subscriptions).values(timezone="UTC"))
    world.run_for(2 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert "no more trouble" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_an_end_that_was_agreed_later_explains_the_periods_that_are_gone(world):
    world.subscribe("approved", interval="week")
    kept = Kept(world)
    world.clock.advance(1)
    do(world, "change", ends_at=(START + 10 * DAY).isoformat())
    world.run_for(31 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert {d.kind for d in deviations.values()} == {"not_due"}
    assert all("subscription.changed" in d.because for d in deviations.values())
    assert (comparison.unexplained, len(deviations)) == (0, 3)


def test_the_sales_switch_explains_what_waited_for_it_and_no_missing_period(world):
    for name in ("waits", "missing"):
        world.subscribe("approved", name, anchor_at=(START + DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == "missing")
            .values(next_billing_at=START + 9 * DAY)
        )
    kill_switch.switch(world.store, on=False, service=None, by="operator:ann", reason="audit",
                 now=world.clock.now() + timedelta(seconds=1))  # fmt: skip
    world.run_for(2 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert deviations["waits-p0"].because.startswith("sales are switched off; sales.switched by")
    assert deviations["missing-p0"].because is None
    assert comparison.unexplained == 1


def test_what_the_preview_dated_after_its_end_is_no_deviation_once_it_is_charged(world):
    world.subscribe("approved", anchor_at=(START - 40 * DAY).isoformat(), catch_up="collect_all:4")
    kept = Kept(world, 2 * DAY)
    assert "next attempt is later" in reasons(foreseen(world, 2 * DAY)).values()
    world.run_for(10 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert (deviations, comparison.unexplained) == ({}, 0)


def test_a_charge_on_another_day_than_planned_is_a_deviation_with_its_cause(world):
    world.subscribe("decline_insufficient_funds", "late")
    world.subscribe(
        "approved", "early", anchor_at=(START - 40 * DAY).isoformat(), catch_up="collect_all:9"
    )
    kept = Kept(world, 20 * DAY)
    world.tick()
    world.clock.advance(2 * DAY)
    card = CardRecord(Secret("approved.new"), None, None, 12, 2040)
    replace_card(
        world.store, world.vault, world.clock,
        subscription_reference="late", card=card, by="carl", why="new",
    )  # fmt: skip
    dated = next(name for name, row in rows(world).items()
                 if row.status == "open" and name.startswith("early"))  # fmt: skip
    retry_invoice(world.store, world.clock, reference=dated, by="operator:ann", why="asked")
    world.run_for(8 * DAY, step=DAY / 2)
    deviations, comparison = kept.compared()
    assert {invoice: d.kind for invoice, d in deviations.items()} == {
        "late-p0": "late", dated: "early",
    }  # fmt: skip
    assert "insufficient_funds" in deviations["late-p0"].because
    assert "retry.ordered by operator:ann" in deviations[dated].because
    assert comparison.unexplained == 0


def test_an_attempt_from_before_the_preview_that_is_paid_late_is_the_gateways_word(world):
    world.subscribe("late_after_expiry")
    world.run_for(DAY / 24, step=timedelta(minutes=5))
    kept = Kept(world)
    world.run_for(5 * DAY, step=timedelta(hours=6))
    deviations, comparison = kept.compared()
    assert deviations["sub-1-p0"].kind == "charged"
    assert "before the preview, was paid" in deviations["sub-1-p0"].because
    assert comparison.unexplained == 0


def test_a_cancellation_that_no_sweep_has_carried_out_explains_the_period_that_is_gone(world):
    for name in ("leaving", "staying"):
        world.subscribe("approved", name, anchor_at=(START + 2 * DAY).isoformat())
    kept = Kept(world, 3 * DAY)
    world.clock.advance(DAY)
    do(world, "cancel", "leaving", at_period_end=True)
    world.clock.advance(DAY + timedelta(minutes=5))
    deviations, comparison = kept.compared()
    assert "cancellation_scheduled by operator:ann" in deviations["leaving-p0"].because
    assert comparison.counts["not_due_yet"] == 1, "the next sweep is five minutes late, no more"
    world.clock.advance(DAY / 4)
    deviations, _ = kept.compared()
    assert deviations["staying-p0"].because is None


def test_what_came_after_an_uninvited_charge_does_not_explain_it(world):
    world.subscribe("approved", anchor_at=(START + DAY).isoformat())
    do(world, "pause")
    world.clock.advance(60)
    kept = Kept(world, 20 * DAY)
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(
                status="active", paused_at=None, next_billing_at=START + DAY
            )
        )
    world.run_for(2 * DAY, step=DAY / 2)
    do(world, "pause")
    world.clock.advance(DAY)
    do(world, "resume", shift_anchor=False)
    deviations, comparison = kept.compared()
    assert (deviations["sub-1-p0"].kind, deviations["sub-1-p0"].because) == ("charged", None)
    assert comparison.unexplained == 1


def test_what_was_paid_elsewhere_was_no_charge_and_says_so(world):
    world.subscribe("approved", "planned")
    world.sweep()
    kept = Kept(world, DAY)
    world.subscribe("approved", "unforeseen")
    world.sweep()
    for reference in ("planned-p0", "unforeseen-p0"):
        mark_paid(
            world.store, world.clock, reference=reference, evidence="cash", by="ann", why="desk"
        )
    deviations, comparison = kept.compared()
    assert list(deviations) == ["planned-p0"]
    assert deviations["planned-p0"].because == "paid elsewhere: cash"
    assert comparison.unexplained == 0
