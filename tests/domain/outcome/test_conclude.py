"""News about an attempt, without database, gateway or clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.domain.attempt import TRANSITIONS, AttemptStatus, move
from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.domain.outcome import (
    PAID_BY_WORD,
    RECHECKS,
    Case,
    NoAnswer,
    NothingSent,
    Postponed,
    Resolved,
)
from billing_worker.domain.statement import (
    PAID_STATUSES,
)
from billing_worker.domain.subscription import SubscriptionStatus
from tests.support.outcomes import (
    NOW,
    TERMS,
    after_the_grace,
    attempt,
    case,
    invoice,
    kinds,
    stated,
    subscription,
    told,
)


@pytest.mark.parametrize("status", sorted(PAID_STATUSES))
def test_every_status_in_which_money_was_taken_pays_the_invoice(status):
    after = told(stated(status)).case
    assert after.attempt.status is AttemptStatus.SUCCEEDED
    assert after.invoice.status is InvoiceStatus.PAID


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": Decimal("10.00")},
        {"amount": None},
        {"payment_amount": Decimal("10.49")},
        {"payment_amount": None},
        {"currency": "EUR"},
        {"reference_id": "another"},
        {"test_mode": False},
        {"test_mode": None},
        {"processed_amount": Decimal(5)},
    ],
    ids=str,
)
def test_processed_with_one_wrong_field_pays_nothing_and_alerts(wrong):
    concluded = told(stated("processed", **wrong))
    assert concluded.case.attempt.status is AttemptStatus.SUBMITTED
    assert concluded.case.invoice.status is InvoiceStatus.OPEN
    assert any(event.alert for event in concluded.events)


@pytest.mark.parametrize("status", ["partially_processed", "verified", "something_new"])
def test_a_status_that_does_not_belong_to_a_charge_stays_unknown_and_alerts(status):
    concluded = told(stated(status))
    assert concluded.case.attempt.status is AttemptStatus.SUBMITTED
    assert any(event.alert for event in concluded.events)


def test_the_same_contradiction_alerts_once_and_a_new_one_again():
    first = told(stated("partially_processed"))
    again = told(stated("partially_processed"), first.case)
    other = told(stated("verified"), again.case)
    assert [any(e.alert for e in c.events) for c in (first, again, other)] == [True, False, True]


@pytest.mark.parametrize("status", ["created", "processing", "process_pending", "process_error"])
@pytest.mark.parametrize("days", [0, 1, 400])
def test_no_age_turns_a_pending_charge_into_a_failed_one(status, days):
    after = told(stated(status), now=NOW + timedelta(days=days)).case
    assert after.attempt.status is AttemptStatus.SUBMITTED
    assert after.attempt.next_poll_at > NOW + timedelta(days=days)


def test_no_answer_proves_nothing_at_any_age():
    after = told(NoAnswer("read timeout"), now=NOW + timedelta(days=4000)).case
    assert after.attempt.status is AttemptStatus.SUBMITTED


def test_expired_counts_only_when_it_still_stands_after_the_grace():
    first = told(stated("expired"))
    early = told(stated("expired"), first.case, NOW + TERMS.expiry_grace - timedelta(seconds=1))
    late = told(stated("expired"), early.case, NOW + TERMS.expiry_grace)
    states = [c.case.attempt.status for c in (first, early, late)]
    assert states == [
        AttemptStatus.SUBMITTED,
        AttemptStatus.SUBMITTED,
        AttemptStatus.NOT_CHARGED,
    ]


def test_a_final_status_that_was_taken_back_starts_its_grace_anew():
    expired = told(stated("expired")).case
    pending = told(stated("process_pending"), expired, NOW + timedelta(minutes=30)).case
    again = told(stated("expired"), pending, NOW + TERMS.expiry_grace).case
    assert again.attempt.status is AttemptStatus.SUBMITTED


def test_expired_after_the_card_refused_is_a_decline():
    refused = case(sale_status="process_failed", sale_resolution="insufficient_funds")
    waiting = told(stated("expired"), refused).case
    after = told(stated("expired"), waiting, NOW + TERMS.expiry_grace).case
    assert after.attempt.status is AttemptStatus.DECLINED
    assert after.invoice.reason == "declined_soft: insufficient_funds"


@pytest.mark.parametrize("status", ["terminated", "rejected"])
def test_an_invoice_ended_by_a_moderator_is_not_tried_again_by_itself(status):
    waiting = told(stated(status)).case
    after = told(stated(status), waiting, NOW + TERMS.expiry_grace).case
    assert after.attempt.status is AttemptStatus.NOT_CHARGED
    assert after.invoice.next_attempt_at is None


def test_an_unpaid_end_is_asked_about_again_for_a_month():
    current = told(stated("process_failed", "declined")).case
    asked = []
    while current.attempt.next_poll_at is not None:
        asked.append(current.attempt.next_poll_at - NOW)
        current = told(
            stated("process_failed", "declined"), current, current.attempt.next_poll_at
        ).case
    hour, day = timedelta(hours=1), timedelta(days=1)
    assert asked == [hour, day, 3 * day, 7 * day, 30 * day] == list(RECHECKS)


@pytest.mark.parametrize("status", [AttemptStatus.DECLINED, AttemptStatus.NOT_CHARGED])
def test_late_money_pays_an_invoice_that_is_still_owed(status):
    concluded = told(stated("processed"), case(status, settled_at=NOW))
    assert concluded.case.invoice.status is InvoiceStatus.PAID
    assert any(event.alert for event in concluded.events)


@pytest.mark.parametrize("settled", [InvoiceStatus.PAID, InvoiceStatus.VOID])
def test_money_for_an_invoice_that_is_no_longer_owed_is_surplus_and_alerts(settled):
    before = replace(case(), invoice=invoice(settled, paid_at=NOW))
    concluded = told(stated("processed"), before)
    assert concluded.case.attempt.status is AttemptStatus.SURPLUS
    assert concluded.case.invoice == before.invoice
    assert any(event.alert for event in concluded.events)


def test_nothing_sent_by_a_frame_that_overslept_changes_nothing():
    ended = case(AttemptStatus.SUCCEEDED)
    assert told(NothingSent("too late"), ended).case == ended


@pytest.mark.parametrize("status", ["expired", "process_failed", "process_pending"])
def test_a_paid_attempt_is_never_moved_back(status):
    before = Case(
        attempt(AttemptStatus.SUCCEEDED), invoice(InvoiceStatus.PAID, paid_at=NOW), subscription()
    )
    concluded = told(stated(status), before)
    assert concluded.case.attempt.status is AttemptStatus.SUCCEEDED
    assert concluded.case.invoice.status is InvoiceStatus.PAID
    assert any(event.alert for event in concluded.events)


def test_a_decline_makes_the_subscription_past_due_and_late_money_makes_it_active():
    declined = told(stated("process_failed", "declined")).case
    assert declined.subscription.status is SubscriptionStatus.PAST_DUE
    assert told(stated("processed"), declined).case.subscription.status is SubscriptionStatus.ACTIVE


def test_a_reopened_attempt_stops_the_next_one():
    ended = replace(
        case(AttemptStatus.NOT_CHARGED, settled_at=NOW),
        invoice=invoice(
            next_attempt_at=NOW + timedelta(hours=1), enqueue_at=NOW + timedelta(hours=1)
        ),
    )
    concluded = told(stated("process_pending"), ended)
    assert concluded.case.invoice.next_attempt_at is None
    assert any(event.alert for event in concluded.events)


def test_every_edge_of_the_attempt_machine_is_in_the_table_and_no_other():
    for before in AttemptStatus:
        for after in AttemptStatus:
            if after in TRANSITIONS[before]:
                assert move(before, after) is after
            else:
                with pytest.raises(IllegalTransition):
                    move(before, after)


NEWS = st.one_of(
    st.builds(
        stated,
        st.sampled_from([
            "processed", "process_failed", "expired", "process_pending", "rejected", "refunded",
            "partially_processed", "nonsense",
        ]),
        st.sampled_from(["ok", "declined", "card_expired", "new_code"]),
    ),
    st.builds(NoAnswer, st.just("timeout")),
    st.builds(NothingSent, st.just("not sent"), st.booleans()),
    st.builds(Postponed, st.just("later")),
    st.builds(Resolved, st.booleans(), st.just("portal"), st.just("called")),
)  # fmt: skip


@given(
    st.sampled_from(list(AttemptStatus)),
    st.lists(st.tuples(NEWS, st.integers(0, 7200)), max_size=12),
)
def test_no_sequence_of_news_leaves_the_table_or_unpays_an_invoice(start, sequence):
    paid = start in {AttemptStatus.SUCCEEDED, AttemptStatus.SURPLUS}
    status = InvoiceStatus.PAID if paid else InvoiceStatus.OPEN
    current = Case(
        attempt(start, settled_at=None if start in {"prepared", "submitted"} else NOW),
        invoice(status, paid_at=NOW if paid else None),
        subscription(),
    )
    now = NOW
    for news, wait in sequence:
        now += timedelta(seconds=wait)
        after = told(news, current, now).case
        before_status, after_status = current.attempt.status, after.attempt.status
        via = TRANSITIONS[before_status] | {
            end for step in TRANSITIONS[before_status] for end in TRANSITIONS[step]
        }
        taken_back = (
            isinstance(news, Resolved)
            and not news.paid
            and (current.attempt.outcome == PAID_BY_WORD)
        )
        if not taken_back:
            assert after_status is before_status or after_status in via
            if current.invoice.status is InvoiceStatus.PAID:
                assert after.invoice.status is InvoiceStatus.PAID
        assert (after.invoice.status is InvoiceStatus.PAID) == (after.invoice.paid_at is not None)
        assert after.invoice.enqueue_at is None or after.invoice.status is InvoiceStatus.OPEN
        current = after


def test_a_statement_about_another_invoice_of_our_reference_changes_nothing_and_alerts():
    before = case()
    concluded = told(stated("process_failed", "declined", gateway_id="cpi_orphan"), before)
    assert concluded.case == before
    assert any(event.alert for event in concluded.events)


def test_a_reopened_attempt_is_asked_about_until_it_is_final_again():
    current = case(AttemptStatus.DECLINED, settled_at=NOW)
    now = NOW
    for _ in range(200):  # long after the last of the rechecks
        now += timedelta(hours=1)
        current = told(stated("process_pending"), current, now).case
        assert current.attempt.next_poll_at is not None
        assert current.attempt.next_poll_at > now


def test_postponing_an_attempt_of_a_held_invoice_ends_it_and_keeps_the_reason():
    held = replace(case(AttemptStatus.PREPARED), invoice=invoice(reason="a person looks"))
    after = told(Postponed("gateway not reached"), held).case
    assert after.attempt.status is AttemptStatus.NOT_CHARGED
    assert (after.invoice.reason, after.invoice.enqueue_at) == ("a person looks", None)


def test_only_attempts_that_were_armed_count_towards_giving_up():
    prepared = case(AttemptStatus.PREPARED, submitted_at=None)
    assert told(NothingSent("sales off"), prepared).case.invoice.not_charged_count == 0
    assert told(NothingSent("too late"), case()).case.invoice.not_charged_count == 1


@pytest.mark.parametrize("said", [None, "ok", "declined", "auth_3ds_required"])
def test_a_sale_that_asked_for_3d_secure_waits_for_the_customer_and_is_not_repeated(said):
    asked = case(sale_status="needs_customer", sale_resolution=said)
    concluded = after_the_grace("expired", asked)
    after = concluded.case
    assert after.attempt.status is AttemptStatus.DECLINED
    assert after.invoice.reason == "declined_needs_customer: auth_3ds_required"
    assert after.invoice.next_attempt_at is None
    assert after.invoice.give_up_at is not None
    assert "customer.step_needed" in kinds(concluded)


def test_the_step_that_the_bank_named_is_the_reason():
    asked = case(sale_status="needs_customer", sale_resolution="auth_otp_required")
    after = after_the_grace("expired", asked).case
    assert after.invoice.reason == "declined_needs_customer: auth_otp_required"


@pytest.mark.parametrize("sale_status", ["needs_customer", "process_failed"])
def test_an_invoice_ended_by_a_moderator_waits_for_a_person_whatever_the_sale_said(sale_status):
    before = case(sale_status=sale_status, sale_resolution="insufficient_funds")
    concluded = after_the_grace("terminated", before)
    assert concluded.case.attempt.status is AttemptStatus.NOT_CHARGED
    assert concluded.case.invoice.give_up_at is None
    assert any(event.alert for event in concluded.events)


@pytest.mark.parametrize(
    ("before", "owes_more", "after"),
    [
        (SubscriptionStatus.PAST_DUE, False, SubscriptionStatus.ACTIVE),
        (SubscriptionStatus.PAST_DUE, True, SubscriptionStatus.PAST_DUE),
        (SubscriptionStatus.SUSPENDED, False, SubscriptionStatus.ACTIVE),
        (SubscriptionStatus.SUSPENDED, True, SubscriptionStatus.PAST_DUE),
    ],
)
def test_a_payment_ends_the_arrears_only_if_nothing_else_is_owed(before, owes_more, after):
    owing = Case(attempt(), invoice(), subscription(before), owes_more=owes_more)
    assert told(stated("processed"), owing).case.subscription.status is after
