"""A key that occurs twice, and a reference that reads as an expression, are refused at every door."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as some

from billing_worker.domain.money import Money
from billing_worker.entrypoints import unique_json
from billing_worker.entrypoints.import_files.import_file import import_file
from billing_worker.services.commands.records import parse_command
from billing_worker.services.hosted_pages.records import parse_tokenisation
from billing_worker.services.import_records.subscription import BadRecord, parse_record

RECORD = {
    "reference_id": "sub-1", "customer": {"reference_id": "jo"}, "card": {"token": "approved.1"},
    "amount": "9.99", "currency": "USD", "interval": "month", "anchor_at": "2026-01-31T00:00:00Z",
}  # fmt: skip
EXPRESSIONS = ["-sub-1", "sub,1", ",", "-", "sub-1,"]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'])
def test_the_key_is_named(text):
    with pytest.raises(unique_json.KeyTwice, match="the key 'a' occurs twice"):
        unique_json.loads(text)


@given(some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner), max_leaves=20,
))  # fmt: skip
def test_everything_else_is_read_as_before(value):
    assert unique_json.loads(json.dumps(value)) == value


def test_an_import_line_with_a_key_twice_is_refused_and_the_others_are_not(world, tmp_path):
    path = tmp_path / "records.jsonl"
    line = json.dumps(RECORD)
    path.write_text(line.replace("{", '{"amount": "1.00", ', 1) + "\n" + line + "\n")
    report = import_file(path, world.store, world.vault, world.clock, by="test", dry_run=False)
    assert [fault.line for fault in report.faults] == [1]
    assert "the key 'amount' occurs twice" in str(report.faults[0])
    assert report.added == 1


@pytest.mark.parametrize("reference", EXPRESSIONS)
def test_a_new_reference_that_reads_as_an_expression_is_refused_at_every_door(reference):
    doors = [
        (parse_record, RECORD | {"reference_id": reference}),
        (lambda raw: parse_command("billing.charge_once", raw), {
            "reference_id": reference, "customer": {"reference_id": "jo"},
            "amount": "1.00", "currency": "USD",
        }),
        (parse_tokenisation, {
            "reference_id": reference, "customer": {"reference_id": "jo"},
            "amount": "1.00", "currency": "USD",
        }),
    ]  # fmt: skip
    for door, record in doors:
        with pytest.raises(BadRecord, match="must not begin with -"):
            door(record)


@pytest.mark.parametrize("reference", ["sub-1", "a-", "a--b", "!", "~", "+.:;", "s" * 100])
def test_any_other_reference_is_taken(reference):
    assert parse_record(RECORD | {"reference_id": reference}).reference_id == reference


@pytest.mark.parametrize("reference", ["-jo", "jo,doe"])
def test_a_customer_may_be_called_anything_because_nobody_is_polled_for_by_that(reference):
    record = parse_record(RECORD | {"customer": {"reference_id": reference}})
    assert record.customer.reference_id == reference


def test_what_has_such_a_name_already_can_still_be_told_to_stop():
    known = {"reference_id": "-cancel,1", "subscription": "-sub,1", "at_period_end": False}
    assert parse_command("billing.cancel", known) is not None


@given(some.integers(1, 10**8), some.sampled_from(["USD", "JPY", "KWD"]))
def test_a_float_of_an_amount_states_it_and_no_neighbour(minor, currency):
    money = Money.from_minor(minor, currency)
    as_float = Decimal(f"{float(money.amount):.17g}")  # as PHP writes it
    assert money.is_stated_by(as_float)
    assert not Money.from_minor(minor + 1, currency).is_stated_by(as_float)
