"""The quick way to read a record against marshmallow's."""

from __future__ import annotations

import copy
import math
from datetime import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from marshmallow import Schema, ValidationError
from sqlalchemy import update

from billing_worker.persistence import subscriptions
from billing_worker.persistence.schema import tables
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.fields import LONGEST_JSON, NotPlain
from billing_worker.services.import_records.subscription import RecordSchema, parse_record
from tests.entrypoints.import_files.test_import_export import BOOK

RECORDS = RecordSchema()
FULL = BOOK[0] | {
    "customer": {"reference_id": "cust-1", "name": "Zoë Łuk", "email": ""},
    "card": {"token": "tok", "mask": "512381******0000", "brand": None,
             "expiry_month": 12, "expiry_year": 2032},
    "trial_end": "2026-02-01T00:00:00+01:00", "paid_through": "2026-06-30T00:00:00.5Z",
    "ends_after_periods": 12, "ends_at": "2030-01-01T00:00:00Z", "description": "Pro",
    "metadata": {"a": [1, {"b": None}], "ä": "x"}, "catch_up": "collect_all:3",
    "dunning": "short", "held": False, "first_number": 3, "paused_at": None,
    "cancels_at": "2029-01-01T00:00:00Z",
}  # fmt: skip
PATHS = [
    *((name,) for name in FULL),
    *(("customer", name) for name in FULL["customer"]),
    *(("card", name) for name in FULL["card"]),
    ("card", "pin"), ("nobody",), ("metadata", "a"), ("metadata", "\0"),
]  # fmt: skip
ODD = [
    None, True, False, 0, 1, -1, 12, 13, 1.0, 2032, 10**30, math.nan, "", " ", "0", "12", "1.00",
    "true", "\0", "\ud800", "a\n", "a b", "ä", "x" * 33, "x" * 101, "x" * 513, "USD", "JPY", "day",
    "fortnight", "Europe/Berlin", "Mars", "short", "hold", "collect_all", "2026-01-31",
    "20260131T000000Z", "2026-01-31T00:00:00", "2026-01-31T00:00:00-00:00", "2026-W05-6T00Z",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-02-30T00:00:00Z",
    [], {}, [1], {"a": 1}, {"a": "x" * LONGEST_JSON}, {"a": math.inf}, {"reference_id": "r"},
    {"token": "t"},
]  # fmt: skip


def changed(changes):
    record = copy.deepcopy(FULL)
    for (*parents, leaf), value in changes:
        inner = record
        for parent in parents:
            inner = inner.get(parent)
        if not isinstance(inner, dict):
            continue
        if value == "left out":
            inner.pop(leaf, None)
        else:
            inner[leaf] = copy.deepcopy(value)
    return record


def shown(data):
    """With types: True is no 1, and two spellings of an instant are told apart."""
    return sorted((name, repr(value)) for name, value in data.items())


@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(PATHS),
            st.sampled_from([*ODD, "left out"])
            | st.text(max_size=40)
            | st.integers()
            | st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
        ),
        max_size=3,
    )
)
@example(changes=[])
@example(changes=[(("metadata",), None)])
@example(changes=[(("card",), "left out"), (("metadata",), "left out")])
def test_what_is_taken_as_plainly_right_is_what_marshmallow_makes_of_it(changes):
    read_both_ways(changes)


def read_both_ways(changes):
    record = changed(changes)
    try:
        quickly = RECORDS.plainly(copy.deepcopy(record))
    except (NotPlain, ValidationError):
        return
    slowly = RECORDS.load(record)
    for part in ("customer", "card"):
        assert shown(quickly.pop(part) or {}) == shown(slowly.pop(part) or {})
    assert shown(quickly) == shown(slowly)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_each_odd_value_alone_is_read_alike(path):
    for value in [*ODD, "left out"]:
        read_both_ways([(path, value)])


@pytest.mark.parametrize("record", [FULL, *BOOK], ids=lambda record: record["reference_id"])
def test_an_ordinary_record_does_not_go_through_marshmallow(record, monkeypatch):
    monkeypatch.setattr(Schema, "load", None)
    assert parse_record(record).reference_id == record["reference_id"]


def test_a_near_miss_that_an_older_version_took_leaves_the_book_as_the_date_it_meant(world):
    dates = {"anchor_at": "2026-01-31T00:00:00Z", "paid_through": "2026-05-31T00:00:00Z"}
    world.subscribe("approved", **dates)
    with world.store.transaction() as connection:
        missed = datetime.fromisoformat("2026-04-30T00:00:01Z")
        connection.execute(update(tables.subscriptions).values(paid_through=missed))
    with world.store.reading() as connection:
        [row] = subscriptions.whole(connection, ["sub-1"])
    record = record_from(row, world.vault)
    assert record.paid_through.isoformat() == "2026-05-31T00:00:00+00:00"
    assert record.snapped() is record
