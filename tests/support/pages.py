"""What tests of pay links and card set-ups do to a world, and look for in it."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import (
    ConcurrentChange,
)
from billing_worker.gateway.http import Response
from billing_worker.persistence.schema import tables
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.stored_tokens import put_token

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
INVOICE = "sub-1-p0"


def checkout(world, invoice=INVOICE, **fields):
    return start_checkout(world.ports, {"invoice": invoice, **fields})


def tokenise(world, reference="card-1", customer="customer-of-sub-1", **fields):
    amount = {} if "invoice" in fields else {"amount": "1.00", "currency": "USD"}
    record = {"reference_id": reference, "customer": {"reference_id": customer}, **amount, **fields}
    return start_tokenisation(world.ports, record)


def pay(world, page):
    """The customer opens the page and pays."""
    reply = world.sandbox.pay_on_page(page["gateway_id"])
    assert reply.status == 200, reply
    return reply


def rows(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table).order_by(table.c.id)).all()


def payment(world):
    return rows(world, tables.card_setups)[-1]


def told(world, kind):
    with world.store.reading() as connection:
        query = select(tables.events).where(tables.events.c.kind == kind)
        return connection.execute(query).all()


def sent(world, method="POST"):
    return [json.loads(r.body) for r in world.transport.sent if r.method == method]


def late_money_is_over(world):
    """The page may have been used: its money may come after it expired."""
    expired_at = max(row.unpaid_since for row in rows(world, tables.attempts) if row.unpaid_since)
    return (expired_at + world.ports.timings.expired_retry).isoformat()


def late_payment(world, page):
    """The gateway takes money on a page that it had called expired: no client can prevent that."""
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.acquirer.charge(invoice, world.clock.now())


class Died(BaseException):
    """The process is gone: no handler runs."""


def dies_after(world, count):
    calls = []

    def before_send(_request):
        calls.append(_request)
        if len(calls) > count:
            raise Died

    world.transport.before_send = before_send


def overtaken(monkeypatch, module, ask):
    """What `ask`, of `module`, hands out to a second caller, while a first one asks the gateway and
    hands out nothing.
    """
    real = module.obtained
    pages = []

    def second_comes(*args, **options):
        monkeypatch.setattr(module, "obtained", real)
        pages.append(ask())
        return real(*args, **options)

    monkeypatch.setattr(module, "obtained", second_comes)
    with pytest.raises(ConcurrentChange):
        ask()
    [page] = pages
    return page


def give_card(world, token):
    put_token(world, token)


def answering(world, change, *, with_included=None):
    """Change the attributes, and the included resources, of every answer about one invoice."""
    real = world.transport.send

    def send(request, *, moves_money):
        response = real(request, moves_money=moves_money)
        document = json.loads(response.body, parse_float=Decimal)
        data = document.get("data")
        if isinstance(data, dict) and data.get("type") == "payment-invoices":
            change(data["attributes"])
            if with_included is not None:
                document["included"] = with_included(document.get("included", []))
        body = json.dumps(document, default=float).encode()
        return Response(response.status, body, response.content_type)

    world.transport.send = send


def default_card(world, reference="sub-1"):
    (card_id,) = (
        s.card_id for s in rows(world, tables.subscriptions) if s.reference_id == reference
    )
    return card_id
