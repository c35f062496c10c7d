"""Prints a page on which a customer pays, for the two commands that open one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from billing_worker.domain.card_setup import Page
from billing_worker.domain.errors import BillingError
from billing_worker.entrypoints.cli.shared import print_json
from billing_worker.entrypoints.cli.worker_ports import open_ports
from billing_worker.entrypoints.web.addresses import CALLBACKS
from billing_worker.entrypoints.web.pay_form import render
from billing_worker.services.import_records.subscription import BadRecord
from billing_worker.services.ports import Ports

html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write an HTML file that sends a browser to the payment.",
)


def hand_out_page(
    start: Callable[[Ports, Mapping[str, Any]], dict[str, Any]],
    record: Mapping[str, Any],
    *,
    as_json: bool,
    file: Path | None,
) -> None:
    """Open the page and print its address. Exit with status 1 and the reason if there is none."""
    with open_ports() as (ports, settings):
        try:
            done = start(ports, {name: value for name, value in record.items() if value})
        except (BillingError, BadRecord) as error:
            if as_json:
                print_json({"error": {"kind": type(error).__name__, "reason": str(error)}})
                raise SystemExit(1) from None
            raise click.ClickException(str(error)) from None
    # The web process receives the callbacks, so pay pages are under the same public address.
    base = settings.callback_url.removesuffix(CALLBACKS)
    if base != settings.callback_url:
        done["pay_url"] = base + done["pay_path"]
    if file is not None:
        file.write_text(render(Page(done["action"], done["method"], done["params"])))
    if as_json:
        print_json(done)
        return
    click.echo(f"{done['reference_id']}: {done['amount']} {done['currency']}")
    click.echo(f"  send the customer to  {done.get('pay_url', done['pay_path'])}")
    click.echo(f"  or submit yourself    {done['method']} {done['action']} {done['params'] or ''}")
    if file is not None:
        click.echo(f"  or open               {file}")
