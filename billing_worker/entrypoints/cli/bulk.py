"""One decision about many subscriptions: `change --where` and `redenominate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.services.subscriptions import bulk
from billing_worker.services.subscriptions.bulk import Report


def _asked_for(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        json_option,
        click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing."),
        click.option("--why", required=True, help="Reason in the history."),
        by_option,
    ):
        command = decorate(command)
    return command


def _do(ask: Callable[..., Report], *args: Any, by: str, as_json: bool, **options: Any) -> None:
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            report = ask(store, SystemClock(), *args, by=f"operator:{by}", **options)
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report, dry_run=options["dry_run"])
    if report.refused:
        raise SystemExit(1)


def _print_report(report: Report, *, dry_run: bool) -> None:
    rows = [list(example.values()) for example in report.examples]
    if rows:
        print_table("The first of them", ("subscription", "before", "after"), rows)
    for reference, reason in report.refused.items():
        click.echo(f"{reference}: {reason}", err=True)
    verb = "would be changed" if dry_run else "changed"
    click.echo(
        f"{report.changed} {verb}, {report.unchanged} unchanged, {len(report.refused)} refused."
    )
    for currency, total in report.as_dict()["totals"].items():
        click.echo(f"  together {total} {currency} a period")
    if report.open_in_old:
        click.echo(f"{report.open_in_old} open invoice(s) stay in the old currency: look at each.")


def change_all(where: Sequence[str], by: str, *, as_json: bool, **options: Any) -> None:
    """Change the terms of all subscriptions that have the terms `where`, each as "term=value"."""
    named = dict(term.partition("=")[::2] for term in where)
    _do(bulk.change_where, named, by=by, as_json=as_json, **options)


@click.command()
@_asked_for
@click.argument("old")
@click.argument("new")
@click.argument("rate")
def redenominate(old: str, new: str, rate: str, by: str, *, as_json: bool, **options: Any) -> None:
    """Give all subscriptions in the currency OLD their price in NEW, RATE units of OLD to one.

    \b
    Example:
      billing-worker subscriptions redenominate BGN EUR 1.95583 --why euro
    """
    _do(bulk.redenominate, old=old, new=new, rate=rate, by=by, as_json=as_json, **options)
