"""`billing-worker invoices retry | pay-link | resolve | void | mark-paid`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.hand_out import hand_out_page, html_option
from billing_worker.entrypoints.cli.shared import (
    by_option,
    chosen,
    json_option,
    open_store,
    print_json,
    settings_for,
    why_option,
)
from billing_worker.entrypoints.cli.what_follows import what_follows
from billing_worker.entrypoints.cli.worker_ports import open_ports
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.operators.debts import (
    MAY_BE_CHARGED,
    IfCharged,
    mark_paid,
    void_invoice,
)
from billing_worker.services.operators.resolve import resolve_unknown


@click.group()
def invoices() -> None:
    """Change one invoice by hand."""


@contextmanager
def _refusals_said(*, as_json: bool) -> Iterator[None]:
    """Print a refusal as one line with the way out, or as one JSON object, and exit with
    status 1.
    """
    try:
        yield
    except InvalidInput as error:
        if as_json:
            print_json({"error": {"field": error.field, "reason": error.reason}})
            raise SystemExit(1) from None
        raise click.ClickException(f"{error}{_way_out(error)}") from None


def _way_out(error: InvalidInput) -> str:
    if MAY_BE_CHARGED not in error.reason:
        return ""
    options = "--even-if-charged, or of `void` --if-unpaid"
    return f" (`invoices resolve` says what became of it; see also {options})"


@invoices.command()
@click.argument("reference")
@by_option
@why_option
@json_option
def retry(reference: str, by: str, why: str, *, as_json: bool) -> None:
    """Charge an unpaid invoice now, or say which rule forbids it.

    REFERENCE is the invoice's or an attempt's. The command is refused while another attempt is in
    progress. The charge counts towards the card's network limits and uses no step of the retry
    schedule.

    \b
    Example:
      billing-worker invoices retry sub-1-p0 --by ann --why "customer called"
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings, decides=True) as store, _refusals_said(as_json=as_json):
        done = retry_invoice(
            store, SystemClock(), reference=reference, by=f"operator:{by}", why=why,
            timings=settings.timings,
        )  # fmt: skip
        follows = what_follows(store, settings, done["invoice"])
    if as_json:
        print_json(done | {"next": follows})
        return
    click.echo(f"{done['invoice']} is to be charged once more. {follows}")


@invoices.command("pay-link")
@click.argument("reference")
@click.option("--return-url", help="Where the customer returns to.")
@html_option
@json_option
def pay_link(reference: str, return_url: str | None, html: Path | None, *, as_json: bool) -> None:
    """Open a page on which the customer pays an open or uncollectible invoice with the card on file.

    If that card cannot be charged, the customer enters another one: it pays the subscription from then
    on. Nothing is charged automatically while the page is open. The same command again returns the same
    page.

    \b
    Example:
      billing-worker invoices pay-link sub-1-p0
    """
    record = {"invoice": reference, "return_url": return_url}
    hand_out_page(start_checkout, record, as_json=as_json, file=html)


@invoices.command()
@click.argument("reference")
@click.option("--paid/--not-paid", "paid", default=None, callback=chosen, help="What is known now.")
@click.option("--evidence", required=True, help="Source of the knowledge, for the history.")
@by_option
@why_option
@json_option
def resolve(reference: str, evidence: str, by: str, why: str, *, paid: bool, as_json: bool) -> None:
    """Record whether an attempt of unknown outcome was paid, with your own evidence.

    REFERENCE is the invoice's or the attempt's. The worker goes on polling the gateway, and a later
    answer of the gateway wins. After --not-paid nothing is charged automatically: `invoices retry`
    asks the gateway first.

    \b
    Example:
      billing-worker invoices resolve sub-1-p0 --paid --evidence mail-7 --why t-42
    """
    with open_ports() as (ports, settings), _refusals_said(as_json=as_json):
        done = resolve_unknown(
            ports, reference=reference, paid=paid, evidence=evidence, by=f"operator:{by}", why=why
        )
        follows = what_follows(ports.store, settings, done["invoice"])
    if as_json:
        print_json(done | {"next": follows})
        return
    click.echo(
        f"{done['attempt']}: {done['outcome']}, {done['attempt_status']}; "
        f"{done['invoice']} is {done['invoice_status']}."
    )
    click.echo(follows)


_EVEN_IF_CHARGED = click.option(
    "--even-if-charged",
    is_flag=True,
    help="Also while a charge is unknown: its money is then surplus.",
)


@invoices.command()
@click.argument("reference")
@_EVEN_IF_CHARGED
@click.option(
    "--if-unpaid",
    is_flag=True,
    help="During a charge: void it as soon as the charge ends unpaid.",
)
@by_option
@why_option
@json_option
def void(
    reference: str, by: str, why: str, *, even_if_charged: bool, if_unpaid: bool, as_json: bool
) -> None:
    """Void an invoice: it is owed no longer. No sale for it is sent after this command returns.

    The command is refused if the invoice is paid, or while the card may have been charged already.

    \b
    Example:
      billing-worker invoices void sub-1-p0 --by ann --why "billed by mistake"
    """
    if even_if_charged and if_unpaid:
        raise click.UsageError("Say --even-if-charged or --if-unpaid.")
    how = IfCharged.ALL_THE_SAME if even_if_charged else IfCharged.REFUSE
    how = IfCharged.IF_UNPAID if if_unpaid else how
    with open_store(settings_for(*config.DATABASE)) as store, _refusals_said(as_json=as_json):
        done = void_invoice(
            store, SystemClock(), reference=reference, by=f"operator:{by}", why=why, if_charged=how
        )
    _print_decided(done, as_json=as_json)


@invoices.command("mark-paid")
@click.argument("reference")
@click.option("--evidence", required=True, help="How it was paid, for the history.")
@_EVEN_IF_CHARGED
@by_option
@why_option
@json_option
def mark_as_paid(
    reference: str, evidence: str, by: str, why: str, *, even_if_charged: bool, as_json: bool
) -> None:
    """Record that an invoice was paid elsewhere, for example in cash or by bank transfer.

    No sale for it is sent after this command returns. It is refused while the card may have been
    charged already: use `invoices resolve` for a payment by card.

    \b
    Example:
      billing-worker invoices mark-paid sub-1-p0 --evidence transfer-99 --why t-42
    """
    how = IfCharged.ALL_THE_SAME if even_if_charged else IfCharged.REFUSE
    with (
        open_store(settings_for(*config.DATABASE), decides=True) as store,
        _refusals_said(as_json=as_json),
    ):
        done = mark_paid(
            store, SystemClock(), reference=reference, evidence=evidence, by=f"operator:{by}",
            why=why, if_charged=how,
        )  # fmt: skip
    _print_decided(done, as_json=as_json)


def _print_decided(done: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    reason = f" ({done['reason']})" if done["reason"] else ""
    click.echo(f"{done['invoice']}: {done['outcome']}, {done['status']}{reason}.")
    for attempt in done["withdrawn"]:
        click.echo(f"  withdrawn  {attempt}: nothing was sent for it")
