from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, Table, column, insert, inspect, select, table, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from billing_worker.persistence.book import identity as books
from billing_worker.persistence.schema import tables
from billing_worker.persistence.schema.migrate import _config, migrate, newest_revision
from billing_worker.persistence.schema.tables import metadata
from billing_worker.persistence.store import Store

pytestmark = pytest.mark.sql


def test_the_migrations_build_the_tables_that_the_code_describes(store):
    with store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(store):
    assert migrate(store) == (newest_revision(), newest_revision())


def test_two_migrations_of_an_empty_postgres_database_at_once_take_turns(postgres):
    with postgres.temporary_database() as url:
        results = []

        def run():
            store = Store(url)
            results.append(migrate(store))
            store.close()

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {before for before, _ in results} == {None, newest_revision()}


@pytest.mark.parametrize("statement", ["UPDATE events SET kind = 'x'", "DELETE FROM events"])
def test_history_cannot_be_rewritten(world, statement):
    world.subscribe()
    with pytest.raises(DBAPIError, match="append-only"), world.store.transaction() as connection:
        connection.execute(text(statement))


@pytest.fixture(params=["sqlite", "postgres"])
def empty_store(request, tmp_path):
    """A database on which no migration has run."""
    if request.param == "sqlite":
        with Store(f"sqlite:///{tmp_path}/empty.db") as store:
            yield store
        return
    with (
        request.getfixturevalue("postgres").temporary_database() as url,
        Store(url) as store,
    ):
        yield store


