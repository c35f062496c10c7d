from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.entrypoints.import_file import ImportReport, import_file
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.vault import FernetVault
from billing_worker.services import overview

SHOWN_FAULTS = 20
PAGE = 1_000


@click.group()
def subscriptions() -> None:
    """Import, list and show subscriptions."""


@subscriptions.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@json_option
def import_(file: Path, *, dry_run: bool, as_json: bool) -> None:
    """Import subscriptions from JSON Lines, or CSV if FILE ends in .csv.

    Idempotent by reference_id. A bad line is reported with its number and field, the good ones
    are imported, and the exit status is then 1.
    """
    settings = settings_for(*config.DATABASE, *config.VAULT)
    with open_store(settings) as store:
        report = import_file(
            file,
            store,
            FernetVault(settings.vault_keys),
            SystemClock(),
            by=f"import:{getpass.getuser()}",
            dry_run=dry_run,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report, dry_run=dry_run)
    if report.faults:
        raise SystemExit(1)


def _print_report(report: ImportReport, *, dry_run: bool) -> None:
    for fault in report.faults[:SHOWN_FAULTS]:
        where = f", {fault.field}" if fault.field else ""
        click.echo(f"line {fault.line}{where}: {fault.reason}", err=True)
    if len(report.faults) > SHOWN_FAULTS:
        click.echo(f"… and {len(report.faults) - SHOWN_FAULTS} more faults", err=True)
    verb = "would be added" if dry_run else "added"
    click.echo(
        f"{report.added} {verb}, {report.unchanged} unchanged, {report.bad_lines} line(s) refused."
    )


@subscriptions.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List all subscriptions in the order of their creation."""
    rows: list[dict[str, Any]] = []
    last_id = 0
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        while page := stored.listed(connection, last_id, PAGE):
            rows += [overview.described(row) for row in page]
            last_id = page[-1].id
    if as_json:
        print_json(rows)
        return
    columns = ("reference_id", "status", "amount", "currency", "every", "next_billing_at")
    print_table("", columns, [[row[column] for column in columns] for row in rows])


@subscriptions.command()
@click.argument("reference_id")
@json_option
def show(reference_id: str, *, as_json: bool) -> None:
    """Show one subscription with its invoices and its history."""
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = overview.show(connection, reference_id)
    if data is None:
        raise click.ClickException(f"no subscription {reference_id!r}")
    if as_json:
        print_json(data)
        return
    for key, value in data.items():
        if key not in {"invoices", "history"}:
            click.echo(f"{key:16} {value if value is not None else '-'}")
    columns = ("reference_id", "start", "status", "reason", "next_attempt_at", "paid_at")
    print_table("Invoices", columns, [[i[c] for c in columns] for i in data["invoices"]])
    for event in data["history"]:
        click.echo(f"{event['at']}  {event['kind']} by {event['by']}  {event['data']}")
