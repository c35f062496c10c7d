from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import click

from billing_worker.addresses import shown
from billing_worker.config import EVERYTHING, SETTINGS, Settings, load
from billing_worker.entrypoints.book_checks import why_nothing_is_sold
from billing_worker.entrypoints.checks import redis_trouble
from billing_worker.entrypoints.cli.shared import open_store
from billing_worker.entrypoints.local.stack import PROVIDED, LocalStack
from billing_worker.persistence.schema.migrate import migrate

_REDIS_AGAIN_SECONDS = 2


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

    Settings that are given (BILLING_* or BILLING_*_FILE) are used as they are. SQLite, an embedded
    Redis, a vault key and the sandbox replace what is missing. The sandbox replaces a whole gateway:
    give its URL, cardgate, user name and password together, or none of them.

    \b
    Example:
      billing-worker up --folder billing-data
    """
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with LocalStack(folder, os.environ) as stack:
        if stack.sandbox is None:
            click.echo("A gateway is given, so the sandbox is not started.", err=True)
        settings = load(stack.environ, EVERYTHING)
        with open_store(settings, migrated=False) as store:
            migrate(store)
        if why := why_nothing_is_sold(settings):
            raise click.ClickException(why)
        if not _redis_answers(settings, stopping):
            return
        stack.start_worker_and_beat()
        _announce(stack, settings)
        while not stopping.wait(1):
            if ended := stack.ended_children():
                raise click.ClickException(stack.told(ended))
        click.echo("Stopping: what is in flight is finished first.")


def _redis_answers(settings: Settings, stopping: threading.Event) -> bool:
    """Wait until Redis answers, however long. Return False if asked to stop meanwhile."""
    told = False
    while trouble := redis_trouble(settings.redis_url):
        if not told:
            url = shown(settings.redis_url)
            click.echo(f"Redis {url} is unreachable, trying again: {trouble}", err=True)
            told = True
        if stopping.wait(_REDIS_AGAIN_SECONDS):
            return False
    return True


def _announce(stack: LocalStack, settings: Settings) -> None:
    addresses = {
        "BILLING_DATABASE_URL": shown(settings.database_url),
        "BILLING_REDIS_URL": shown(settings.redis_url),
    }
    click.echo(f"Running on {stack.folder}; logs are there. Ctrl-C stops. Settings:")
    for info in SETTINGS:
        source = stack.sources.get(info.variable)
        if source is not None:
            hidden = "***" if info.secret else stack.environ.get(info.variable, "")
            click.echo(f"  {info.variable}={addresses.get(info.variable, hidden)}  ({source})")
    if stack.sandbox:
        click.echo("The gateway is the sandbox; it forgets its ledger when this process ends.")
    elif not settings.test_mode:
        click.echo("LIVE: BILLING_TEST_MODE is false, cards are charged for real.")
    if stack.sources["BILLING_REDIS_URL"] == PROVIDED:
        click.echo(
            f"Senders of commands find Redis by BILLING_REDIS_URL_FILE={stack.folder}/redis.url"
        )
    click.echo("In another terminal:")
    for variable, source in stack.sources.items():
        if source == PROVIDED:
            name = variable if variable in stack.environ else f"{variable}_FILE"
            click.echo(f"  export {name}={shlex.quote(stack.environ[name])}")
    us = Path(sys.argv[0])
    click.echo(f"  {us} subscriptions import FILE")
    click.echo(f"  {us} status")
