"""Tells ahead of charges, and writes down which amount and date were told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.catch_up import cancellation_is_due
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import reference_for
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing.notice import (
    LONG_INTERVAL_DAYS,
    TRIAL_DAYS,
    USUAL_DAYS,
    Needed,
    Notice,
    NoticePolicy,
    NoticeType,
    needed,
)
from billing_worker.persistence import history
from billing_worker.persistence.history import Entry
from billing_worker.persistence.outbox import notices
from billing_worker.persistence.outbox.notices import Coming
from billing_worker.persistence.store import Store

BY = "notices"

ANNOUNCE_BATCH = 500

TOLD_EARLIER = timedelta(hours=1)
"""A notice goes out so much earlier than its days ahead. A receiver that is away for minutes then
delays no charge that waits for its notice.
"""

_KINDS: Final = {
    NoticeType.RENEWAL_UPCOMING: EventKind.RENEWAL_UPCOMING,
    NoticeType.TRIAL_ENDING: EventKind.TRIAL_ENDING,
}


@dataclass(frozen=True, slots=True)
class Charge:
    """A coming charge that its customer is told of."""

    subscription_id: int
    subscription: str  # its reference
    period: int
    start: datetime
    money: Money
    at: datetime  # when it is made at the earliest
    invoice_id: int | None = None  # None: its period is not open yet


def announce(store: Store, clock: Clock, default: NoticePolicy) -> int:
    """Tell of every charge that comes near and was not told of with its amount and date. Returns how
    many were told of.

    Safe to run as often as one likes, and twice at a time.
    """
    told, last_id = 0, 0
    while True:
        with store.transaction() as connection:
            now = clock.now()
            coming, following = notices.lock_coming(
                connection, now, _ahead(default), last_id, ANNOUNCE_BATCH
            )
            due = list(_near(coming, default, now))
            tell(connection, due, now)
        told += len(due)
        if following is None:
            return told
        last_id = following


def _ahead(default: NoticePolicy) -> dict[bool, timedelta]:
    """Return by whether an interval is long how far the sweep looks by default."""
    trial = TRIAL_DAYS if default.trial_days is None else default.trial_days
    usual = {False: USUAL_DAYS, True: LONG_INTERVAL_DAYS}
    return {
        long: timedelta(days=max(trial, default.days or days)) + TOLD_EARLIER
        for long, days in usual.items()
    }


def _near(
    coming: Sequence[Coming], default: NoticePolicy, now: datetime
) -> Iterator[tuple[Needed, Charge]]:
    for one in coming:
        subscription, number = one.subscription, one.subscription.next_period
        start = subscription.next_billing_at
        need = needed(one.agreement, number, default)
        if need is None or start is None or cancellation_is_due(subscription):
            continue
        if start - need.ahead - TOLD_EARLIER <= now:
            price = subscription.price_at(start)
            reference = subscription.reference_id
            yield need, Charge(subscription.id, reference, number, start, price, start)


def tell(connection: Connection, due: Sequence[tuple[Needed, Charge]], now: datetime) -> None:
    """Write a notice of each charge, and tell other systems. Their subscriptions or invoices are
    locked. What was told in the same words already is left as it is.
    """
    if not due:
        return
    known = notices.of_periods(connection, [(c.subscription_id, c.period) for _, c in due])
    written: list[Notice] = []
    entries: list[Entry] = []
    for need, charge in due:
        before = known.get((charge.subscription_id, charge.period))
        if before is not None and before.told_at and before.is_of(charge.start, charge.money):
            continue
        after = _next_edition(before, charge, now)
        written.append(after)
        event = Event(_KINDS[need.type], now, BY, _said(charge, after))
        entries.append(Entry(event, charge.subscription_id, charge.invoice_id))
    notices.write(connection, written)
    history.write(connection, entries)


def _next_edition(before: Notice | None, charge: Charge, now: datetime) -> Notice:
    edition = 1 if before is None else before.edition + 1
    same = before if before is not None and before.is_of(charge.start, charge.money) else None
    return Notice(
        charge.subscription_id, charge.period, charge.start, charge.money, edition, now,
        same.accepted_at if same else None, same.accepted_by if same else None,
    )  # fmt: skip


def _said(charge: Charge, notice: Notice) -> dict[str, Any]:
    return {
        "period": charge.period,
        "charge": reference_for(charge.subscription, charge.period),
        "amount": str(charge.money.amount),
        "currency": charge.money.currency,
        "charge_at": charge.at,
        "edition": notice.edition,
    }
