"""Books that are from a backup: what they have forgotten is not charged again, on both databases."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.errors import InvalidInput, NotPayable, OutcomeUnknown
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import Statement, most_telling
from billing_worker.persistence.book.outside import Memory
from billing_worker.services import kill_switch
from billing_worker.services.charging.callbacks import Fate, Inbox, receive
from billing_worker.services.commands.one_off_charge import charge_once
from billing_worker.services.commands.records import parse_command
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer, Caps
from billing_worker.services.operators.debts import IfCharged, mark_paid, void_invoice
from billing_worker.services.operators.resolve import resolve_unknown
from billing_worker.services.subscriptions import lifecycle
from tests.support.backup import backup, restore

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def go_back(world, kept):
    """Restore, as a machine would find it: nothing of the broker is left either."""
    restore(world.store, kept)
    world.bell.messages.clear()


def start_again(world):
    now = world.clock.now()
    kill_switch.switch(world.store, on=True, service=None, by="operator:ann", reason="compared",
                 now=now, restored=True)  # fmt: skip


def charged_after_a_backup_of_the_prepared_attempt(world):
    """Runs one charge to its end; returns the books as they were when its create was sent."""
    kept = []

    def keep(request):
        if request.method == "POST" and not kept:
            kept.append(backup(world.store))

    world.transport.before_send = keep
    world.tick()
    world.run_for(5 * MINUTE)
    return kept[0]


# --- attempts that are in the backup ----------------------------------------------------------


def test_a_sold_attempt_that_is_prepared_and_long_overdue_in_the_backup_is_not_sold_again(world):
    world.subscribe("approved")
    lifecycle.change(world.store, world.clock, "sub-1", catch_up="hold", by="test")
    kept = charged_after_a_backup_of_the_prepared_attempt(world)
    assert world.fate() == "paid"
    go_back(world, kept)
    assert world.attempts() == ["prepared"]
    world.clock.advance(5 * DAY)
    world.run_for(30 * MINUTE)  # shorter than until the withdrawn attempt is asked about
    assert world.attempts() == ["not_charged"], "the overdue attempt is not decided anew here"
    catch_up.apply(world.store, world.clock, Answer(Policy(CatchUp.COLLECT_ALL, 1)), Caps(),
                   by="operator:ann", why="they pay")  # fmt: skip
    world.run_for(8 * DAY, step=HOUR)
    assert world.fate() == "paid"
    assert world.attempts() == ["succeeded", "not_charged"]
    assert world.debits() == {"sub-1-p0": 1}


def test_a_sold_attempt_that_a_pause_ended_after_the_restore_is_not_sold_again(world):
    world.subscribe("approved")
    kept = charged_after_a_backup_of_the_prepared_attempt(world)
    go_back(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    world.clock.advance(10 * MINUTE)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.run_for(HOUR)
    assert world.attempts() == ["succeeded", "not_charged"]
    assert world.debits() == {"sub-1-p0": 1}


def test_while_a_lost_create_may_still_be_paid_no_other_attempt_is_sold(world):
    world.subscribe("create_answer_lost")
    world.transport.before_send = lambda _: None
    world.sweep()
    world.transport.before_send = _unreachable_for_finds(world)
    world.deliver()
    assert world.attempts() == ["prepared"]
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.transport.before_send = lambda _: None
    world.transport.unreachable = False
    world.run_for(10 * MINUTE)
    assert world.attempts() == ["not_charged", "prepared"]
    assert "has not ended yet" in world.explain()["why"]
    assert world.debits() == {}
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert world.attempts()[-1] == "succeeded"
    assert world.debits() == {"sub-1-p0": 1}


def _unreachable_for_finds(world):
    def cut(request):
        world.transport.unreachable = request.method == "GET"

    return cut


# --- attempts that the backup has never seen --------------------------------------------------


def test_a_charge_that_the_backup_has_never_seen_is_found_and_not_repeated(world):
    world.subscribe("approved")
    kept = backup(world.store)
    world.tick()
    assert world.fate() == "paid"
    go_back(world, kept)
    world.clock.advance(10 * MINUTE)
    start_again(world)
    world.run_for(HOUR)
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1


def test_a_retry_that_the_backup_has_never_seen_is_found_and_not_repeated(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    kept = backup(world.store)
    world.run_for(10 * DAY, step=3 * HOUR)
    assert world.attempts() == ["declined"] * 3
    go_back(world, kept)
    start_again(world)
    world.run_for(10 * DAY, step=3 * HOUR)
    assert world.attempts() == ["declined"] * 3
    assert [world.sales(f"sub-1-p0-a{n}") for n in (1, 2, 3)] == [1, 1, 1]


def test_a_charge_that_was_pending_when_the_books_were_restored_is_left_to_end(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=4000)
    world.subscribe("approved_later")
    kept = backup(world.store)
    world.tick()
    assert world.attempts() == ["submitted"]
    go_back(world, kept)
    start_again(world)
    world.run_for(30 * MINUTE)
    assert world.attempts() == ["prepared"]
    assert "restored books" in world.explain()["why"]
    world.run_for(2 * HOUR)
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1


def test_a_one_off_charge_that_is_ordered_again_after_a_restore_is_found(world):
    kept = backup(world.store)
    order_once(world)
    world.run_for(5 * MINUTE)
    assert world.fate("extra-1-p0") == "paid"
    go_back(world, kept)
    start_again(world)
    world.clock.advance(DAY)
    order_once(world)
    world.run_for(5 * MINUTE)
    assert world.fate("extra-1-p0") == "paid"
    assert world.sales("extra-1-p0-a1") == 1


def order_once(world):
    order = parse_command("billing.charge_once", {
        "reference_id": "extra-1", "customer": {"reference_id": "jo"},
        "card": {"token": "approved.jo"}, "amount": "5.00", "currency": "USD",
    }).record  # fmt: skip
    charge_once(world.store, world.vault, world.clock, world.ports.timings, order)


def test_a_period_later_than_the_next_is_created_without_a_poll(world):
    world.subscribe("approved")
    world.tick()
    start_again(world)
    world.run_for(40 * DAY, step=DAY)
    assert world.fate("sub-1-p1") == "paid"
    world.clock.advance(30 * DAY)
    world.transport.sent.clear()
    world.tick()
    assert world.fate("sub-1-p2") == "paid"
    assert [r.method for r in world.transport.sent] == ["POST", "POST", "GET"]


def test_a_subscription_that_begins_long_after_the_restore_is_created_without_a_poll(world):
    start_again(world)
    world.clock.advance(40 * DAY)
    world.subscribe("approved")
    world.tick()
    assert [r.method for r in world.transport.sent] == ["POST", "POST", "GET"]


def test_no_pay_link_opens_for_what_was_charged_after_the_backup(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    kept = backup(world.store)
    page = start_checkout(world.ports, {"invoice": "sub-1-p0"})
    world.sandbox.pay_on_page(page["gateway_id"])
    go_back(world, kept)
    start_again(world)
    with pytest.raises(NotPayable):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    world.run_for(6 * DAY, step=3 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}


# --- what stands in the way of finding it -----------------------------------------------------


def test_a_charge_behind_a_number_that_left_nothing_at_the_gateway_is_found(world):
    world.subscribe("approved")
    kept = backup(world.store)
    world.transport.unreachable = True
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    world.transport.unreachable = False
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.run_for(10 * MINUTE)
    assert world.attempts() == ["not_charged", "succeeded"]
    go_back(world, kept)
    start_again(world)
    world.run_for(4 * HOUR, step=5 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


def test_a_pending_sale_is_not_repeated_when_the_poll_for_it_fails_once(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=4000)
    world.subscribe("approved_later")
    kept = backup(world.store)
    world.tick()
    go_back(world, kept)
    start_again(world)
    failures = iter([True])

    def time_out(request):
        if request.method == "GET" and next(failures, False):
            raise OutcomeUnknown("read timeout")

    world.transport.before_send = time_out
    world.run_for(3 * HOUR)
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1


@pytest.mark.parametrize("token", ["approved", "approved_later"])
def test_no_card_page_opens_for_an_invoice_that_was_charged_after_the_backup(world, token):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=4000)
    world.subscribe(token)
    kept = backup(world.store)
    world.tick()
    go_back(world, kept)
    world.sweep()
    world.bell.messages.clear()
    start_again(world)
    with pytest.raises(NotPayable):
        start_tokenisation(world.ports, {
            "reference_id": "card-1", "customer": {"reference_id": "customer-of-sub-1"},
            "invoice": "sub-1-p0",
        })  # fmt: skip
    world.run_for(5 * HOUR, step=5 * MINUTE)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


@pytest.mark.parametrize("shown", ["process_pending", "expired"])
def test_no_second_page_opens_beside_one_that_books_have_forgotten(world, shown):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    kept = backup(world.store)
    page = start_checkout(world.ports, {"invoice": "sub-1-p0"})
    forgotten = world.sandbox._books.with_id(page["gateway_id"])
    go_back(world, kept)
    start_again(world)
    forgotten.status = shown
    with pytest.raises(NotPayable):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    assert len(world.sandbox._books.with_reference("sub-1-p0-a2")) == 1


def test_a_page_for_a_card_that_is_asked_for_again_after_a_restore_is_the_same_one(world):
    wanted = {
        "reference_id": "card-1", "customer": {"reference_id": "jo"},
        "amount": "1.00", "currency": "USD",
    }  # fmt: skip
    kept = backup(world.store)
    first = start_tokenisation(world.ports, wanted)
    go_back(world, kept)
    start_again(world)
    assert start_tokenisation(world.ports, wanted)["gateway_id"] == first["gateway_id"]


def test_a_period_that_a_repeated_resumption_gives_a_later_date_is_polled_for(world):
    world.subscribe("approved")
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    kept = backup(world.store)
    _resume_after(world, 5 * DAY)
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.fate("sub-1-p1") == "paid"
    go_back(world, kept)
    _resume_after(world, timedelta(0))
    start_again(world)
    world.run_for(50 * DAY, step=6 * HOUR)
    assert world.fate("sub-1-p1") == "paid"
    assert world.sales("sub-1-p1-a1") == 1


def _resume_after(world, span):
    world.clock.advance(span)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=True, by="test")


def test_late_money_on_an_expired_sale_that_books_have_forgotten_is_waited_for(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=600)
    world.subscribe("late_after_expiry")
    kept = charged_after_a_backup_of_the_prepared_attempt(world)
    go_back(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    start_again(world)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    world.run_for(5 * HOUR, step=5 * MINUTE)
    assert world.debits() == {"sub-1-p0": 1}


def without_knowing_it(world, kept):
    """Restored, and nobody says so; nor does anything outside of the database."""
    go_back(world, kept)
    world.ports = world.ports_of_a_worker(outside=(Memory(),))


@pytest.mark.parametrize("restored", [go_back, without_knowing_it])
def test_an_attempt_without_an_id_that_is_found_expired_is_waited_for_like_a_sale(world, restored):
    world.subscribe("late_16h_after_expiry")
    kept = charged_after_a_backup_of_the_prepared_attempt(world)
    restored(world, kept)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    if restored is go_back:
        start_again(world)
    world.clock.advance(65 * MINUTE)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=False, by="test")
    before = len(world.transport.sent)
    world.run_for(12 * HOUR, step=5 * MINUTE)
    assert len(world.transport.sent) - before <= 20  # dated, not asked every five minutes
    assert world.explain()["next_attempt_at"] >= (world.clock.now() + 2 * DAY).isoformat()
    world.run_for(6 * DAY, step=HOUR)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("token", ["late_6h_after_expiry", "late_16h_after_expiry"])
def test_a_sale_that_books_have_forgotten_and_that_is_found_expired_is_waited_for(world, token):
    world.subscribe(token, ends_after_periods=1)
    kept = backup(world.store)
    world.tick()
    world.clock.advance(2 * HOUR)
    go_back(world, kept)
    start_again(world)
    world.run_for(10 * DAY, step=HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.sales("sub-1-p0-a1") == 1
    assert world.fate() == "paid"


def test_of_two_invoices_under_one_reference_the_one_nearest_to_money_counts():
    def found(*statuses):
        return most_telling([Statement(f"cpi_{s}", s) for s in statuses]).status

    assert found("processed", "expired", "process_pending") == "processed"
    assert found("processing", "process_failed") == "processing"
    assert found("process_failed", "process_pending") == "process_failed"
    assert found("process_pending", "expired") == "process_pending"
    assert found("partially_processed", "process_failed") == "partially_processed"


# --- what a person, or a decision, ends while the forgotten sale is pending --------------------


def found_pending_after_a_restore(world):
    """Sold by the forgotten life, whose money comes after more than an hour."""
    world.sandbox.behaviour = replace(world.sandbox.behaviour, later_seconds=4000)
    world.subscribe("approved_later")
    kept = backup(world.store)
    world.tick()
    go_back(world, kept)
    world.clock.advance(10 * MINUTE)
    start_again(world)
    world.run_for(10 * MINUTE)
    assert world.attempts() == ["prepared"]


def void(world, **options):
    return void_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann",
                        why="gone", **options)  # fmt: skip


def pay_by_bank(world, **options):
    return mark_paid(world.store, world.clock, reference="sub-1-p0", evidence="bank",
                     by="operator:ann", why="x", **options)  # fmt: skip


def cancel(world, **_):
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="ann")


@pytest.mark.parametrize("end", [void, pay_by_bank, cancel])
def test_late_money_of_a_forgotten_sale_is_found_although_its_attempt_was_withdrawn(world, end):
    found_pending_after_a_restore(world)
    end(world, if_charged=IfCharged.ALL_THE_SAME)
    assert world.attempts() == ["not_charged"]
    world.run_for(2 * DAY, step=HOUR)
    found = [status for status in world.attempts() if status != "not_charged"]
    assert found == ["surplus"], "whether the next reference is looked for too depends on the end"


def test_a_withdrawn_attempt_that_may_be_sold_is_polled_on_a_ladder_and_then_left_to_a_person(
    world,
):
    world.sandbox.behaviour = replace(
        world.sandbox.behaviour, later_seconds=40 * 86400.0, lifetime_seconds=90 * 86400.0
    )
    world.subscribe("approved_later", ends_after_periods=1)
    kept = backup(world.store)
    world.tick()
    go_back(world, kept)
    start_again(world)
    world.run_for(10 * MINUTE)
    void(world, if_charged=IfCharged.ALL_THE_SAME)
    before = len(world.transport.sent)
    world.run_for(35 * DAY, step=HOUR)
    assert len(world.transport.sent) - before == 2 * 5  # a list and its invoice, at each date
    assert any("it is not polled any more" in why for why in world.alerts())
    world.run_for(6 * DAY, step=HOUR)
    assert world.attempts() == ["not_charged"]
    [debit] = world.sandbox.ledger
    called_back(world, gateway_id=debit.gateway_id, reference_id=debit.reference_id)
    world.tick()
    assert world.attempts() == ["surplus"]


def test_what_is_found_pending_for_days_is_asked_about_every_hour(world):
    world.sandbox.behaviour = replace(
        world.sandbox.behaviour, later_seconds=5 * 86400.0, lifetime_seconds=90 * 86400.0
    )
    world.subscribe("approved_later", ends_after_periods=1)
    kept = backup(world.store)
    world.tick()
    go_back(world, kept)
    start_again(world)
    world.run_for(30 * HOUR, step=10 * MINUTE)
    before = len(world.transport.sent)
    world.run_for(10 * HOUR, step=5 * MINUTE)
    assert world.attempts() == ["prepared"]
    assert len(world.transport.sent) - before <= 2 * 11
    world.run_for(5 * DAY, step=HOUR)
    assert (world.attempts(), world.fate()) == (["succeeded", "not_charged"], "paid")


def called_back(world, *, gateway_id, reference_id):
    said = {"id": gateway_id, "attributes": {"test_mode": True, "reference_id": reference_id}}
    inbox = Inbox(world.store, world.clock, world.vault, world.bell, Secret("k"), test_mode=True)
    assert receive(inbox, json.dumps({"data": said}).encode()) is Fate.STORED


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("end", [void, pay_by_bank])
def test_a_person_is_told_that_a_forgotten_sale_may_be_charged_already(world, end, reachable):
    """Also when the invoice waits for something else by now: what was found stays found."""
    found_pending_after_a_restore(world)
    world.transport.unreachable = not reachable
    world.run_for(10 * MINUTE)
    with pytest.raises(InvalidInput, match="may be charged already"):
        end(world)
    with pytest.raises(InvalidInput) as told:
        resolve_unknown(world.ports, reference="sub-1-p0", paid=True, evidence="acquirer's list",
                        by="operator:ann", why="x")  # fmt: skip
    assert "nothing was sold" not in told.value.reason
    assert "may be charged already" in told.value.reason
