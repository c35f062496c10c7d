"""`billing-worker customers update`."""

from __future__ import annotations

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.services.customers import update_customer


@click.group()
def customers() -> None:
    """Change what is known of customers."""


@customers.command()
@click.argument("customer")
@click.option("--name", help="Empty text removes it.")
@click.option("--email", help="Empty text removes it.")
@by_option
@click.option("--why", help="Reason in the history.")
@json_option
def update(
    customer: str, name: str | None, email: str | None, by: str, why: str | None, *, as_json: bool
) -> None:
    """Give a customer another name or e-mail: the gateway is told it with the next charge.

    \b
    Example:
      billing-worker customers update cust-1 --email jo@example.com
    """
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            done = update_customer(
                store, SystemClock(), customer=customer, name=name, email=email,
                by=f"operator:{by}", why=why,
            )  # fmt: skip
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        print_json(done)
        return
    fields = f": {', '.join(done['fields'])}" if done["fields"] else ""
    click.echo(f"{customer}: {done['outcome']}{fields}.")
