"""A notice counts once a receiver has taken it, or another service says that it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing import notice as rules
from billing_worker.domain.outgoing.notice import Agreement, Notice, NoticePolicy, NoticeType
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence import claims, history
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.outbox import notices
from billing_worker.persistence.store import Store

_BEGIN: Final = tuple(f'{{"type":"{kind}"' for kind in NoticeType)
"""How the body of such an event begins: most events are others, and are not parsed."""

OLDEST_NOTICE = timedelta(days=rules.MOST_NOTICE_DAYS)
CLOCKS_MAY_DIFFER = timedelta(minutes=1)


def taken(
    connection: Connection, events: Iterable[tuple[int, str]], who: str, now: datetime
) -> None:
    """Mark the notices among delivered events, given as (subscription id, body), as accepted."""
    found = sorted(
        (subscription_id, data["period"], data["edition"])
        for subscription_id, body in events
        if body.startswith(_BEGIN)
        for data in [json.loads(body)["data"]]
    )
    entries: list[Entry] = []
    for subscription_id, period, edition in found:
        if notices.accept(connection, subscription_id, period, edition, now, who):
            data = {"period": period, "edition": edition, "accepted_at": now}
            event = Event(EventKind.NOTICE_ACCEPTED, now, who, data)
            entries.append(Entry(event, subscription_id))
    history.write(connection, entries)


@dataclass(frozen=True, slots=True)
class _Told:
    """The charge that somebody was told of."""

    subscription: Subscription
    agreement: Agreement
    period: int
    start: datetime
    money: Money
    item: DueInvoice | None  # None: its period is not open yet


def notice_sent(
    store: Store,
    clock: Clock,
    default: NoticePolicy,
    *,
    subscription: str,
    period: int,
    amount: Any,
    currency: Any,
    sent_at: datetime | None = None,
    by: str,
    why: str | None = None,
) -> dict[str, Any]:
    """Record that the customer was told of the charge for one period, and of which amount.

    The period is open, or the next one. `sent_at`: when, if not now; at most 90 days ago. A charge
    that waits for the notice is dated anew. Returns {subscription, period, invoice, accepted_at,
    charged_from}; `charged_from` is None where no charge waits for a notice. Raises InvalidInput on
    `subscription`, `period`, `sent_at`, or on `amount` if the charge will be another one.
    """
    money = Money.parse(amount, currency)
    with store.transaction() as connection:
        told = _charge(connection, subscription, period)
        now = clock.now()
        at = _not_in_the_future(sent_at, now)
        if money != told.money:
            raise InvalidInput("amount", f"is {money}, and the charge is of {told.money}")
        before = notices.of_periods(connection, [(told.subscription.id, period)])
        notice = _accepted(told, before.get((told.subscription.id, period)), at, by)
        notices.write(connection, [notice])
        need = rules.needed(told.agreement, period, default)
        waits = need is not None and need.is_required
        ready = max(rules.earliest(need, notice, now), told.start) if need and waits else None
        if ready is not None:
            _date(connection, told, ready)
        data = {"period": period, "amount": str(money), "accepted_at": notice.accepted_at,
                "why": why}  # fmt: skip
        entry = Entry(Event(EventKind.NOTICE_ACCEPTED, now, by, data), told.subscription.id)
        history.write(connection, [entry])
    return {
        "subscription": subscription,
        "period": period,
        "invoice": reference_for(subscription, period),
        "accepted_at": notice.accepted_at.isoformat() if notice.accepted_at else None,
        "charged_from": ready.isoformat() if ready else None,
    }


def _charge(connection: Connection, reference: str, period: int) -> _Told:
    found = notices.lock_agreement(connection, reference)
    if found is None:
        raise InvalidInput("subscription", f"there is no subscription {reference!r}")
    subscription, agreement = found
    for item in claims.lock_open(connection, subscription.id):
        invoice = item.invoice
        if invoice.period_number == period:
            return _Told(subscription, agreement, period, invoice.period_start, invoice.money, item)
    start = subscription.next_billing_at
    if period != subscription.next_period or start is None:
        raise InvalidInput("period", "is neither open nor the next one that becomes due")
    price = subscription.price_at(start)
    return _Told(subscription, agreement, period, start, price, None)


def _accepted(told: _Told, before: Notice | None, at: datetime, by: str) -> Notice:
    if before is None or not before.is_of(told.start, told.money):
        edition = before.edition if before else 0
        return Notice(
            told.subscription.id, told.period, told.start, told.money, edition, None, at, by
        )
    if before.accepted_at is not None and before.accepted_at <= at:
        return before
    return replace(before, accepted_at=at, accepted_by=by)


def _date(connection: Connection, told: _Told, ready: datetime) -> None:
    """Date a charge that waits for this notice, which may have been sent days ago."""
    item = told.item
    waits = item is not None and item.invoice.reason in {rules.NOT_ACCEPTED, rules.ACCEPTED_LATE}
    if item is None or not waits or item.invoice.next_attempt_at is None:
        return
    claims.date(connection, [(item.invoice.id, rules.ACCEPTED_LATE, ready)])


def _not_in_the_future(sent_at: datetime | None, now: datetime) -> datetime:
    if sent_at is None:
        return now
    if sent_at > now + CLOCKS_MAY_DIFFER:
        raise InvalidInput("sent_at", "is in the future")
    if sent_at < now - OLDEST_NOTICE:
        raise InvalidInput("sent_at", f"is more than {OLDEST_NOTICE.days} days ago")
    return min(sent_at, now)
