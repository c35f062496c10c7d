"""What tests of cards do to a world, and look for in it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

from sqlalchemy import select

from billing_worker.persistence.schema import tables

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ANN = {"reference_id": "ann"}


def expiring_card(token="approved", month=1, year=2026):
    return {"token": token, "expiry_month": month, "expiry_year": year}


def declines_from_now_on(world):
    """Whatever is pending at the gateway is refused: there is no money."""
    poll = world.ports.gateway.poll

    def declined(gateway_id, calls):
        return dataclasses.replace(
            poll(gateway_id, calls), status="process_failed", resolution="insufficient_funds"
        )

    world.ports.gateway.poll = declined


def card_ids(world):
    with world.store.reading() as connection:
        return list(
            connection.execute(select(tables.cards.c.id).order_by(tables.cards.c.id)).scalars()
        )


def sold(world):
    """(attempt id, invoice id, when, fingerprint, amount, status), in the order of the sales."""
    a, c = tables.attempts, tables.cards
    query = (
        select(a.c.id, a.c.invoice_id, a.c.submitted_at, c.c.fingerprint, a.c.amount_minor,
               a.c.status)
        .join(c, c.c.id == a.c.card_id)
        .where(a.c.submitted_at.is_not(None))
        .order_by(a.c.submitted_at, a.c.id)
    )  # fmt: skip
    with world.store.reading() as connection:
        return connection.execute(query).all()
