from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import click

from billing_worker.config import EVERYTHING, load
from billing_worker.entrypoints.cli.shared import open_store, shown_url
from billing_worker.entrypoints.local import LocalStack
from billing_worker.persistence.migrate import migrate


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("billing-data"),
    show_default=True,
    help="Database, Redis files, vault key and logs.",
)
def up(folder: Path) -> None:
    """Run worker and beat on this machine until Ctrl-C.

    Settings that are given are used; embedded Redis, SQLite and the sandbox stand in for the rest.
    """
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with LocalStack(folder, os.environ) as stack:
        settings = load(stack.environ, EVERYTHING)
        with open_store(settings, migrated=False) as store:
            migrate(store)
        stack.start_worker_and_beat()
        _announce(stack, settings.database_url, settings.gateway_url)
        while not stopping.wait(1):
            if ended := stack.ended_children():
                raise click.ClickException(f"{ended} ended; see {stack.folder}/*.log")
        click.echo("Stopping: what is in flight is finished first.")


def _announce(stack: LocalStack, database_url: str, gateway_url: str) -> None:
    kind = "sandbox" if stack.sandbox else "gateway"
    click.echo(f"Running on {stack.folder}; logs are there. Ctrl-C stops.")
    click.echo(f"  database {shown_url(database_url)}")
    click.echo(f"  {kind}  {gateway_url}")
    click.echo("In another terminal:")
    for name in ("BILLING_DATABASE_URL", "BILLING_REDIS_URL", "BILLING_VAULT_KEYS_FILE"):
        if name not in os.environ and name in stack.environ:
            click.echo(f"  export {name}={stack.environ[name]}")
    us = Path(sys.argv[0])
    click.echo(f"  {us} subscriptions import FILE")
    click.echo(f"  {us} status")
