"""Stored subscriptions as import records again: for export, and to show both sides of a conflict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.secret import Secret
from billing_worker.domain.subscription import BILLABLE, Subscription, SubscriptionStatus
from billing_worker.gateway.redaction import HIDDEN
from billing_worker.persistence.rows import subscription_from
from billing_worker.services.ports import Vault
from billing_worker.services.records import CardRecord, CustomerRecord, SubscriptionRecord


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of two records that should be the same. Never shows a card token."""

    field: str
    stored: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.field}: stored {self.stored!r}, given {self.given!r}"


def record_from(row: Row[Any], vault: Vault | None) -> SubscriptionRecord:
    """What to import so that another database would go on where this subscription stands.

    `row` is one of `subscriptions.whole`; without a vault the card's token stays empty. The record
    says nothing of status, of what is owed, or of policies.
    """
    subscription = subscription_from(row)
    first_series = subscription.series_start == 0
    last = subscription.ends_after_periods
    return SubscriptionRecord(
        reference_id=subscription.reference_id,
        customer=CustomerRecord(row.customer_reference, row.customer_name, row.customer_email),
        card=_card_from(row, vault),
        money=subscription.money,
        schedule=subscription.schedule,
        trial_end=row.trial_end if first_series else None,
        paid_through=_paid_through(subscription, row.paid_through if first_series else None),
        # Periods are counted from the anchor there, and from the first one ever here.
        ends_after_periods=None if last is None else last - subscription.series_start,
        description=subscription.description,
        metadata=row.metadata,
    )


def _paid_through(subscription: Subscription, imported: datetime | None) -> datetime | None:
    following = subscription.next_period
    if imported is not None and subscription.first_number_from(imported) == following:
        return imported
    return None if following == subscription.series_start else subscription.start_of(following)


def _card_from(row: Row[Any], vault: Vault | None) -> CardRecord | None:
    if row.card_id is None:
        return None
    return CardRecord(
        token=vault.unlock(row.card_token) if vault else Secret(""),
        mask=row.card_mask,
        brand=row.card_brand,
        expiry_month=row.card_expiry_month,
        expiry_year=row.card_expiry_year,
    )


def why_left_out(subscription: Subscription) -> str | None:
    """Why a subscription is not exported: importing its record would bill what must not be."""
    last = subscription.ends_after_periods
    all_billed = last is not None and subscription.next_period >= last
    if subscription.status is SubscriptionStatus.ENDED and all_billed:
        return None  # There it is born ended.
    if subscription.cancels_at is not None:
        return "about to be cancelled"
    return None if subscription.status in BILLABLE else str(subscription.status)


def differences(stored: SubscriptionRecord, given: SubscriptionRecord) -> tuple[Difference, ...]:
    """Field by field; empty when both mean the same."""
    found = differing(stored.as_json(with_token=False), given.as_json(with_token=False))
    if stored.card and given.card and stored.card.token != given.card.token:
        found += (Difference("card.token", HIDDEN, f"{HIDDEN} (another one)"),)
    return found


def differing(
    stored: Mapping[str, Any], given: Mapping[str, Any], parent: str = ""
) -> tuple[Difference, ...]:
    return tuple(_differing(stored, given, parent))


def _differing(
    stored: Mapping[str, Any], given: Mapping[str, Any], parent: str
) -> Iterator[Difference]:
    for name in [*stored, *(name for name in given if name not in stored)]:
        path = f"{parent}.{name}".strip(".")
        one, other = stored.get(name), given.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and name != "metadata":
            yield from _differing(one, other, path)
        elif one != other:
            yield Difference(path, one, other)
