"""News about an attempt, without database, gateway or clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.domain.attempt import TRANSITIONS, Attempt, AttemptStatus, Origin, move
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.card import Card
from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.invoice import VOID_IF_UNPAID, Invoice, InvoiceStatus
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import (
    PAID_BY_WORD,
    RECHECKS,
    Case,
    Context,
    NeverHandedOut,
    NoAnswer,
    NothingSent,
    Postponed,
    Resolved,
    Stated,
    conclude,
    withdrawn,
)
from billing_worker.domain.statement import (
    GIVEN_BACK_STATUSES,
    PAID_STATUSES,
    Statement,
    most_telling,
)
from billing_worker.domain.subscription import Subscription, SubscriptionStatus
from billing_worker.domain.timings import Timings

NOW = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
PRICE = Money.parse("9.99", "USD")
TERMS = Timings()


def attempt(status=AttemptStatus.SUBMITTED, **changes):
    made = Attempt(
        id=1, invoice_id=1, number=1, reference_id="sub-1-p0-a1", status=status,
        origin=Origin.SCHEDULED, card_id=1, money=PRICE, test_mode=True, fence=1, claims=1,
        created_at=NOW, lease_until=None, gateway_id="cpi_1", submitted_at=NOW, settled_at=None,
        next_poll_at=NOW, rechecks=0, unpaid_since=None, sale_status=None, sale_resolution=None,
        outcome=None,
    )  # fmt: skip
    return replace(made, **changes)


def invoice(status=InvoiceStatus.OPEN, **changes):
    made = Invoice(
        id=1, reference_id="sub-1-p0", subscription_id=1, period_number=0, period_start=NOW,
        period_end=NOW + timedelta(days=31), money=PRICE, status=status, reason=None,
        next_attempt_at=None, enqueue_at=None, not_charged_count=0, created_at=NOW, paid_at=None,
    )  # fmt: skip
    return replace(made, **changes)


def subscription(status=SubscriptionStatus.ACTIVE):
    return Subscription(
        id=1, reference_id="sub-1", customer_id=1, card_id=1, status=status, money=PRICE,
        schedule=Schedule(NOW, Unit.MONTH, 1, "UTC"), ends_after_periods=None, next_period=1,
        next_billing_at=NOW + timedelta(days=31),
    )  # fmt: skip


def case(status=AttemptStatus.SUBMITTED, **changes):
    return Case(attempt(status, **changes), invoice(), subscription())


def stated(status, resolution="ok", **changes):
    statement = Statement(
        gateway_id="cpi_1", status=status, resolution=resolution, reference_id="sub-1-p0-a1",
        amount=Decimal("9.99"), payment_amount=Decimal("9.99"), processed_amount=None,
        currency="USD", test_mode=True,
    )  # fmt: skip
    return Stated(replace(statement, **changes))


def told(news, before=None, now=NOW):
    return conclude(before or case(), news, Context(now, "test", TERMS))


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


# --- a sale that asked for the customer -------------------------------------------------------


def after_the_grace(status, before):
    waiting = told(stated(status), before).case
    return told(stated(status), waiting, NOW + TERMS.expiry_grace)


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


def kinds(concluded):
    return [str(event.kind) for event in concluded.events]


# --- pay pages --------------------------------------------------------------------------------


def card(card_id=1, **changes):
    made = Card(card_id, f"print-{card_id}", "visa", 12, 2032, None, None)
    return replace(made, **changes)


LATER = NOW + timedelta(days=2)
IN_LADDER = {
    "first_declined_at": NOW, "next_attempt_at": LATER, "enqueue_at": None,
    "next_origin": Origin.DUNNING, "reason": "declined_soft: insufficient_funds",
}  # fmt: skip
WAITS_FOR_CUSTOMER = {
    "first_declined_at": NOW, "give_up_at": NOW + timedelta(days=30), "reason": "a step is needed",
}  # fmt: skip
EARLIER = attempt(AttemptStatus.DECLINED, id=7, number=1, settled_at=NOW - TERMS.decline_stands,
                  outcome="insufficient_funds")  # fmt: skip


def link(of_invoice, default_card=None, *, status=AttemptStatus.SUBMITTED, **changes):
    page = attempt(status, number=2, origin=Origin.LINK, **changes)
    return Case(
        page, invoice(**of_invoice), subscription(SubscriptionStatus.PAST_DUE),
        earlier=(EARLIER, page), card=card(), default_card=default_card or card(),
    )  # fmt: skip


def page_declined(before, resolution, original_code=None):
    news = stated("process_failed", resolution, original_code=original_code)
    waiting = told(news, before).case
    return told(news, waiting, NOW + TERMS.expiry_grace)


def test_a_network_code_that_says_never_kills_the_card_of_a_pay_page_and_ends_its_ladder():
    concluded = page_declined(link(IN_LADDER), "issuer_decline", "43")
    assert concluded.kills_card is not None
    assert concluded.case.invoice.next_attempt_at is None
    assert concluded.case.invoice.give_up_at is not None
    assert "card.needed" in kinds(concluded)


def test_a_network_code_that_says_never_kills_no_card_when_the_customer_typed_one():
    concluded = page_declined(replace(link(IN_LADDER, card_id=None), card=None), "declined", "43")
    assert concluded.kills_card is None
    assert concluded.case.invoice.next_attempt_at == LATER


def test_a_hard_decline_of_a_pay_page_ends_the_tries_of_the_card_and_does_not_kill_it():
    concluded = page_declined(link(IN_LADDER), "lost_or_stolen_card")
    assert concluded.kills_card is None
    assert concluded.case.invoice.next_attempt_at is None
    assert concluded.case.invoice.reason == "declined_hard: lost_or_stolen_card"
    assert "card.needed" in kinds(concluded)


def test_a_hard_decline_of_a_pay_page_outlasts_a_pause():
    aside = {**IN_LADDER, "next_attempt_at": None, "paused_attempt_at": LATER, "reason": "paused"}
    paused = replace(link(aside), subscription=subscription(SubscriptionStatus.PAUSED))
    after = page_declined(paused, "lost_or_stolen_card").case
    assert (after.invoice.next_attempt_at, after.invoice.paused_attempt_at) == (None, None)


def test_what_a_pay_page_may_have_been_paid_with_stops_the_ladder_until_a_person_has_polled():
    concluded = page_declined(link(IN_LADDER), "duplicated_transaction")
    assert concluded.case.invoice.next_attempt_at is None
    assert concluded.case.invoice.give_up_at is None
    assert any(event.alert for event in concluded.events)


@pytest.mark.parametrize("resolution", ["insufficient_funds", "auth_3ds_required", "fatal_error"])
def test_any_other_decline_of_a_pay_page_leaves_the_planned_step_as_it_was(resolution):
    after = page_declined(link(IN_LADDER), resolution).case
    assert after.attempt.status is AttemptStatus.DECLINED
    assert (after.invoice.next_attempt_at, after.invoice.next_origin) == (LATER, Origin.DUNNING)


@pytest.mark.parametrize("resolution", ["lost_or_stolen_card", "declined", "unknown"])
def test_no_decline_of_a_pay_page_releases_an_invoice_that_waits_for_a_person(resolution):
    held = link({"first_declined_at": NOW, "reason": "declined_unknown: unknown"}, card(2))
    after = page_declined(held, resolution).case.invoice
    assert (after.reason, after.next_attempt_at) == ("declined_unknown: unknown", None)
    assert after.give_up_at is None


@pytest.mark.parametrize("of_invoice", [IN_LADDER, WAITS_FOR_CUSTOMER], ids=["dated", "waiting"])
@pytest.mark.parametrize("how", ["expired", "declined", "never handed out", "given back"])
def test_a_card_that_came_while_the_page_was_open_is_tried_when_it_ends(of_invoice, how):
    if how in {"expired", "declined"}:
        status = "expired" if how == "expired" else "process_failed"
        news = stated(status, "lost_or_stolen_card")
        waiting = told(news, link(of_invoice, card(2))).case
        at = NOW + TERMS.expiry_grace
        after = told(news, waiting, at).case.invoice
    else:
        news = NeverHandedOut() if how == "never handed out" else NothingSent("caller gave up")
        at = NOW
        prepared = link(of_invoice, card(2), status=AttemptStatus.PREPARED, lease_until=NOW)
        after = told(news, prepared).case.invoice
    assert (after.next_attempt_at, after.next_origin) == (at, Origin.NEW_CARD)
    assert (after.enqueue_at, after.give_up_at) == (at, None)


@pytest.mark.parametrize(
    "default_card",
    [card(1), card(2, unusable_reason="stolen"), card(2, expiry_year=2020)],
    ids=["the same", "dead", "expired"],
)
def test_a_page_that_ends_brings_no_new_card_when_there_is_none_to_try(default_card):
    before = link(WAITS_FOR_CUSTOMER, default_card)
    after = after_the_grace("expired", before).case.invoice
    assert after.next_attempt_at is None
    assert after.give_up_at == WAITS_FOR_CUSTOMER["give_up_at"]


def test_a_card_that_only_the_page_has_asked_is_left_alone():
    before = link(WAITS_FOR_CUSTOMER, card(2), card_id=2)
    assert page_declined(before, "lost_or_stolen_card").case.invoice.next_attempt_at is None


def test_a_withdrawn_charge_is_asked_about_as_a_withdrawn_link_is():
    """A life that the books have forgotten may have sold it. A page may be charged for at once."""
    prepared = attempt(AttemptStatus.PREPARED, gateway_id=None, next_poll_at=NOW)
    assert withdrawn(prepared, "paused", NOW).next_poll_at > NOW
    assert withdrawn(replace(prepared, origin=Origin.LINK), "paused", NOW).next_poll_at > NOW


# --- money that goes back ---------------------------------------------------------------------


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


# --- what else is owed ------------------------------------------------------------------------


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


# --- looks that overtake each other -----------------------------------------------------------


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


# --- sold by somebody else --------------------------------------------------------------------


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


# --- a resolution beside a status that only ends ---------------------------------------------


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
