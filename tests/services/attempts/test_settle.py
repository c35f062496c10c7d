"""What the gateway tells late, twice, out of order or about a page, through the whole worker."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import select

from billing_worker.domain.outcome import Stated
from billing_worker.gateway.http import Response
from billing_worker.persistence import attempts, callbacks
from billing_worker.persistence.schema import tables
from billing_worker.services.attempts.settle import Settle, settle_all
from billing_worker.services.doorbell import poll_due
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import events, replace, retry, sold_at, subscription
from tests.support.stored_tokens import token_of

SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=s) for s in (1, 60, 3600, 86_400))
ONCE = {"ends_after_periods": 1}


def checkout(world, invoice="sub-1-p0"):
    return start_checkout(world.ports, {"invoice": invoice})


def answers_change(world, reference, **attributes):
    """From now on the gateway tells this of its invoice, whatever it did."""
    real = world.transport.send

    def send(request, *, moves_money):
        response = real(request, moves_money=moves_money)
        body = json.loads(response.body, parse_float=Decimal)
        data = body.get("data")
        for one in data if isinstance(data, list) else [data]:
            if isinstance(one, dict) and one.get("type") == "payment-invoices":
                told = one["attributes"]
                told.update(attributes if told["reference_id"] == reference else {})
        return Response(
            response.status, json.dumps(body, default=float).encode(), response.content_type
        )

    world.transport.send = send


def called_back(world):
    """A callback about the newest attempt has rung."""
    with world.store.transaction() as connection:
        newest = select(tables.attempts.c.gateway_id).order_by(tables.attempts.c.id.desc())
        key = callbacks.poll_now(
            connection, connection.execute(newest).scalars().first(), world.clock.now()
        )
    assert key is not None
    world.run("look", (key.attempt_id,))


def alerts(world, reference="sub-1-p0"):
    return [one["kind"] for one in world.explain(reference)["history"] if one["alert"]]


def test_a_sale_that_asks_for_3d_secure_is_sold_once_and_the_customer_is_asked(world):
    world.subscribe("needs_3ds", **ONCE)
    world.run_for(20 * HOUR, step=10 * MINUTE)
    assert world.attempts() == ["declined"]
    assert world.sandbox.requests.total("sale") == 1
    assert world.explain()["reason"] == "declined_needs_customer: auth_3ds_required"
    assert len(events(world, "customer.step_needed")) == 1


def test_a_card_that_its_network_forbids_on_a_page_is_charged_for_nobody_afterwards(world):
    card = {"token": "decline_insufficient_funds", "brand": "visa"}
    world.subscribe(None, card=card, **ONCE)
    world.tick()
    checkout(world)
    answers_change(
        world, "sub-1-p0-a2", status="process_failed", resolution="issuer_decline",
        original_data={"original_resolution": "43"},
    )  # fmt: skip
    world.run_for(4 * DAY, step=HOUR)
    assert world.attempts() == ["declined", "declined"]
    assert len(events(world, "card.unusable")) == len(events(world, "card.needed")) == 1
    same = {"reference_id": "customer-of-sub-1"}
    world.subscribe(None, "sub-2", card=card, customer=same, **ONCE)
    world.run_for(HOUR, step=10 * MINUTE)
    assert "card_unusable" in world.explain("sub-2-p0")["reason"]
    assert world.sales("sub-2-p0-a1") == 0


def test_a_hard_decline_on_a_page_stops_the_ladder_until_another_card_comes(world):
    world.subscribe("decline_insufficient_funds", **ONCE)
    world.tick()
    checkout(world)
    answers_change(world, "sub-1-p0-a2", status="process_failed", resolution="card_is_stolen")
    world.run_for(5 * DAY, step=HOUR)
    assert world.attempts() == ["declined", "declined"]
    assert events(world, "card.unusable") == []
    replace(world, "approved")
    world.run_for(HOUR, step=10 * MINUTE)
    assert world.fate() == "paid"


def test_a_card_replaced_while_a_page_is_open_pays_when_the_page_has_ended(world):
    world.subscribe("decline_auth_3ds_required", **ONCE)
    world.tick()
    checkout(world)
    assert replace(world, "approved.new")["in_flight"] == ["sub-1-p0"]
    world.run_for(3 * HOUR, step=10 * MINUTE)
    assert [a["origin"] for a in world.explain()["attempts"]] == ["scheduled", "link", "new_card"]
    assert world.fate() == "paid"


def test_a_card_replaced_while_a_page_is_prepared_pays_when_its_caller_is_gone(world):
    world.subscribe("decline_auth_3ds_required", **ONCE)
    world.tick()
    abandon(world)
    assert replace(world, "approved.new")["in_flight"] == ["sub-1-p0"]
    world.run_for(15 * MINUTE)
    assert world.attempts() == ["declined", "not_charged", "succeeded"]


def abandon(world):
    """A caller that dies after it took the slot for a page."""

    class CallerDied(BaseException):
        pass

    def die(_):
        raise CallerDied

    world.transport.before_send = die
    with pytest.raises(CallerDied):
        checkout(world)
    world.transport.before_send = lambda _: None


def test_the_sweep_of_polls_never_finds_a_link_that_a_pause_withdrew(world):
    world.subscribe("decline_auth_3ds_required")
    world.tick()
    abandon(world)
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    assert world.attempts() == ["declined", "not_charged"]
    world.clock.advance(10 * MINUTE)
    for _ in range(5):
        poll_due(world.ports)
        assert [ids for kind, ids in world.bell.messages if 2 in ids] == []
        world.clock.advance(10 * MINUTE)


@pytest.mark.parametrize("status", ["charged_back", "refunded"])
def test_money_that_goes_back_raises_one_alert_and_the_invoice_stays_paid(world, status):
    world.subscribe("approved", **ONCE)
    world.tick()
    answers_change(world, "sub-1-p0-a1", status=status)
    for _ in range(3):
        called_back(world)
    assert alerts(world) == ["attempt.given_back"]
    assert [one["status"] for one in events(world, "attempt.given_back")] == [status]
    assert world.fate() == "paid"


def test_a_subscription_stays_past_due_until_the_last_of_its_debts_is_paid(world):
    world.subscribe("decline_duplicated_transaction", interval="week")
    world.run_for(8 * DAY, step=DAY)
    assert world.attempts("sub-1-p0") == world.attempts("sub-1-p1") == ["declined"]
    replace(world, "approved")
    retry(world, "sub-1-p1")
    world.tick()
    assert world.fate("sub-1-p1") == "paid"
    assert subscription(world).status == "past_due"
    retry(world, "sub-1-p0")
    world.tick()
    assert subscription(world).status == "active"


@pytest.mark.by_hand
def test_two_debts_that_are_paid_in_one_transaction_end_the_arrears(world):
    world.subscribe("decline_duplicated_transaction", interval="week")
    world.run_for(8 * DAY, step=DAY)
    replace(world, "answer_lost_after")
    for number in (0, 1):
        retry(world, f"sub-1-p{number}")
    world.tick()
    assert world.attempts("sub-1-p0") == world.attempts("sub-1-p1") == ["declined", "submitted"]
    with world.store.reading() as connection:
        keys = attempts.keys_of(connection, (3, 4))
    calls = []
    found = [world.ports.gateway.poll(gateway_id, calls) for _, gateway_id in keys]
    requests = [
        Settle(key, Stated(said), "test") for (key, _), said in zip(keys, found, strict=True)
    ]
    now = world.clock.now()
    with world.store.transaction() as connection:
        locked = attempts.LockedCases(connection, [key for key, _ in keys])
        settle_all(world.ports, connection, locked, requests, now)
        after = locked.case(keys[0][0]).subscription.status
    assert after == "active"


def test_a_slow_answer_does_not_undo_what_a_later_question_has_found(world):
    world.subscribe("decline_insufficient_funds.17", **ONCE)
    world.tick()
    real = world.transport.send

    def overtaken(request, *, moves_money):
        answer = real(request, moves_money=moves_money)
        world.transport.send = real
        body = json.loads(answer.body)
        body["data"]["attributes"].update(status="process_pending", resolution="ok")
        world.clock.advance(SECOND)
        world.run("look", (1,))
        world.clock.advance(MINUTE)
        return Response(answer.status, json.dumps(body).encode(), answer.content_type)

    planned = world.explain()["next_attempt_at"]
    world.clock.advance(HOUR)
    world.transport.send = overtaken
    world.run("look", (1,))
    assert world.explain()["next_attempt_at"] == planned
    assert alerts(world) == []


@pytest.mark.parametrize("status", ["partially_processed", "processing"])
def test_what_somebody_else_may_have_sold_is_unknown_and_nothing_else_is_tried(world, status):
    """A copy of the database, or its life before a restore, has got further than this one."""
    world.subscribe("create_answer_lost", **ONCE)
    answers_change(world, "sub-1-p0-a1", status=status, processed_amount=5)
    world.run_for(DAY, step=HOUR)
    assert world.attempts() == ["submitted"]
    assert world.fate() == "unknown"
    assert len(sold_at(world)) == 1
    assert "attempt.not_charged" not in world.events()
    assert "attempt.quarantined" in alerts(world)
    assert world.sales("sub-1-p0-a1") == 0


def test_an_attempt_knows_when_the_gateway_was_asked_and_not_when_it_answered(world):
    world.subscribe("approved", **ONCE)
    world.tick()
    asked_at = world.clock.now()
    real = world.transport.send

    def slow(request, *, moves_money):
        answer = real(request, moves_money=moves_money)
        world.clock.advance(20 * SECOND)
        return answer

    world.transport.send = slow
    called_back(world)
    with world.store.reading() as connection:
        assert connection.execute(select(tables.attempts.c.heard_at)).scalar() == asked_at


def charged_elsewhere(world, number):
    """The card of sub-1 pays another subscription of the same customer."""
    same = {"reference_id": "customer-of-sub-1"}
    token = token_of(world, card_row(world))
    world.subscribe(token, f"sub-{number}", customer=same, **ONCE)
    world.run_for(HOUR, step=10 * MINUTE)
    return world.sales(f"sub-{number}-p0-a1")


def card_row(world):
    with world.store.reading() as connection:
        return connection.execute(select(tables.cards).order_by(tables.cards.c.id)).first()


def test_a_hard_decline_marks_the_card_although_its_subscription_was_cancelled_meanwhile(world):
    world.subscribe("pending_forever")
    world.tick()
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="test")
    answers_change(world, "sub-1-p0-a1", status="process_failed", resolution="card_is_stolen")
    called_back(world)
    assert (world.fate(), world.attempts()) == ("void", ["declined"])
    assert card_row(world).unusable_reason == "declined_hard: card_is_stolen"
    assert charged_elsewhere(world, 2) == 0


def test_a_refusal_of_the_configuration_pauses_the_service_although_its_subscription_was_cancelled(
    world,
):
    world.subscribe("pending_forever")
    world.tick()
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="test")
    answers_change(world, "sub-1-p0-a1", status="process_failed", resolution="invalid_credentials")
    called_back(world)
    assert len(events(world, "service.paused")) == 1


def test_a_hard_decline_that_is_told_after_the_attempt_has_ended_marks_the_card(world):
    world.subscribe("pending_forever", **ONCE)
    world.run_for(2 * HOUR + 10 * MINUTE, step=5 * MINUTE)
    assert world.attempts() == ["not_charged"]
    answers_change(world, "sub-1-p0-a1", status="process_failed", resolution="card_is_stolen")
    for _ in range(2):
        called_back(world)
    assert card_row(world).unusable_reason == "declined_hard: card_is_stolen"
    assert len(events(world, "card.unusable")) == 1
    assert charged_elsewhere(world, 2) == 0
