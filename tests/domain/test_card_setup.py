"""What becomes of a page that is paid for a token, without database, gateway or clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_worker.domain.card_setup import (
    TRANSITIONS,
    CardSetup,
    CardSetupStatus,
    PageStatement,
    StoredCard,
    conclude,
    move,
)
from billing_worker.domain.errors import IllegalTransition
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import Context
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import PAID_STATUSES, Owner, Statement
from billing_worker.domain.timings import Timings

NOW = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
IN_AN_HOUR = NOW + timedelta(hours=1)
CARD = StoredCard(token=Secret("4c9jHUgeL1SD7g5byDYn9Gc0RC60NN3x"), mask="512381******0000")
OPEN = CardSetup(
    id=1, reference_id="card-1", gateway_reference="card-1", customer_id=1,
    customer_reference="cust-1", attempt_id=None, money=Money.parse("1.00", "USD"), test_mode=True,
    status=CardSetupStatus.OPEN, fence=1, created_at=NOW, gateway_id="cpi_1", opened_at=NOW,
    settled_at=None, next_poll_at=NOW, unpaid_since=None, outcome=None,
)  # fmt: skip


def said(status, card=CARD, customer="cust-1", **wrong):
    statement = Statement(
        gateway_id="cpi_1", status=status, resolution="ok", reference_id="card-1",
        amount=Decimal(1), payment_amount=Decimal(1), currency="USD", test_mode=True,
        owner=Owner(customer=customer),
    )  # fmt: skip
    return PageStatement(replace(statement, **wrong), card=card)


def told(news, before=OPEN, now=NOW, **options):
    return conclude(before, news, Context(now, "test", Timings()), **options)


@pytest.mark.parametrize("before", CardSetupStatus)
@pytest.mark.parametrize("to", CardSetupStatus)
def test_only_the_edges_of_the_table_exist(before, to):
    if to in TRANSITIONS[before]:
        assert move(before, to) is to
    else:
        with pytest.raises(IllegalTransition):
            move(before, to)


@pytest.mark.parametrize("status", sorted(PAID_STATUSES))
def test_whatever_happened_to_the_money_afterwards_the_card_is_kept(status):
    concluded = told(said(status))
    assert concluded.setup.status is CardSetupStatus.STORED
    assert concluded.keep == CARD


@pytest.mark.parametrize(
    ("news", "options", "reason", "next_poll_at"),
    [
        (said("processed", card=None), {}, "token_missing", IN_AN_HOUR),
        (said("processed", card=replace(CARD, token=None)), {}, "token_missing", IN_AN_HOUR),
        (said("processed", customer="cust-2"), {}, "token_of_another_customer", None),
        (said("processed"), {"token_is_foreign": True}, "token_of_another_customer", None),
    ],
)
def test_paid_without_a_token_that_may_be_used_ends_with_a_reason_and_a_step(
    news, options, reason, next_poll_at
):
    concluded = told(news, **options)
    assert concluded.setup.outcome == reason
    assert concluded.setup.next_poll_at == next_poll_at
    assert concluded.keep is None
    (event,) = concluded.events
    assert event.alert
    assert event.data["needs"]


def test_a_customer_whom_the_gateway_does_not_name_is_taken_for_the_one_we_ordered_for():
    assert told(said("processed", customer=None)).setup.status is CardSetupStatus.STORED


def test_a_token_that_comes_late_is_kept():
    without = told(said("processed", card=None)).setup
    assert told(said("processed"), without).setup.status is CardSetupStatus.STORED


def test_a_token_that_never_comes_is_asked_for_for_a_month_and_told_of_once():
    payment, now, events, asked = OPEN, NOW, [], []
    while payment.next_poll_at is not None:
        now = payment.next_poll_at
        asked.append(now - NOW)
        concluded = told(said("processed", card=None), payment, now)
        payment = concluded.setup
        events += concluded.events
    hour, day = timedelta(hours=1), timedelta(days=1)
    assert asked == [timedelta(0), hour, day, 3 * day, 7 * day, 30 * day]
    assert len(events) == 1


@pytest.mark.parametrize(
    "wrong", [{"amount": Decimal(2)}, {"currency": "EUR"}, {"test_mode": False}], ids=str
)
def test_paid_for_another_order_keeps_nothing_and_alerts_once(wrong):
    first = told(said("processed", **wrong))
    again = told(said("processed", **wrong), first.setup)
    assert first.setup.status is CardSetupStatus.OPEN
    assert [e.alert for e in (*first.events, *again.events)] == [True]


STATUSES = st.sampled_from(
    ["processed", "process_failed", "expired", "process_pending", "refunded", "verified", None]
)
CARDS = st.sampled_from([CARD, None, replace(CARD, token=None)])


@given(st.lists(st.tuples(STATUSES, CARDS, st.booleans(), st.integers(0, 100_000)), max_size=12))
def test_whatever_the_gateway_says_a_card_is_kept_at_most_once_and_never_unpaid(news):
    payment, now, kept = OPEN, NOW, 0
    states = [payment.status]
    for status, card, foreign, seconds in news:
        now += timedelta(seconds=seconds)
        answer = said(status, card) if status else None
        concluded = told(answer, payment, now, token_is_foreign=foreign)
        kept += concluded.keep is not None
        assert concluded.keep is None or status in PAID_STATUSES
        assert concluded.setup.next_poll_at is None or concluded.setup.next_poll_at > now
        payment = concluded.setup
        states.append(payment.status)
    assert kept <= 1
    assert all(b is a or b in TRANSITIONS[a] for a, b in pairwise(states))
    assert payment.next_poll_at is not None or payment.status is not CardSetupStatus.OPEN


@pytest.mark.parametrize("status", ["expired", "process_failed"])
def test_an_unpaid_page_keeps_why_its_card_was_refused(status):
    refused = said(status, resolution="insufficient_funds")
    waiting = told(refused)
    assert waiting.events[0].data["reason"] == "insufficient_funds"
    ended = told(refused, waiting.setup, IN_AN_HOUR).setup
    assert (ended.status, ended.outcome) == (CardSetupStatus.UNPAID, "insufficient_funds")


def test_a_refusal_that_is_told_only_after_the_end_is_kept():
    ended = replace(OPEN, status=CardSetupStatus.UNPAID, settled_at=NOW, outcome="expired")
    later = told(said("expired", resolution="lost_or_stolen_card"), ended, IN_AN_HOUR)
    assert later.setup.outcome == "lost_or_stolen_card"
    assert told(said("expired"), later.setup, IN_AN_HOUR).setup == later.setup
