from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    update,
)

from billing_worker.domain.errors import ConcurrentChange, InvariantBroken
from billing_worker.domain.subscription import BILLABLE, ONE_OFF, OVER, Subscription
from billing_worker.persistence.bulk import among, insert_rows
from billing_worker.persistence.rows import (
    SUBSCRIPTIONS,
    TERMS,
    Unreadable,
    readable,
    subscription_from,
)
from billing_worker.persistence.schema.mapping import Update
from billing_worker.persistence.schema.tables import cards, customers, invoices, subscriptions

# Built once: sweeps run every few seconds and usually find nothing.
_NOW = bindparam("now", type_=subscriptions.c.next_billing_at.type)
_NO_TROUBLE = or_(subscriptions.c.plan_again_at.is_(None), subscriptions.c.plan_again_at <= _NOW)
_DUE = (
    select(*TERMS)
    .where(subscriptions.c.next_billing_at <= _NOW, _NO_TROUBLE)
    .order_by(subscriptions.c.next_billing_at, subscriptions.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_LEAVING = (
    select(*TERMS)
    .where(
        # A literal: SQLite plans the statement at each call if a bound value decides whether a
        # partial index fits.
        subscriptions.c.status == literal_column("'suspended'"),
        subscriptions.c.cancels_at <= _NOW,
        _NO_TROUBLE,
    )
    .order_by(subscriptions.c.cancels_at, subscriptions.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)


_RESUMING = (
    select(*TERMS)
    .where(
        subscriptions.c.resumes_at <= _NOW,
        subscriptions.c.status == literal_column("'paused'"),
        subscriptions.c.handed_over_at.is_(None),
        _NO_TROUBLE,
    )
    .order_by(subscriptions.c.resumes_at, subscriptions.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)


def claim_resuming(
    connection: Connection, now: datetime, limit: int
) -> tuple[list[Subscription], list[Unreadable]]:
    """Lock paused subscriptions whose pause ends, as `claim_due` does."""
    return readable(connection.execute(_RESUMING, {"now": now, "most": limit}))


def claim_due(
    connection: Connection, now: datetime, limit: int
) -> tuple[list[Subscription], list[Unreadable]]:
    """Lock up to `limit` due subscriptions.

    Skips those that another sweep has locked, and those that failed a short while ago.
    """
    return readable(connection.execute(_DUE, {"now": now, "most": limit}))


def claim_leaving(
    connection: Connection, now: datetime, limit: int
) -> tuple[list[Subscription], list[Unreadable]]:
    """Lock suspended subscriptions whose cancellation date has come, as `claim_due` does."""
    return readable(connection.execute(_LEAVING, {"now": now, "most": limit}))


def trouble_told(connection: Connection, subscription_id: int) -> str | None:
    query = select(subscriptions.c.trouble).where(subscriptions.c.id == subscription_id)
    return connection.execute(query).scalar()


def put_off(connection: Connection, trouble: Sequence[tuple[int, str]], until: datetime) -> None:
    """Put off subscriptions that cannot be planned: (id, why). The sweep skips them until then."""
    if trouble:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id == bindparam("row_id"))
            .values(trouble=bindparam("why"), plan_again_at=until),
            [{"row_id": row_id, "why": why} for row_id, why in trouble],
        )


_NAMED = (
    select(*TERMS)
    .where(subscriptions.c.reference_id == bindparam("reference_id"))
    .with_for_update()
)


def lock(connection: Connection, reference_id: str) -> Subscription | None:
    """Lock one subscription until the end of the transaction. Waits for other lock holders."""
    row = connection.execute(_NAMED, {"reference_id": reference_id}).one_or_none()
    return subscription_from(row) if row else None


def ids_of_customer(connection: Connection, customer_id: int) -> list[int]:
    """Return the ids of what the customer still pays, at most a hundred, the newest first."""
    query = (
        select(subscriptions.c.id)
        .where(
            subscriptions.c.customer_id == customer_id,
            subscriptions.c.status.not_in(["cancelled", "ended"]),
        )
        .order_by(subscriptions.c.id.desc())
        .limit(100)
    )
    return list(connection.execute(query).scalars())


def is_one_off(connection: Connection, subscription_id: int) -> bool:
    """Return whether it stands for a single charge."""
    query = select(subscriptions.c.kind).where(subscriptions.c.id == subscription_id)
    return connection.execute(query).scalar() == ONE_OFF


def lock_these(
    connection: Connection, ids: Collection[int]
) -> tuple[list[Subscription], list[Unreadable]]:
    """Lock several, in ascending order of their ids."""
    query = select(*TERMS).where(subscriptions.c.id.in_(ids)).order_by(subscriptions.c.id)
    return readable(connection.execute(query.with_for_update()))


_SAVE = Update(
    SUBSCRIPTIONS,
    subscriptions,
    [
        "status", "money", "schedule", "series_start", "next_period", "next_billing_at",
        "description", "paused_at", "paused_from", "resumes_at", "resumes_shifted", "cancels_at", "catch_up", "dunning_policy",
        "notices",
        "ends_at", "new_amount_minor", "new_amount_from",
    ],
)  # fmt: skip
_MOVED_ON = ["status", "next_period", "next_billing_at", "cancels_at"]
_ADVANCE, _ADVANCE_AND_REPRICE = (
    Update(
        SUBSCRIPTIONS,
        subscriptions,
        written,
        under=["next_period"],
        trouble=None,
        plan_again_at=None,
    )
    for written in (_MOVED_ON, [*_MOVED_ON, "money", "new_amount_minor", "new_amount_from"])
)


def save(connection: Connection, before: Subscription, after: Subscription) -> None:
    """Write the terms and the state of a subscription that the caller holds locked."""
    _SAVE.write(connection, [(before, after)])


def advance(connection: Connection, moves: Sequence[tuple[Subscription, Subscription]]) -> None:
    """Write (before, after) pairs of locked subscriptions whose next period was opened."""
    repriced = [(b, after) for b, after in moves if b.new_amount_from != after.new_amount_from]
    usual = [(b, after) for b, after in moves if b.new_amount_from == after.new_amount_from]
    try:
        _ADVANCE.write(connection, usual)
        _ADVANCE_AND_REPRICE.write(connection, repriced)
    except ConcurrentChange as error:
        raise InvariantBroken(f"a subscription that is opened: {error}") from None


def find(connection: Connection, reference_id: str) -> Row[Any] | None:
    """Return one subscription with its customer and card, or None."""
    query = _overview().where(subscriptions.c.reference_id == reference_id)
    return connection.execute(query).one_or_none()


_RECURRING = subscriptions.c.kind == "recurring"


def listed(connection: Connection, after_id: int, limit: int) -> Sequence[Row[Any]]:
    """Return a batch in the order of creation. `after_id` is the last id of the batch before, or 0.

    Without one-off charges, which are subscriptions only inside this database.
    """
    query = (
        _overview()
        .where(subscriptions.c.id > after_id, _RECURRING)
        .order_by(subscriptions.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def _overview() -> Any:
    return (
        select(
            subscriptions,
            customers.c.reference_id.label("customer_reference"),
            customers.c.name.label("customer_name"),
            customers.c.email.label("customer_email"),
            cards.c.mask.label("card_mask"),
            cards.c.brand.label("card_brand"),
        )
        .join(customers, customers.c.id == subscriptions.c.customer_id)
        .join(cards, cards.c.id == subscriptions.c.card_id, isouter=True)
    )


def count_by_status(connection: Connection) -> dict[str, int]:
    query = (
        select(subscriptions.c.status, func.count())
        .where(_RECURRING)
        .group_by(subscriptions.c.status)
    )
    return {status: count for status, count in connection.execute(query)}  # noqa: C416 - Row is no pair for dict()


def earliest_due(connection: Connection) -> datetime | None:
    return connection.execute(select(func.min(subscriptions.c.next_billing_at))).scalar()


def known(connection: Connection, references: Sequence[str]) -> dict[str, Row[Any]]:
    """Return the known ones of these references: the digest of the record that created each, and
    how it stands.
    """
    query: Any = select(
        subscriptions.c.reference_id,
        subscriptions.c.record_digest,
        subscriptions.c.status,
        subscriptions.c.held,
        subscriptions.c.next_billing_at,
        subscriptions.c.cancels_at,
    ).where(among(connection, subscriptions.c.reference_id, references))
    return {row.reference_id: row for row in connection.execute(query)}


def count_held(connection: Connection) -> int:
    """Return how many imports are held, and so not billed, before somebody arms them."""
    query = select(func.count()).where(
        subscriptions.c.held.is_(True),
        subscriptions.c.handed_over_at.is_(None),
        subscriptions.c.status.in_(sorted(BILLABLE)),
    )
    return connection.execute(query).scalar_one()


def whole(connection: Connection, references: Sequence[str]) -> Sequence[Row[Any]]:
    """Return subscriptions with all data of their customers and cards. Tokens stay encrypted."""
    return connection.execute(_whole().where(subscriptions.c.reference_id.in_(references))).all()


def whole_page(connection: Connection, after_id: int, limit: int) -> Sequence[Row[Any]]:
    """Return a batch of recurring subscriptions as `whole` does, in the order of creation."""
    query = (
        _whole()
        .where(subscriptions.c.id > after_id, _RECURRING)
        .order_by(subscriptions.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def lock_held(connection: Connection, references: Sequence[str]) -> list[Subscription]:
    """Lock and return those of the named subscriptions that are held imports."""
    query = _held().where(subscriptions.c.reference_id.in_(references))
    return [subscription_from(row) for row in connection.execute(query)]


def lock_held_page(connection: Connection, after_id: int, limit: int) -> list[Subscription]:
    query = _held().where(subscriptions.c.id > after_id).limit(limit)
    return [subscription_from(row) for row in connection.execute(query)]


def _held() -> Any:
    return (
        select(*TERMS)
        .where(subscriptions.c.held.is_(True), subscriptions.c.handed_over_at.is_(None))
        .order_by(subscriptions.c.id)
        .with_for_update()
    )


def arm(connection: Connection, starts: Sequence[tuple[int, datetime]]) -> None:
    """Activate held imports: (subscription id, when its next period is due)."""
    if starts:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id == bindparam("row_id"))
            .values(held=False, next_billing_at=bindparam("start")),
            [{"row_id": row_id, "start": start} for row_id, start in starts],
        )


_GOING_ON = and_(_RECURRING, subscriptions.c.status.not_in(sorted(OVER)),
               subscriptions.c.handed_over_at.is_(None))  # fmt: skip


def lock_in_currency(
    connection: Connection, currency: str, after_id: int, limit: int
) -> Sequence[Row[Any]]:
    """Lock a batch of subscriptions that go on in a currency, whether or not this version can read it:
    id, reference_id, amount_minor, new_amount_minor.
    """
    s = subscriptions.c
    query: Any = (
        select(s.id, s.reference_id, s.amount_minor, s.new_amount_minor)
        .where(_GOING_ON, subscriptions.c.currency == currency, subscriptions.c.id > after_id)
        .order_by(subscriptions.c.id)
        .limit(limit)
        .with_for_update()
    )
    rows: Sequence[Row[Any]] = connection.execute(query).all()
    return rows


def set_prices(
    connection: Connection, currency: str, prices: Sequence[tuple[int, int, int | None]]
) -> None:
    """Write (id, amount, amount that is agreed for later) of locked subscriptions, in another
    currency. What the old one had kept from being planned is tried again.
    """
    if prices:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id == bindparam("row_id"))
            .values(
                amount_minor=bindparam("minor"), new_amount_minor=bindparam("later"),
                currency=currency, trouble=None, plan_again_at=None,
            ),
            [{"row_id": id_, "minor": minor, "later": later} for id_, minor, later in prices],
        )  # fmt: skip


def count_open_in(connection: Connection, currency: str) -> int:
    """Return how many invoices are open in a currency."""
    query = select(func.count()).where(invoices.c.currency == currency, invoices.c.status == "open")
    return connection.execute(query).scalar_one()


def matching(
    connection: Connection, terms: Mapping[str, Any], after_id: int, limit: int
) -> Sequence[Row[Any]]:
    """Return a batch of subscriptions that go on and have these terms: id and reference_id."""
    query: Any = (
        select(subscriptions.c.id, subscriptions.c.reference_id)
        .where(_GOING_ON, subscriptions.c.id > after_id)
        .where(*(subscriptions.c[name] == value for name, value in terms.items()))
        .order_by(subscriptions.c.id)
        .limit(limit)
    )
    rows: Sequence[Row[Any]] = connection.execute(query).all()
    return rows


def lock_if_matching(connection: Connection, reference_id: str, terms: Mapping[str, Any]) -> bool:
    """Lock a subscription. Return whether it goes on and has these terms."""
    query = (
        select(subscriptions.c.id)
        .where(_GOING_ON, subscriptions.c.reference_id == reference_id)
        .where(*(subscriptions.c[name] == value for name, value in terms.items()))
        .with_for_update()
    )
    return connection.execute(query).scalar() is not None


def hand_over(connection: Connection, ids: Sequence[int], now: datetime) -> None:
    """Mark locked subscriptions as billed by another book. Their status stays as it is."""
    if ids:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id.in_(ids))
            .values(handed_over_at=now, next_billing_at=None)
        )


