"""Hands a book over: another book continues its subscriptions, this one collects its open debts.

    nothing new begins here ──▶ batch by batch: stopped here, committed ──▶ written for the other book

What is written was stopped before, so no period is billed twice, whenever a process dies. An
interrupted hand-over is run again and writes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.clock import Clock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import EventKind
from billing_worker.domain.subscription import BILLABLE, Subscription
from billing_worker.persistence import history, subscriptions, switches
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import Other
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.import_records.export import GOES_ON, why_left_out
from billing_worker.services.invoicing.pause_collection import Moment

HAND_OVER_BATCH = 500


def hand_over(store: Store, clock: Clock, *, by: str, why: str) -> Iterator[Row[Any]]:
    """Yield every recurring subscription, complete, in the order of creation. A continuing one is
    not billed here any more when it is yielded. Open invoices are still collected here.

    After the first one no subscription and no one-off charge begins in this book.
    """
    _fence(store, clock, by, why)
    last_id = 0
    while page := _page(store, clock, last_id, by, why):
        yield from page
        last_id = page[-1].id


def _fence(store: Store, clock: Clock, by: str, why: str) -> None:
    with store.transaction() as connection:
        moment = Moment(clock.now(), by)
        switches.hand_over(connection, by=by, reason=why, now=moment.now)
        history.write(connection, [Entry(moment.event(EventKind.BOOK_HANDED_OVER, why=why))])
    with store.transaction() as connection:
        # A transaction that has read that the book is open may still add to it until then.
        switches.wait_for_readers(connection)


def _page(store: Store, clock: Clock, last_id: int, by: str, why: str) -> Sequence[Row[Any]]:
    with store.transaction() as connection:
        locked = subscriptions.lock_page(connection, last_id, HAND_OVER_BATCH)
        moment = Moment(clock.now(), by)
        _hold(connection, [s for s in locked if _is_billed_here(s)], moment, why)
        ids = {subscription.id for subscription in locked}
        return [
            r for r in subscriptions.whole_page(connection, last_id, HAND_OVER_BATCH) if r.id in ids
        ]


def _is_billed_here(subscription: Subscription) -> bool:
    goes_on = subscription.status in GOES_ON and why_left_out(subscription) is None
    return goes_on and subscription.handed_over_at is None


def _hold(connection: Connection, going: Sequence[Subscription], moment: Moment, why: str) -> None:
    subscriptions.hand_over(connection, [s.id for s in going], moment.now)
    history.write(
        connection,
        (
            Entry(
                moment.event(
                    EventKind.SUBSCRIPTION_HANDED_OVER,
                    why=why,
                    next_period=s.next_period,
                    next_billing_at=_iso(s.next_billing_at),
                ),
                s.id,
            )
            for s in going
        ),
    )


def take_back(
    store: Store,
    clock: Clock,
    references: Sequence[str] | None,
    *,
    by: str,
    why: str,
    other: Other | None = None,
) -> int:
    """Bill subscriptions here again that no other book bills. None: all, and the book is open
    again.

    Before a charge the worker looks for what the other book may have billed until now. `other`:
    that book, if all are taken back; for a month the worker looks for new charges under its
    references too. None: nothing has begun there.

    Returns how many. Raises InvalidInput on `reference_id` for one that was not handed over.
    """
    taken = last_id = 0
    while True:
        with store.transaction() as connection:
            page = subscriptions.lock_handed_over(connection, last_id, HAND_OVER_BATCH, references)
            _take_back(connection, page, Moment(clock.now(), by), why)
        taken += len(page)
        if len(page) < HAND_OVER_BATCH:
            break
        last_id = page[-1][0].id
    if references is None:
        _open_again(store, Moment(clock.now(), by), why, other)
    elif taken < len(set(references)):
        raise InvalidInput("reference_id", f"{taken} taken back, the others were not handed over")
    return taken


def _take_back(
    connection: Connection,
    page: Sequence[tuple[Subscription, bool]],
    moment: Moment,
    why: str,
) -> None:
    starts = [(s.id, _due_at(s, held=held)) for s, held in page]
    subscriptions.take_back(connection, starts, moment.now)
    history.write(
        connection,
        (
            Entry(
                moment.event(
                    EventKind.SUBSCRIPTION_TAKEN_BACK, why=why, next_billing_at=_iso(start)
                ),
                row_id,
            )
            for row_id, start in starts
        ),
    )


def _due_at(subscription: Subscription, *, held: bool) -> datetime | None:
    becomes_due = subscription.status in BILLABLE and not held
    return subscription.start_of(subscription.next_period) if becomes_due else None


def _open_again(store: Store, moment: Moment, why: str, other: Other | None) -> None:
    with store.transaction() as connection:
        if other is not None:
            books.remember_other(connection, other, moment.now)
        switches.take_back(connection)
        told = {"why": why, "other_book": other.identity if other else None}
        history.write(connection, [Entry(moment.event(EventKind.BOOK_TAKEN_BACK, **told))])


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
