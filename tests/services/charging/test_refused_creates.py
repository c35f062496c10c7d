"""Creates that are refused or answered unreadably, and look-ups that cannot be believed."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from typing import get_args

import pytest

from billing_worker.domain.errors import NotPayable, OutcomeUnknown, Refused
from billing_worker.gateway.http import Response
from billing_worker.persistence import switches
from billing_worker.persistence.book.outside import Memory
from billing_worker.persistence.schema import tables
from billing_worker.sandbox.behaviour import RefusalShape
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from tests.support.backup import backup, restore

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SHAPES = get_args(RefusalShape)


def act(world, **changes):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, **changes)


def creates(world, reference="sub-1-p0-a1"):
    return world.sandbox.requests.for_reference("create", reference)


def forget(world):
    """Lose all that happened after `world.kept`, as a standby does that was behind."""
    restore(world.store, world.kept)
    world.bell.messages.clear()
    world.clock.advance(2 * MINUTE)
    world.ports = world.ports_of_a_worker(outside=(Memory(),))  # nor does anything else tell of it


def answered(world, status, body, *, when=lambda request: request.method == "POST", times=1):
    """Answer the next creates like this, in place of the sandbox."""
    send, left = world.transport.send, [times]

    def sent(request, *, moves_money):
        if not left[0] or not when(request):
            return send(request, moves_money=moves_money)
        left[0] -= 1
        return Response(status, body, "text/html")

    world.transport.send = sent


# --- 4xx on a first create --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_refused_create_ends_with_one_alert_whatever_its_shape(world, shape):
    act(world, refusal_shape=shape)
    world.subscribe("rejects_token")
    world.tick()
    world.run_for(30 * HOUR, step=10 * MINUTE)
    assert (creates(world), world.attempts()) == (1, ["not_charged"])
    explained = world.explain()
    assert (explained["next_attempt_at"], explained["status"]) == (None, "open")
    assert "gateway refused the invoice: " in explained["reason"]
    assert "422" in explained["reason"]
    assert (
        sum("refused the invoice" in why for why in world.alerts()) == 2
    )  # of attempt and invoice


@pytest.mark.parametrize("status", [400, 404, 405, 410, 413, 422])
def test_a_web_page_in_place_of_a_create_is_a_refusal_only_after_the_look_up(world, status):
    answered(world, status, b"<html>nginx</html>")
    world.subscribe("approved")
    world.tick()
    assert world.attempts() == ["not_charged"]
    assert world.sandbox.requests.for_reference("find", "sub-1-p0-a1") == 1
    retry_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann", why="mended")
    world.run_for(5 * MINUTE)
    assert world.fate() == "paid"


def test_a_web_page_for_everything_proves_nothing(world):
    answered(world, 404, b"<html>no such host</html>", when=lambda _: True, times=60)
    world.subscribe("approved")
    world.tick()
    world.run_for(10 * MINUTE)
    assert world.attempts() == ["prepared"]
    world.run_for(6 * HOUR)
    assert world.fate() == "paid"
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502])
def test_what_may_be_a_duplicate_or_a_failure_stays_unknown(world, status):
    answered(world, status, b'{"message": "later"}')
    world.subscribe("approved")
    world.tick()
    assert world.attempts() == ["prepared"]
    world.run_for(10 * MINUTE)
    assert world.fate() == "paid"


CARD = {
    "reference_id": "card-1", "amount": "1.00", "currency": "USD",
    "customer": {"reference_id": "customer-of-sub-1"},
}  # fmt: skip
KNOWN_ALREADY = [
    ("409", True), ("429", False), ("422", True), ("return_existing", True),
    ("return_existing", False),
]  # fmt: skip
PAGES = [(start_checkout, {"invoice": "sub-1-p0"}), (start_tokenisation, CARD)]


@pytest.mark.parametrize("body", [b"<html>", b'{"errors":[{"title":"no"}]}', b'{"message":"no"}'])
@pytest.mark.parametrize(("start", "record"), PAGES)
def test_a_refused_page_is_refused_whatever_the_shape(world, body, start, record):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    answered(world, 422, body)
    with pytest.raises(Refused):
        start(world.ports, record)


# --- an invoice under a reference that this book believes fresh -------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("token", ["approved", "approved_later"])
def test_a_refused_duplicate_shows_a_forgotten_charge_and_is_not_sold_again(world, shape, token):
    act(world, duplicate_create="422", refusal_shape=shape, later_seconds=1800.0)
    world.subscribe(token)
    world.kept = backup(world.store)
    world.tick()
    forget(world)
    world.run_for(2 * HOUR)
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}


def test_a_forgotten_charge_that_is_pending_is_unknown_and_told(world):
    act(world, duplicate_create="422")
    world.subscribe("pending_forever")
    world.kept = backup(world.store)
    world.tick()
    forget(world)
    world.tick()
    assert world.attempts() == ["submitted"]
    assert world.fate() == "unknown"
    assert any("no create of this book" in why for why in world.alerts())
    assert "under a reference that this book has not used yet" in str(world.alerts())
    with world.store.reading() as connection:
        assert switches.read(connection).restored_at is not None


def silent_about_creates(world):
    """Let the gateway echo no metadata, as some labels may not."""
    send = world.transport.send

    def sent(request, *, moves_money):
        answer = send(request, moves_money=moves_money)
        return replace(
            answer, body=re.sub(rb'"metadata": ?{"book"[^{}]*}', b'"metadata":[]', answer.body)
        )

    world.transport.send = sent


@pytest.mark.parametrize(("policy", "echoes"), KNOWN_ALREADY)
def test_a_forgotten_sale_that_is_still_pending_is_not_sold_by_a_first_claim(world, policy, echoes):
    """Nothing but the answer to the create tells that these books have forgotten it."""
    act(world, duplicate_create=policy, second_sale="charge", later_seconds=1800.0)
    if not echoes:
        silent_about_creates(world)
    world.subscribe("approved_later")
    world.kept = backup(world.store)
    world.tick()
    forget(world)
    world.tick()
    assert (world.attempts(), world.fate()) == (["submitted"], "unknown")
    world.run_for(2 * HOUR)
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("status", [None, 409, 429, 502])
def test_what_this_very_create_has_made_is_sold_although_its_answer_says_otherwise(world, status):
    """A proxy that repeats our request meets what it has made itself."""
    world.ports = world.ports_of_a_worker(outside=())  # nothing else proves that it is ours
    lose_the_answer_of_the_next_create(world, status)
    world.subscribe("approved")
    world.tick()
    assert world.fate() == "paid"
    assert creates(world) == 1


def test_a_lost_create_that_nothing_proves_to_be_ours_is_left_to_end(world):
    silent_about_creates(world)
    world.ports = world.ports_of_a_worker(outside=())
    lose_the_answer_of_the_next_create(world)
    world.subscribe("approved")
    world.tick()
    assert (world.attempts(), world.sales("sub-1-p0-a1")) == (["prepared"], 0)
    assert world.explain()["reason"].startswith("found at the gateway, and nothing proves")


def test_more_invoices_than_creates_show_a_forgotten_charge(world):
    """The create is lost on its way back: two invoices are found, and only one create was sent."""
    world.subscribe("approved_later")
    world.kept = backup(world.store)
    world.tick()
    forget(world)
    lose_the_answer_of_the_next_create(world)
    act(world, later_seconds=1800.0)
    world.tick()
    world.run_for(3 * HOUR)
    assert world.sales("sub-1-p0-a1") == 1
    assert world.debits() == {"sub-1-p0": 1}


def lose_the_answer_of_the_next_create(world, status=None):
    """`status`: what is answered in its place, if anything."""
    send, lost = world.transport.send, []

    def sent(request, *, moves_money):
        answer = send(request, moves_money=moves_money)
        if request.method != "POST" or lost:
            return answer
        lost.append(request)
        if status is None:
            raise OutcomeUnknown("read timeout")
        return Response(status, b'{"message": "duplicate request detected"}', "application/json")

    world.transport.send = sent


@pytest.mark.parametrize(("policy", "echoes"), KNOWN_ALREADY)
@pytest.mark.parametrize(("start", "record"), PAGES)
def test_a_page_that_this_book_has_never_made_is_not_handed_out(
    world, start, record, policy, echoes
):
    if not echoes:
        silent_about_creates(world)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.kept = backup(world.store)
    start(world.ports, record)
    forget(world)
    act(world, duplicate_create=policy)
    with pytest.raises(NotPayable, match="no create of this book"):
        start(world.ports, record)


@pytest.mark.parametrize(("start", "record"), PAGES)
def test_a_second_page_is_not_handed_out_beside_a_forgotten_one(world, start, record):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.kept = backup(world.store)
    start(world.ports, record)
    forget(world)
    lose_the_answer_of_the_next_create(world)
    with pytest.raises(NotPayable, match="no create of this book"):
        start(world.ports, record)


@pytest.mark.parametrize("status", [None, 409])
@pytest.mark.parametrize(("start", "record"), PAGES)
def test_a_page_that_this_very_create_has_made_is_handed_out(world, start, record, status):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    lose_the_answer_of_the_next_create(world, status)
    assert start(world.ports, record)["action"]


# --- look-ups that cannot be believed ---------------------------------------------------------


def busy_account(world, invoices=30):
    for number in range(invoices):
        world.subscribe("approved", f"other-{number}")
    world.tick()


@pytest.mark.parametrize("others", [1, 30])
def test_a_gateway_that_ignores_the_filter_proves_nothing(world, others):
    """Its newest invoices are answered: not to be among them is not to be missing."""
    busy_account(world, others)
    world.subscribe("create_answer_lost")
    act(world, list_filter="ignored")
    world.tick()
    world.run_for(HOUR)
    assert world.attempts() == ["prepared"]
    assert creates(world) == 1
    told = [why for why in world.alerts() if "filter was not obeyed" in why]
    assert len(told) == 1
    act(world, list_filter="exact")
    world.run_for(5 * HOUR)
    assert world.fate() == "paid"


def test_an_unreliable_look_up_is_told_once_a_day(world):
    busy_account(world, 2)
    act(world, list_filter="ignored")
    for number in range(5):
        world.subscribe("create_answer_lost", f"sub-{number}")
    world.run_for(30 * HOUR, step=10 * MINUTE)
    assert len([why for why in world.alerts() if why.startswith("the list")]) == 2


@pytest.mark.parametrize("reference", ["-sub-1", "sub,1"])
def test_an_old_reference_that_reads_as_an_expression_is_never_called_missing(world, reference):
    busy_account(world, 1)
    act(world, list_filter="expression")
    world.subscribe("create_answer_lost")
    with world.store.transaction() as connection:
        named = tables.subscriptions.c.reference_id == "sub-1"
        connection.execute(
            tables.subscriptions.update().where(named).values(reference_id=reference)
        )
    world.tick()
    world.run_for(HOUR)
    assert world.attempts(f"{reference}-p0") == ["prepared"]
    assert creates(world, f"{reference}-p0-a1") == 1