def take_back(
    connection: Connection, starts: Sequence[tuple[int, datetime | None]], now: datetime
) -> None:
    """Bill these here again. `starts`: (subscription id, when its next period is due)."""
    if starts:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id == bindparam("row_id"))
            .values(handed_over_at=None, taken_back_at=now, next_billing_at=bindparam("start")),
            [{"row_id": row_id, "start": start} for row_id, start in starts],
        )


def lock_handed_over(
    connection: Connection, after_id: int, limit: int, references: Sequence[str] | None
) -> list[tuple[Subscription, bool]]:
    """Lock a batch of those that another book bills, ordered by id, each with whether it is a held
    import.

    Only the named ones, if names are given.
    """
    query = (
        select(*TERMS)
        .where(subscriptions.c.handed_over_at.is_not(None), subscriptions.c.id > after_id)
        .order_by(subscriptions.c.id)
        .limit(limit)
        .with_for_update()
    )
    if references is not None:
        query = query.where(subscriptions.c.reference_id.in_(references))
    return [(subscription_from(row), row.held) for row in connection.execute(query)]


def lock_page(connection: Connection, after_id: int, limit: int) -> list[Subscription]:
    """Lock a batch of recurring subscriptions, in the order of creation."""
    query = (
        select(*TERMS)
        .where(subscriptions.c.id > after_id, _RECURRING)
        .order_by(subscriptions.c.id)
        .limit(limit)
        .with_for_update()
    )
    return [subscription_from(row) for row in connection.execute(query)]


def count_handed_over(connection: Connection) -> tuple[int, int]:
    """Return how many subscriptions another book bills, and how many of their invoices are open
    here.
    """
    handed = subscriptions.c.handed_over_at.is_not(None)
    still_open = (
        select(func.count())
        .select_from(invoices.join(subscriptions, subscriptions.c.id == invoices.c.subscription_id))
        .where(handed, invoices.c.status == "open")
    )
    total = select(func.count()).select_from(subscriptions).where(handed)
    return connection.execute(total).scalar_one(), connection.execute(still_open).scalar_one()


def _whole() -> Any:
    return _overview().add_columns(
        cards.c.token.label("card_token"),
        cards.c.expiry_month.label("card_expiry_month"),
        cards.c.expiry_year.label("card_expiry_year"),
    )


def add(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Insert subscriptions. Return their ids in the order of `rows`."""
    return insert_rows(connection, subscriptions, rows)
