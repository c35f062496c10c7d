"""A fail-over forgets the commits that the standby has not heard of, and no others."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import NullPool, create_engine, text

from tests.support.replication import ReplicatedPostgres

pytestmark = pytest.mark.again


@pytest.fixture
def pair():
    with ReplicatedPostgres() as pair:
        yield pair


def commit_coin(url):
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS coins (id SERIAL)"))
        connection.execute(text("INSERT INTO coins DEFAULT VALUES"))


def coins(url):
    with create_engine(url, poolclass=NullPool).begin() as connection:
        return connection.execute(text("SELECT count(*) FROM coins")).scalar_one()


def test_fails_over_twice_at_one_address(pair):
    url = pair.create_database("books")
    for past in range(2):
        commit_coin(url)
        pair.cut_off()
        commit_coin(url)
        pair.fail_over()
        assert (pair.url("books"), coins(url)) == (url, past + 1)
        with pytest.raises(RuntimeError, match="add_standby"):
            _ = pair.standby
        pair.add_standby()


def test_what_the_standby_hears_after_it_is_connected_again_survives(pair):
    url = pair.create_database("kept")
    pair.cut_off()
    commit_coin(url)
    pair.reconnect()
    pair.fail_over()
    assert coins(url) == 1


def test_a_standby_is_read_only_and_a_promotion_begins_a_timeline(pair):
    timeline = sql.SQL("SELECT timeline_id FROM pg_control_checkpoint()")
    system = sql.SQL("SELECT system_identifier::text FROM pg_control_system()")
    assert pair.standby.execute(sql.SQL("SELECT pg_is_in_recovery()"))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        pair.standby.create_database("never")
    before = pair.primary.execute(timeline), pair.primary.execute(system)
    pair.fail_over()
    assert pair.primary.execute(timeline) == before[0] + 1
    assert pair.primary.execute(system) == before[1]
