"""What every transaction relies on holds whatever the server's defaults, and a frozen server hangs
nobody.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from billing_worker.persistence import postgres as pinned
from billing_worker.persistence.store import CommitUnknown, Store, Within
from billing_worker.services import kill_switch
from billing_worker.services.attempts import submit
from tests.support.postgres import EmbeddedPostgres
from tests.support.world import World

LEVELS = ["read uncommitted", "read committed", "repeatable read", "serializable"]


def defaults(url, **settings):
    """Give the database defaults of its own, as a server or a hoster may."""
    plain = make_url(url).set(drivername="postgresql")
    with psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True) as admin:
        for name, value in settings.items():
            admin.execute(f"ALTER DATABASE \"{plain.database}\" SET {name} = '{value}'")


@pytest.fixture
def store_with(postgres_url):
    stores = []

    def build(**settings):
        defaults(postgres_url, **settings)
        stores.append(Store(postgres_url))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


@pytest.mark.parametrize("level", LEVELS)
def test_no_sale_is_sent_after_sales_stop_has_returned(store_with, monkeypatch, level):
    """The transaction that submits the charge has begun, and waits, when sales are stopped."""
    store = store_with(default_transaction_isolation=level)
    world = World(store)
    world.subscribe()
    real, stopped = submit.switches.read, []

    def stop_first(connection):
        if not stopped:
            stopped.append(True)
            kill_switch.switch(
                store, on=False, service=None, by="t", reason="r", now=world.clock.now()
            )
        return real(connection)

    def submit_all(*args, **options):
        monkeypatch.setattr(submit.switches, "read", stop_first)
        return armed(*args, **options)

    armed = submit.submit_all
    monkeypatch.setattr("billing_worker.services.attempts.commit.submit_all", submit_all)
    world.tick()
    assert stopped
    assert world.sales("sub-1-p0-a1") == 0
    assert world.debits() == {}


CARELESS = {
    "default_transaction_isolation": "serializable",
    "synchronous_commit": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}


def test_every_kind_of_transaction_has_what_it_relies_on(store_with):
    store = store_with(**CARELESS)
    with store.transaction() as connection:
        assert pinned.not_pinned(connection) == []
        with Within(connection).transaction() as within:
            assert pinned.not_pinned(within) == []
    with store.reading() as connection:
        assert pinned.not_pinned(connection) == []
        with Within(connection).reading() as within:
            assert pinned.not_pinned(within) == []


def test_what_another_client_left_in_a_pooled_session_does_not_matter(store_with):
    """PgBouncer in transaction mode hands one client's session to the next."""
    store = store_with()
    connection = store.engine.raw_connection()
    for name, value in CARELESS.items():
        connection.driver_connection.execute(f"SET SESSION {name} = '{value}'")
    connection.close()
    with store.transaction() as connection:
        assert pinned.not_pinned(connection) == []
        left = connection.execute(text("SHOW default_transaction_isolation")).scalar()
        assert left == "serializable", "this is that session"


def test_nothing_is_asked_for_at_connect_that_a_pooler_refuses(store_with):
    connection = store_with().engine.raw_connection()
    assert connection.driver_connection.info.options == ""
    connection.close()


def test_a_transaction_that_lacks_something_says_what(store_with):
    with store_with().transaction() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        assert pinned.not_pinned(connection) == ["synchronous_commit is off, not on"]


def test_slow_statements_are_allowed_for_one_transaction_only(store_with):
    store = store_with()
    with store.transaction() as connection:
        pinned.allow_slow_statements(connection, 60)
        assert pinned.not_pinned(connection) == ["statement_timeout is 60000, not 15000"]
        assert connection.connection.driver_connection.statement_seconds == 65
    with store.transaction() as connection:
        assert pinned.not_pinned(connection) == []
        assert connection.connection.driver_connection.statement_seconds == 20


# --- a server that is frozen ---


@contextmanager
def frozen(server):
    os.kill(server.pid, signal.SIGSTOP)  # first: it starts no child and buries none from here on
    children = _children(server.pid)
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGCONT)
        os.kill(server.pid, signal.SIGCONT)


def _children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.fixture(scope="module")
def server():
    with EmbeddedPostgres() as server:
        server.create_database("frozen")
        yield server


@pytest.fixture
def frozen_store(server, monkeypatch):
    """Waits a second where the product waits five to twenty."""
    monkeypatch.setattr(pinned, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(pinned, "STATEMENT_SECONDS", 2.0)
    monkeypatch.setattr(pinned, "COMMIT_SECONDS", 1.5)
    with Store(server.url("frozen")) as store:
        ask(store)
        yield store


def ask(store):
    with store.transaction() as connection:
        return connection.execute(text("SELECT 1")).scalar()


def ask_while_frozen(store, server):
    with store.transaction() as connection, frozen(server), within(10):
        connection.execute(text("SELECT 1"))


@contextmanager
def within(seconds):
    started = time.monotonic()
    try:
        yield
    finally:
        assert time.monotonic() - started < seconds


@pytest.mark.again
def test_a_frozen_server_is_given_up_in_a_statement_and_by_those_who_come_after(
    server, frozen_store
):
    with pytest.raises(OperationalError, match="no answer within 2 s"):
        ask_while_frozen(frozen_store, server)
    with frozen(server), within(15), pytest.raises(OperationalError):
        ask(frozen_store)
    assert ask(frozen_store) == 1


@pytest.mark.again
def test_a_commit_that_a_frozen_server_does_not_answer_is_unknown(server, frozen_store):
    def commit_while_frozen():
        with ExitStack() as frost, frozen_store.transaction() as connection:
            connection.execute(text("CREATE TEMPORARY TABLE t (v int)"))
            frost.enter_context(frozen(server))

    with within(10), pytest.raises(CommitUnknown):
        commit_while_frozen()


@pytest.mark.again
def test_a_pooled_connection_whose_server_is_frozen_is_given_up_too(server, frozen_store):
    """A second for the question whether it lives, and the time that a connection may take."""
    with frozen(server), within(15), pytest.raises(OperationalError):
        ask(frozen_store)
    assert ask(frozen_store) == 1


def test_the_longest_wait_for_an_answer_is_what_the_documents_say():
    assert (pinned.IDLE_SECONDS, pinned.STATEMENT_SECONDS, pinned.COMMIT_SECONDS) == (5, 20, 10)
    statement_timeout = int(pinned.PINNED["statement_timeout"]) / 1000
    assert pinned.COMMIT_SECONDS < statement_timeout < pinned.STATEMENT_SECONDS
