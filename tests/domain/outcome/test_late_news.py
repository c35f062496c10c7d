"""News that comes late, twice, out of order or of a sale that somebody else has made."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.invoice import VOID_IF_UNPAID, InvoiceStatus
from billing_worker.domain.outcome import (
    Case,
    NothingSent,
)
from billing_worker.domain.statement import (
    GIVEN_BACK_STATUSES,
    most_telling,
)
from tests.support.outcomes import (
    NOW,
    TERMS,
    attempt,
    card,
    case,
    invoice,
    kinds,
    stated,
    subscription,
    told,
)


def paid_case(status=AttemptStatus.SUCCEEDED):
    paid = attempt(status, outcome="processed", next_poll_at=None, settled_at=NOW)
    return Case(paid, invoice(InvoiceStatus.PAID, paid_at=NOW), subscription())


@pytest.mark.parametrize("status", sorted(GIVEN_BACK_STATUSES))
def test_money_that_went_back_alerts_once_for_each_status_and_leaves_the_invoice_paid(status):
    first = told(stated(status), paid_case())
    again = told(stated(status), first.case)
    assert [(str(e.kind), e.alert) for e in first.events] == [("attempt.given_back", True)]
    assert again.events == ()
    assert first.case.attempt.status is AttemptStatus.SUCCEEDED
    assert first.case.invoice == paid_case().invoice


def test_a_refund_that_becomes_a_charge_back_is_told_again():
    refunded = told(stated("refunded"), paid_case()).case
    assert any(event.alert for event in told(stated("charged_back"), refunded).events)


def test_a_charge_whose_money_is_back_before_we_knew_of_it_pays_the_invoice_and_alerts():
    concluded = told(stated("charged_back"))
    assert concluded.case.invoice.status is InvoiceStatus.PAID
    assert [str(e.kind) for e in concluded.events if e.alert] == ["attempt.given_back"]


@pytest.mark.parametrize(("status", "alerts"), [("refunded", False), ("charged_back", True)])
def test_a_surplus_that_is_refunded_is_told_and_alarms_nobody(status, alerts):
    concluded = told(stated(status), paid_case(AttemptStatus.SURPLUS))
    assert [(str(e.kind), e.alert) for e in concluded.events] == [("attempt.given_back", alerts)]


def heard(status, seconds, *, resolution="ok", before=None):
    """Asked `seconds` after NOW; settled a minute after it, as a slow answer would be."""
    asked_at = NOW + timedelta(seconds=seconds)
    news = replace(stated(status, resolution), asked_at=asked_at)
    return told(news, before, asked_at + timedelta(minutes=1))


@pytest.mark.parametrize("newer", ["expired", "process_failed", "process_pending", "processed"])
@pytest.mark.parametrize("older", ["expired", "process_failed", "process_pending"])
def test_an_older_answer_changes_nothing_that_a_newer_one_has_told(older, newer):
    known = heard(newer, 30, resolution="insufficient_funds").case
    late = heard(older, 10, resolution="insufficient_funds", before=known)
    assert late.case == known
    assert not any(event.alert for event in late.events)


def test_an_older_refund_that_failed_meanwhile_is_not_told():
    known = heard("refund_failed", 30).case
    assert heard("refund_pending", 10, before=known).case == known


@pytest.mark.parametrize("newer", ["expired", "process_failed", "process_pending"])
def test_money_is_never_too_old_to_hear(newer):
    known = heard(newer, 30, resolution="insufficient_funds").case
    assert heard("processed", 10, before=known).case.invoice.status is InvoiceStatus.PAID


def test_a_slow_pending_does_not_start_the_grace_anew():
    known = heard("expired", 30).case
    assert heard("process_pending", 10, before=known).case.attempt.unpaid_since is not None
    assert heard("process_pending", 40, before=known).case.attempt.unpaid_since is None


def test_a_slow_expired_ends_nothing_that_was_taken_back():
    expired = heard("expired", 0).case
    taken_back = heard("process_pending", 4000, before=expired).case
    after = heard("expired", 3990, before=taken_back).case
    assert after.attempt.status is AttemptStatus.SUBMITTED
    assert after.attempt.unpaid_since is None


@pytest.mark.parametrize(
    "status", ["partially_processed", "processing", "process_error", "verified", "something_new"]
)
@pytest.mark.parametrize("brought", ["stated", "nothing sent"])
def test_a_prepared_attempt_that_somebody_has_touched_is_unknown_and_nothing_follows(
    status, brought
):
    dated = {"next_attempt_at": NOW, "enqueue_at": NOW}
    prepared = attempt(AttemptStatus.PREPARED, gateway_id=None, submitted_at=None)
    before = Case(prepared, invoice(**dated), subscription())
    said = stated(status)
    news = said if brought == "stated" else NothingSent("no", hold=True, statement=said.statement)
    concluded = told(news, before)
    after = concluded.case
    assert (after.attempt.status, after.attempt.submitted_at) == (AttemptStatus.SUBMITTED, NOW)
    assert after.attempt.next_poll_at > NOW
    assert (after.invoice.next_attempt_at, after.invoice.enqueue_at) == (None, None)
    assert "attempt.not_charged" not in kinds(concluded)
    assert any(event.alert for event in concluded.events)


def test_what_somebody_may_have_sold_leaves_an_invoice_void_with_its_reason():
    prepared = attempt(AttemptStatus.PREPARED, gateway_id=None, submitted_at=None)
    waived = invoice(InvoiceStatus.VOID, reason="waived by ann")
    after = told(stated("processing"), Case(prepared, waived, subscription())).case
    assert after.attempt.status is AttemptStatus.SUBMITTED
    assert after.invoice == waived


@pytest.mark.parametrize("status", ["created", "process_pending", "expired"])
def test_a_prepared_attempt_that_nobody_has_touched_was_certainly_not_charged(status):
    prepared = attempt(AttemptStatus.PREPARED, gateway_id=None, submitted_at=None)
    before = Case(prepared, invoice(next_attempt_at=NOW), subscription())
    assert told(stated(status), before).case.attempt.status is AttemptStatus.NOT_CHARGED


@pytest.mark.parametrize("status", ["processed", "process_failed"])
def test_what_a_twin_has_sold_is_submitted_before_it_ends(status):
    prepared = attempt(AttemptStatus.PREPARED, gateway_id=None, submitted_at=None)
    concluded = told(stated(status, "declined"), Case(prepared, invoice(), subscription()))
    assert kinds(concluded)[0] == "attempt.submitted"
    assert concluded.case.attempt.submitted_at == NOW


def test_what_a_clock_that_was_ahead_has_heard_silences_nobody():
    before = case(heard_at=NOW + timedelta(hours=1))
    after = told(replace(stated("process_failed", "insufficient_funds"), asked_at=NOW), before)
    assert after.case.attempt.status is AttemptStatus.DECLINED


def test_a_final_that_has_moved_is_asked_for_once_more_after_it_stands_again():
    late = NOW + timedelta(days=30)
    settled = {"settled_at": NOW, "gateway_id": "cpi_1", "submitted_at": NOW}
    moved = case(AttemptStatus.NOT_CHARGED, **settled, undecided_since=late - timedelta(hours=1))
    after = told(stated("expired"), moved, late).case.attempt
    assert (after.undecided_since, after.next_poll_at) == (None, late + timedelta(hours=1))
    still = case(AttemptStatus.NOT_CHARGED, **settled, unpaid_since=NOW)
    assert told(stated("expired"), still, late).case.attempt.next_poll_at is None


@pytest.mark.parametrize("status", ["expired", "terminated", "rejected"])
@pytest.mark.parametrize(
    ("resolution", "reason"),
    [
        ("insufficient_funds", "declined_soft: insufficient_funds"),
        ("lost_or_stolen_card", "declined_hard: lost_or_stolen_card"),
        ("auth_3ds_required", "declined_needs_customer: auth_3ds_required"),
        ("never_documented", "declined_unknown: never_documented"),
    ],
)
def test_an_end_with_a_resolution_is_a_decline_with_it_once_the_grace_is_over(
    status, resolution, reason
):
    news = stated(status, resolution)
    waiting = told(news).case
    assert waiting.attempt.status is AttemptStatus.SUBMITTED
    concluded = told(news, waiting, NOW + TERMS.expiry_grace)
    assert concluded.case.attempt.status is AttemptStatus.DECLINED
    assert concluded.case.invoice.reason == reason
    assert (concluded.kills_card is not None) == reason.startswith("declined_hard")


@pytest.mark.parametrize("resolution", [None, "", "ok"])
def test_an_end_without_a_resolution_is_no_decline(resolution):
    news = stated("expired", resolution)
    after = told(news, told(news).case, NOW + TERMS.expiry_grace).case
    assert after.attempt.status is AttemptStatus.NOT_CHARGED


def test_a_prepared_attempt_whose_invoice_expired_with_a_refusal_was_sold_by_somebody():
    prepared = case(AttemptStatus.PREPARED, submitted_at=None)
    sold = told(stated("expired", "insufficient_funds"), prepared).case
    assert sold.attempt.status is AttemptStatus.SUBMITTED
    again = told(stated("expired", "insufficient_funds"), sold, NOW + TERMS.expiry_grace).case
    assert again.attempt.status is AttemptStatus.DECLINED


def test_an_invoice_that_expired_with_a_refusal_tells_more_than_a_fresh_twin():
    refused, fresh = stated("expired", "insufficient_funds"), stated("process_pending")
    assert most_telling([refused.statement, fresh.statement]) == refused.statement


def test_a_hard_resolution_that_is_told_later_marks_the_card():
    ended = replace(case(AttemptStatus.NOT_CHARGED, settled_at=NOW), card=card())
    assert told(stated("expired", "lost_or_stolen_card"), ended).kills_card is not None


@pytest.mark.parametrize("ordered", [True, False])
def test_an_order_to_void_is_no_matter_of_words(ordered):
    words = "in other words" if ordered else VOID_IF_UNPAID
    before = replace(case(), invoice=invoice(reason=words, void_if_unpaid=ordered))
    after = told(stated("process_failed", "insufficient_funds"), before).case.invoice
    assert (after.status is InvoiceStatus.VOID) is ordered
