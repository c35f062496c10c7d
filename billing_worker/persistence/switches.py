from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select, update

from billing_worker.persistence.tables import switches

SALES = "sales"


_SALES_ON = select(switches.c.is_on).where(switches.c.name == SALES)


def sales_are_on(connection: Connection) -> bool:
    """The kill switch, read inside the transaction that arms a charge.

    A missing row counts as off: a database that nobody has migrated must not charge.
    """
    return bool(connection.execute(_SALES_ON).scalar())


def turn_sales(
    connection: Connection, *, on: bool, by: str, reason: str | None, now: datetime
) -> None:
    connection.execute(
        update(switches)
        .where(switches.c.name == SALES)
        .values(is_on=on, by=by, reason=reason, changed_at=now)
    )
