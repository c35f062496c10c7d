"""A field is written, or its change is refused: none is lost because somebody forgot its column."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import pytest
from sqlalchemy import create_engine, insert, select, text

from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.catch_up_policy import CatchUp, Policy
from billing_worker.domain.errors import ConcurrentChange, InvariantBroken
from billing_worker.domain.money import Money
from billing_worker.domain.outgoing.notice import NoticePolicy
from billing_worker.persistence import attempts, subscriptions
from billing_worker.persistence.rows import ATTEMPTS, INVOICES, SUBSCRIPTIONS
from billing_worker.persistence.schema import tables

NOW = datetime(2026, 1, 31, tzinfo=UTC)
SAMPLES = {str: "x", int: 1, bool: True, bytes: b"x"}
KNOWN = {
    "metadata": {}, "billing_day": None, "currency": "USD", "interval": "month", "timezone": "UTC", "catch_up": "collect_all",
    "origin": "scheduled", "next_origin": "scheduled", "paused_from": "active",
    "notices": "require",
}  # fmt: skip
STATUS = {"attempts": "submitted", "invoices": "open", "subscriptions": "active"}
UPDATES = {
    "attempt": (attempts._ATTEMPT, ATTEMPTS, tables.attempts),
    "invoice": (attempts._INVOICE, INVOICES, tables.invoices),
    "subscription, settled": (attempts._SUBSCRIPTION, SUBSCRIPTIONS, tables.subscriptions),
    "subscription, saved": (subscriptions._SAVE, SUBSCRIPTIONS, tables.subscriptions),
    "subscription, opened": (subscriptions._ADVANCE, SUBSCRIPTIONS, tables.subscriptions),
    "subscription, opened at its new price": (
        subscriptions._ADVANCE_AND_REPRICE,
        SUBSCRIPTIONS,
        tables.subscriptions,
    ),
}


def sample(column):
    if column.name in KNOWN:
        return KNOWN[column.name]
    if column.foreign_keys:
        return 1
    return NOW if isinstance(column.type, tables.Instant) else SAMPLES[column.type.python_type]


def another(value):
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, StrEnum):
        return next(member for member in type(value) if member is not value)
    changes = {
        str: lambda: value + "x",
        int: lambda: value + 1,
        datetime: lambda: value + timedelta(seconds=1),
        Money: lambda: Money.from_minor(value.minor + 1, "EUR"),
        Schedule: lambda: Schedule(NOW + timedelta(days=1), Unit.DAY, 2, "Europe/Berlin"),
        Policy: lambda: Policy(CatchUp.FORGIVE_OLDER_THAN, 2),
        NoticePolicy: lambda: NoticePolicy.parse("tell:30"),
    }
    return changes[type(value)]()


@pytest.fixture
def stored():
    """One row in every table, each column with a value: what the columns mean is not the subject."""
    with create_engine("sqlite://").begin() as connection:
        tables.metadata.create_all(connection)
        connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        for table in (tables.attempts, tables.invoices, tables.subscriptions):
            row = {column.name: sample(column) for column in table.c}
            connection.execute(insert(table), row | {"status": STATUS[table.name]})
        yield connection


@pytest.mark.parametrize("name", UPDATES)
def test_a_changed_field_is_in_the_row_or_refused(stored, name):
    update, objects, table = UPDATES[name]
    for field in objects.fields:
        before = objects.read(stored.execute(select(table)).one())
        after = replace(before, **{field: another(getattr(before, field))})
        try:
            update.write(stored, [(before, after)])
        except InvariantBroken:
            after = before
        found = objects.read(stored.execute(select(table)).one())
        assert found == after, field


def test_a_row_that_was_changed_by_another_is_not_written(stored):
    before = ATTEMPTS.read(stored.execute(select(tables.attempts)).one())
    with pytest.raises(ConcurrentChange):
        attempts.save_open(stored, [(replace(before, fence=7), replace(before, fence=7))], [])
