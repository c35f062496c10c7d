"""Turns stored subscriptions into import records, for export and to show both sides of a
conflict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret, card_of
from billing_worker.domain.subscription import (
    BILLABLE,
    Subscription,
    SubscriptionStatus,
    near_miss,
)
from billing_worker.gateway.redaction import HIDDEN
from billing_worker.persistence.book.identity import Book
from billing_worker.persistence.rows import subscription_from
from billing_worker.services.import_records.subscription import (
    COMES_FROM,
    CardRecord,
    CustomerRecord,
    State,
    SubscriptionRecord,
)
from billing_worker.services.ports import Vault


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which two records differ. Never shows a card token."""

    field: str
    stored: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.field}: stored {self.stored!r}, given {self.given!r}"


def record_from(row: Row[Any], vault: Vault | None) -> SubscriptionRecord:
    """Return the record with which another database continues this subscription.

    `row` is one of `subscriptions.whole`. Without a vault the card's token stays empty. The record
    holds no open debts and no cards but the default one.
    """
    subscription = subscription_from(row)
    return SubscriptionRecord(
        reference_id=subscription.reference_id,
        customer=CustomerRecord(
            row.customer_reference, row.customer_name or None, row.customer_email or None
        ),
        card=_card_from(row, vault),
        money=subscription.money,
        schedule=subscription.schedule,
        trial_end=_trial_end(subscription, row.trial_end),
        paid_through=_paid_through(subscription, row.paid_through),
        ends_after_periods=subscription.ends_after_periods,
        description=subscription.description or None,
        metadata=row.metadata,
        ends_at=_ends_at(subscription),
        state=State(
            catch_up=subscription.catch_up,
            dunning=subscription.dunning_policy,
            notices=str(subscription.notices) if subscription.notices else None,
            held=row.held,
            first_number=subscription.series_start,
            paused_at=subscription.paused_at,
            resumes_at=subscription.resumes_at,
            resumes_shifted=subscription.resumes_shifted,
            cancels_at=subscription.cancels_at,
            new_amount=_new_amount(subscription),
            new_amount_from=subscription.new_amount_from,
            from_book=row.from_book,
            from_prefix=row.from_prefix,
        ),
    )


def leaving(row: Row[Any], vault: Vault | None, book: Book) -> SubscriptionRecord:
    """Return `record_from` with the identity of this book, for an export. References at the gateway
    keep the prefix of the book that created them.
    """
    record = record_from(row, vault)
    prefix = book.prefix if row.from_prefix is None else row.from_prefix
    state = replace(record.state, from_book=book.identity, from_prefix=prefix)
    return replace(record, state=state)


def _new_amount(subscription: Subscription) -> Money | None:
    since = subscription.new_amount_from
    return None if since is None else subscription.price_at(since)


def _ends_at(subscription: Subscription) -> datetime | None:
    """Return `ends_at`, or None if no further period follows: a record that says so is refused."""
    ends_at = subscription.ends_at
    following = subscription.start_of(subscription.next_period)
    return None if ends_at is None or ends_at <= following else ends_at


def _trial_end(subscription: Subscription, imported: datetime | None) -> datetime | None:
    """Return the end of the trial. In a record it equals the anchor, which a pause may have
    moved.
    """
    trialing = SubscriptionStatus.TRIALING in {subscription.status, subscription.paused_from}
    anchor = subscription.schedule.anchor
    if imported == anchor and subscription.series_start == 0:
        return imported
    return anchor if trialing and imported is not None else None


def _paid_through(subscription: Subscription, imported: datetime | None) -> datetime | None:
    following = subscription.next_period
    # In another series the anchor is a later one.
    if (
        imported is not None
        and subscription.series_start == 0
        and subscription.first_number_from(imported) == following
        and near_miss(subscription.schedule, imported) is None  # which no import takes any more
    ):
        return imported
    return None if following == subscription.series_start else subscription.start_of(following)


def _card_from(row: Row[Any], vault: Vault | None) -> CardRecord | None:
    if row.card_id is None:
        return None
    return CardRecord(
        token=vault.unlock(row.card_token, card_of(row.customer_id)) if vault else Secret(""),
        mask=row.card_mask or None,
        brand=row.card_brand or None,
        expiry_month=row.card_expiry_month,
        expiry_year=row.card_expiry_year,
    )


GOES_ON = BILLABLE | {SubscriptionStatus.PAUSED}


def why_left_out(subscription: Subscription) -> str | None:
    """Return why a subscription is not exported: a record cannot express it, or it must not be
    billed again.
    """
    if subscription.handed_over_at is not None and subscription.status not in GOES_ON:
        return f"{subscription.status} since it was handed over"
    last = subscription.ends_after_periods
    all_billed = last is not None and subscription.next_period >= last
    if subscription.status is SubscriptionStatus.ENDED and all_billed:
        return None  # The other book creates it as ended.
    if subscription.paused_at is not None:
        return None
    return None if subscription.status in BILLABLE else str(subscription.status)


def differences(stored: SubscriptionRecord, given: SubscriptionRecord) -> tuple[Difference, ...]:
    """Return differences by field. Empty if both records mean the same."""
    one, other = stored.card, given.card
    return differences_shown(
        stored.as_json(with_token=False),
        given.as_json(with_token=False),
        other_card=one is not None and other is not None and one.token != other.token,
    )


def differences_shown(
    stored: Mapping[str, Any], given: Mapping[str, Any], *, other_card: bool
) -> tuple[Difference, ...]:
    """Return `differences` of shown records, without tokens."""
    if not given["held"]:  # The record leaves this to the option of the import.
        stored = {**stored, "held": False}
    stored, given = ({n: v for n, v in r.items() if n not in COMES_FROM} for r in (stored, given))
    found = differing(stored, given)
    if other_card:
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
