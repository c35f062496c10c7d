"""What is known of a customer, on both databases."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.customers import update_customer
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.import_records.subscription import BadRecord
from tests.support.pages import tokenise
from tests.support.recovery import events

ANN = {"reference_id": "ann", "name": "Ann A.", "email": "ann@example.com"}


def known(world):
    with world.store.reading() as connection:
        row = connection.execute(select(tables.customers)).one()
    return row.name, row.email


def update(world, reference="u-1", **told):
    asked = {"reference_id": reference, "customer": "ann", **told}
    return carry_out(world.ports, Message("billing.update_customer", asked)).as_json()


def told_to_the_gateway(world):
    sent = [json.loads(r.body) for r in world.transport.sent if b"customer" in (r.body or b"")]
    return sent[-1]["data"]["attributes"]["customer"]


def test_a_later_record_of_a_customer_brings_their_new_name_and_the_history_says_so(world):
    world.subscribe("approved.1", customer=ANN)
    world.subscribe("approved.2", "sub-2", customer={"reference_id": "ann", "name": "Ann B."})
    assert known(world) == ("Ann B.", "ann@example.com")
    assert [one["fields"] for one in events(world, "customer.changed")] == [["name"]]
    world.tick()
    assert told_to_the_gateway(world)["name"] == "Ann B."


def test_a_record_that_says_nothing_new_or_nothing_at_all_changes_nothing(world):
    world.subscribe("approved.1", customer=ANN)
    world.subscribe("approved.2", "sub-2", customer=ANN)
    world.subscribe("approved.3", "sub-3", customer={"reference_id": "ann"})
    assert known(world) == ("Ann A.", "ann@example.com")
    assert events(world, "customer.changed") == []


def test_a_customer_is_updated_by_command_and_an_empty_text_removes_what_is_known(world):
    world.subscribe("approved.1", customer=ANN)
    answer = update(world, email="new@example.com", name="")
    assert answer["customer"] == {
        "reference_id": "ann", "outcome": "changed", "fields": ["name", "email"],
    }  # fmt: skip
    assert known(world) == (None, "new@example.com")
    assert "new@example.com" not in str(events(world, "customer.changed"))
    assert update(world, "u-2", email="new@example.com")["customer"]["outcome"] == "unchanged"


def test_an_update_of_nobody_or_of_nothing_is_refused_with_its_field(world):
    assert update(world, name="X")["errors"][0]["field"] == "customer"
    world.subscribe("approved.1", customer=ANN)
    assert update(world)["errors"][0]["field"] == "name"


BAD = [
    ("email", "jo"), ("email", "jo@example"), ("email", "jo@@example.com"), ("email", "a b@example.com"),
    ("email", "jo@example.com\n"), ("email", "@example.com"), ("email", "jo@.com"),
    ("email", f"{'j' * 250}@example.com"), ("name", "Jo\x1b[2J"), ("name", "Jo\nDoe"), ("name", "J" * 201),
]  # fmt: skip
GOOD = [
    ("email", "jo+shop@mail.example.co"), ("email", "jö@exämple.de"), ("email", "o'neil@example.com"),
    ("name", "Đỗ Thị Ánh"), ("name", "O'Neil-Smith, Jr."),
]  # fmt: skip


@pytest.mark.parametrize(("field", "text"), BAD)
def test_what_can_be_no_name_and_no_email_is_refused_at_every_door(world, field, text):
    world.subscribe("approved.1", customer=ANN)
    fault = update(world, **{field: text})["errors"][0]
    assert fault["field"] == field
    with pytest.raises(InvalidInput, match=field):
        update_customer(
            world.store, world.clock, customer="ann", by="ann", why=None,
            **({"name": None, "email": None} | {field: text}),
        )  # fmt: skip
    record = ANN | {field: text}
    with pytest.raises(BadRecord, match=f"customer.{field}"):
        world.subscribe("approved.2", "sub-2", customer=record)
    with pytest.raises(BadRecord, match=f"customer.{field}"):
        start_tokenisation(
            world.ports,
            {"reference_id": "t-1", "customer": record, "amount": "1.00", "currency": "USD"},
        )
    assert known(world) == ("Ann A.", "ann@example.com")


@pytest.mark.parametrize(("field", "text"), GOOD)
def test_unusual_names_and_addresses_are_taken(world, field, text):
    world.subscribe("approved.1", customer=ANN | {field: text})
    assert text in known(world)


@pytest.mark.parametrize("number", ["jo", "12", "+49\n30", "0" * 33, "+49 30 x"])
def test_what_can_be_no_phone_number_is_refused(world, number):
    with pytest.raises(BadRecord, match="phone"):
        tokenise(world, phone=number)


@pytest.mark.parametrize("number", ["+49 (30) 123-456", "0301234567"])
def test_phone_numbers_as_people_write_them_are_taken(world, number):
    assert tokenise(world, phone=number)["reference_id"] == "card-1"
