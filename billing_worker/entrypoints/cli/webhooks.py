"""`billing-worker webhooks add | list | pause | resume | remove | rotate-secret | test | replay |
deliveries`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from billing_worker import bootstrap, config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.outgoing.webhooks import in_words
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.persistence.outbox import deliveries as stored
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.receivers.signature import read_secret
from billing_worker.services.outbox import endpoints

_endpoint = click.argument("endpoint", type=click.IntRange(1))
_secret_option = click.option(
    "--secret-file",
    type=click.File(),
    help="File with a secret of yours (whsec_…); - is standard input. Default: a new one.",
)


@click.group()
def webhooks() -> None:
    """Receivers of public events, and what became of each event there."""


@contextmanager
def _opened(*needs: str) -> Iterator[tuple[Store, config.Settings]]:
    """Turns what is wrong with the arguments into one message."""
    settings = settings_for(*config.DATABASE, *needs)
    with open_store(settings) as store:
        try:
            yield store, settings
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None


def _given(secret_file: TextIO | None) -> Secret | None:
    return None if secret_file is None else read_secret(secret_file.read().strip())


@webhooks.command()
@click.argument("url")
@click.option("--events", help="Types to send, comma-separated. Default: all.")
@_secret_option
@json_option
def add(url: str, *, events: str | None, secret_file: TextIO | None, as_json: bool) -> None:
    """Send events to URL from now on. Prints the secret, only this once.

    \b
    Example:
      billing-worker webhooks add https://shop.example/b --events invoice.paid
    """
    types = [name.strip() for name in events.split(",")] if events is not None else None
    with _opened(*config.VAULT) as (store, settings):
        added = endpoints.add(
            store,
            FernetVault(settings.vault_keys),
            SystemClock(),
            url=url,
            types=types,
            secret=_given(secret_file),
            allow_private=settings.webhooks_allow_private,
        )
    if as_json:
        print_json({"id": added.id, "url": added.url, "secret": added.secret.reveal()})
        return
    click.echo(f"Endpoint {added.id}: {added.url}")
    click.echo(f"Its secret, shown only now: {added.secret.reveal()}")


@webhooks.command("list")
@json_option
def list_endpoints(*, as_json: bool) -> None:
    """List endpoints, and how many subscriptions wait for each.

    \b
    Example:
      billing-worker webhooks list
    """
    with _opened() as (store, _), store.reading() as connection:
        found = endpoints.described(connection)
    if as_json:
        print_json(found)
        return
    columns = ("id", "url", "events", "status", "waiting", "parked", "reason")
    shown = [one | {"events": one["events"] or ["all"]} for one in found]
    print_table("", columns, [[_cell(one[name]) for name in columns] for one in shown])


def _cell(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


@webhooks.command()
@_endpoint
@click.option(
    "--why", default="paused by a person", show_default=True, help="Reason in `webhooks list`."
)
def pause(endpoint: int, why: str) -> None:
    """Send nothing to ENDPOINT. Events are kept and sent after `resume`.

    \b
    Example:
      billing-worker webhooks pause 1 --why "the shop moves"
    """
    with _opened() as (store, _):
        endpoints.pause(store, endpoint, why)
    click.echo(f"Endpoint {endpoint} is paused.")


@webhooks.command()
@_endpoint
def resume(endpoint: int) -> None:
    """Send the waiting and all later events to ENDPOINT.

    \b
    Example:
      billing-worker webhooks resume 1
    """
    with _opened() as (store, _):
        endpoints.resume(store, endpoint)
    click.echo(f"Endpoint {endpoint} is active.")


@webhooks.command()
@_endpoint
def remove(endpoint: int) -> None:
    """Remove ENDPOINT and its waiting deliveries. `events list` still has the events.

    \b
    Example:
      billing-worker webhooks remove 1
    """
    with _opened() as (store, _):
        endpoints.remove(store, endpoint)
    click.echo(f"Endpoint {endpoint} is removed.")


@webhooks.command("rotate-secret")
@_endpoint
@_secret_option
@json_option
def rotate_secret(endpoint: int, *, secret_file: TextIO | None, as_json: bool) -> None:
    """Print a new secret, only this once. For 24 hours requests are signed with both.

    \b
    Example:
      billing-worker webhooks rotate-secret 1
    """
    with _opened(*config.VAULT) as (store, settings):
        vault = FernetVault(settings.vault_keys)
        secret = endpoints.rotate_secret(store, vault, SystemClock(), endpoint, _given(secret_file))
    if as_json:
        print_json({"id": endpoint, "secret": secret.reveal()})
        return
    click.echo(f"The new secret of endpoint {endpoint}, shown only now: {secret.reveal()}")


@webhooks.command()
@_endpoint
@json_option
def test(endpoint: int, *, as_json: bool) -> None:
    """Send one signed `webhook.test` to ENDPOINT now. Exit status 1 if it is not accepted.

    \b
    Example:
      billing-worker webhooks test 1
    """
    with _opened(*config.VAULT) as (store, settings):
        answer = endpoints.send_test(bootstrap.build_outbound(settings, store), endpoint)
    failure = in_words(answer.status, answer.reason)
    if as_json:
        print_json({"id": endpoint, "status": answer.status, "reason": failure})
    else:
        click.echo(f"Endpoint {endpoint}: {failure or f'answered {answer.status}'}.")
    if failure:
        raise SystemExit(1)


@webhooks.command()
@_endpoint
@click.option("--from", "first", type=click.IntRange(1), help="Number of the first event.")
@click.option(
    "--to", "last", type=click.IntRange(1), help="Number of the last. Default: the newest."
)
@click.option("--event", "event_id", help="One event, by its id.")
@click.option("--parked", is_flag=True, help="What is parked: the whole schedule anew, now.")
def replay(
    endpoint: int, *, first: int | None, last: int | None, event_id: str | None, parked: bool
) -> None:
    """Send events to ENDPOINT once more, in order and under the same ids.

    \b
    Example:
      billing-worker webhooks replay 1 --from 4711 --to 4800
    """
    if sum([first is not None, event_id is not None, parked]) != 1:
        raise click.UsageError("Say one of --from, --event and --parked.")
    clock = SystemClock()
    with _opened() as (store, _):
        if parked:
            count = endpoints.replay_parked(store, clock, endpoint)
        elif event_id is not None:
            count = endpoints.replay_event(store, clock, endpoint, event_id)
        else:
            assert first is not None  # noqa: S101 - one of the three is given
            count = endpoints.replay(store, clock, endpoint, first=first, last=last)
    click.echo(f"Endpoint {endpoint}: events of {count} subscription(s) go again.")


@webhooks.command()
@click.option("--endpoint", type=click.IntRange(1), help="Only those to this endpoint.")
@click.option("--failed", is_flag=True, help="Only events whose last try failed.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@json_option
def deliveries(*, endpoint: int | None, failed: bool, limit: int, as_json: bool) -> None:
    """List deliveries and their last results, the newest first.

    \b
    Example:
      billing-worker webhooks deliveries --failed
    """
    with _opened() as (store, _), store.reading() as connection:
        rows = stored.listed(connection, failed=failed, endpoint_id=endpoint, limit=limit)
    found = [
        {
            "endpoint": row.endpoint_id,
            "url": row.url,
            "number": row.number,
            "event": row.event_id,
            "type": row.type,
            "tries": row.tries,
            "last_at": row.last_at.isoformat(),
            "status": row.status,
            "reason": row.reason,
            "delivered_at": row.delivered_at.isoformat() if row.delivered_at else None,
        }
        for row in rows
    ]
    if as_json:
        print_json(found)
        return
    columns = ("endpoint", "number", "type", "tries", "last_at", "status", "reason")
    print_table("", columns, [[one[name] for name in columns] for one in found])
