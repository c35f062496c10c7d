"""Money that comes after the gateway has called a charge final and unpaid."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from billing_worker.domain.errors import NotPayable
from billing_worker.gateway.http import Response
from billing_worker.persistence.schema import tables
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.recovery import add_backup, events, origins, replace, retry, sold_at

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
ONCE = {"ends_after_periods": 1}
WAIT = 3 * DAY


def checkout(world):
    return start_checkout(world.ports, {"invoice": "sub-1-p0"})


def alerts(world):
    return [one["kind"] for one in world.explain()["history"] if one["alert"]]


def expired_at(world, number=1):
    with world.store.reading() as connection:
        query = select(tables.attempts.c.unpaid_since).where(tables.attempts.c.number == number)
        return connection.execute(query).scalar_one()


def until_it_has_ended_unpaid(world, token="pending_forever"):
    world.subscribe(token, **ONCE)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    assert world.attempts() == ["not_charged"]


# --- a sale that may have arrived before its invoice expired --------------------------------


@pytest.mark.parametrize("hours", [6, 16])
def test_an_approval_within_three_days_is_found_before_anything_else_is_charged(world, hours):
    world.subscribe(f"late_{hours}h_after_expiry", **ONCE)
    world.run_for(40 * DAY, step=HOUR)
    assert world.attempts() == ["succeeded"]
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


def test_an_approval_after_three_days_is_found_as_surplus_with_an_alert(world):
    """What no client could know: the gateway said `expired` right before the second sale."""
    world.subscribe("late_80h_after_expiry", **ONCE)
    world.run_for(40 * DAY, step=HOUR)
    assert sorted(world.attempts()) == ["succeeded", "surplus"]
    assert world.debits() == {"sub-1-p0": 2}
    assert "attempt.surplus" in alerts(world)
    first, second = sold_at(world)
    assert second - first >= WAIT


@pytest.mark.parametrize("token", ["pending_forever", "answer_lost_before", "never_answers_before"])
def test_one_attempt_follows_three_days_after_expired_and_then_a_person_decides(world, token):
    world.subscribe(token, **ONCE)
    world.run_for(30 * DAY, step=3 * HOUR)
    assert world.attempts() == ["not_charged", "not_charged"]
    assert sold_at(world)[1] >= expired_at(world) + WAIT
    told = world.explain()
    assert told["fate"] == "open, waiting for a person"
    assert told["reason"] == "expired_unproven_again"
    assert "two sales may have arrived" in told["why"]
    assert alerts(world) == ["invoice.waiting"]


def test_explain_says_why_the_next_attempt_is_three_days_away(world):
    until_it_has_ended_unpaid(world)
    told = world.explain()
    assert told["next_attempt_at"] == (expired_at(world) + WAIT).isoformat()
    assert "late approval is waited for" in told["why"]
    assert told["next_attempt_at"] in told["next"]


def test_what_certainly_was_never_sent_is_tried_again_after_an_hour(world):
    world.subscribe("approved", **ONCE)
    sales = []

    def unreachable_for_the_first_sale(request):
        if request.url.endswith("/payment/sale"):
            sales.append(request)
        world.transport.unreachable = request.url.endswith("/payment/sale") and len(sales) == 1

    world.transport.before_send = unreachable_for_the_first_sale
    world.run_for(2 * HOUR, step=5 * MINUTE)
    assert world.attempts() == ["not_charged", "succeeded"]


def test_the_gateway_is_asked_about_the_first_sale_right_before_the_second(world):
    until_it_has_ended_unpaid(world)
    first = world.sandbox._books.with_reference("sub-1-p0-a1")[0]
    world.clock.advance(WAIT - 2 * HOUR)
    world.tick()  # every re-check that is due by now
    world.sandbox._books.acquirer.charge(first, world.clock.now())
    world.clock.advance(2 * HOUR)
    world.run("charge", (1,))
    assert world.attempts() == ["succeeded", "not_charged"]
    assert world.debits() == {"sub-1-p0": 1}


def test_what_was_heard_before_a_long_wait_is_asked_again_right_before_the_sale(world):
    """The late approval comes while the second attempt waits for its turn."""
    until_it_has_ended_unpaid(world)
    first = world.sandbox._books.with_reference("sub-1-p0-a1")[0]
    world.clock.advance(WAIT)
    real = world.transport.send

    def slow_create(request, *, moves_money):
        answer = real(request, moves_money=moves_money)
        if request.method == "POST" and not moves_money:
            world.clock.advance(20)
            world.sandbox._books.acquirer.charge(first, world.clock.now())
        return answer

    world.transport.send = slow_create
    world.run("charge", (1,))
    assert world.debits() == {"sub-1-p0": 1}
    assert world.sales("sub-1-p0-a2") == 0
    assert world.fate() == "paid"


def test_a_process_that_slept_after_it_had_asked_sells_nothing(world):
    until_it_has_ended_unpaid(world)
    first = world.sandbox._books.with_reference("sub-1-p0-a1")[0]
    world.clock.advance(WAIT)
    begin = world.store.transaction

    def sleeps_before_the_commit(*arguments, **options):
        if world.attempts()[-1] == "prepared" and world.sandbox.requests.total("create") == 2:
            world.store.transaction = begin
            world.clock.advance(HOUR)
            world.sandbox._books.acquirer.charge(first, world.clock.now())
        return begin(*arguments, **options)

    world.store.transaction = sleeps_before_the_commit
    world.run("charge", (1,))
    assert world.sales("sub-1-p0-a2") == 0
    world.run_for(DAY, step=HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.fate() == "paid"


@pytest.mark.parametrize(
    "answer", [(500, b"{}"), (404, b"{}"), (200, b"<html>"), (200, b"{}")], ids=str
)
def test_a_first_sale_that_cannot_be_asked_about_keeps_the_second_back(world, answer):
    until_it_has_ended_unpaid(world)
    first = world.explain()["attempts"][0]["gateway_id"]
    real = world.transport.send

    def send(request, *, moves_money):
        if request.method == "GET" and request.url.endswith(first):
            return Response(*answer, "application/json")
        return real(request, moves_money=moves_money)

    world.transport.send = send
    world.run_for(WAIT + DAY, step=3 * HOUR)
    assert world.sandbox.requests.total("sale") == 1
    assert world.attempts() == ["not_charged", "prepared"]


def test_late_money_is_found_a_month_after_the_last_attempt(world):
    world.subscribe("pending_forever", **ONCE)
    world.run_for(20 * DAY, step=6 * HOUR)
    assert world.fate() == "open, waiting for a person"
    late = world.sandbox._books.with_reference("sub-1-p0-a2")[0]
    world.sandbox._books.acquirer.charge(late, world.clock.now())
    world.run_for(20 * DAY, step=6 * HOUR)
    assert world.fate() == "paid"
    assert "attempt.succeeded" in alerts(world)


# --- what people ask for meanwhile ----------------------------------------------------------


def test_a_page_is_refused_while_the_expired_sale_may_still_be_approved(world):
    until_it_has_ended_unpaid(world)
    with pytest.raises(
        NotPayable, match=r"may still be paid: a page can be opened from 2026-02-03"
    ):
        checkout(world)
    assert world.attempts() == ["not_charged"], "nothing of the refused page is kept"
    world.clock.advance(WAIT)
    checkout(world)
    assert world.attempts() == ["not_charged", "submitted"]


def test_a_decline_that_turns_expired_right_before_the_next_step_keeps_it_back(world):
    world.subscribe("decline_insufficient_funds", **ONCE)
    world.run_for(44 * HOUR, step=HOUR)
    first = world.sandbox._books.with_reference("sub-1-p0-a1")[0]
    first.status, first.resolution = "expired", None
    world.run_for(2 * DAY, step=HOUR)
    assert world.sales("sub-1-p0-a2") == 0
    seen = expired_at(world)
    assert world.explain()["next_attempt_at"] == (seen + WAIT).isoformat()
    world.run_for(2 * DAY, step=HOUR)
    assert [world.sales(f"sub-1-p0-a{number}") for number in (1, 2, 3)] == [1, 0, 1]
    assert sold_at(world)[-1] - seen >= WAIT
    assert "attempt.undecided" not in alerts(world)


@pytest.mark.parametrize("ask", [retry, lambda world: replace(world, "approved.new")])
def test_what_somebody_asks_for_is_dated_while_the_expired_sale_may_still_be_approved(world, ask):
    until_it_has_ended_unpaid(world)
    ask(world)
    world.tick()
    assert world.attempts() == ["not_charged"]
    assert world.explain()["next_attempt_at"] == (expired_at(world) + WAIT).isoformat()
    assert (
        "may still be paid" in world.explain()["why"] or "late approval" in world.explain()["why"]
    )
    world.run_for(WAIT, step=3 * HOUR)
    assert len(world.attempts()) == 2


def test_after_the_automatic_attempt_a_person_can_order_another_one(world):
    world.subscribe("pending_forever", **ONCE)
    world.run_for(20 * DAY, step=6 * HOUR)
    replace(world, "approved.new")
    retry(world)
    world.tick()
    assert origins(world) == ["scheduled", "scheduled", "manual"]
    assert world.fate() == "paid"


def test_a_customer_whose_step_was_asked_for_can_pay_at_once(world):
    """The sale was answered: without the step, which nobody could take, no money comes."""
    world.subscribe("needs_3ds", **ONCE)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    assert world.attempts() == ["declined"]
    checkout(world)
    assert world.attempts() == ["declined", "submitted"]


def test_a_page_that_expired_keeps_the_ladder_back_and_not_the_customer(world):
    world.subscribe("decline_insufficient_funds", **ONCE)
    world.tick()
    planned = world.explain()["next_attempt_at"]
    checkout(world)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    assert world.attempts() == ["declined", "not_charged"]
    moved = (expired_at(world, 2) + WAIT).isoformat()
    assert world.explain()["next_attempt_at"] == moved > planned
    checkout(world)
    assert world.attempts() == ["declined", "not_charged", "submitted"]


# --- refusals that an expired invoice tells -------------------------------------------------


def test_an_expired_invoice_with_a_soft_resolution_is_a_decline_and_climbs_the_ladder(world):
    world.subscribe("expires_insufficient_funds", **ONCE)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    told = world.explain()
    assert [one["status"] for one in told["attempts"]] == ["declined"]
    assert told["reason"] == "declined_soft: insufficient_funds"
    assert told["next_attempt_at"] == (expired_at(world) + WAIT).isoformat()
    world.run_for(4 * DAY, step=6 * HOUR)
    assert origins(world) == ["scheduled", "dunning"]


def test_an_expired_invoice_with_a_hard_resolution_marks_the_card(world):
    world.subscribe("expires_card_is_stolen", **ONCE)
    world.run_for(20 * DAY, step=HOUR)
    assert world.sandbox.requests.total("sale") == 1
    assert world.explain()["reason"] == "declined_hard: card_is_stolen"
    assert len(events(world, "card.unusable")) == len(events(world, "card.needed")) == 1


def test_an_expired_invoice_that_wanted_3d_secure_asks_the_customer(world):
    world.subscribe("expires_auth_3ds_required", **ONCE)
    world.run_for(20 * DAY, step=HOUR)
    assert world.sandbox.requests.total("sale") == 1
    assert world.explain()["fate"] == "open, waiting for the customer"
    assert len(events(world, "customer.step_needed")) == 1
    checkout(world)


def test_a_sale_whose_payment_must_be_authorised_is_a_step_for_the_customer(world):
    """The only official example of a nested answer has no `auth_payload`."""
    world.sandbox.behaviour = dataclasses.replace(world.sandbox.behaviour, sale_shape="nested")
    real = world.transport.send

    def send(request, *, moves_money):
        answer = real(request, moves_money=moves_money)
        body = json.loads(answer.body)
        body.pop("auth_payload", None)
        return Response(answer.status, json.dumps(body).encode(), answer.content_type)

    world.transport.send = send
    world.subscribe("needs_3ds", **ONCE)
    world.run_for(20 * DAY, step=HOUR)
    assert world.sandbox.requests.total("sale") == 1
    assert world.explain()["reason"] == "declined_needs_customer: auth_3ds_required"


# --- declines that flip ---------------------------------------------------------------------


def asks_for_another_attempt(world, how):
    if how == "retry":
        retry(world)
    else:
        replace(world, "approved.new")


@pytest.mark.parametrize("how", ["retry", "new card"])
def test_a_decline_that_flips_within_minutes_is_found_before_another_attempt(world, how):
    world.subscribe("flips_after_5m", **ONCE)
    world.tick()
    assert world.attempts() == ["declined"]
    world.clock.advance(1)
    asks_for_another_attempt(world, how)
    world.run_for(HOUR, step=MINUTE)
    assert world.debits() == {"sub-1-p0": 1}
    assert world.attempts()[0] == "succeeded"
    assert world.fate() == "paid"


def test_a_backup_card_is_charged_once_the_hard_decline_has_stood_for_ten_minutes(world):
    world.subscribe("decline_card_is_stolen", **ONCE)
    add_backup(world, "approved.backup")
    world.tick()
    at = datetime.fromisoformat(world.explain()["next_attempt_at"])
    assert at - world.clock.now() == 10 * MINUTE
    [failed] = events(world, "payment.failed")
    assert failed["next_attempt_at"] == at.isoformat()
    world.run_for(15 * MINUTE)
    assert world.fate() == "paid"


@pytest.mark.parametrize("how", ["retry", "new card"])
def test_a_decline_that_flips_later_is_surplus_with_an_alert(world, how):
    world.subscribe("flips_after_2h", **ONCE)
    world.tick()
    replace(world, "approved.new") if how == "retry" else None
    asks_for_another_attempt(world, how)
    world.run_for(40 * DAY, step=HOUR)
    assert world.attempts() == ["surplus", "succeeded"]
    assert "attempt.surplus" in alerts(world)
