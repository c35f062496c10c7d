"""`billing-worker subscriptions pause | resume | change | cancel | uncancel | end`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.bulk import change_all
from billing_worker.entrypoints.cli.details import in_lines
from billing_worker.entrypoints.cli.shared import (
    by_option,
    chosen,
    decided_at_option,
    json_option,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.entrypoints.cli.what_follows import what_follows_of
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.bulk import WHERE
from billing_worker.services.subscriptions.lifecycle import Outcome


def _asked_for(command: Callable[..., Any], *, of_one: bool = True) -> Callable[..., Any]:
    """The options that all these commands share. Not `of_one`: a reference may be left out."""
    for decorate in (
        json_option,
        decided_at_option,
        click.option("--why", help="Reason in the history."),
        by_option,
        click.argument("reference_id", required=of_one),
    ):
        command = decorate(command)
    return command


def _do(
    ask: Callable[..., Outcome], reference_id: str, by: str, *, as_json: bool, **options: Any
) -> None:
    settings = settings_for(*config.DATABASE)
    with open_store(settings, decides=True) as store:
        try:
            outcome = ask(store, SystemClock(), reference_id, by=f"operator:{by}", **options)
        except InvalidInput as error:
            if as_json:
                print_json({"error": {"field": error.field, "reason": error.reason}})
                raise SystemExit(1) from None
            raise click.ClickException(str(error)) from None
        open_invoices = what_follows_of(store, settings, reference_id)
    shown = outcome.as_dict() | {"open_invoices": open_invoices}
    if as_json:
        print_json(shown)
        return
    click.echo(f"{reference_id}: {outcome.outcome}, {outcome.status}.")
    dates = {"next_period": shown["next_billing_at"] or "none", "cancels_at": shown["cancels_at"]}
    for line in in_lines({**dates, **outcome.details}):
        click.echo(line)
    for invoice, follows in open_invoices.items():
        click.echo(f"  {invoice}: {follows}")


_and_void = click.option(
    "--and-void",
    "void_open",
    is_flag=True,
    help="Void open invoices now, and one with a charge in flight when that ends unpaid.",
)


@click.command()
@partial(_asked_for, of_one=False)
@click.option(
    "--where", multiple=True, metavar="TERM=VALUE",
    help="In place of a reference, more than once: all subscriptions that have such terms now "
    f"({', '.join(WHERE)}).",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="With --where: show what would change.")
@click.option("--amount", help='Decimal text in major units, such as "9.99".')
@click.option(
    "--from", "amount_from",
    help="The amount counts for periods that begin at or after this time, such as "
    "2027-01-01T00:00:00Z. Empty text takes it back.",
)  # fmt: skip
@click.option("--currency", help="Needs --amount, because prices are not converted.")
@click.option("--interval", help="day, week, month, quarter or year.")
@click.option("--interval-count", type=int, help="So many intervals make one period.")
@click.option("--description", help="Empty text removes it.")
@click.option(
    "--catch-up",
    help="Catch-up policy: collect_latest, collect_all:DAYS, forgive_older_than:DAYS or hold.",
)
@click.option(
    "--notices",
    help="Notices before a charge: tell, require, require:DAYS or require:DAYS:TRIAL_DAYS. Empty "
    "text leaves it to the settings.",
)
@click.option(
    "--ends-at",
    help="No period begins at or after this time, such as 2027-01-31T00:00:00Z. Empty text removes "
    "it.",
)
def change(
    reference_id: str | None,
    by: str,
    where: tuple[str, ...],
    *,
    dry_run: bool,
    as_json: bool,
    **terms: Any,
) -> None:
    """Change the terms from the next period on. A period that has begun keeps its terms.

    Give a reference to change one subscription. Give --where amount=9.99 --where currency=EUR to
    change all that have these terms now; look at them with --dry-run first.

    \b
    Example:
      billing-worker subscriptions change sub-1 --amount 12.50 --why "new price"
    """
    if (reference_id is None) is not bool(where):
        raise click.UsageError("give either a reference or --where")
    if reference_id is None:
        change_all(where, by, as_json=as_json, dry_run=dry_run, **terms)
        return
    if dry_run:
        raise click.UsageError("--dry-run is for --where")
    _do(lifecycle.change, reference_id, by, as_json=as_json, **terms)


@click.command()
@_asked_for
@click.option("--days", type=int, help="Begin the next period so many days later (goodwill days).")
@click.option("--billing-day", type=int, help="Begin it on the next such day of a month: 1 to 31.")
@click.option("--free-periods", type=int, help="Do not bill the next periods; the dates stay.")
def reschedule(reference_id: str, by: str, *, as_json: bool, **how: Any) -> None:
    """Begin the next period later. The time in between is free. Give one option.

    \b
    Example:
      billing-worker subscriptions reschedule sub-1 --days 7 --why "outage"
    """
    _do(lifecycle.reschedule, reference_id, by, as_json=as_json, **how)


@click.command()
@_asked_for
@click.option(
    "--until",
    help="End the pause by itself at this time, such as 2027-01-31T00:00:00Z. Empty text removes "
    "the date.",
)
@click.option(
    "--shift-anchor/--keep-anchor", default=False,
    help="With --until: move the dates by the length of the pause, or keep them.  [default: keep]",
)  # fmt: skip
def pause(reference_id: str, by: str, *, as_json: bool, **when: Any) -> None:
    """Charge nothing until the subscription is resumed, or until a date.

    \b
    Example:
      billing-worker subscriptions pause sub-1 --by ann --why "on holiday"
    """
    _do(lifecycle.pause, reference_id, by, as_json=as_json, **when)


@click.command()
@_asked_for
@click.option(
    "--shift-anchor/--keep-anchor",
    default=None,
    callback=chosen,
    help="Move the dates by the length of the pause, or keep them and skip the paused periods.",
)
def resume(reference_id: str, by: str, *, shift_anchor: bool, as_json: bool, **when: Any) -> None:
    """End a pause.

    \b
    Example:
      billing-worker subscriptions resume sub-1 --shift-anchor
    """
    _do(lifecycle.resume, reference_id, by, as_json=as_json, shift_anchor=shift_anchor, **when)


@click.command()
@_asked_for
@click.option("--now/--at-period-end", "now", default=None, callback=chosen)
@_and_void
def cancel(
    reference_id: str, by: str, *, now: bool, void_open: bool, as_json: bool, **when: Any
) -> None:
    """Cancel now, or when the next period would begin. Its open invoices become void then.

    Until then they are still collected: the answer names them, and --and-void voids them now. A
    subscription that has ended, and a one-off charge, still owe what is open. They are cancelled
    only with --and-void.

    \b
    Example:
      billing-worker subscriptions cancel sub-1 --at-period-end --by ann
    """
    how = {"at_period_end": not now, "void_open": void_open}
    _do(lifecycle.cancel, reference_id, by, as_json=as_json, **how, **when)


@click.command()
@_asked_for
def uncancel(reference_id: str, by: str, *, as_json: bool, **when: Any) -> None:
    """Withdraw a cancellation that has not taken effect.

    \b
    Example:
      billing-worker subscriptions uncancel sub-1 --by ann
    """
    _do(lifecycle.uncancel, reference_id, by, as_json=as_json, **when)


@click.command()
@_asked_for
@_and_void
def end(reference_id: str, by: str, *, void_open: bool, as_json: bool, **when: Any) -> None:
    """Let no further period begin. Invoices that are open are still collected.

    \b
    Example:
      billing-worker subscriptions end sub-1 --by ann
    """
    _do(lifecycle.end, reference_id, by, as_json=as_json, void_open=void_open, **when)


@click.command()
@click.argument("reference_id")
@by_option
@click.option("--why", help="Reason in the history.")
@json_option
def forgive(reference_id: str, by: str, **options: Any) -> None:
    """Void what a suspended subscription owes, and bill it again from its next period.

    \b
    Example:
      billing-worker subscriptions forgive sub-1 --by ann --why "goodwill"
    """
    _do(lifecycle.forgive, reference_id, by, **options)


LIFECYCLE_COMMANDS = (change, reschedule, pause, resume, cancel, uncancel, end, forgive)
