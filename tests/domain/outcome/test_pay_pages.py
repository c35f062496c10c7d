"""What the end of a pay page means for its card, its ladder and its invoice."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.attempt import AttemptStatus, Origin
from billing_worker.domain.outcome import (
    Case,
    NeverHandedOut,
    NothingSent,
    withdrawn,
)
from billing_worker.domain.subscription import SubscriptionStatus
from tests.support.outcomes import (
    NOW,
    TERMS,
    after_the_grace,
    attempt,
    card,
    invoice,
    kinds,
    stated,
    subscription,
    told,
)

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
