"""The command line. Commands are imported when they are called: `--help` must be quick."""

from __future__ import annotations

import importlib
from typing import Any

import click

_PACKAGE = "billing_worker.entrypoints.cli"
_COMMANDS = {
    "demo": (
        f"{_PACKAGE}.demo",
        "Bill 60 sample subscriptions on this machine, and check the books.",
    ),
    "up": (f"{_PACKAGE}.up", "The same set-up kept running on a data folder."),
    "migrate": (f"{_PACKAGE}.operate", "Bring the database to this version's schema."),
    "check": (
        f"{_PACKAGE}.operate",
        "Test settings, database, Redis, gateway, keys and callbacks.",
    ),
    "sandbox": ("billing_worker.sandbox.cli", "A gateway to practise on."),
    "web": (f"{_PACKAGE}.web", "Callbacks, pay pages and health endpoints."),
    "subscriptions": (
        f"{_PACKAGE}.subscriptions",
        "Import, list, show, change, pause and cancel subscriptions.",
    ),
    "preview": (f"{_PACKAGE}.preview", "What will be charged until a date; compare it afterwards."),
    "catch-up": (f"{_PACKAGE}.catch_up", "Decide about periods that nobody billed in time."),
    "commands": (f"{_PACKAGE}.commands", "What other services asked for, and the answers."),
    "cards": (f"{_PACKAGE}.cards", "List, replace, add and tokenise cards."),
    "invoices": (
        f"{_PACKAGE}.invoices",
        "What people do to one invoice: retry, pay-link, resolve, void, mark-paid.",
    ),
    "status": (f"{_PACKAGE}.operate", "What was charged, what is open, what is unknown."),
    "explain": (
        f"{_PACKAGE}.operate",
        "Why one invoice is as it is, what happens next, wire calls.",
    ),
    "sales": (f"{_PACKAGE}.operate", "The kill switch: stop or start sending sales."),
    "new-key": (f"{_PACKAGE}.operate", "Make a key for BILLING_VAULT_KEYS."),
}


class _OnDemand(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(
            importlib.import_module(module), cmd_name.replace("-", "_")
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in _COMMANDS.items()])


@click.group(cls=_OnDemand, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="billing-worker")
def cli() -> None:
    """Charges card tokens every period: never twice, never lost, every charge explained."""


def main(**options: Any) -> None:
    """Entry point: turns the errors that users cause or meet into one message and a status."""
    # Imported here to keep `--help` quick.
    from billing_worker.config import BadSettings  # noqa: PLC0415
    from billing_worker.domain.errors import BillingError  # noqa: PLC0415

    try:
        cli.main(prog_name="billing-worker", **options)
    except BadSettings as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    except (BillingError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from None
    except Exception as error:
        trouble = _of_a_server(error)
        if trouble is None:
            raise
        click.echo(f"Error: {trouble}", err=True)
        raise SystemExit(1) from None


def _of_a_server(error: Exception) -> str | None:
    """One line about a database or a Redis that went away meanwhile; None: it is our own bug."""
    from redis.exceptions import RedisError  # noqa: PLC0415 - as above
    from sqlalchemy.exc import DBAPIError, OperationalError  # noqa: PLC0415

    if isinstance(error, RedisError):
        return f"Redis: {error}"
    if isinstance(error, OperationalError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        return f"database: {str(error.orig).strip().splitlines()[0]}"
    return None
