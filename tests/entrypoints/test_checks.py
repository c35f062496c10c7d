"""`billing-worker check`: every part is named, and a wrong one says where to look."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet

from billing_worker.clock import SystemClock
from billing_worker.config import load
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.checks import run_checks
from billing_worker.entrypoints.cli import cli
from billing_worker.persistence import postgres, sweep_runs
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from tests.entrypoints.test_config import GOOD
from tests.support.redis_server import RedisServer
from tests.support.world import KEY, TwinTransport, World

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def sandbox():
    gateway = SandboxGateway(Behaviour(), SystemClock().now)
    with SandboxServer(gateway) as server:
        gateway.url = server.url
        yield gateway


@pytest.fixture
def environ(sandbox, redis, database_url):
    return GOOD | {
        "BILLING_DATABASE_URL": database_url,
        "BILLING_REDIS_URL": redis.url,
        "BILLING_GATEWAY_URL": f"{sandbox.url}/api",
        "BILLING_CARDGATE_URL": sandbox.url,
        "BILLING_GATEWAY_USERNAME": sandbox.username,
        "BILLING_GATEWAY_PASSWORD": sandbox.password,
        "BILLING_VAULT_KEYS": KEY,
    }


@pytest.fixture
def check(environ):
    def check(**changes):
        return {one.part: one for one in run_checks(load(environ | changes))}

    return check


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_transaction_that_does_not_get_what_it_relies_on_is_named(check, monkeypatch):
    assert "fsync is off" in check()["database"].details, "this is the tests' server"
    monkeypatch.setattr(postgres, "_BEGIN", b"BEGIN ISOLATION LEVEL SERIALIZABLE")
    database = check()["database"]
    assert not database.ok
    assert "transaction_isolation is serializable, not read committed" in database.details


def wrong(found):
    return [part for part, one in found.items() if not one.ok]


def test_every_part_is_told_and_none_of_them_moves_money(check, sandbox):
    found = check()
    assert wrong(found) == []
    of_the_book = ["book", "clock", "standby"]
    others = ["redis", "sweeps", "gateway", "look-up", "cardgate", "vault keys", "callbacks"]
    assert list(found) == ["database", "schema", *of_the_book, *others]
    assert "credentials accepted, test mode" in found["gateway"].details
    assert "no sale was sent" in found["cardgate"].details
    assert not sandbox.ledger


def test_refused_credentials_name_the_settings_to_look_at(check):
    found = check(BILLING_GATEWAY_PASSWORD="wrong")
    assert wrong(found) == ["gateway"]
    assert found["gateway"].details == (
        "credentials refused (401): look at BILLING_GATEWAY_USERNAME and BILLING_GATEWAY_PASSWORD"
    )


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("gateway", {"BILLING_GATEWAY_URL": NOWHERE}, "look at BILLING_GATEWAY_URL"),
        ("cardgate", {"BILLING_CARDGATE_URL": NOWHERE}, "look at BILLING_CARDGATE_URL"),
        ("redis", {"BILLING_REDIS_URL": "redis://127.0.0.1:1/0"}, "refused"),
        ("callbacks", {"BILLING_CALLBACK_URL": "https://b.example.com/x"}, "CALLBACK_SECRET"),
    ],
)
def test_a_part_that_is_wrong_is_the_only_one(check, part, changes, said):
    found = check(**changes)
    assert wrong(found) == [part]
    assert said in found[part].details


def test_a_gateway_url_without_its_prefix_is_told(check, sandbox):
    found = check(BILLING_GATEWAY_URL=f"{sandbox.url}/nothing/here")
    assert wrong(found) == ["gateway"]
    assert "no such path (404): look at BILLING_GATEWAY_URL" in found["gateway"].details


def test_keys_that_do_not_open_what_is_stored_are_wrong(check, store):
    World(store).subscribe()
    assert wrong(check()) == []
    found = check(BILLING_VAULT_KEYS=Fernet.generate_key().decode())
    assert wrong(found) == ["vault keys"]
    assert found["vault keys"].details == (
        "BILLING_VAULT_KEYS open none of the 1 card tokens that were tried"
    )


def test_keys_that_open_some_of_what_is_stored_and_not_the_rest_are_wrong(check, store):
    World(store).subscribe(reference="sub-1")
    world, new = World(store), Fernet.generate_key().decode()
    world.vault = FernetVault(Secret(new))
    world.subscribe(reference="sub-2")
    found = check(BILLING_VAULT_KEYS=new)
    assert wrong(found) == ["vault keys"]
    assert "open only 1 of the 2 card tokens" in found["vault keys"].details
    assert "put the key of the others back at the end" in found["vault keys"].details
    both = check(BILLING_VAULT_KEYS=f"{new},{KEY}")
    assert both["vault keys"].details == "2 key(s); all 2 card tokens that were tried open"


def test_a_redis_that_drops_keys_is_wrong(check, redis):
    import redis as client  # noqa: PLC0415 - the fixture has the name

    with client.Redis.from_url(redis.url) as connection:
        connection.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = check()
        finally:
            connection.config_set("maxmemory-policy", "noeviction")
    assert wrong(found) == ["redis"]
    assert "needs noeviction" in found["redis"].details


def test_an_unreachable_database_is_told_once_and_the_rest_is_still_checked(check):
    found = check(BILLING_DATABASE_URL="postgresql://u:p@127.0.0.1:1/billing")
    assert wrong(found) == [
        "database",
        "schema",
        "book",
        "clock",
        "standby",
        "sweeps",
        "look-up",
        "vault keys",
    ]
    assert "not checked" in found["schema"].details


def test_the_command_says_so_and_exits_1(environ, monkeypatch):
    for name, value in (environ | {"BILLING_GATEWAY_PASSWORD": "wrong"}).items():
        monkeypatch.setenv(name, value)
    shown = CliRunner().invoke(cli, ["check"])
    assert shown.exit_code == 1
    assert "FAIL  gateway: credentials refused (401)" in shown.output
    as_data = CliRunner().invoke(cli, ["check", "--json"])
    assert [p["part"] for p in json.loads(as_data.stdout) if not p["ok"]] == ["gateway"]


def charged(database_url, sandbox):
    """One charge of this book at the sandbox of `check`. Returns its reference there."""
    with Store(database_url) as store:
        world = World(store)
        world.sandbox = sandbox
        world.transport = TwinTransport(sandbox, world.clock)
        world.ports = world.ports_of_a_worker()
        world.subscribe("approved", f"checked-{world.book.identity}")
        world.tick()
        return world.explain(f"checked-{world.book.identity}-p0")["attempts"][0]["reference_id"]


def test_the_look_up_is_trusted_only_as_far_as_it_was_tried(check):
    look_up = check()["look-up"]
    assert look_up.ok
    assert "not tried with a known one" in look_up.details


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_look_up_by_reference_is_tried_both_ways(check, sandbox, database_url):
    reference = charged(database_url, sandbox)
    assert f"exactly one invoice for {reference}: it can be trusted" in check()["look-up"].details
    sandbox.behaviour = replace(sandbox.behaviour, list_filter="ignored")
    found = check()
    sandbox.behaviour = replace(sandbox.behaviour, list_filter="exact")
    assert wrong(found) == ["look-up"]
    assert "its filter was not obeyed" in found["look-up"].details
    assert found["gateway"].ok, "it answers all the same"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_look_up_that_finds_nothing_of_what_was_sent_is_named(check, sandbox, database_url):
    reference = charged(database_url, sandbox)
    sandbox.reset()
    look_up = check()["look-up"]
    assert not look_up.ok
    assert f"0 invoices are listed for {reference}" in look_up.details


def test_silent_sweeps_fail_the_check_only_where_an_age_is_asked_for(environ, database_url):
    with Store(database_url) as store, store.transaction() as connection:
        sweep_runs.add(connection, "billing.renew", SystemClock().now() - timedelta(hours=2))

    def sweeps(max_age):
        found = run_checks(load(environ), max_age)
        return next(one for one in found if one.part == "sweeps")

    assert sweeps(None).ok
    assert sweeps(None).details.startswith("the last one 2:00:")
    late = sweeps(timedelta(minutes=10))
    assert not late.ok
    assert "billing.renew for 2:00:" in late.details
    assert sweeps(timedelta(hours=3)).ok
