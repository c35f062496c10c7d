"""What happens after an attempt ended without money: what, when, and which rule said so."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from billing_worker.domain.declines import classify
from billing_worker.domain.terms import Terms

MAX_NOT_CHARGED_IN_A_ROW = 5
"""Five hours of expired invoices mean that the sale never arrives: a person has to look."""


@dataclass(frozen=True, slots=True)
class NextStep:
    """`at` None means nothing happens by itself; `reason` then says whose turn it is."""

    at: datetime | None
    reason: str
    rule: str


def after_decline(resolution: str | None) -> NextStep:
    """A declined invoice stays open with its reason; the recovery ladder is a later chapter."""
    kind = classify(resolution)
    return NextStep(None, f"declined_{kind}: {resolution or 'no resolution'}", "decline.no_ladder")


def after_not_charged(now: datetime, not_charged_in_a_row: int, terms: Terms) -> NextStep:
    """Nothing reached the card, so a new attempt harms nobody; but not for ever."""
    if not_charged_in_a_row >= MAX_NOT_CHARGED_IN_A_ROW:
        return NextStep(None, "not_charged_repeatedly", "not_charged.limit")
    return NextStep(now + terms.not_charged_retry, "not_charged", "not_charged.retry")


def hold(reason: str, rule: str) -> NextStep:
    """Nothing may happen before a person has looked."""
    return NextStep(None, reason, rule)
