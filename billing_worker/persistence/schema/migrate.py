"""Alembic, configured in code: there is no alembic.ini to drift from the settings."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from billing_worker.persistence.postgres import allow_slow_statements
from billing_worker.persistence.store import Store

_ADVISORY_LOCK = 0x62696C6C  # "bill": the advisory lock that keeps two migrations apart
_STATEMENT_SECONDS = 60


def migrate(store: Store) -> tuple[str | None, str]:
    """Bring the database to this version's schema. Returns (revision before, revision after).

    Runs in one transaction and in one process at a time. Running it again changes nothing. With the
    lock timeout a migration fails instead of blocking every charge behind it.
    """
    with store.transaction() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = '4s'"))
            allow_slow_statements(connection, _STATEMENT_SECONDS)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        before = current_revision(connection)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        after = current_revision(connection)
    assert after is not None  # noqa: S101 - upgrade to head leaves a revision; this tells mypy
    return before, after


def current_revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def newest_revision() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None  # noqa: S101 - the package ships at least one migration
    return head


def _config() -> Config:
    config = Config()
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    return config
