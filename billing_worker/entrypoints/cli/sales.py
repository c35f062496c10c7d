from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from billing_worker import config
from billing_worker.bootstrap import build_outside
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    require_clock_of_database,
    settings_for,
)
from billing_worker.persistence import invoices, switches
from billing_worker.services.kill_switch import switch


@click.command()
@click.argument("action", type=click.Choice(["stop", "start"]))
@click.option("--reason", required=True, help="Reason in the history.")
@by_option
@click.option("--service", help="Only this service, such as payment_card_usd_hpp.")
@click.option(
    "--restored",
    is_flag=True,
    help="The database is from a backup. With stop: no period becomes due until the decisions made "
    "since the backup are repeated. With start: they are repeated, and the worker asks the gateway "
    "about everything that was due before it creates it.",
)
@click.option(
    "--moved",
    is_flag=True,
    help="With start: this database is a copy, and the original is gone. Implies --restored.",
)
@json_option
def sales(
    action: str,
    reason: str,
    by: str,
    service: str | None,
    *,
    restored: bool,
    moved: bool,
    as_json: bool,
) -> None:
    """Stop or start all charges, in all processes. No sale is sent after `stop` returns.

    The worker pauses a single service when the gateway rejects its configuration. Start it again
    here when that is corrected.

    \b
    Example:
      billing-worker sales stop --by ann --reason "wrong amounts"
    """
    on = action == "start"
    restored = restored or moved
    if restored and service:
        raise click.UsageError("--restored and --moved are said of all services.")
    if moved and not on:
        raise click.UsageError("--moved is said with `start`.")
    said: dict[str, Any] = {
        "on": on, "service": service, "reason": reason, "by": f"operator:{by}",
    }  # fmt: skip
    state = _switch(**said, restored=restored, moved=moved)
    if as_json:
        print_json(said | {"restored": restored, "moved": moved, "next": str(state)})
        return
    if service is not None:
        click.echo(f"{service} is {'resumed' if on else 'paused'}.")
    if restored and on:
        click.echo("What was due by now is looked for at the gateway before it is created there.")
    if restored and not on:
        click.echo("Nothing becomes due before `sales start --restored`.")
    click.echo(str(state))


@dataclass(frozen=True, slots=True)
class _State:
    """What is charged next, after the order."""

    sales_on: bool
    paused: tuple[str, ...]
    due: int
    next_at: datetime | None

    def __str__(self) -> str:
        if not self.sales_on:
            return "Sales are stopped: prepared charges wait."
        due = f"{self.due} invoice(s) are due now"
        later = f"the next one is due at {self.next_at.isoformat()}" if self.next_at else ""
        paused = f"paused: {', '.join(self.paused)}" if self.paused else ""
        return f"Sales are on: {'; '.join(filter(None, (due, later, paused)))}."


def _switch(*, service: str | None, **order: Any) -> _State:
    """Carry the order out, and return what is charged after it."""
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store:
        if order["on"]:  # `stop` works with any clock.
            require_clock_of_database(store)
        try:
            switch(
                store,
                service=service,
                now=SystemClock().now(),
                outside=build_outside(settings),
                **order,
            )
        except InvalidInput as error:
            raise click.ClickException(error.reason if not service else str(error)) from None
        with store.reading() as connection:
            switched = switches.read(connection)
            due, next_at = invoices.charges_due(connection, SystemClock().now())
    return _State(switched.sales_on, tuple(sorted(switched.paused)), due, next_at)
