"""The callback route: what is stored, what is counted, and that nobody's word is taken for money."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import redis as redis_client
import requests
from click.testing import CliRunner
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from billing_worker.config import load
from billing_worker.domain.secret import OF_CALLBACK, Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.web import callbacks as route
from billing_worker.entrypoints.web.app import create_app
from billing_worker.entrypoints.web.callbacks import LARGEST_CALLBACK, callback_routes
from billing_worker.entrypoints.worker.doorbell import POLLS, TRANSPORT_OPTIONS
from billing_worker.gateway import answer_bodies
from billing_worker.gateway.callback_signature import is_signed
from billing_worker.persistence import counters
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.charging.callbacks import Fate, Inbox, is_genuine, receive
from tests.gateway.samples import BODIES, body
from tests.support.ports import free_port
from tests.support.processes import CLI, Process
from tests.support.redis_server import RedisServer
from tests.support.world import KEY as VAULT_KEY
from tests.support.world import World

KEY = "sk_test_4f1c"
URL = "/callbacks/payment-invoices"
ABOUT_INVOICES = ["04", "06", "08", "09", "17", "19"]


def sign(content: bytes, key: str = KEY) -> str:
    """As gateway.md §5 prints it; shares no code with the product."""
    return base64.b64encode(
        hashlib.sha1(key.encode() + content + key.encode()).digest()  # noqa: S324
    ).decode()


def about(gateway_id="cpi_1", **attributes):
    attributes = {"status": "processed", "test_mode": True, **attributes}
    resource = {"type": "payment-invoices", "id": gateway_id, "attributes": attributes}
    return json.dumps({"data": resource}).encode()


def inbox_of(world, key=KEY, *, test_mode=True):
    return Inbox(world.store, world.clock, world.vault, world.bell, Secret(key), test_mode)


class Caller:
    """Posts to the route as the gateway does, and reads what that left behind."""

    def __init__(self, world, key=KEY, *, test_mode=True):
        self.world = world
        app = Flask("test")
        app.register_blueprint(callback_routes(inbox_of(world, key, test_mode=test_mode)))
        self._client = app.test_client()

    def post(self, content, signature=None, **options):
        headers = {"X-Signature": sign(content) if signature is None else signature}
        kind = "application/json"
        return self._client.post(URL, data=content, headers=headers, content_type=kind, **options)

    def status(self, content, signature=None):
        return self.post(content, signature).status_code

    @property
    def stored(self):
        with self.world.store.reading() as connection:
            return connection.execute(select(tables.callbacks)).all()

    @property
    def counts(self):
        with self.world.store.reading() as connection:
            return counters.counts(connection, "callbacks.")


@pytest.fixture
def caller(world):
    return Caller(world)


@pytest.fixture
def charged(world):
    """An invoice whose sale was never answered: submitted, not yet asked about."""
    world.subscribe("answer_lost_after")
    world.tick()
    assert world.fate() == "unknown"
    return world.explain()["attempts"][0]["gateway_id"]


# --- what a genuine call does ---


def test_a_callback_makes_the_attempt_due_and_rings_and_changes_nothing_else(
    world, caller, charged
):
    before = world.explain()
    assert caller.status(about(charged)) == 200
    after = world.explain()
    assert world.bell.messages == [("poll", (1,))]
    assert after["attempts"][0].pop("ask_again_at") == world.clock.now().isoformat()
    assert before["attempts"][0].pop("ask_again_at") > world.clock.now().isoformat()
    assert after["attempts"] == before["attempts"]
    assert after["fate"] == before["fate"]


def test_what_a_callback_rang_for_is_settled_by_a_get(world, caller, charged):
    caller.post(about(charged))
    world.deliver()
    assert world.fate() == "paid"
    assert "attempt.called_back" in world.events()


def test_a_callback_that_lies_about_payment_pays_nothing(world, caller):
    world.subscribe("pending_forever")
    world.tick()
    caller.post(about(world.explain()["attempts"][0]["gateway_id"], status="processed"))
    world.deliver()
    assert world.fate() == "unknown"


def test_the_bytes_are_kept_encrypted_and_come_back_as_they_were(world, caller):
    assert caller.status(body("17").replace(b"REDACTED.JWT.HS256", b"eyJ0eXAi.secret")) == 200
    (row,) = caller.stored
    assert b"eyJ0eXAi" not in row.body
    assert b"eyJ0eXAi.secret" in world.vault.unlock(row.body, OF_CALLBACK).reveal().encode()


@pytest.mark.parametrize("number", ABOUT_INVOICES)
def test_every_documented_body_of_an_invoice_is_taken(world, number):
    content = body(number)
    test_mode = json.loads(content)["data"]["attributes"]["test_mode"]
    caller = Caller(world, test_mode=test_mode)
    assert caller.status(content) == 200
    assert [row.gateway_id for row in caller.stored] == [json.loads(content)["data"]["id"]]


OTHERS = sorted(
    path
    for folder in (BODIES, Path(__file__).parent / "bodies")
    for path in folder.glob("*.json")
    if path.stem[:2] not in ABOUT_INVOICES
)


def test_every_documented_body_is_among_those_tried_here():
    numbers = {path.stem[:2] for path in OTHERS} | set(ABOUT_INVOICES)
    assert numbers == {f"{n:02}" for n in (*range(1, 22), *range(90, 95))}


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem[:2])
def test_a_documented_body_that_is_no_callback_is_read_and_not_stored(caller, path):
    assert isinstance(answer_bodies._parse_object(path.read_bytes()), dict)
    assert caller.status(path.read_bytes()) == 400
    assert caller.stored == []


def test_an_invoice_that_nobody_knows_is_stored_and_answered_200(world, caller):
    assert caller.status(about("cpi_somebody_elses")) == 200
    assert len(caller.stored) == 1
    assert world.bell.messages == []


def test_the_same_bytes_are_stored_once_ring_once_and_are_answered_200(world, caller, charged):
    for _ in range(3):
        assert caller.status(about(charged)) == 200
    assert len(caller.stored) == 1
    assert world.bell.messages == [("poll", (1,))]
    assert caller.counts == {"duplicate": 2}


def test_calls_in_the_wrong_order_end_where_those_in_order_do(world, caller, charged):
    for status in ("processed", "process_pending", "created"):
        caller.post(about(charged, status=status))
        world.deliver()
    assert world.fate() == "paid"


def test_a_callback_before_our_own_commit_leaves_the_prepared_attempt_alone(world, caller):
    world.subscribe("approved")
    answers = []
    world.transport.before_send = lambda request: (
        answers.append(caller.status(about("cpi_sandbox000000001")))
        if request.url.endswith("/payment-invoices/cpi_sandbox000000001") or not answers
        else None
    )
    world.tick()
    assert set(answers) == {200}
    assert world.fate() == "paid"
    assert world.sales("sub-1-p0-a1") == 1


def test_a_callback_about_a_final_attempt_asks_once_more_and_never_again(world, caller):
    world.subscribe("approved")
    world.tick()
    caller.post(about(world.explain()["attempts"][0]["gateway_id"], status="refunded"))
    world.tick()
    assert world.explain()["attempts"][0]["ask_again_at"] is None
    assert world.fate() == "paid"


def test_callbacks_about_a_declined_charge_do_not_use_up_its_later_rechecks(world, caller):
    world.subscribe("decline_fatal_decline")
    world.tick()
    expected = world.explain()["attempts"][0]["ask_again_at"]
    for number in range(5):
        caller.post(about(world.explain()["attempts"][0]["gateway_id"], updated=number))
        world.deliver()
    assert world.explain()["attempts"][0]["ask_again_at"] == expected


# --- what is refused: counted, and nothing stored ---


def test_any_changed_bit_of_the_body_is_refused():
    content = body("08")
    signature = sign(content)
    assert is_signed(content, signature, Secret(KEY))
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        assert not is_signed(bytes(changed), signature, Secret(KEY))


def test_any_changed_bit_of_the_signature_is_refused():
    content = body("08")
    signature = sign(content).encode()
    for position in range(len(signature) * 8):
        changed = bytearray(signature)
        changed[position // 8] ^= 1 << position % 8
        assert not is_signed(content, changed.decode("latin-1"), Secret(KEY))


@given(st.binary(max_size=300), st.text(max_size=40), st.text(min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_signature_but_the_right_one_is_taken(content, guess, key):
    right = base64.b64encode(
        hashlib.sha1(key.encode() + content + key.encode()).digest()  # noqa: S324
    ).decode()
    assert is_signed(content, right, Secret(key))
    assert is_signed(content, guess, Secret(key)) == (guess == right)


@pytest.mark.parametrize("signature", ["", "x", "é", sign(b"another body")])
def test_a_forged_call_is_401_counted_and_not_stored(world, caller, charged, signature):
    assert caller.status(about(charged), signature) == 401
    assert (caller.stored, caller.counts) == ([], {"forged": 1})
    assert world.bell.messages == []


def test_a_call_signed_with_an_hmac_is_forged(caller):
    mac = hmac.new(KEY.encode(), about(), hashlib.sha1).digest()
    assert caller.status(about(), base64.b64encode(mac).decode()) == 401


def test_a_genuine_call_of_the_other_mode_is_401_and_counted(caller):
    assert caller.status(about(test_mode=False)) == 401
    assert (caller.stored, caller.counts) == ([], {"other_mode": 1})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not JSON", b"[]", b"null", b'{"data":[]}', b"\xff\xfe", b'{"data":{"id":1}}',
        b'{"data":{"id":"../../x","attributes":{"test_mode":true}}}',
        b'{"data":{"id":"cpi_1","attributes":[]}}',
        b'{"data":{"id":"cpi_1","attributes":{"test_mode":"true"}}}',
        b'{"data":{"id":"cpi_1","id":"cpi_2","attributes":{"test_mode":true}}}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[:30].decode("latin-1"),
)  # fmt: skip
def test_a_signed_call_that_cannot_be_read_is_400_and_counted(caller, content):
    assert caller.status(content) == 400
    assert (caller.stored, caller.counts) == ([], {"unreadable": 1})


def test_a_body_that_is_too_large_is_413_and_counted_even_if_signed(caller):
    content = about(padding="x" * LARGEST_CALLBACK)
    assert caller.status(content) == 413
    assert (caller.stored, caller.counts) == ([], {"too_large": 1})


def test_a_flood_of_forged_calls_is_429_and_does_not_shut_the_gateway_out(world, caller):
    statuses = [caller.status(about(), "forged") for _ in range(100)]
    assert statuses == [401] * 40 + [429] * 60
    assert caller.status(about()) == 200
    world.clock.advance(1)
    assert caller.status(about(), "forged") == 401
    assert caller.counts == {"forged": 41, "too_many": 60}


def test_without_a_key_the_route_is_closed(world):
    caller = Caller(world, key="")
    assert caller.status(about(), sign(about(), key="")) == 503
    assert (caller.stored, caller.counts) == ([], {})


def test_when_the_database_is_away_the_gateway_is_told_to_come_again(caller, monkeypatch):
    def fail(*_args, **_options):
        raise OperationalError("", {}, Exception("gone"))

    monkeypatch.setattr(route.callbacks, "receive", fail)
    assert caller.status(about()) == 503


# --- a storm ---


def _mutations(seed, number, gateway_id):
    """Documented and real bodies with bytes changed, keys moved and values swapped."""
    dice = random.Random(seed)
    sources = [body(n) for n in ABOUT_INVOICES]
    for count in range(number):
        content = dice.choice(sources)
        if count % 2:
            resource = json.loads(content)
            attributes = resource["data"]["attributes"]
            resource["data"]["id"] = dice.choice([gateway_id, "cpi_x", None, 7, []])
            attributes["test_mode"] = dice.choice([True, True, True, False, None, "true"])
            attributes[dice.choice([*attributes, "new"])] = dice.choice(
                [None, [], {}, "processed", "expired", -1, 1e400, "x" * 300, {"a": [1]}, True]
            )
            content = json.dumps(resource).encode()
        changed = bytearray(content)
        for _ in range(dice.choice([0, 0, 0, 1, 30])):
            position = dice.randrange(len(changed))
            match dice.randrange(3):
                case 0:
                    changed[position] = dice.randrange(256)
                case 1:
                    del changed[position : position + dice.randrange(1, 40)]
                case 2:
                    changed[position:position] = dice.choice(sources)[: dice.randrange(60)]
        yield bytes(changed), dice.random() < 0.2


def test_10_000_mutated_callbacks_raise_nothing_and_change_no_state_without_a_get(sqlite_url):
    store = Store(sqlite_url)
    # Thousands of commits need not survive a power cut.
    event.listen(store.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous=OFF"))
    world = World(store)
    world.subscribe("answer_lost_after")
    world.tick()
    gateway_id = world.explain()["attempts"][0]["gateway_id"]
    inbox = inbox_of(world)
    before, sent = _books(store), len(world.transport.sent)
    fates = Counter()
    for content, signed in _mutations(5, 10_000, gateway_id):
        with suppress(answer_bodies.UnreadableError):
            answer_bodies.called_back(content)  # also what no signature lets through
        if is_genuine(inbox, content, sign(content if signed else content[1:])):
            fates[receive(inbox, content)] += 1
    assert fates.keys() == {Fate.STORED, Fate.DUPLICATE, Fate.UNREADABLE, Fate.OTHER_MODE}
    assert fates[Fate.STORED] > 100
    assert _books(store) == before
    assert len(world.transport.sent) == sent
    world.deliver()
    assert world.fate() == "paid"
    store.close()


def _books(store):
    """Every row that says something about money; when it is asked about next says nothing."""
    with store.reading() as connection:
        return [
            [{name: value for name, value in row.items() if name != "next_poll_at"}
             for row in connection.execute(select(table)).mappings()]
            for table in (tables.attempts, tables.invoices, tables.subscriptions)
        ]  # fmt: skip


# --- the real server ---


@pytest.fixture
def redis(tmp_path):
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def environment(sqlite_url, redis):
    return {
        "BILLING_DATABASE_URL": sqlite_url,
        "BILLING_REDIS_URL": redis.url,
        "BILLING_VAULT_KEYS": VAULT_KEY,
        "BILLING_TEST_MODE": "true",
        "BILLING_CALLBACK_SECRET": KEY,
    }


def test_under_gunicorn_a_call_is_stored_and_rings_the_workers_queue(environment, redis, tmp_path):
    store = Store(environment["BILLING_DATABASE_URL"])
    world = World(store)
    world.subscribe("answer_lost_after")
    world.tick()
    gateway_id = world.explain()["attempts"][0]["gateway_id"]
    port = free_port()
    command = [*CLI, "web", "--host", "127.0.0.1", "--port", str(port)]
    web = Process(command, environment, tmp_path / "web.log")
    url = f"http://127.0.0.1:{port}"
    try:
        web.says("Listening at")
        assert requests.get(f"{url}/health/ready", timeout=10).json()["callbacks"] == "on"
        content = about(gateway_id)
        headers = {"X-Signature": sign(content), "X-Forwarded-Proto": "https"}
        assert requests.post(url + URL, content, headers=headers, timeout=10).status_code == 200
        chunks = (content[:20], content[20:])
        again = requests.post(url + URL, iter(chunks), headers=headers, timeout=10)
        assert again.json() == {"callback": "duplicate"}
        headers["X-Signature"] = sign(b"")
        assert requests.post(url + URL, content, headers=headers, timeout=10).status_code == 401
        prefix = TRANSPORT_OPTIONS.get("global_keyprefix", "")
        with redis_client.Redis.from_url(redis.url) as client:
            assert client.llen(prefix + POLLS) == 1
        redis.kill()
        content = about(gateway_id, updated=2)
        headers["X-Signature"] = sign(content)
        assert requests.post(url + URL, content, headers=headers, timeout=20).status_code == 200
        web.signal(signal.SIGTERM)
        assert web.wait() == 0
    finally:
        web.kill()
        store.close()
    for secret in (KEY, environment["BILLING_VAULT_KEYS"]):
        assert secret not in web.output


def test_readiness_says_that_callbacks_are_off(environment):
    app = create_app(load(environment | {"BILLING_CALLBACK_SECRET": ""}, ()))
    answer = app.test_client().get("/health/ready")
    assert answer.status_code == 200
    assert answer.json["callbacks"] == "off: BILLING_CALLBACK_SECRET is not set"


def test_the_web_process_does_not_ask_for_the_settings_of_a_worker(environment):
    del environment["BILLING_VAULT_KEYS"]
    done = CliRunner().invoke(cli, ["web"], env=environment)
    assert set(done.exception.faults) == {"BILLING_VAULT_KEYS"}
