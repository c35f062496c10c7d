"""The constraints of the schema, attacked with plain SQL on both databases."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError, StatementError

from billing_worker.persistence.schema.tables import attempts, invoices, subscriptions

pytestmark = pytest.mark.sql


@pytest.fixture
def charged(world):
    world.subscribe("approved")
    world.tick()
    return world


def copied(connection, table, **changes):
    row = dict(connection.execute(select(table)).first()._mapping)
    row.pop("id")
    return insert(table).values(**(row | changes))


def refused(world, rule, make_statement, *, columns=""):
    """By this rule, and not by another one in its way. SQLite calls a unique one by its columns."""
    with pytest.raises(IntegrityError) as refusal, world.store.transaction() as connection:
        connection.execute(make_statement(connection))
    said = str(refusal.value.orig)
    assert rule in said or said == f"UNIQUE constraint failed: {columns}"


def test_a_period_cannot_be_invoiced_twice(charged):
    refused(
        charged, "uq_invoices_subscription_id_period_number",
        lambda c: copied(c, invoices, reference_id="twin"),
        columns="invoices.subscription_id, invoices.period_number",
    )  # fmt: skip


def test_a_reference_cannot_be_used_by_two_attempts(charged):
    refused(
        charged, "uq_attempts_reference_id",
        lambda c: copied(c, attempts, number=2, status="declined", gateway_id="cpi_2"),
        columns="attempts.reference_id",
    )  # fmt: skip


def test_an_invoice_cannot_have_two_live_attempts(charged):
    with charged.store.transaction() as connection:
        connection.execute(
            copied(connection, attempts, number=2, reference_id="r2", status="submitted",
                   gateway_id="cpi_2")
        )  # fmt: skip
    refused(
        charged, "uq_attempts_one_live",
        lambda c: copied(c, attempts, number=3, reference_id="r3", status="prepared",
                         gateway_id=None),
        columns="attempts.invoice_id",
    )  # fmt: skip
    with charged.store.transaction() as connection:  # leave the books as the ledger knows them
        connection.execute(attempts.delete().where(attempts.c.number == 2))


def test_an_invoice_cannot_succeed_twice(charged):
    refused(
        charged, "uq_attempts_one_succeeded",
        lambda c: copied(c, attempts, number=2, reference_id="r2", gateway_id="cpi_2"),
        columns="attempts.invoice_id",
    )  # fmt: skip


def test_an_attempt_cannot_be_submitted_without_the_gateways_id(charged):
    refused(
        charged, "ck_attempts_sold_only_with_gateway_id",
        lambda c: copied(c, attempts, number=2, reference_id="r2", gateway_id=None,
                         status="submitted"),
    )  # fmt: skip


@pytest.mark.parametrize("table", [subscriptions, invoices, attempts], ids=lambda t: t.name)
@pytest.mark.parametrize("amount", [0, -1])
def test_an_amount_must_be_positive(charged, table, amount):
    rule = f"ck_{table.name}_amount_positive"
    refused(charged, rule, lambda _: update(table).values(amount_minor=amount))


@pytest.mark.parametrize(
    ("table", "at_rest"),
    [(subscriptions, {"next_billing_at": None}), (invoices, {"paid_at": None}), (attempts, {})],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_unknown_status_is_refused(charged, table, at_rest):
    rule = f"ck_{table.name}_status_known"
    refused(charged, rule, lambda _: update(table).values(status="broken", **at_rest))


def test_a_paid_invoice_cannot_be_rung_for(charged):
    refused(
        charged, "ck_invoices_rung_only_while_open",
        lambda _: text("UPDATE invoices SET enqueue_at = created_at"),
    )  # fmt: skip


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
