from __future__ import annotations

import getpass

import click

from billing_worker import config
from billing_worker.bootstrap import build_outside
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import json_option, open_store, print_json, settings_for
from billing_worker.persistence import switches
from billing_worker.services.kill_switch import switch


@click.command()
@click.argument("action", type=click.Choice(["stop", "start"]))
@click.option("--reason", required=True, help="Kept in the history.")
@click.option("--by", default=getpass.getuser, help="Who decides; default: the system user.")
@click.option("--service", help="Only this service, such as payment_card_usd_hpp.")
@click.option(
    "--restored",
    is_flag=True,
    help="The database is from a backup. With stop: nothing becomes due until what was decided "
    "since the backup has been said again. With start: it has been, and what was due by now is "
    "looked for at the gateway before it is created there.",
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
    """Stop or start sending sales, everywhere. Once it returns, no further charge is armed.

    A service is paused by itself when the gateway refuses our configuration: start it again here
    once that is mended.
    """
    now = SystemClock().now()
    on = action == "start"
    restored = restored or moved
    if restored and service:
        raise click.UsageError("--restored and --moved are said of all services.")
    if moved and not on:
        raise click.UsageError("--moved is said with `start`.")
    who = f"operator:{by}"
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store:
        try:
            switch(
                store,
                on=on,
                service=service,
                by=who,
                reason=reason,
                now=now,
                restored=restored,
                moved=moved,
                outside=build_outside(settings),
            )
        except InvalidInput as error:
            raise click.ClickException(error.reason if not service else str(error)) from None
        with store.reading() as connection:
            switched = switches.read(connection)
    if as_json:
        said = {"on": on, "service": service, "reason": reason, "by": who, "restored": restored}
        print_json(said | {"moved": moved})
        return
    if service is not None:
        click.echo(f"{service} is {'resumed' if on else 'paused'}.")
    if restored and on:
        click.echo("What was due by now is looked for at the gateway before it is created there.")
    if restored and not on:
        click.echo("Nothing becomes due before `sales start --restored`.")
    sent = "Sales are sent." if switched.sales_on else "Sales are stopped: prepared charges wait."
    click.echo(sent)
