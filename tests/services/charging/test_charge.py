"""One charge through the whole protocol, on both databases, against the twin."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.outcome import NothingSent
from billing_worker.persistence.schema.tables import invoices
from billing_worker.services.attempts.claim import claim
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from tests.support.one_by_one import EachAlone

pytestmark = pytest.mark.sql

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def test_an_approved_card_is_charged_once_and_the_invoice_is_paid(world):
    world.subscribe("approved")
    world.tick()
    assert world.fate() == "paid"
    assert world.attempts() == ["succeeded"]
    assert world.debits() == {"sub-1-p0": 1}


def test_the_history_of_a_charge_tells_its_steps_in_order(world):
    world.subscribe("approved")
    world.tick()
    assert world.events() == [
        "invoice.opened",
        "attempt.prepared",
        "attempt.submitted",
        "attempt.succeeded",
        "invoice.paid",
    ]


def test_every_wire_call_of_a_charge_is_kept_with_its_outcome(world):
    world.subscribe("approved")
    world.tick()
    calls = [
        (call["operation"], call["outcome"])
        for event in world.explain()["history"]
        for call in event["data"].get("calls", ())
    ]
    assert calls == [("create", "201"), ("sale", "200"), ("look", "200")]


def test_a_declined_invoice_stays_open_with_its_reason_and_the_date_of_its_next_step(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(6 * HOUR, step=HOUR)
    assert world.attempts() == ["declined"]
    assert world.explain()["reason"] == "declined_soft: insufficient_funds"
    assert world.explain()["next_attempt_at"] == "2026-02-02T09:00:00+00:00"
    assert world.debits() == {}


@pytest.mark.parametrize(
    "token",
    ["answer_lost_after", "never_answers_after", "error_500_after", "html_502_after"],
)
def test_a_sale_whose_answer_was_lost_after_the_charge_is_found_paid(world, token):
    world.subscribe(token)
    world.tick()
    assert world.fate() == "unknown"
    world.run_for(timedelta(minutes=2), step=timedelta(seconds=10))
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("token", ["answer_lost_before", "never_answers_before", "needs_3ds"])
def test_an_unknown_charge_is_never_tried_again_while_the_gateway_calls_it_pending(world, token):
    world.subscribe(token)
    world.run_for(timedelta(minutes=59))
    assert world.fate() == "unknown"
    assert world.attempts() == ["submitted"]
    assert world.sales("sub-1-p0-a1") <= 1


def test_an_expired_invoice_counts_as_not_charged_only_after_the_grace(world):
    world.subscribe("answer_lost_before")
    world.run_for(1.5 * HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["submitted"]
    world.run_for(1 * HOUR, step=timedelta(minutes=5))
    assert world.attempts()[0] == "not_charged"


def test_after_not_charged_a_new_attempt_follows_under_a_new_reference(world):
    world.subscribe("answer_lost_before")
    world.run_for(4 * DAY, step=timedelta(hours=1))
    references = [a["reference_id"] for a in world.explain()["attempts"]]
    assert references[:2] == ["sub-1-p0-a1", "sub-1-p0-a2"]


def test_attempts_whose_sale_is_never_sent_end_with_a_person(world):
    world.subscribe("approved")
    world.transport.before_send = only_sales_are_unreachable(world)
    world.run_for(timedelta(hours=8), step=timedelta(minutes=15))
    assert world.attempts() == ["not_charged"] * 5
    assert world.explain()["reason"] == "not_charged_repeatedly"
    assert [e["kind"] for e in world.explain()["history"] if e["alert"]] == ["invoice.waiting"]


def only_sales_are_unreachable(world):
    def before_send(request):
        world.transport.unreachable = request.url.endswith("/payment/sale")

    return before_send


def test_money_that_arrives_after_the_decline_pays_the_invoice(world):
    world.subscribe("flips_to_processed")
    world.tick()
    assert world.attempts() == ["declined"]
    world.run_for(1.5 * HOUR, step=timedelta(minutes=10))
    assert world.attempts() == ["succeeded"]
    assert world.fate() == "paid"


def test_a_charge_refused_for_its_amount_is_never_sold(world):
    for number, token in enumerate(
        ["wrong_amount", "wrong_currency", "wrong_payment_amount", "wrong_test_mode",
         "wrong_reference"]
    ):  # fmt: skip
        world.subscribe(token, f"sub-{number}")
    world.run_for(3 * HOUR, step=timedelta(minutes=10))
    for number in range(5):
        assert world.sales(f"sub-{number}-p0-a1") == 0
        assert "expected" in world.explain(f"sub-{number}-p0")["reason"]
        assert "attempt.quarantined" in world.events(f"sub-{number}-p0")


def test_a_partial_payment_stays_unknown_and_raises_an_alert(world):
    world.subscribe("partially_processed")
    world.run_for(3 * HOUR, step=timedelta(minutes=10))
    assert world.fate() == "unknown"
    assert any(e["alert"] for e in world.explain()["history"])


def test_a_token_that_the_gateway_refuses_leaves_the_invoice_to_a_person(world):
    world.subscribe("rejects_token")
    world.run_for(6 * HOUR, step=HOUR)
    assert world.attempts() == ["not_charged"]
    assert "gateway refused the invoice" in world.explain()["reason"]


def test_a_subscription_without_a_card_waits_with_its_reason_and_no_gateway_call(world):
    world.subscribe(None)
    world.tick()
    assert world.explain()["reason"] == "card_missing"
    assert world.transport.sent == []


@pytest.mark.parametrize("token", ["create_answer_lost", "create_error_500"])
def test_a_create_without_an_answer_is_polled_up_before_it_is_repeated(world, token):
    world.subscribe(token)
    world.run_for(timedelta(minutes=15), step=timedelta(seconds=30))
    assert world.fate() == "paid"
    assert world.attempts() == ["succeeded"]


def test_an_unreachable_gateway_postpones_the_same_attempt(world):
    world.subscribe("approved")
    world.transport.unreachable = True
    world.run_for(HOUR)
    assert world.attempts() == ["prepared"]
    world.transport.unreachable = False
    world.run_for(timedelta(minutes=10))
    assert world.attempts() == ["succeeded"]


def test_500_deliveries_of_one_charge_make_one_sale(world):
    world.subscribe("approved")
    world.sweep()
    message = world.bell.messages[0]
    world.bell.messages = [message] * 500
    world.deliver()
    assert world.sales("sub-1-p0-a1") == 1


class FallsAsleepAfterCommit(EachAlone):
    def __init__(self, clock, seconds):
        self._clock, self._seconds = clock, seconds

    def __call__(self, work, ports, request):
        answer = super().__call__(work, ports, request)
        self._clock.advance(self._seconds)
        return answer


@pytest.mark.parametrize(("seconds", "sales"), [(4, 1), (6, 0)])
def test_a_sale_is_sent_only_within_five_seconds_of_its_commit(world, seconds, sales):
    world.subscribe("approved")
    commit_group = FallsAsleepAfterCommit(world.clock, seconds)
    world.ports = world.ports_of_a_worker(commit_group=commit_group)
    world.tick()
    assert world.sales("sub-1-p0-a1") == sales
    assert world.attempts() == ["succeeded" if sales else "not_charged"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
def test_each_period_is_charged_once_over_a_year_of_hourly_sweeps(world):
    world.subscribe("approved", ends_after_periods=12)
    world.run_for(timedelta(days=366), step=timedelta(hours=12))
    assert sorted(world.debits().values()) == [1] * 12


def test_a_claim_that_was_replaced_cannot_call_its_successors_sale_not_sent(world):
    """Found by the model: the old claim's create is refused as a duplicate after the new claim
    has already sold, and giving up would have called a running charge not charged.
    """
    world.subscribe("approved_later")
    world.sweep()
    (message,) = world.bell.messages
    old = claim(world.ports, message[1])[0]
    world.clock.advance(world.ports.timings.stuck_after)
    world.run(*message)
    assert world.attempts() == ["submitted"]
    with pytest.raises(ConcurrentChange):
        settle(
            world.ports,
            Settle(old.key, NothingSent("422 duplicate"), "charge", fence=old.attempt.fence),
        )
    assert world.attempts() == ["submitted"]


def test_a_hold_set_after_the_claim_stops_the_sale(world):
    """Another worker finds that an earlier attempt may still pay, while ours creates its invoice."""
    world.subscribe("approved")

    def hold_while_creating(request):
        if request.url.endswith("/payment-invoices"):
            with world.store.transaction() as connection:
                connection.execute(
                    update(invoices).values(next_attempt_at=None, enqueue_at=None, reason="held")
                )

    world.transport.before_send = hold_while_creating
    world.tick()
    assert world.sales("sub-1-p0-a1") == 0
    assert world.attempts() == ["not_charged"]
    assert world.explain()["reason"] == "held"
