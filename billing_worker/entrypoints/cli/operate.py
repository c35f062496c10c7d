"""Commands of the people who keep it running."""

from __future__ import annotations

import getpass
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.events import Event, EventKind
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
    shown_url,
)
from billing_worker.persistence import history, switches
from billing_worker.persistence.history import Entry
from billing_worker.services import overview


@click.command()
@json_option
def migrate(*, as_json: bool) -> None:
    """Bring the database to this version's schema. Safe to run again, and twice at once."""
    from billing_worker.persistence.migrate import migrate as run  # noqa: PLC0415 - alembic is slow

    settings = settings_for(*config.DATABASE)
    with open_store(settings, migrated=False) as store:
        before, after = run(store)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"{shown_url(settings.database_url)} is already at {after}.")
    else:
        click.echo(f"{shown_url(settings.database_url)}: {before or 'empty'} -> {after}.")


@click.command()
@json_option
def check(*, as_json: bool) -> None:
    """Test every part that the worker needs; exit 1 if one of them does not answer."""
    from billing_worker.entrypoints.checks import run_checks  # noqa: PLC0415 - needs the client

    settings = settings_for(*config.EVERYTHING)
    results = run_checks(settings)
    if as_json:
        print_json([{"part": r.part, "ok": r.ok, "details": r.details} for r in results])
    else:
        for result in results:
            click.echo(f"{'ok  ' if result.ok else 'FAIL'}  {result.part}: {result.details}")
    if not all(result.ok for result in results):
        raise SystemExit(1)


@click.command()
@json_option
def status(*, as_json: bool) -> None:
    """What was charged, what is open, what is unknown and for how long."""
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = overview.status(connection, SystemClock().now())
    if as_json:
        print_json(data)
        return
    print_status(data)


def print_status(data: dict[str, Any]) -> None:
    print_table(
        "Invoices",
        ("fate", "count", "amount", "currency"),
        [(i["fate"], i["count"], i["amount"], i["currency"]) for i in data["invoices"]],
    )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(data["subscriptions"].items()))
    click.echo(f"Subscriptions: {counts or 'none'}. Next period due: {data['next_due_at'] or '-'}.")
    if data["oldest_unknown_seconds"] is not None:
        click.echo(f"Oldest unknown outcome: {data['oldest_unknown_seconds']:.0f} s old.")
    if not data["sales_on"]:
        click.echo(
            "SALES ARE STOPPED: `billing-worker sales start --reason TEXT` sends them again."
        )
    for service, reason in data["paused_services"].items():
        click.echo(f"PAUSED {service}: {reason}. `sales start --service {service}` resumes it.")
    for alert in data["alerts"]:
        click.echo(f"ALERT {alert['at']} {alert['kind']} {alert['invoice'] or ''} {alert['data']}")


@click.command()
@click.argument("reference")
@json_option
def explain(reference: str, *, as_json: bool) -> None:
    """Explain one invoice, by its reference, an attempt's reference, or the gateway's id."""
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = overview.explain(connection, reference)
    if data is None:
        raise click.ClickException(f"no invoice, attempt or gateway id {reference!r}")
    if as_json:
        print_json(data)
        return
    _print_explanation(data)


def _print_explanation(data: dict[str, Any]) -> None:
    period = data["period"]
    click.echo(f"{data['invoice']}: {data['amount']} {data['currency']}, {data['fate']}")
    click.echo(f"  subscription {data['subscription']}, period {period['number']}")
    click.echo(f"  {period['start']} to {period['end']} ({period['timezone']})")
    if data["reason"]:
        click.echo(f"  reason: {data['reason']}")
    if data["next_attempt_at"]:
        click.echo(f"  next attempt at {data['next_attempt_at']}")
    for event in data["history"]:
        details = {k: v for k, v in event["data"].items() if k != "calls"}
        told = ", ".join(f"{key}={value}" for key, value in details.items())
        number = f" attempt {event['attempt']}" if event["attempt"] else ""
        alert = " ALERT" if event["alert"] else ""
        click.echo(f"{event['at']}  {event['kind']}{number} by {event['by']}{alert}  {told}")
        for call in event["data"].get("calls", ()):
            click.echo(f"    {call['at']}  {call['method']} {call['path']} -> {call['outcome']}"
                       f" in {call['duration_ms']} ms")  # fmt: skip
            if call["request"]:
                click.echo(f"      sent: {call['request']}")
            if call["answer"]:
                click.echo(f"      got:  {call['answer'][:300]}")


@click.command()
@click.argument("action", type=click.Choice(["stop", "start"]))
@click.option("--reason", required=True, help="Kept in the history.")
@click.option("--by", default=getpass.getuser, help="Who decides; default: the system user.")
@click.option("--service", help="Only this service, such as payment_card_usd_hpp.")
def sales(action: str, reason: str, by: str, service: str | None) -> None:
    """Stop or start sending sales, everywhere, from the next commit on.

    A service is paused by itself when the gateway refuses our configuration: start it again here
    once that is mended.
    """
    now = SystemClock().now()
    on = action == "start"
    with open_store(settings_for(*config.DATABASE)) as store, store.transaction() as connection:
        if service is None:
            switches.turn_sales(connection, on=on, by=by, reason=reason, now=now)
        elif on:
            switches.resume_service(connection, service)
        else:
            switches.pause_service(connection, service, by=by, reason=reason, now=now)
        data = {"on": on, "reason": reason, "service": service}
        said = Event(EventKind.SALES_SWITCHED, now, f"operator:{by}", data)
        history.write(connection, [Entry(said)])
    click.echo("Sales are sent." if on else "Sales are stopped: prepared charges wait.")


@click.command("new-key")
def new_key() -> None:
    """Print a fresh key for BILLING_VAULT_KEYS."""
    from cryptography.fernet import Fernet  # noqa: PLC0415 - only here

    click.echo(Fernet.generate_key().decode())
