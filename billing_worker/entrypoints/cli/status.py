from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli.details import as_words
from billing_worker.entrypoints.cli.shared import (
    json_option,
    money_of,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.services.reports import status as report


@click.command()
@json_option
def status(*, as_json: bool) -> None:
    """Show what was charged, what is open, and what is unknown since when.

    \b
    Example:
      billing-worker status
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = report.status(connection, SystemClock().now())
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
    if data["held_imports"]:
        click.echo(
            f"HELD: {data['held_imports']} of them are imports that are not billed: "
            "`billing-worker subscriptions activate` lets them be."
        )
    if data["unknown"]:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(data["unknown"].items()))
        age = timedelta(seconds=int(data["oldest_unknown_seconds"] or 0))
        click.echo(f"Unknown, the oldest for {age}: {kinds}. They are held, and asked about.")
    for page in data["card_pages"]:
        click.echo(f"Card pages, {page['fate']}: {page['count']}, {money_of(page)}.")
    if data["waits_for_decisions_since"]:
        click.echo(
            "BOOKS FROM A BACKUP: nothing becomes due and nothing is sold since "
            f"{data['waits_for_decisions_since']}. Say again what was decided since the backup, "
            "with --decided-at, then `billing-worker sales start --restored --reason TEXT`."
        )
    elif not data["sales_on"]:
        click.echo(
            "SALES ARE STOPPED: `billing-worker sales start --reason TEXT` sends them again "
            "(with --restored, if the database is from a backup)."
        )
    handed = data["handed_over"]
    if handed["since"] or handed["subscriptions"]:
        since = f" since {handed['since']}: nothing new begins here" if handed["since"] else ""
        click.echo(
            f"HANDED OVER to another book{since}. {handed['subscriptions']} subscriptions are billed "
            f"there; {handed['open_invoices']} open invoices of theirs are still collected here."
        )
    if data["restored_at"]:
        click.echo(f"BOOKS RESTORED: what was due by {data['restored_at']} is looked for first.")
    for service, reason in data["paused_services"].items():
        click.echo(f"PAUSED {service}: {reason}. `sales start --service {service}` resumes it.")
    _print_surplus(data["surplus"])
    for alert in data["alerts"]:
        told = as_words(alert["data"])
        click.echo(f"ALERT {alert['at']} {alert['kind']} {alert['invoice'] or ''} {told}")


def _print_surplus(surplus: dict[str, Any]) -> None:
    for total in surplus["totals"]:
        click.echo(f"SURPLUS, to be given back: {total['count']}, {money_of(total)}.")
    for one in surplus["attempts"]:
        click.echo(f"  {one['attempt']} ({one['gateway_id']}): {money_of(one)}, since {one['at']}")
