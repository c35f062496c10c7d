"""The constraints of the schema, attacked with plain SQL on both databases."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError, StatementError

from billing_worker.persistence.tables import attempts, invoices, subscriptions


@pytest.fixture
def charged(world):
    world.subscribe("approved")
    world.tick()
    return world


def copied(connection, table, **changes):
    row = dict(connection.execute(select(table)).first()._mapping)
    row.pop("id")
    return insert(table).values(**(row | changes))


def refused(world, make_statement):
    with pytest.raises(IntegrityError), world.store.transaction() as connection:
        connection.execute(make_statement(connection))


def test_a_period_cannot_be_invoiced_twice(charged):
    refused(charged, lambda c: copied(c, invoices, reference_id="twin"))


def test_a_reference_cannot_be_used_by_two_attempts(charged):
    refused(charged, lambda c: copied(c, attempts, number=2, status="declined", gateway_id="cpi_2"))


def test_an_invoice_cannot_have_two_live_attempts(charged):
    with charged.store.transaction() as connection:
        connection.execute(
            copied(connection, attempts, number=2, reference_id="r2", status="submitted",
                   gateway_id="cpi_2")
        )  # fmt: skip
    refused(
        charged,
        lambda c: copied(c, attempts, number=3, reference_id="r3", status="prepared",
                         gateway_id=None),
    )  # fmt: skip
    with charged.store.transaction() as connection:  # leave the books as the ledger knows them
        connection.execute(attempts.delete().where(attempts.c.number == 2))


def test_an_invoice_cannot_succeed_twice(charged):
    refused(charged, lambda c: copied(c, attempts, number=2, reference_id="r2", gateway_id="cpi_2"))


def test_an_attempt_cannot_be_submitted_without_the_gateways_id(charged):
    refused(
        charged,
        lambda c: copied(c, attempts, number=2, reference_id="r2", gateway_id=None,
                         status="submitted"),
    )  # fmt: skip


@pytest.mark.parametrize("table", [subscriptions, invoices, attempts], ids=lambda t: t.name)
@pytest.mark.parametrize("amount", [0, -1])
def test_an_amount_must_be_positive(charged, table, amount):
    refused(charged, lambda _: update(table).values(amount_minor=amount))


@pytest.mark.parametrize("table", [subscriptions, invoices, attempts], ids=lambda t: t.name)
def test_an_unknown_status_is_refused(charged, table):
    refused(charged, lambda _: update(table).values(status="broken"))


def test_a_paid_invoice_cannot_be_rung_for(charged):
    refused(charged, lambda _: text("UPDATE invoices SET ring_at = created_at"))


def test_a_naive_datetime_never_reaches_the_database(charged):
    with pytest.raises(StatementError, match="naive"), charged.store.transaction() as connection:
        connection.execute(update(invoices).values(created_at=datetime(2026, 1, 1)))  # noqa: DTZ001


def test_an_instant_comes_back_as_it_went_in(charged):
    moment = datetime(2026, 7, 1, 14, 30, 0, 123456, tzinfo=ZoneInfo("Asia/Kathmandu"))
    with charged.store.transaction() as connection:
        connection.execute(update(invoices).values(created_at=moment))
    with charged.store.reading() as connection:
        read = connection.execute(select(invoices.c.created_at)).scalar()
    assert read == moment
    assert read.utcoffset() == timedelta(0)
