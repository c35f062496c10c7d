"""What a person is told is what has happened, to the very attempt that is named."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.secret import Secret
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.recovery import events

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
MODERATION = re.compile(rb'"moderation_required": ?(false|0)')


def test_a_page_that_nobody_paid_has_its_own_reason_and_not_that_of_the_attempt_before(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    start_checkout(world.ports, {"invoice": "sub-1-p0"})
    world.run_for(DAY, step=HOUR)
    why = world.explain()["why"]
    assert why.startswith("Attempt 2, a page to pay on, ended without money: ")
    assert why.index("before it") < why.index("insufficient_funds")


@pytest.mark.parametrize("answer", [b"x" * 2_000_000, b"<html>maintenance</html>"])
def test_an_answer_that_cannot_be_used_is_told_with_its_reason(world, answer, monkeypatch):
    world.subscribe("pending_forever")
    world.tick()
    assert "could not be used" not in world.explain()["why"]
    send = world.transport.send

    def unusable(request, *, moves_money):
        return replace(send(request, moves_money=moves_money), body=answer)

    monkeypatch.setattr(world.transport, "send", unusable)
    world.run_for(HOUR, step=HOUR / 4)
    explained = world.explain()
    assert explained["fate"] == "unknown"
    assert "its answer could not be used: " in explained["why"]


def test_a_charge_that_is_held_for_moderation_alerts_once_and_at_once(world, monkeypatch):
    world.subscribe("pending_forever")
    world.tick()
    send = world.transport.send

    def moderated(request, *, moves_money):
        reply = send(request, moves_money=moves_money)
        return replace(reply, body=MODERATION.sub(rb'"moderation_required": true', reply.body))

    monkeypatch.setattr(world.transport, "send", moderated)
    world.run_for(HOUR / 2, step=HOUR / 6)
    told = [e for e in world.explain()["history"] if e["alert"] and e["kind"] == "attempt.looked"]
    assert len(told) == 1
    assert "moderation" in told[0]["data"]["found"]
    assert world.fate() == "unknown"
    assert "somebody there has to release or refuse it" in world.explain()["why"]
    assert world.explain()["known"] == "held for moderation at the gateway"


def test_sales_that_the_cardgate_does_not_know_alert_and_stay_unknown(world):
    wrong = GatewaySettings(
        api_url="https://gateway.test/api", username=world.sandbox.username,
        password=Secret(world.sandbox.password), cardgate_url="https://cardgate.test/v2",
    )  # fmt: skip
    ports = world.ports_of_a_worker(gateway=PaycoreGateway(world.transport, world.clock, wrong))
    for number in range(2):
        world.subscribe("approved", f"sub-{number}")
    world.sweep()
    for kind, ids in world.bell.messages:
        assert kind == "charge"
        charge_batch(ports, ids)
    assert world.fate("sub-0-p0") == "unknown"
    [told] = events(world, "gateway.refuses_sales")
    assert "404" in told["reason"]
