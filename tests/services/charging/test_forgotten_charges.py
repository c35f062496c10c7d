"""Charges that restored books have forgotten, of invoices that are not charged again."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.events import EventKind
from billing_worker.domain.secret import Secret
from billing_worker.persistence.forgotten_charges import left_without_a_look
from billing_worker.persistence.schema.tables import events
from billing_worker.services.cards.new_card import Scope, replace_card
from billing_worker.services.charging import forgotten_charges
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.operators.debts import IfCharged, mark_paid, void_invoice
from billing_worker.services.operators.resolve import resolve_unknown
from billing_worker.services.subscriptions import lifecycle
from tests.services.charging.test_restored_books import go_back, start_again
from tests.support.backup import backup

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def restored(world, kept):
    world.clock.advance(MINUTE)
    go_back(world, kept)
    start_again(world)


def suspected(world):
    query = select(events.c.invoice_id).where(events.c.kind == EventKind.ATTEMPT_SUSPECTED)
    with world.store.reading() as connection:
        return list(connection.execute(query).scalars())


def fates(world):
    return {reference: world.fate(reference) for reference in world.debits()}


def test_the_months_that_restored_books_waive_are_found_paid(world):
    """They are late, and `collect_latest` collects one of them: the others were charged long ago."""
    world.subscribe("approved")
    world.tick()
    kept = backup(world.store)
    world.run_for(100 * DAY, step=12 * HOUR)
    restored(world, kept)
    world.run_for(3 * DAY, step=HOUR)
    assert fates(world) == {f"sub-1-p{number}": "paid" for number in range(4)}
    assert set(world.debits().values()) == {1}


def test_a_worker_that_comes_back_after_a_month_still_looks_for_them(world):
    world.subscribe("approved")
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    world.clock.advance(70 * DAY)
    world.run_for(2 * DAY, step=HOUR)
    assert world.fate() == "paid"
    assert set(world.debits().values()) == {1}


def test_a_paused_subscription_that_the_lost_time_has_charged_is_found_paid(world):
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


def test_money_for_an_invoice_that_a_person_voids_again_is_surplus_with_an_alert(world):
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    void_invoice(world.store, world.clock, reference="sub-1-p0", by="ann", why="agreed",
                 if_charged=IfCharged.REFUSE)  # fmt: skip
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.attempts() == ["surplus", "not_charged"], "behind what is found another may be"
    with world.store.reading() as connection:
        surplus = select(events.c.alert).where(events.c.kind == EventKind.ATTEMPT_SURPLUS)
        assert connection.execute(surplus).scalars().all() == [True]


def test_a_second_payment_that_only_the_lost_time_knew_is_surplus(world):
    """A named person had called the charge unpaid, and the customer had paid on a page."""
    world.subscribe("late_after_expiry")
    world.tick()
    kept = backup(world.store)
    resolve_unknown(world.ports, reference="sub-1-p0-a1", paid=False, evidence="the statement",
                    by="ann", why="asked")  # fmt: skip
    page = start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert world.sandbox.pay_on_page(page["gateway_id"]).status == 200
    restored(world, kept)
    world.run_for(3 * DAY, step=HOUR)
    assert world.debits() == {"sub-1-p0": 2}
    assert sorted(world.attempts()) == ["not_charged", "succeeded", "surplus"]


def test_what_is_paid_between_two_losses_is_still_looked_for(world):
    """A second loss is noticed before anybody has searched after the first one."""
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    mark_paid(world.store, world.clock, reference="sub-1-p0", evidence="cash", by="ann", why="asked",
              if_charged=IfCharged.REFUSE)  # fmt: skip
    world.clock.advance(MINUTE)
    start_again(world)
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.attempts() == ["surplus", "not_charged"]


def test_a_charge_behind_an_attempt_that_was_given_up_is_found(world):
    """The first attempt left nothing at the gateway. The second one, with another card, was sold."""
    world.subscribe("create_error_500")
    world.tick()
    card = CardRecord(Secret("approved"), None, None, 12, 2032)
    replace_card(world.store, world.ports.vault, world.clock, subscription_reference="sub-1",
                 card=card, scope=Scope.SUBSCRIPTION, by="ann", why=None)  # fmt: skip
    kept = backup(world.store)
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.fate() == "paid"
    restored(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    world.run_for(3 * HOUR, step=10 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


def test_books_that_have_forgotten_nothing_look_for_nothing(world):
    world.subscribe("approved")
    lifecycle.change(world.store, world.clock, "sub-1", catch_up="collect_latest", by="test")
    world.clock.advance(100 * DAY)
    world.run_for(2 * DAY, step=HOUR)
    assert suspected(world) == []


def test_an_invoice_is_looked_for_once_and_not_again_by_each_sweep(world):
    world.subscribe("approved")
    kept = backup(world.store)
    restored(world, kept)
    world.clock.advance(70 * DAY)
    world.run_for(5 * DAY, step=HOUR)
    assert len(suspected(world)) == 2, "two waived months"
    with world.store.reading() as connection:
        since = world.clock.now() - 400 * DAY
        assert left_without_a_look(connection, since, since, since) == []


@pytest.mark.parametrize("is_searched_first", [True, False])
def test_a_forgotten_charge_is_found_by_a_worker_that_was_away_until_it_is_too_old(
    world, is_searched_first
):
    """The worker is away until the age cap holds the invoice, and may have searched before or not."""
    world.subscribe("approved", ends_after_periods=1)
    renew_due(world.ports)
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    if is_searched_first:
        world.sweep()
    world.bell.messages.clear()
    world.clock.advance(70 * DAY)
    world.run_for(2 * DAY, step=HOUR)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("step", ["counted", "suspected"])
def test_a_search_that_dies_is_made_again(world, monkeypatch, step):
    """Dead before the attempts are written, or after it and before they are asked about."""
    world.subscribe("approved")
    renew_due(world.ports)
    kept = backup(world.store)
    world.tick()
    restored(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    real = forgotten_charges._suspect

    def dies(*given):
        if step == "suspected":
            real(*given)
        monkeypatch.setattr(forgotten_charges, "_suspect", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(forgotten_charges, "_suspect", dies)
    with pytest.raises(KeyboardInterrupt):
        world.sweep()
    world.run_for(3 * HOUR, step=10 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}
