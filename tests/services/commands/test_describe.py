"""Questions and the newer commands: what became of it, end, uncancel, retry."""

from __future__ import annotations

from datetime import timedelta

import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import func, select

from billing_worker.domain.public_schema import INVOICE, SUBSCRIPTION
from billing_worker.persistence.schema import tables
from billing_worker.services.commands.execute import Message, carry_out


@pytest.fixture
def ask(world):
    def ask(task, message_id=None, **arguments):
        return carry_out(world.ports, Message(f"billing.{task}", arguments, message_id)).as_json()

    return ask


def test_a_subscription_is_described_with_its_state_and_newest_invoices(world, ask):
    world.subscribe()
    world.tick()
    told = ask("describe", subscription="sub-1")
    assert (told["status"], told["kind"], told["customer"]) == (
        "done", "subscription", "customer-of-sub-1",
    )  # fmt: skip
    assert "9.99 USD every 1 month" in told["words"]
    assert [invoice["status"] for invoice in told["invoices"]] == ["paid"]
    Draft202012Validator(SUBSCRIPTION).validate(told["state"])
    Draft202012Validator(INVOICE).validate(told["invoices"][0])


def test_a_day_of_a_subscription_says_what_was_sent_and_why_nothing_else_was(world, ask):
    world.subscribe("decline_insufficient_funds")
    world.run_for(timedelta(minutes=2))
    told = ask("describe", subscription="sub-1", at="2026-01-31")
    assert (told["status"], told["then"]["attempts"][0]["became"]) == ("done", "declined")
    assert told["then"]["reasons"][0]["rule"] == "ladder.step 1"
    whole = ask("describe", customer="customer-of-sub-1", at="2026-01-31")
    assert [one["subscription"] for one in whole["then"]["subscriptions"]] == ["sub-1"]
    for wrong in (
        {"subscription": "sub-1", "at": "soon"},
        {"invoice": "sub-1-p0", "at": "2026-01-31"},
    ):
        refused = ask("describe", **wrong)
        assert (refused["status"], refused["errors"][0]["field"]) == ("refused", "at")


def test_an_invoice_says_why_it_is_so_and_what_follows(world, ask):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    told = ask("describe", invoice="sub-1-p0")
    assert told["fate"] == "open, next attempt dated"
    assert told["state"]["next_attempt_at"]
    assert (told["subscription"], told["customer"]) == ("sub-1", "customer-of-sub-1")


def test_charge_once_is_answered_with_what_became_of_the_charge(world, ask):
    order = {"reference_id": "order-1", "customer": {"reference_id": "ann"}, "amount": "5.00",
             "currency": "USD", "card": {"token": "approved.ann"}}  # fmt: skip
    ask("charge_once", **order)
    assert ask("describe", charge="order-1")["invoice"]["status"] == "open"
    world.tick()
    told = ask("describe", charge="order-1")
    assert (told["fate"], told["state"]["kind"]) == ("paid", "one_off")
    assert ask("describe", customer="ann")["subscriptions"] == [told["state"]]


@pytest.mark.parametrize("kind", ["subscription", "charge", "invoice", "customer"])
def test_what_there_is_not_is_refused(world, ask, kind):
    world.subscribe()
    told = ask("describe", **{kind: "nobody"})
    assert (told["status"], told["errors"][0]["field"]) == ("refused", kind)


@pytest.mark.parametrize("named", [{}, {"subscription": "sub-1", "invoice": "sub-1-p0"}])
def test_a_question_names_one_thing(ask, named):
    assert ask("describe", **named)["status"] == "refused"


def test_a_question_is_answered_anew_each_time_and_leaves_no_row(world, ask):
    world.subscribe()
    answers = [ask("describe", message_id="m-1", reference_id="q-1", subscription="sub-1")]
    world.tick()
    answers.append(ask("describe", message_id="m-1", reference_id="q-1", subscription="sub-1"))
    assert [len(one["invoices"]) for one in answers] == [0, 1]
    with world.store.reading() as connection:
        assert connection.execute(select(func.count()).select_from(tables.commands)).scalar() == 0


def test_a_cancellation_is_withdrawn_and_a_subscription_ended_by_command(world, ask):
    world.subscribe()
    world.tick()
    ask("cancel", reference_id="c-1", subscription="sub-1", at_period_end=True)
    done = ask("uncancel", reference_id="u-1", subscription="sub-1")
    assert (done["status"], done["subscription"]["cancels_at"]) == ("done", None)
    ended = ask("end", reference_id="e-1", subscription="sub-1", why="closed")
    assert (ended["status"], ended["subscription"]["status"]) == ("done", "ended")
    again = ask("end", reference_id="e-1", subscription="sub-1", why="closed")
    assert again["status"] == "unchanged"


def test_an_attempt_is_ordered_by_command(world, ask):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.clock.advance(timedelta(days=1))
    done = ask("retry", reference_id="r-1", invoice="sub-1-p0", by="ann")
    assert (done["status"], done["invoice"]["reference_id"]) == ("done", "sub-1-p0")
    world.tick()
    assert world.attempts() == ["declined", "declined"]
    refused = ask("retry", reference_id="r-2", invoice="sub-9-p0")
    assert (refused["status"], refused["errors"][0]["field"]) == ("refused", "invoice")
