"""Whatever a stranger writes to any queue, the worker goes on charging."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError

from billing_worker.client import BillingClient
from billing_worker.entrypoints.worker.doorbell import CHARGES, COMMANDS, POLLS, SWEEPS, WEBHOOKS
from tests.support.processes import CELERY, ROOT, Process, beat, eventually, worker

pytestmark = pytest.mark.again

INNER = (SWEEPS, CHARGES, POLLS, WEBHOOKS)


def message(task="billing.charge", args=([1],), kwargs=None, **changes):
    """As Celery writes one, with some of it replaced."""
    body = base64.b64encode(json.dumps([list(args), kwargs or {}, {}]).encode()).decode()
    whole = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": task, "id": "t-1", "lang": "py", "retries": 0} | changes.pop("headers", {}),
        "properties": {
            "correlation_id": "t-1", "delivery_mode": 2, "delivery_tag": "d-1",
            "delivery_info": {"exchange": "", "routing_key": "x"}, "priority": 0,
            "body_encoding": "base64",
        } | changes.pop("properties", {}),
    } | changes  # fmt: skip
    return json.dumps(whole)


BOMB = base64.b64encode(zlib.compress(b"[" + b" " * 300_000_000 + b"[],{},{}]")).decode()
HOSTILE = (
    b"garbage", b"\xff\xfe", b"5", b"null", b"[]", b'"text"', b"{}", b"[" * 100_000,
    b'{"headers": null, "body": "", "properties": {}}',
    message(headers={"timelimit": "x"}), message(headers={"timelimit": [1]}),
    message(headers={"timelimit": {"a": 1}}), message(headers={"retries": "many"}),
    message(headers={"expires": "0001-01-01T00:00:00+14:00"}), message(headers={"expires": 5}),
    message(headers={"expires": "9999-12-31T23:59:59-14:00"}),
    message(headers={"eta": "2020-01-01T00:00:00"}), message(headers={"eta": "x"}),
    message(headers={"task": None}), message(headers={"task": 5}), message(headers={"task": []}),
    message(headers={"id": None}), message(headers={"id": {"a": 1}}),
    b"{",
    message(headers={"group": 5, "chord": 5, "root_id": []}), message(headers={"stamps": 5}),
    message(properties={"delivery_tag": None}), message(properties={"delivery_tag": []}),
    message(properties={"delivery_info": None}), message(properties={"delivery_info": 5}),
    message(properties={"priority": "high"}), message(properties={"body_encoding": "rot13"}),
    message(properties={"reply_to": "other"}), message(body=None), message(body="%%%"),
    message(body=BOMB, headers={"compression": "application/x-gzip"}),
    message(**{"content-type": "application/x-python-serialize"}),
    message(**{"content-encoding": "no-such"}), message(**{"content-type": None}),
    message(args=()), message(args=(5,)), message(args=([10**30],)), message(args=(["x"],)),
    message(args=([1],), kwargs={"x": 1}), message(args=([[1]], [2])),
    message("celery.backend_cleanup", ()), message("celery.group", ()),
    message("celery.chord_unlock", ("g", {})), message("celery.map", ()), message("no.such", ()),
)  # fmt: skip


def test_no_message_in_any_queue_ends_the_worker_or_stops_charging(installation):
    with Redis.from_url(installation.redis.url) as stranger:
        stranger.hset("unacked", "tag-1", b"garbage")
        stranger.zadd("unacked_index", {"tag-1": 1})
    with Redis.from_url(installation.redis.url) as stranger, \
            worker(installation.settings, installation.folder) as process:  # fmt: skip
        for queue in (*INNER, COMMANDS):
            stranger.lpush(queue, *HOSTILE)
        for number in range(50):
            stranger.publish("/0.celery.pidbox", f"garbage {number}")
        eventually(
            lambda: all(stranger.llen(queue) == 0 for queue in (*INNER, COMMANDS)),
            why="every queue is empty",
        )
        eventually(lambda: stranger.hlen("unacked") == 0, why="no message is waited for")
        installation.subscribe(count=5)
        with beat(installation.settings, installation.folder):
            eventually(lambda: installation.paid() == 5, why="5 paid")
        assert process.status is None
        assert "queue.message_refused" in process.output
        peak = _peak_memory_mb(process.pid)
        assert process.terminate() == 0
    assert set(installation.debits_per_invoice().values()) == {1}
    assert peak < 300


def _peak_memory_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    [line] = [one for one in status.splitlines() if one.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024


def test_nobody_controls_the_worker_through_redis(installation):
    """`control.cancel_consumer` stopped charging while every check stayed green."""
    with worker(installation.settings, installation.folder), \
            beat(installation.settings, installation.folder):  # fmt: skip
        for order in (["cancel_consumer", CHARGES], ["shutdown"]):
            asked = Process(
                [*CELERY, "control", "-t", "2", *order], installation.settings,
                installation.folder / "control.log",
            )  # fmt: skip
            assert asked.wait() != 0
        installation.subscribe(count=3)
        eventually(lambda: installation.paid() == 3, why="3 paid")


def test_a_command_of_160_mb_is_refused_before_it_is_fetched(installation):
    with Redis.from_url(installation.redis.url) as stranger, \
            worker(installation.settings, installation.folder) as process:  # fmt: skip
        before = _peak_memory_mb(process.pid)
        stranger.lpush(COMMANDS, b"x" * 160_000_000)
        sent = BillingClient(installation.redis.url).describe(customer="nobody")
        assert sent.answer(timeout=60)["status"] == "refused"
        eventually(lambda: stranger.llen(COMMANDS) == 0, why="the queue is empty")
        assert _peak_memory_mb(process.pid) - before < 60


SENDER_ACL = re.search(
    r"ACL SETUSER shop on >PASSWORD (.*)", (ROOT / "docs" / "security.md").read_text()
)


def test_the_documented_rights_of_a_sender_are_enough_for_the_client_and_no_more(installation):
    with Redis.from_url(installation.redis.url) as admin:
        admin.execute_command("ACL", "SETUSER", "shop", "on", ">sesame", *SENDER_ACL[1].split())
        url = f"redis://shop:sesame@127.0.0.1:{installation.redis.port}/0"
        with worker(installation.settings, installation.folder):
            sent = BillingClient(url).describe(customer="nobody")
            assert sent.answer(timeout=60)["status"] == "refused"
        assert admin.acl_log() == []
        with Redis.from_url(url) as shop:
            for forbidden in (
                ("LPUSH", CHARGES, "x"), ("LRANGE", COMMANDS, 0, -1), ("DEL", COMMANDS),
                ("KEYS", "*"), ("PUBLISH", "/0.celery.pidbox", "x"), ("FLUSHALL",),
                ("HSET", "unacked", "a", "b"), ("CONFIG", "GET", "*"), ("EVAL", "return 1", 0),
                ("GET", "billing:outside:x"), ("SET", "billing:outside:x", "y"),
            ):  # fmt: skip
                with pytest.raises(NoPermissionError):
                    shop.execute_command(*forbidden)