def test_a_card_that_did_not_hear_of_its_twins_death_is_dead_after_the_migration(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        card = {"customer_id": 1, "token": b"x", "created_at": now}
        dead = {"unusable_reason": "stolen", "declined_at": now}
        for more in ({"fingerprint": "a"} | dead, {"fingerprint": "a"}, {"fingerprint": "b"}, {}):
            connection.execute(insert(tables.cards).values(card | more))
    migrate(empty_store)
    with empty_store.reading() as connection:
        c = tables.cards.c
        rows = connection.execute(select(c.unusable_reason, c.declined_at).order_by(c.id)).all()
    assert rows == [("stolen", now), ("stolen", now), (None, None), (None, None)]


def _terms(now):
    return {
        "reference_id": "sub-1", "customer_id": 1, "status": "active", "amount_minor": 999,
        "currency": "USD", "interval": "month", "interval_count": 1, "anchor_at": now,
        "timezone": "UTC", "next_period": 0, "next_billing_at": now, "metadata": {},
        "record_digest": "", "created_at": now,
    }  # fmt: skip


def test_orders_and_possible_sales_that_were_kept_as_words_are_kept_in_columns(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    words = {
        1: "void if it ends unpaid",
        2: "found at the gateway, and restored books (or moved ones) cannot tell whether it was sold",
        3: "gateway not reached",
    }
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0019")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        connection.execute(insert(tables.subscriptions).values(_terms(now) | {"id": 1}))
        for number, reason in words.items():
            row = {
                "id": number, "reference_id": f"sub-1-p{number}", "subscription_id": 1,
                "period_number": number, "period_start": now, "period_end": now, "status": "open",
                "amount_minor": 999, "currency": "USD", "reason": reason, "not_charged_count": 0,
                "created_at": now, "next_origin": "scheduled",
            }  # fmt: skip
            _insert(connection, "invoices", row)
            tried = {
                "id": number, "reference_id": f"a{number}", "invoice_id": number, "number": 1,
                "status": "prepared", "origin": "link", "amount_minor": 999, "currency": "USD",
                "test_mode": True, "fence": 1, "claims": 1, "created_at": now, "rechecks": 0,
            }  # fmt: skip
            _insert(connection, "attempts", tried)
    migrate(empty_store)
    with empty_store.reading() as connection:
        i, a = tables.invoices.c, tables.attempts.c
        ordered = connection.execute(select(i.id).where(i.void_if_unpaid)).scalars().all()
        maybe_sold = connection.execute(select(a.invoice_id).where(a.maybe_sold)).scalars().all()
        assert (ordered, maybe_sold) == ([1], [2])


def _insert(connection, name, row):
    """Into the table as it is at this revision."""
    table = Table(name, MetaData(), autoload_with=connection)
    connection.execute(insert(table).values(row))


def test_what_was_taken_back_before_it_was_kept_when_is_looked_for_too(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0012")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        for number in (1, 2):
            row = _terms(now) | {"id": number, "reference_id": f"sub-{number}"}
            connection.execute(insert(tables.subscriptions).values(row))
        taken = {"kind": "subscription.taken_back", "by": "ann", "alert": False, "data": {}}
        for at in (now, now + timedelta(days=9)):
            event = taken | {"at": at, "subscription_id": 2}
            connection.execute(insert(tables.events).values(event))
    migrate(empty_store)
    with empty_store.reading() as connection:
        c = tables.subscriptions.c
        rows = connection.execute(select(c.taken_back_at).order_by(c.id)).scalars().all()
        assert rows == [None, now + timedelta(days=9)]


def test_a_subscription_of_before_was_handed_to_nobody_and_comes_from_nowhere(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    terms = _terms(now)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0008")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        connection.execute(insert(tables.subscriptions).values(terms))
    migrate(empty_store)
    handed = update(tables.subscriptions).values(handed_over_at=now)
    with empty_store.transaction() as connection:
        c = tables.subscriptions.c
        rows = connection.execute(select(c.handed_over_at, c.from_book, c.from_prefix)).all()
        assert rows == [(None, None, None)]
    refused = pytest.raises(IntegrityError, match="handed_over_is_not_billed")
    with refused, empty_store.transaction() as connection:
        connection.execute(handed)


_OLD_CARD_SETUPS = table(
    "hosted_payments", *(column(known.name, known.type) for known in tables.card_setups.c)
)


def test_nothing_of_the_card_setups_keeps_the_old_name_and_the_next_row_has_a_fresh_id(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    setup = {
        "record_digest": "", "customer_id": 1, "amount_minor": 100, "currency": "USD",
        "test_mode": True, "status": "prepared", "fence": 1, "created_at": now,
    }  # fmt: skip
    person = {"id": 1, "reference_id": "ann", "created_at": now}
    with _migrated(empty_store, "0021", {tables.customers: person}) as connection:
        named = {"reference_id": "one", "gateway_reference": "one"}
        connection.execute(insert(_OLD_CARD_SETUPS).values(setup | named))
    with empty_store.transaction() as connection:
        named = {"reference_id": "two", "gateway_reference": "two"}
        connection.execute(insert(tables.card_setups).values(setup | named))
        kept = select(tables.card_setups.c.reference_id).order_by(tables.card_setups.c.id)
        assert connection.execute(kept).scalars().all() == ["one", "two"]
        book = inspect(connection)
        assert "hosted_payments" not in book.get_table_names()
        parts = [
            book.get_pk_constraint("card_setups"), *book.get_foreign_keys("card_setups"),
            *book.get_unique_constraints("card_setups"), *book.get_indexes("card_setups"),
            *book.get_check_constraints("card_setups"),
        ]  # fmt: skip
    assert [part["name"] for part in parts if "card_setups" not in part["name"]] == []


def test_pages_that_are_open_before_pages_have_names_are_kept_and_have_none(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    page = {
        "record_digest": "", "customer_id": 1, "amount_minor": 100, "currency": "USD",
        "test_mode": True, "status": "open", "fence": 1, "created_at": now, "page": b"x",
    }  # fmt: skip
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0010")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        for name in ("one", "two"):
            ids = dict.fromkeys(("reference_id", "gateway_reference", "gateway_id"), name)
            connection.execute(insert(_OLD_CARD_SETUPS).values(page | ids))
    migrate(empty_store)
    c = tables.card_setups.c
    with empty_store.reading() as connection:
        assert connection.execute(select(c.page, c.page_digest)).all() == [(b"x", None)] * 2
    same = update(tables.card_setups).values(page_digest="0" * 64)
    with pytest.raises(IntegrityError), empty_store.transaction() as connection:
        connection.execute(same)


def _link_in_flight(now, *, test_mode=True):
    """Rows by table, in the order of their insertion: a pay link on which nobody has paid yet."""
    money = {"amount_minor": 999, "currency": "USD"}
    return {
        tables.customers: {"id": 1, "reference_id": "ann", "created_at": now},
        tables.subscriptions: money | {
            "id": 1, "reference_id": "sub-1", "customer_id": 1, "status": "active",
            "interval": "month", "interval_count": 1, "anchor_at": now, "timezone": "UTC",
            "next_period": 1, "next_billing_at": now, "metadata": {}, "record_digest": "",
            "created_at": now,
        },
        tables.invoices: money | {
            "id": 1, "reference_id": "sub-1-p0", "subscription_id": 1, "period_number": 0,
            "period_start": now, "period_end": now, "status": "open", "created_at": now,
            "next_origin": "scheduled", "not_charged_count": 0,
        },
        tables.attempts: money | {
            "reference_id": "sub-1-p0-a1", "invoice_id": 1, "number": 1, "status": "submitted",
            "origin": "link", "test_mode": test_mode, "fence": 1, "claims": 0, "rechecks": 0,
            "created_at": now, "submitted_at": now, "gateway_id": "cpi_1",
        },
    }  # fmt: skip


@contextmanager
def _migrated(store, revision, rows):
    """A database of this revision that holds the rows, as far as it knows their columns. It is
    migrated at the end of the block.
    """
    with store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        for table, row in rows.items():
            columns = {column["name"] for column in inspect(connection).get_columns(table.name)}
            known = {name: value for name, value in row.items() if name in columns}
            connection.execute(insert(table).values(known))
        yield connection
    migrate(store)


@pytest.mark.parametrize("test_mode", [True, False])
def test_a_book_that_has_charged_before_books_had_a_mode_keeps_it(empty_store, test_mode):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with _migrated(empty_store, "0006", _link_in_flight(now, test_mode=test_mode)):
        pass
    with empty_store.reading() as connection:
        stored = books.read(connection)
    assert (stored.test_mode, stored.prefix, stored.server) == (test_mode, "", None)


def test_a_card_of_before_there_were_defaults_is_nobodys_named_default(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0015")
        connection.execute(
            insert(tables.customers).values(id=1, reference_id="ann", created_at=now)
        )
        card = {"id": 1, "customer_id": 1, "token": b"x", "created_at": now}
        connection.execute(insert(tables.cards).values(card))
    migrate(empty_store)
    with empty_store.reading() as connection:
        assert connection.execute(select(tables.cards.c.default_since)).scalars().all() == [None]


def test_the_dates_of_what_is_in_flight_are_kept_under_their_new_names(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    c, a = tables.invoices.c, tables.attempts.c
    with _migrated(empty_store, "0011", _link_in_flight(now)) as connection:
        connection.execute(text("UPDATE invoices SET ring_at = created_at"))
        connection.execute(text("UPDATE attempts SET look_at = created_at"))
    with empty_store.reading() as connection:
        assert connection.execute(select(c.enqueue_at)).scalars().all() == [now]
        assert connection.execute(select(a.next_poll_at)).scalars().all() == [now]
        for table, index, column in (
            ("invoices", "ix_invoices_ring", "enqueue_at"),
            ("attempts", "ix_attempts_look", "next_poll_at"),
        ):
            indexes = {one["name"]: one for one in inspect(connection).get_indexes(table)}
            assert indexes[index]["column_names"] == [column]
    closed = update(tables.invoices).values(status="void")
    only_open = pytest.raises(IntegrityError, match="rung_only_while_open")
    with only_open, empty_store.transaction() as connection:
        connection.execute(closed)


def test_a_subscription_of_before_has_no_amount_for_later_and_half_of_one_is_refused(empty_store):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0022")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        _insert(connection, "subscriptions", _terms(now) | {"id": 1})
    migrate(empty_store)
    c = tables.subscriptions.c
    with empty_store.reading() as connection:
        rows = connection.execute(select(c.amount_minor, c.new_amount_minor)).all()
        assert rows == [(999, None)]
    for half in ({"new_amount_minor": 1250}, {"new_amount_from": now}):
        with pytest.raises(IntegrityError), empty_store.transaction() as connection:
            connection.execute(update(tables.subscriptions).values(half))


def test_a_subscription_of_before_has_the_default_notices_and_an_acceptance_needs_a_name(
    empty_store,
):
    now = datetime(2026, 1, 31, tzinfo=UTC)
    with empty_store.transaction() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0025")
        person = {"id": 1, "reference_id": "ann", "created_at": now}
        connection.execute(insert(tables.customers).values(person))
        _insert(connection, "subscriptions", _terms(now) | {"id": 1})
    migrate(empty_store)
    with empty_store.reading() as connection:
        assert connection.execute(select(tables.subscriptions.c.notices)).scalars().all() == [None]
    notice = {"subscription_id": 1, "period_number": 1, "period_start": now, "amount_minor": 999,
              "currency": "EUR", "edition": 1, "accepted_at": now}  # fmt: skip
    with pytest.raises(IntegrityError), empty_store.transaction() as connection:
        connection.execute(insert(tables.notices).values(notice))
