from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from billing_worker.domain.card import died_of_age, is_later_expiry
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.network_rules import never_again
from billing_worker.persistence import cards as stored_cards
from billing_worker.persistence.bulk import among, insert_rows
from billing_worker.persistence.schema.tables import cards, customers, invoices, subscriptions

FOREIGN_CARD = "belongs to another customer"


def ids_for(
    connection: Connection, people: Sequence[dict[str, Any]], now: datetime
) -> dict[str, int]:
    """Find or add customers by reference id. A known one keeps its name and e-mail."""
    by_reference: dict[str, dict[str, Any]] = {}
    for person in people:
        by_reference.setdefault(person["reference_id"], person)
    known = {row.reference_id: row.id for row in _known(connection, list(by_reference))}
    new = [
        {**person, "created_at": now}
        for reference, person in by_reference.items()
        if reference not in known
    ]
    if new:
        ids = insert_rows(connection, customers, new)
        known |= {person["reference_id"]: row_id for person, row_id in zip(new, ids, strict=True)}
    return known


def find(connection: Connection, reference_id: str) -> int | None:
    query = select(customers.c.id).where(customers.c.reference_id == reference_id)
    return connection.execute(query).scalar()


def of_invoice(connection: Connection, invoice_id: int) -> Row[Any]:
    """Return (reference_id, name, email, description of the invoice) of who owes it."""
    query: Select[Any] = (
        select(
            customers.c.reference_id, customers.c.name, customers.c.email, invoices.c.description
        )
        .join(subscriptions, subscriptions.c.customer_id == customers.c.id)
        .join(invoices, invoices.c.subscription_id == subscriptions.c.id)
        .where(invoices.c.id == invoice_id)
    )
    return connection.execute(query).one()


@dataclass(frozen=True, slots=True)
class Updated:
    """A known customer of whom something new was told."""

    id: int
    reference_id: str
    fields: tuple[str, ...]  # their names: what they say is not repeated in the history


def update_known(connection: Connection, people: Sequence[Mapping[str, Any]]) -> list[Updated]:
    """Take a new name or e-mail of customers who are known. None leaves what is known, an empty text
    removes it; of two in one call the later one counts. Return those that have changed.
    """
    given = {person["reference_id"]: person for person in people}
    updated: list[Updated] = []
    for row in _known(connection, list(given)):
        told = {
            name: value or None
            for name in ("name", "email")
            if (value := given[row.reference_id].get(name)) is not None
        }
        new = {name: value for name, value in told.items() if value != getattr(row, name)}
        if new:
            connection.execute(update(customers).where(customers.c.id == row.id).values(new))
            updated.append(Updated(row.id, row.reference_id, tuple(new)))
    return updated


def _known(connection: Connection, references: Sequence[str]) -> Sequence[Row[Any]]:
    query: Select[Any] = select(
        customers.c.id, customers.c.reference_id, customers.c.name, customers.c.email
    ).where(among(connection, customers.c.reference_id, references))
    # Who updates several does so in one order, so that two imports never deadlock.
    return connection.execute(query.order_by(customers.c.id)).all()


def add_cards(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Store cards with encrypted tokens. Return their ids in the order of `rows`.

    A card that the customer has already, by its fingerprint, is not stored twice, and keeps its past.
    Refused for good stays refused, unless the bank refused it for its expiry and it comes back with a
    later one: then it was renewed. Raises InvalidInput on `card.token` if another customer has the
    card.
    """
    if not rows:
        return []
    owner_of: dict[str, int] = {}
    for row in rows:
        _require_own(
            owner_of.setdefault(row["fingerprint"], row["customer_id"]), row["customer_id"]
        )
    known: dict[str, list[Row[Any]]] = defaultdict(list)
    for stored in stored_cards.lock_known(connection, owner_of):
        _require_own(stored.customer_id, owner_of[stored.fingerprint])
        known[stored.fingerprint].append(stored)
    new = {row["fingerprint"]: row for row in rows if row["fingerprint"] not in known}
    added = insert_rows(connection, cards, list(new.values())) if new else []
    ids = dict(zip(new, added, strict=True))
    for row in rows:
        if alike := known.get(row["fingerprint"]):
            _given_again(connection, alike, row)
    ids |= {name: alike[-1].id for name, alike in known.items()}
    return [ids[row["fingerprint"]] for row in rows]


def _given_again(
    connection: Connection, alike: Sequence[Row[Any]], given: Mapping[str, Any]
) -> None:
    """Keep what is told of a known card for the first time. Older versions stored one twice."""
    newest = alike[-1]
    if stored_cards.is_removed(newest):
        stored_cards.restore(connection, newest, given["token"])
    month, year = given["expiry_month"], given["expiry_year"]
    if is_later_expiry(stored_cards.card_from(newest), month, year):
        ids = [row.id for row in alike]
        revived = died_of_age(newest.unusable_reason) and not any(
            never_again(newest.brand, code, given["created_at"])
            for code in stored_cards.codes_of_declines(connection, ids)
        )
        stored_cards.renew(connection, ids, month=month, year=year, is_revived=revived)
    told = {
        name: given[name]
        for name in ("mask", "brand", "holder", "issuer_name", "issuer_country")
        if given.get(name) and getattr(newest, name) is None
    }
    if told:
        stored_cards.complete(connection, newest.id, told)


def _require_own(owner_id: int, customer_id: int) -> None:
    if owner_id != customer_id:
        raise InvalidInput("card.token", FOREIGN_CARD)
