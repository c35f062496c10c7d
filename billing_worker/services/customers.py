"""Who a customer is: their name and e-mail, taken anew from whatever tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.persistence import customers, history, subscriptions
from billing_worker.persistence.customers import Updated
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.import_records.person import check_email, check_name
from billing_worker.services.import_records.subscription import CustomerRecord


def known_as(
    connection: Connection, people: Sequence[CustomerRecord], by: str, now: datetime
) -> dict[str, int]:
    """Find or add customers. Return their ids by reference.

    A name or e-mail that is given is the customer's from now on; one that is left out stays.
    """
    given = [
        {"reference_id": one.reference_id, "name": one.name, "email": one.email} for one in people
    ]
    _tell(connection, customers.update_known(connection, given), by, None, now)
    return customers.ids_for(connection, given, now)


def update_customer(
    store: Store, clock: Clock, *, customer: str, name: str | None, email: str | None, by: str,
    why: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Give a customer another name or e-mail; None leaves it, an empty text removes it.

    Return {reference_id, outcome, fields}. Raises InvalidInput on `customer` when there is none, on
    `name` when nothing is given, or on what cannot be meant.
    """
    if name is None and email is None:
        raise InvalidInput("name", "give a name or an e-mail")
    if name:
        check_name(name)
    if email:
        check_email(email)
    now = clock.now()
    with store.transaction() as connection:
        if customers.find(connection, customer) is None:
            raise InvalidInput("customer", f"there is no customer {customer!r}")
        given = {"reference_id": customer, "name": name, "email": email}
        updated = customers.update_known(connection, [given])
        _tell(connection, updated, by, why, now)
    fields = updated[0].fields if updated else ()
    outcome = "changed" if updated else "unchanged"
    return {"reference_id": customer, "outcome": outcome, "fields": list(fields)}


def _tell(
    connection: Connection, updated: Sequence[Updated], by: str, why: str | None, now: datetime
) -> None:
    """In the history of each subscription that the customer still pays."""
    for one in updated:
        said = {"customer": one.reference_id, "fields": list(one.fields), "why": why}
        event = Event(EventKind.CUSTOMER_CHANGED, now, by, said)
        ids = subscriptions.ids_of_customer(connection, one.id)
        history.write(connection, [Entry(event, row_id) for row_id in ids] or [Entry(event)])
