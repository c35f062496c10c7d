"""The command line. Commands are imported when they are called, so that `--help` is quick."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import click

from billing_worker.domain.secret import holds_card_data

_PACKAGE = "billing_worker.entrypoints.cli"
_COMMANDS = {
    "demo": (
        ".demo",
        "Bill 60 sample subscriptions on this machine and compare the books.",
    ),
    "up": (".up", "Run worker and beat on this machine, with a data folder."),
    "migrate": (".migrate", "Bring the database to this version's schema."),
    "check": (
        ".check",
        "Test settings, database, Redis, gateway, keys and callbacks.",
    ),
    "sandbox": ("billing_worker.sandbox.cli", "Serve a practice gateway."),
    "web": (".web", "Serve callbacks, pay pages and health checks."),
    "subscriptions": (
        ".subscriptions",
        "Import, list, show, change, pause and cancel subscriptions.",
    ),
    "preview": (".preview", "List coming charges, and compare them afterwards."),
    "catch-up": (".catch_up", "Decide about periods that were not billed in time."),
    "commands": (".commands", "List commands of other services and their answers."),
    "events": (".events", "List public events: what other systems are told."),
    "webhooks": (".webhooks", "Send public events to other systems; replay them."),
    "cards": (".cards", "List, use, replace, add, remove and tokenise."),
    "customers": (".customers", "Change a customer's name or e-mail."),
    "invoices": (
        ".invoices",
        "Change one invoice: retry, pay-link, resolve, void, mark-paid.",
    ),
    "status": (".status", "Show what was charged, what is open, what is unknown."),
    "explain": (
        ".explain",
        "Explain one thing: why, why not on a day, what happens next.",
    ),
    "invariants": (".invariants", "Ask the book whether it contradicts itself."),
    "sales": (".sales", "Stop or start all charges: the kill switch."),
    "vault": (".vault", "Test stored secrets; encrypt them with a new key."),
    "new-key": (".new_key", "Print a new key for BILLING_VAULT_KEYS."),
}


class _OnDemand(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse card numbers before any command runs: whatever is said here may be stored."""
        if any(map(holds_card_data, args)):
            raise click.UsageError("an argument holds a card number or a CVV.")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(_on_demand(module), cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in _COMMANDS.items()])


def _on_demand(module: str) -> ModuleType:
    """Import a command when it is called: importing all takes half a second."""
    return importlib.import_module(module, _PACKAGE)


@click.group(cls=_OnDemand, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="billing-worker")
def cli() -> None:
    """Charges card tokens every period: never twice, never lost, every charge explained."""


def main(**options: Any) -> None:
    """Entry point. Turns errors that users cause or meet into one message and an exit status."""
    try:
        cli.main(prog_name="billing-worker", **options)
    except Exception as error:
        trouble = _on_demand(".troubles").told(error)
        if trouble is None:  # our own bug
            raise
        click.echo(trouble.message, err=True)
        raise SystemExit(trouble.status) from None
