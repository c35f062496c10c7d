"""Notices before a charge: the last one of each period, and which subscriptions need one now."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Row,
    and_,
    bindparam,
    case,
    exists,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from billing_worker.domain.money import Money
from billing_worker.domain.outgoing.notice import (
    HALF_A_YEAR,
    MOST_NOTICE_DAYS,
    Agreement,
    Notice,
    chosen,
    is_long,
)
from billing_worker.domain.subscription import ONE_OFF, Subscription
from billing_worker.persistence.rows import TERMS, readable, subscription_from
from billing_worker.persistence.schema.tables import notices, subscriptions

_S, _N = subscriptions.c, notices.c

OF_AGREEMENT: Final[list[Any]] = [
    _S.notices,
    _S.kind,
    _S.interval,
    _S.interval_count,
    _S.trial_end.is_not(None).label("had_trial"),
]
"""The columns that `agreement_from` needs."""


def agreement_from(row: Row[Any]) -> Agreement:
    """Raises InvalidInput or KeyError for a row that this version cannot read."""
    long = is_long(row.interval, row.interval_count)
    return Agreement(chosen(row.notices), row.kind == ONE_OFF, bool(row.had_trial), long)


def of_subscriptions(connection: Connection, ids: Collection[int]) -> dict[tuple[int, int], Notice]:
    """Return the notices of these subscriptions by (subscription id, period number)."""
    rows = connection.execute(select(notices).where(_N.subscription_id.in_(ids)))
    return _by_period(rows)


def of_periods(
    connection: Connection, periods: Collection[tuple[int, int]]
) -> dict[tuple[int, int], Notice]:
    """Return the notices of these (subscription id, period number)."""
    ids, numbers = {one for one, _ in periods}, {number for _, number in periods}
    query = select(notices).where(_N.subscription_id.in_(ids), _N.period_number.in_(numbers))
    return _by_period(connection.execute(query))


def _by_period(rows: Any) -> dict[tuple[int, int], Notice]:
    return {
        (row.subscription_id, row.period_number): Notice(
            row.subscription_id, row.period_number, row.period_start,
            Money.from_minor(row.amount_minor, row.currency), row.edition, row.told_at,
            row.accepted_at, row.accepted_by,
        )
        for row in rows
    }  # fmt: skip


def write(connection: Connection, written: Sequence[Notice]) -> None:
    """Write notices in place of those of the same periods."""
    if not written:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(notices)
    given = statement.excluded
    names = [column.name for column in notices.c if not column.primary_key]
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["subscription_id", "period_number"],
            set_={name: given[name] for name in names},
        ),
        [
            {"subscription_id": one.subscription_id, "period_number": one.period_number,
             "period_start": one.period_start, "amount_minor": one.money.minor,
             "currency": one.money.currency, "edition": one.edition, "told_at": one.told_at,
             "accepted_at": one.accepted_at, "accepted_by": one.accepted_by}
            for one in sorted(written, key=lambda one: (one.subscription_id, one.period_number))
        ],
    )  # fmt: skip


_ACCEPT = (
    update(notices)
    .where(
        _N.subscription_id == bindparam("of"),
        _N.period_number == bindparam("number"),
        _N.edition == bindparam("told"),
        _N.accepted_at.is_(None),
    )
    .values(accepted_at=bindparam("at", type_=_N.accepted_at.type), accepted_by=bindparam("who"))
)


def accept(
    connection: Connection, subscription_id: int, number: int, edition: int, at: datetime, who: str
) -> bool:
    """Mark the notice as accepted. False: it was before, or another edition has taken its place."""
    given = {"of": subscription_id, "number": number, "told": edition, "at": at, "who": who}
    return connection.execute(_ACCEPT, given).rowcount == 1


@dataclass(frozen=True, slots=True)
class Coming:
    """A subscription whose next charge may have to be announced, locked."""

    subscription: Subscription
    agreement: Agreement


def lock_agreement(connection: Connection, reference: str) -> tuple[Subscription, Agreement] | None:
    """Lock one subscription. Raises what `subscription_from` raises if it cannot be read."""
    query: Any = (
        select(*TERMS, _S.trial_end.is_not(None).label("had_trial"))
        .where(_S.reference_id == reference)
        .with_for_update(of=subscriptions)
    )
    row = connection.execute(query).one_or_none()
    return (subscription_from(row), agreement_from(row)) if row is not None else None


_PRICE = case(
    (_S.new_amount_from <= _S.next_billing_at, _S.new_amount_minor), else_=_S.amount_minor
)
"""As `Subscription.price_at`: that one decides, this one only leaves out what is done."""

_IS_TOLD = exists().where(
    _N.subscription_id == _S.id,
    _N.period_number == _S.next_period,
    _N.told_at.is_not(None),
    _N.period_start == _S.next_billing_at,
    _N.amount_minor == _PRICE,
    _N.currency == _S.currency,
)
_IS_LONG = or_(
    *(and_(_S.interval == unit, _S.interval_count >= count) for unit, count in HALF_A_YEAR.items())
)


_NOW, _NEAR, _NEAR_OF_LONG, _NEAR_OF_OWN = (
    bindparam(name, type_=_S.next_billing_at.type) for name in ("now", "near", "long", "own")
)
_COMING: Any = (
    select(*TERMS, _S.trial_end.is_not(None).label("had_trial"))
    .where(
        _S.kind != ONE_OFF,
        _S.id > bindparam("after_id"),
        _S.next_billing_at > _NOW,
        _S.next_billing_at <= _NEAR_OF_OWN,
        or_(
            and_(_S.notices.is_(None), ~_IS_LONG, _S.next_billing_at <= _NEAR),
            and_(_S.notices.is_(None), _IS_LONG, _S.next_billing_at <= _NEAR_OF_LONG),
            _S.notices.is_not(None),
        ),
        ~_IS_TOLD,
    )
    .order_by(_S.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=subscriptions)
)


def lock_coming(
    connection: Connection,
    now: datetime,
    ahead: Mapping[bool, timedelta],
    after_id: int,
    limit: int,
) -> tuple[list[Coming], int | None]:
    """Lock a batch of subscriptions whose next charge is near and not announced as it is now.

    `ahead`: how near by default, by whether the interval is long. Returns them with the last id of
    the batch; None: it was the last one. Skips those that others have locked: the next sweep finds
    them.
    """
    own = timedelta(days=MOST_NOTICE_DAYS + 1)
    given = {
        "now": now, "near": now + ahead[False], "long": now + ahead[True], "own": now + own,
        "after_id": after_id, "most": limit,
    }  # fmt: skip
    rows = connection.execute(_COMING, given).all()
    agreed, _ = readable(rows)  # the sweep that opens periods reports the others
    by_id = {row.id: row for row in rows}
    last = rows[-1].id if len(rows) == limit else None
    return [Coming(one, agreement_from(by_id[one.id])) for one in agreed], last
