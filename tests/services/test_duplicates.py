"""What explains that the acquirer calls a charge a duplicate, and what does not; on both databases."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import select

from billing_worker.persistence.schema import tables
from billing_worker.services.operators.resolve import resolve_unknown
from tests.support.pages import HOUR, MINUTE, checkout, pay
from tests.support.recovery import banks_change_their_mind, events
from tests.support.world import World

FIRST, SECOND = "sub-1-p0", "sub-2-p0"
A_PERSON = "open, waiting for a person"
DUPLICATE = "decline_duplicated_transaction"


def charged(world: World, reference: str, token: str) -> None:
    """A subscription of Ann's one card and one price, ten minutes after it is due."""
    card, ann = {"token": "approved.ann"}, {"reference_id": "ann"}
    world.subscribe(card=card, reference=reference, customer=ann)
    banks_change_their_mind(world, token)
    world.run_for(10 * MINUTE, step=MINUTE)


def gateway_id(world: World, invoice: str) -> str:
    return str(world.explain(invoice)["attempts"][0]["gateway_id"])


def next_date(world: World) -> datetime:
    with world.store.reading() as connection:
        found = connection.execute(select(tables.invoices.c.next_attempt_at)).scalar()
    assert isinstance(found, datetime)
    return found


def test_a_charge_that_came_later_does_not_explain_a_duplicate(world):
    charged(world, "sub-1", "pending_forever")
    charged(world, "sub-2", "approved")
    assert world.fate(SECOND) == "paid"
    books = world.sandbox._books
    first = books.with_id(gateway_id(world, FIRST))
    books.acquirer._settle(first, "process_failed", "duplicated_transaction", world.clock.now())
    world.run_for(20 * MINUTE, step=MINUTE)
    assert world.fate(FIRST) == A_PERSON


def test_a_duplicate_after_a_sale_that_expired_without_a_refusal_waits_for_a_person(world):
    charged(world, "sub-1", "pending_forever")
    while world.attempts(FIRST) != ["not_charged"]:
        world.run_for(HOUR, step=HOUR)
    world.clock.advance(next_date(world) - world.clock.now() - HOUR)
    charged(world, "sub-2", "approved")
    banks_change_their_mind(world, DUPLICATE)
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.attempts(FIRST) == ["not_charged", "declined"]
    assert events(world, "attempt.declined")[-1]["equal_charge"].endswith("sub-2-p0-a1")
    assert world.fate(FIRST) == A_PERSON


def test_a_page_that_was_paid_with_whatever_card_does_not_explain_a_duplicate(world):
    charged(world, "sub-1", "decline_insufficient_funds")
    pay(world, checkout(world, FIRST))
    world.run_for(HOUR, step=10 * MINUTE)
    assert world.fate(FIRST) == "paid"
    charged(world, "sub-2", DUPLICATE)
    assert world.fate(SECOND) == A_PERSON


def test_a_person_s_word_that_a_charge_was_paid_does_not_explain_a_duplicate(world):
    charged(world, "sub-1", "pending_forever")
    world.clock.advance(timedelta(minutes=20))
    said = {"evidence": "portal, case 7", "why": "asked by phone"}
    resolve_unknown(world.ports, reference=FIRST, paid=True, by="ann", **said)
    assert world.fate(FIRST) == "paid"
    charged(world, "sub-2", DUPLICATE)
    assert world.fate(SECOND) == A_PERSON
