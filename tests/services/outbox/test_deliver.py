"""Webhooks: signed, in order within a subscription, retried, parked, replayed, and never lost."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
from freezegun import freeze_time
from sqlalchemy import func, select
from standardwebhooks import Webhook

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.persistence.outbox import cursors, deliveries
from billing_worker.persistence.schema import outgoing
from billing_worker.persistence.store import CommitUnknown
from billing_worker.receivers.post import Answer
from billing_worker.services.outbox import deliver as delivering
from billing_worker.services.outbox import endpoints
from billing_worker.services.outbox.deliver import deliver
from billing_worker.services.outbox.publish import publish
from billing_worker.services.subscriptions import lifecycle
from tests.support.receivers import BOOKS, SHOP, AtOnce, add, send, send_for

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def test_a_receiver_verifies_what_comes_with_the_reference_library(world, out, receivers):
    added = add(world)
    world.subscribe()
    world.tick()
    assert send(out) == 4
    assert [e["type"] for e in receivers.taken[SHOP]] == [
        "subscription.created", "invoice.opened", "invoice.paid", "payment.receipt",
    ]  # fmt: skip
    _, headers, body = receivers.calls[-1]
    assert headers["webhook-id"] == json.loads(body)["id"]
    with freeze_time(world.clock.now()):
        Webhook(added.secret.reveal()).verify(body, headers)


def test_a_stuck_event_holds_back_its_own_subscription_and_no_other(world, out, receivers):
    add(world)
    receivers.stuck = "sub-1"
    world.subscribe(reference="sub-1")
    world.subscribe(reference="sub-2")
    world.tick()
    send(out)
    assert receivers.sequences() == {"sub-2": [1, 2, 3, 4]}
    of_stuck = [told["data"] for told in receivers.tried if told["data"]["subscription"] == "sub-1"]
    assert [one["sequence"] for one in of_stuck] == [1]
    receivers.stuck = None
    world.clock.advance(5)
    send(out)
    assert receivers.sequences() == {"sub-1": [1, 2, 3, 4], "sub-2": [1, 2, 3, 4]}


def test_a_dead_endpoint_holds_back_no_other(world, out, receivers):
    add(world, SHOP)
    add(world, BOOKS)
    receivers.dead = SHOP
    world.subscribe()
    world.tick()
    send(out)
    assert receivers.sequences(BOOKS) == {"sub-1": [1, 2, 3, 4]}
    assert receivers.sequences(SHOP) == {}


def test_a_receiver_that_is_dead_for_fourteen_days_gets_everything_in_order(world, out, receivers):
    add(world)
    receivers.say(500)
    for number in range(3):
        world.subscribe(reference=f"sub-{number}", interval="week")
    for _ in range(28):
        world.tick()
        send(out)
        world.clock.advance(12 * HOUR)
    assert receivers.taken == {}
    tried = {(told["data"]["subscription"], told["data"]["sequence"]) for told in receivers.tried}
    assert tried == {("sub-0", 1), ("sub-1", 1), ("sub-2", 1), (None, 1)}  # None: that it is dead
    receivers.say(200)
    send_for(out, DAY + HOUR, step=HOUR)
    assert all(seen == list(range(1, len(seen) + 1)) for seen in receivers.sequences().values())
    with world.store.reading() as connection:
        told = connection.execute(select(func.count()).select_from(outgoing.public_events)).scalar()
    assert sum(map(len, receivers.sequences().values())) == told


def test_the_schedule_ends_in_a_daily_probe_and_alerts_once(world, out, receivers):
    add(world)
    receivers.say(503)
    world.subscribe()
    tried = []
    while len(tried) < len(USUAL_WAITS) + 2:
        before = len(receivers.calls)
        send(out)
        new = [one for one in receivers.tried[before:] if one["data"]["subscription"] == "sub-1"]
        tried += [world.clock.now()] * len(new)
        world.clock.advance(_wait(world))
    assert [after - before for before, after in pairwise(tried)] == [*USUAL_WAITS[1:], DAY, DAY]
    with world.store.reading() as connection:
        c = outgoing.public_events.c
        query = select(c.body).where(c.type == "attention.needed")
        told = [json.loads(body)["data"]["about"] for body in connection.execute(query).scalars()]
    assert told == ["webhook.parked"]


def test_retry_after_is_honoured_and_a_day_at_most(world, out, receivers):
    add(world)
    world.subscribe()
    receivers.say(429, retry_after="3600")
    send(out)
    assert _wait(world) == HOUR
    world.clock.advance(HOUR)
    receivers.say(503, retry_after="99999999")
    send(out)
    assert _wait(world) == DAY
    world.clock.advance(DAY)
    receivers.say(503, retry_after="soon")
    send(out)
    assert _wait(world) == USUAL_WAITS[3]


def _wait(world):
    with world.store.reading() as connection:
        c = outgoing.webhook_cursors.c
        at = connection.execute(select(c.next_at).where(c.stream != 0)).scalar_one()
    return at - world.clock.now()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(302), "302: a redirect, not followed"),
        (Answer(200, "its answer is longer than 64 kB"), "its answer is longer than 64 kB"),
        (Answer(None, "TLS: certificate verify failed"), "TLS: certificate verify failed"),
        (Answer(None), "no answer"),
        (Answer(500), "answered 500"),
    ],
)
def test_a_failed_try_is_listed_with_its_reason_and_made_again(world, out, answer, why):
    add(world)
    world.subscribe()
    send(replace(out, post=lambda *_: answer))
    with world.store.reading() as connection:
        [failed] = deliveries.listed(connection, failed=True, endpoint_id=1, limit=9)
    assert (failed.reason, failed.delivered_at) == (why, None)
    world.clock.advance(HOUR)
    assert send(out) == 1


def test_410_pauses_the_endpoint_and_resume_sends_what_was_kept(world, out, receivers):
    add(world)
    receivers.say(410)
    world.subscribe()
    send(out)
    world.tick()
    assert send(out) == 0
    with world.store.reading() as connection:
        [shown] = endpoints.described(connection)
    assert (shown["status"], shown["reason"], shown["waiting"]) == ("paused", delivering.GONE, 2)
    receivers.say(200)
    endpoints.resume(world.store, 1)
    world.clock.advance(5)
    send(out)
    assert receivers.sequences()["sub-1"] == [1, 2, 3, 4]


def test_an_endpoint_is_sent_only_the_types_that_it_asked_for(world, out, receivers):
    endpoints.add(world.store, world.vault, world.clock, url=SHOP, types=["invoice.paid"])
    world.subscribe()
    world.tick()
    send(out)
    world.clock.advance(31 * DAY)
    world.tick()
    send(out)
    assert [e["type"] for e in receivers.taken[SHOP]] == ["invoice.paid"] * 2


def test_a_commit_that_is_lost_after_the_request_sends_the_event_again_under_its_id(
    world, out, receivers, monkeypatch
):
    add(world)
    world.subscribe()
    publish(world.store, world.clock)
    moves = []

    def lost(*given):
        moves.append(given)
        raise CommitUnknown("the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(delivering.cursors, "move", lost)
        with pytest.raises(CommitUnknown):
            deliver(out, 1, AtOnce())
    world.clock.advance(2 * delivering.LEASE)
    send(out)
    assert len({event["id"] for event in receivers.taken[SHOP]}) == 1
    assert len(receivers.taken[SHOP]) == 2


def test_what_a_lost_claim_reports_moves_nothing(world, out, receivers):
    """It was so slow that another process has sent the event, and the next one."""
    add(world)
    world.subscribe()
    world.tick()
    publish(world.store, world.clock)

    def slow(*_):
        world.clock.advance(2 * delivering.LEASE)
        deliver(out, 1, AtOnce())  # somebody else, meanwhile
        return Answer(500)

    deliver(replace(out, post=slow), 1, AtOnce())
    assert receivers.sequences()["sub-1"] == [1, 2, 3, 4]
    with world.store.reading() as connection:
        assert cursors.backlog(connection)[1] == (0, 0)


def test_a_replay_sends_a_range_again_in_order_and_goes_on_where_it_was(world, out, receivers):
    add(world)
    world.subscribe(interval="day")
    for _ in range(4):
        world.tick()
        send(out)
        world.clock.advance(DAY)
    taken = list(receivers.taken[SHOP])
    receivers.taken.clear()
    receivers.say(500)
    world.tick()
    send(out)  # the newest waits
    receivers.say(200)
    endpoints.replay(world.store, world.clock, 1, first=2, last=4)
    send(out)
    numbers = [event["data"]["number"] for event in receivers.taken[SHOP]]
    newest = len(taken) + 1
    assert numbers == [2, 3, 4, newest, newest + 1, newest + 2]
    assert [e["id"] for e in receivers.taken[SHOP][:3]] == [e["id"] for e in taken[1:4]]


def test_one_event_and_what_is_parked_are_replayed(world, out, receivers):
    add(world)
    world.subscribe()
    send(out)
    [event] = receivers.taken[SHOP]
    assert endpoints.replay_event(world.store, world.clock, 1, event["id"]) == 1
    send(out)
    assert receivers.taken[SHOP] == [event, event]
    receivers.say(500)
    lifecycle.pause(world.store, world.clock, "sub-1", by="ann")
    send_for(out, 6 * DAY, step=HOUR)
    receivers.say(200)
    assert endpoints.replay_parked(world.store, world.clock, 1) >= 1
    send(out)
    assert receivers.sequences()["sub-1"] == [1, 2, 3]


def test_an_endpoint_that_came_later_can_be_told_from_the_beginning(world, out, receivers):
    world.subscribe()
    world.tick()
    send(out)
    add(world)
    endpoints.replay(world.store, world.clock, 1, first=1, last=None)
    send(out)
    assert receivers.sequences() == {"sub-1": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda w: endpoints.replay(w.store, w.clock, 1, first=50, last=60), "from"),
        (lambda w: endpoints.replay_event(w.store, w.clock, 1, "evt_no"), "event"),
        (lambda w: endpoints.pause(w.store, 7, "why"), "id"),
        (lambda w: add(w, SHOP), "url"),
        (lambda w: add(w, "http://shop.example/"), "url"),
        (lambda w: add(w, "https://user:word@shop.example/"), "url"),
        (lambda w: add(w, "https://127.0.0.1/"), "url"),
        (lambda w: add(w, "https://[::ffff:10.0.0.1]/"), "url"),
        (lambda w: add(w, "https://localhost/"), "url"),
        (lambda w: add(w, "https://shop.example/#x"), "url"),
        (lambda w: endpoints.add(w.store, w.vault, w.clock, url=BOOKS, types=["x.y"]), "events"),
    ],
)
def test_what_makes_no_sense_is_named_and_refused(world, ask, field):
    add(world)
    with pytest.raises(InvalidInput) as refused:
        ask(world)
    assert refused.value.field == field


def test_a_secret_is_nowhere_in_clear_and_both_sign_while_it_changes(world, out, receivers):
    added = add(world)
    new = endpoints.rotate_secret(world.store, world.vault, world.clock, added.id)
    with world.store.reading() as connection:
        [row] = connection.execute(select(outgoing.webhook_endpoints)).all()
        assert added.secret.reveal().encode() not in row.secret + row.old_secret
        assert added.secret.reveal() not in json.dumps(endpoints.described(connection))
    world.subscribe()
    send(out)
    assert len(receivers.calls[0][1]["webhook-signature"].split()) == 2
    world.clock.advance(endpoints.CHANGE_OVER)
    endpoints.replay(world.store, world.clock, added.id, first=1, last=None)
    send(out)
    _, headers, body = receivers.calls[-1]
    [only] = headers["webhook-signature"].split()
    at = int(headers["webhook-timestamp"])
    assert only == delivering.signed([new], headers["webhook-id"], at, body)["webhook-signature"]


def test_a_removed_endpoint_leaves_nothing_behind(world, out):
    add(world)
    world.subscribe()
    send(out)
    endpoints.remove(world.store, 1)
    world.tick()
    assert send(out) == 0
    with world.store.reading() as connection:
        for table in (outgoing.webhook_cursors, outgoing.deliveries, outgoing.webhook_endpoints):
            assert connection.execute(select(table)).all() == []
