"""What another user of the machine finds of `demo` and `up`: closed folders, files and doors."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import redis
from redis.exceptions import AuthenticationError

from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.local import child_processes
from billing_worker.entrypoints.local.child_processes import only_for_us, sole_use_of
from billing_worker.entrypoints.local.embedded_redis import EmbeddedRedis
from billing_worker.entrypoints.local.stack import LocalStack
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_embedded_redis_asks_for_a_password_that_no_command_line_shows(tmp_path):
    with EmbeddedRedis(tmp_path / "redis") as server:
        with redis.Redis(port=server.port) as stranger, pytest.raises(AuthenticationError):
            stranger.lpush("billing.commands", "charge a stored card")
        password = server.url.partition("@")[0].rpartition(":")[2]
        assert len(password) == 64
        assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        with redis.Redis.from_url(server.url) as ours:
            assert ours.ping()
        url = server.url
    with EmbeddedRedis(tmp_path / "redis", port=server.port) as again:
        assert again.url == url


def test_nothing_of_a_stack_is_open_to_others(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    with LocalStack(folder, {}) as stack, Store(stack.environ["BILLING_DATABASE_URL"]) as store:
        migrate(store)
        assert (folder / "redis.url").read_text() == stack.environ["BILLING_REDIS_URL"]
        open_to_others = [
            path.name
            for path in (folder, folder / "redis", *folder.glob("*.db*"), *folder.glob("*.key"),
                         folder / "redis.url", folder / "in-use.lock")
            if rights(path) & 0o077
        ]  # fmt: skip
        assert (folder / "billing.db-wal").exists()
    assert open_to_others == []


def test_a_database_file_of_an_older_version_is_closed_to_others(tmp_path):
    file = tmp_path / "billing.db"
    file.touch(mode=0o664)
    file.chmod(0o664)
    with Store(f"sqlite:///{file}"):
        assert rights(file) == 0o660


def test_the_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(child_processes.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BillingError, match="belongs to another user"):
        only_for_us(tmp_path)


def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "in-use.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), \
            sole_use_of(tmp_path / "in-use.lock", patience_seconds=0):  # fmt: skip
        pass
    assert precious.read_text() == "keep me"
