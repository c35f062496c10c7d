"""Shared by several commands: settings, an open database, and two ways of printing."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from billing_worker.addresses import shown
from billing_worker.clock import ClockWatch, SystemClock
from billing_worker.config import DATABASE, Settings, load
from billing_worker.entrypoints import unique_json
from billing_worker.persistence import switches
from billing_worker.persistence.schema.migrate import current_revision, newest_revision
from billing_worker.persistence.store import Store
from billing_worker.services.guards.refusals import Refusal, wrong_clock

by_option = click.option(
    "--by", default=getpass.getuser, help="Name in the history; default: the system user."
)
why_option = click.option("--why", required=True, help="Reason in the history.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing else.")


def _moment(_: click.Context, option: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("must be an ISO 8601 date and time", param=option) from None
    if moment.tzinfo is None:
        raise click.BadParameter("needs a UTC offset, such as a final Z", param=option)
    return moment


decided_at_option = click.option(
    "--decided-at",
    callback=_moment,
    help="Time of the decision, if not now: the command takes effect as of then.",
)

_WIDE = 500
_WAITS_SECONDS = (0.2, 0.5, 1.0, 2.0)


def settings_for(*needs: str) -> Settings:
    return load(os.environ, needs or DATABASE)


def open_store(settings: Settings, *, migrated: bool = True, decides: bool = False) -> Store:
    """Open the database; retry for a few seconds. Raises ClickException with its address.

    `decides`: the command dates charges by this machine's clock, so a wrong clock is refused.
    Commands that stop money (a void, the kill switch) work with any clock.
    """
    store = Store(settings.database_url)
    try:
        _require_ready(store, settings.database_url, migrated=migrated)
        if decides:
            _require_right_clock(store)
    except BaseException:
        store.close()
        raise
    return store


def _require_ready(store: Store, url: str, *, migrated: bool) -> None:
    revision = _revision(store, url)
    if migrated and revision != newest_revision():
        state = f"at {revision}" if revision else "empty"
        raise click.ClickException(
            f"the database is {state}, this version needs {newest_revision()}: "
            "run `billing-worker migrate`"
        )


def require_clock_of_database(store: Store) -> None:
    """Raises ClickException if this machine's clock is not the database's. SQLite has none: there a
    person who starts sales says that the clock is right.
    """
    with store.reading() as connection:
        server = switches.read(connection).server
    _require(wrong_clock(ClockWatch(SystemClock()), replace(server, newest_entry=None)))


def _require_right_clock(store: Store) -> None:
    with store.reading() as connection:
        server = switches.read(connection).server
    _require(wrong_clock(ClockWatch(SystemClock()), server))


def _require(wrong: Refusal | None) -> None:
    if wrong is not None:
        raise click.ClickException(wrong.why)


def _revision(store: Store, url: str) -> str | None:
    trouble = ""
    for wait in (*_WAITS_SECONDS, None):
        try:
            with store.reading() as connection:
                return current_revision(connection)
        except OperationalError as error:
            trouble = _first_line(error)
            if wait is None:
                break
            time.sleep(wait)
        except SQLAlchemyError as error:
            trouble = _first_line(error)
            break
    raise click.ClickException(f"database unreachable: {shown(url)}: {trouble}")


def _first_line(error: SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def chosen(_: click.Context, option: click.Parameter, value: bool | None) -> bool:  # noqa: FBT001 - click's form
    """Not `required`: its message names only one of the two options."""
    if value is None:
        either = " or ".join([*option.opts, *option.secondary_opts])
        raise click.UsageError(f"Say {either}.")
    return value


def money_of(data: Mapping[str, Any]) -> str:
    return f"{data['amount']} {data['currency']}"


def json_object(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Raises BadParameter for a text that is no JSON object."""
    if value is None:
        return None
    try:
        read = unique_json.loads(value)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise click.BadParameter("must be a JSON object.")
    return read


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # A pipe or a file has no width: a reference stays on one line.
    console = Console()
    Console(width=None if console.is_terminal else _WIDE).print(table)
