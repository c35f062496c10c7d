"""`billing-worker invoices retry | pay-link | resolve`."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.hand_out import hand_out_page, html_option
from billing_worker.entrypoints.cli.shared import (
    chosen,
    json_option,
    open_ports,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.services.hosted import start_checkout
from billing_worker.services.recover import retry_invoice
from billing_worker.services.resolve import resolve_unknown


@click.group()
def invoices() -> None:
    """What people do to one invoice."""


@contextmanager
def _refusals_said(*, as_json: bool) -> Iterator[None]:
    """A refusal is one line, or one JSON object, and exit status 1."""
    try:
        yield
    except InvalidInput as error:
        if as_json:
            print_json({"error": {"field": error.field, "reason": error.reason}})
            raise SystemExit(1) from None
        raise click.ClickException(str(error)) from None


@invoices.command()
@click.argument("reference")
@click.option("--by", default=getpass.getuser, help="Who decides; default: system user.")
@click.option("--why", required=True, help="Kept in the history.")
@json_option
def retry(reference: str, by: str, why: str, *, as_json: bool) -> None:
    """Charge an unpaid invoice now, by its reference or an attempt's, or say which rule forbids it.

    Refused while another attempt is under way. It counts towards the card's network limits, and
    takes no step of the recovery ladder.
    """
    with open_store(settings_for(*config.DATABASE)) as store, _refusals_said(as_json=as_json):
        done = retry_invoice(
            store, SystemClock(), reference=reference, by=f"operator:{by}", why=why
        )
    if as_json:
        print_json(done)
        return
    click.echo(f"{done['invoice']} is charged with the next sweep.")


@invoices.command("pay-link")
@click.argument("reference")
@click.option("--return-url", help="Where the customer comes back to.")
@html_option
@json_option
def pay_link(reference: str, return_url: str | None, html: Path | None, *, as_json: bool) -> None:
    """Open a page on which the customer pays an open invoice with the card on file.

    While it is open nothing is charged automatically; the same again returns the same page.
    """
    record = {"invoice": reference, "return_url": return_url}
    hand_out_page(start_checkout, record, as_json=as_json, file=html)


@invoices.command()
@click.argument("reference")
@click.option("--paid/--not-paid", "paid", default=None, callback=chosen, help="What is known now.")
@click.option("--evidence", required=True, help="Where it is known from. Kept in the history.")
@click.option("--by", default=getpass.getuser, help="Who decides; default: system user.")
@click.option("--why", required=True, help="Kept in the history.")
@json_option
def resolve(reference: str, evidence: str, by: str, why: str, *, paid: bool, as_json: bool) -> None:
    """Say whether an attempt of unknown outcome was paid, from evidence of your own.

    REFERENCE is the invoice's or the attempt's. The gateway goes on being asked, and its later word
    wins. After --not-paid nothing is charged by itself: `invoices retry` asks the gateway first.
    """
    with open_ports() as (ports, _), _refusals_said(as_json=as_json):
        done = resolve_unknown(
            ports, reference=reference, paid=paid, evidence=evidence, by=f"operator:{by}", why=why
        )
    if as_json:
        print_json(done)
        return
    click.echo(
        f"{done['attempt']}: {done['outcome']}, {done['attempt_status']}; "
        f"{done['invoice']} is {done['invoice_status']}."
    )
    if done["invoice_status"] == "open" and done["attempt_status"] == "not_charged":
        click.echo(f"Nothing is charged by itself: `invoices retry {done['invoice']}` does, "
                   f"`invoices void {done['invoice']}` ends it.")  # fmt: skip
