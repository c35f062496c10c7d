"""Commands of other services against a real worker, a real broker and a real PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import func, select

from billing_worker.client import BillingClient
from billing_worker.entrypoints.worker.doorbell import COMMANDS
from billing_worker.persistence.schema import tables
from tests.support.processes import WITHIN, eventually, worker

TOKEN = "approved.4c9jHUgeL1SD7g5byDYn9Gc0"
CUSTOMER = {"reference_id": "cust-1"}
NODE_MODULES = os.environ.get("BILLING_TEST_NODE_MODULES", "")
WHY_NO_NODE = (
    "needs node and the npm package: npm install --prefix FOLDER celery-node, then "
    "BILLING_TEST_NODE_MODULES=FOLDER/node_modules"
)
has_node = shutil.which("node") is not None and (Path(NODE_MODULES) / "celery-node").is_dir()


def order(number):
    return {"reference_id": f"order-{number}", "customer": CUSTOMER, "card": {"token": TOKEN},
            "amount": "5.00", "currency": "USD"}  # fmt: skip


@pytest.fixture
def client(installation):
    return BillingClient(installation.redis.url)


@pytest.fixture
def queue(installation):
    with Redis.from_url(installation.redis.url) as client:
        yield client


def outcomes(installation):
    count = select(tables.commands.c.outcome, func.count()).group_by(tables.commands.c.outcome)
    with installation.store.reading() as connection:
        return {outcome: number for outcome, number in connection.execute(count)}  # noqa: C416 - Row is no pair for dict()


def test_a_command_is_carried_out_charged_and_answered(installation, client, queue):
    with worker(installation.settings, installation.folder) as process:
        sent = client.charge_once(**order(1))
        assert sent.answer(timeout=WITHIN)["status"] == "done"
        eventually(lambda: installation.paid() == 1, why="the one-off charge is paid")
        assert client.charge_once(**order(1)).answer(timeout=WITHIN)["status"] == "unchanged"
        assert TOKEN not in process.output
        assert process.terminate() == 0
    assert installation.debits_per_invoice() == {"order-1-p0": 1}
    assert queue.llen(COMMANDS) == 0


def test_a_plain_celery_application_needs_to_know_only_queue_and_names(installation):
    app = Celery(broker=installation.redis.url, backend=installation.redis.url)
    with worker(installation.settings, installation.folder):
        for options in ({"args": [order(1)]}, {"kwargs": order(2), "priority": 6}):
            result = app.send_task("billing.charge_once", queue=COMMANDS, **options)
            assert result.get(timeout=WITHIN)["status"] == "done"
        lost = app.send_task("billing.charge_once", args=[order(3)], queue="billing.sweeps")
        assert lost.get(timeout=WITHIN)["status"] == "done"


def test_what_is_no_command_is_kept_answered_and_does_no_harm(installation, client, queue):
    app = Celery(broker=installation.redis.url, backend=installation.redis.url)
    with worker(installation.settings, installation.folder) as process:
        for garbage in (b"garbage", b"{}", b"[]", b"\xff", b'{"body": 5, "properties": []}'):
            queue.lpush(COMMANDS, garbage)
        unknown = app.send_task("billing.refund", args=[{"token": TOKEN}], queue=COMMANDS)
        app.send_task("billing.refund", args=[{"token": TOKEN}], queue="billing.sweeps")
        malformed = app.send_task("billing.pause", kwargs={"subscription": 1}, queue=COMMANDS)
        assert unknown.get(timeout=WITHIN)["errors"][0]["field"] == "task"
        assert malformed.get(timeout=WITHIN)["status"] == "refused"
        eventually(lambda: outcomes(installation) == {"refused": 7}, why="all are kept")
        assert client.charge_once(**order(1)).answer(timeout=WITHIN)["status"] == "done"
        eventually(lambda: "queue.message_refused" in process.output, why="the stray one is told")
        assert process.terminate() == 0
    assert queue.llen(COMMANDS) == 0
    assert TOKEN not in process.output


def test_a_database_that_stops_loses_no_command(installation, client, queue, postgres):
    with worker(installation.settings, installation.folder) as process:
        client.charge_once(**order(0)).answer(timeout=WITHIN)
        postgres.stop(immediate=True)
        try:
            sent = [client.charge_once(**order(number)) for number in range(1, 21)]
            eventually(lambda: "command.waits" in process.output, why="the outage is noticed")
            assert queue.llen(COMMANDS) == 20
        finally:
            postgres.start()
        assert {one.answer(timeout=WITHIN)["status"] for one in sent} == {"done"}
        assert process.terminate() == 0
    assert outcomes(installation) == {"done": 21}
    assert queue.llen(COMMANDS) == 0


def test_workers_killed_in_the_middle_lose_no_command(installation, client, queue):
    sent = [client.charge_once(**order(number)) for number in range(60)]
    for life in range(2):
        with worker(installation.settings, installation.folder, f"killed-{life}") as process:
            enough = 10 * life
            eventually(lambda: outcomes(installation).get("done", 0) > enough, why="it works")  # noqa: B023 - called at once
            process.signal(signal.SIGKILL)
            process.wait()
        for lease in queue.scan_iter(f"{COMMANDS}.lease:*"):
            queue.delete(lease)  # A minute passes.
    with worker(installation.settings, installation.folder, "successor") as process:
        for one in sent:
            assert one.answer(timeout=WITHIN)["status"] == "done"
        assert process.terminate() == 0
    assert outcomes(installation) == {"done": 60}
    assert queue.llen(COMMANDS) == 0


def test_a_broker_that_restarts_loses_no_command_and_ends_no_worker(installation, client):
    with worker(installation.settings, installation.folder) as process:
        sent = [client.charge_once(**order(number)) for number in range(20)]
        installation.redis.restart()
        eventually(lambda: outcomes(installation) == {"done": 20}, why="all are done")
        assert sent[-1].answer(timeout=WITHIN)["status"] == "done"
        assert process.terminate() == 0


def test_a_worker_asked_to_stop_finishes_the_command_in_hand(installation, client, queue):
    with worker(installation.settings, installation.folder) as process:
        sent = [client.charge_once(**order(number)) for number in range(30)]
        sent[0].answer(timeout=WITHIN)
        assert process.terminate() == 0
    done = outcomes(installation)["done"]
    assert done + queue.llen(COMMANDS) == 30
    assert list(queue.scan_iter(f"{COMMANDS}.lease:*")) == []


@pytest.mark.again
def test_a_cancellation_sent_right_after_its_subscription_always_finds_it(installation, client):
    anchor = datetime.now(UTC) + timedelta(days=1)  # noqa: TID251 - real time
    sent = []
    with (
        worker(installation.settings, installation.folder, "one"),
        worker(installation.settings, installation.folder, "two"),
    ):
        for number in range(40):
            name, card = f"sub-{number}", {"token": f"{TOKEN}{number}"}
            who = {"reference_id": f"cust-{number}"}
            client.subscribe(
                reference_id=name, customer=who, card=card, amount="5.00", currency="USD",
                interval="month", anchor_at=anchor,
            )  # fmt: skip
            sent.append(client.cancel(
                reference_id=f"cancel-{number}", subscription=name, at_period_end=False,
            ))  # fmt: skip
        answers = [one.answer(timeout=WITHIN) for one in sent]
    assert {answer["status"] for answer in answers} == {"done"}
    assert {answer["subscription"]["status"] for answer in answers} == {"cancelled"}


@pytest.mark.node
@pytest.mark.skipif(not has_node, reason=WHY_NO_NODE)
def test_a_producer_that_is_not_python_is_served_and_answered(installation):
    def send(task, record):
        script = Path(__file__).parent / "node" / "send.cjs"
        done = subprocess.run(
            ["node", str(script), installation.redis.url, task, json.dumps(record)],
            env={"NODE_PATH": NODE_MODULES, "PATH": os.environ["PATH"]},
            capture_output=True, text=True, timeout=40, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    with worker(installation.settings, installation.folder):
        assert send("billing.charge_once", order(1))["status"] == "done"
        assert send("billing.charge_once", order(1))["status"] == "unchanged"
        assert send("billing.pause", {"reference_id": "p-1"})["errors"] == [
            {"field": "subscription", "reason": "Missing data for required field."}
        ]
        eventually(lambda: installation.paid() == 1, why="paid")
