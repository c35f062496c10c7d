"""`billing-worker events list | stuck | schema`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click

from billing_worker import config
from billing_worker.domain.public_events import PublicType
from billing_worker.domain.public_schema import schema as schema_of
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.persistence.outbox import feed, pending
from billing_worker.persistence.store import Store

_BATCH = 500
_PAUSE_SECONDS = 1.0


@click.group()
def events() -> None:
    """What other systems are told: the feed of public events."""


@events.command("list")
@click.option(
    "--after", default=0, show_default=True, type=click.IntRange(0), help="Last number seen."
)
@click.option("--limit", type=click.IntRange(1), help="Stop after so many.")
@click.option("--follow", is_flag=True, help="Wait for more. With --json: one event per line.")
@json_option
def list_events(*, after: int, limit: int | None, follow: bool, as_json: bool) -> None:
    """List public events in the order of their numbers.

    \b
    Example:
      billing-worker events list --after 4711 --json
    """
    with open_store(settings_for(*config.DATABASE)) as store:
        found = _all_after(store, after, limit, follow=follow)
        if as_json and not follow:
            print_json(list(found))
            return
        try:
            for event in found:
                click.echo(json.dumps(event, ensure_ascii=False) if as_json else _line(event))
        except KeyboardInterrupt:  # how a reader who follows leaves
            return


def _all_after(
    store: Store, after: int, limit: int | None, *, follow: bool
) -> Iterator[dict[str, Any]]:
    left = limit
    while left is None or left > 0:
        with store.reading() as connection:
            rows = feed.after(connection, after, _BATCH if left is None else min(_BATCH, left))
        yield from (json.loads(row.body) for row in rows)
        if rows:
            after = rows[-1].number
            left = left if left is None else left - len(rows)
        elif follow:
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def _line(event: dict[str, Any]) -> str:
    data = event["data"]
    whose = data["invoice"] or data["subscription"] or data["customer"] or "-"
    line = f"{data['number']:>8}  {event['timestamp']}  {event['type']:<24}  {whose}"
    said = ": ".join(data[name] for name in ("about", "why") if data.get(name))
    return f"{line}  {said}" if said else line


@events.command()
@json_option
def stuck(*, as_json: bool) -> None:
    """List events that could not be rendered. They are kept and hold back their own subscription.

    \b
    Example:
      billing-worker events stuck
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        rows = pending.in_trouble(connection, _BATCH)
    found = [
        {"id": r.id, "at": r.at.isoformat(), "type": r.type, "trouble": r.trouble} for r in rows
    ]
    if as_json:
        print_json(found)
        return
    print_table("", ("id", "at", "type", "trouble"), [one.values() for one in found])


@events.command()
@click.argument(
    "event_type",
    type=click.Choice([str(kind) for kind in PublicType]),
    required=False,
    metavar="[TYPE]",
)
def schema(event_type: str | None) -> None:
    """Print the JSON Schema of one event type, or of all types.

    \b
    Example:
      billing-worker events schema invoice.paid
    """
    if event_type is not None:
        print_json(schema_of(PublicType(event_type)))
        return
    print_json({str(kind): schema_of(kind) for kind in PublicType})
