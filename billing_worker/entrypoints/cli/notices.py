"""`billing-worker subscriptions notice-sent`."""

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
from billing_worker.services.notices.accepted import notice_sent
from billing_worker.services.subscriptions.terms import instant


@click.command("notice-sent")
@click.argument("reference_id")
@click.argument("period", type=int)
@click.argument("amount")
@click.argument("currency")
@click.option("--sent-at", default="", help="When, if not now, such as 2027-01-31T00:00:00Z.")
@by_option
@click.option("--why", help="Reason in the history.")
@json_option
def sent(
    reference_id: str,
    by: str,
    why: str | None,
    period: int,
    amount: str,
    currency: str,
    sent_at: str,
    *,
    as_json: bool,
) -> None:
    """Record that the customer was told of a coming charge: the number of its PERIOD, and its amount.

    \b
    Example:
      billing-worker subscriptions notice-sent sub-1 3 9.99 EUR
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings, decides=True) as store:
        try:
            done = notice_sent(
                store,
                SystemClock(),
                settings.notices,
                subscription=reference_id,
                period=period,
                amount=amount,
                currency=currency,
                sent_at=instant("sent_at", sent_at),
                by=f"operator:{by}",
                why=why,
            )
        except InvalidInput as error:
            if as_json:
                print_json({"error": {"field": error.field, "reason": error.reason}})
                raise SystemExit(1) from None
            raise click.ClickException(str(error)) from None
    if as_json:
        print_json(done)
        return
    charged = done["charged_from"]
    click.echo(f"{done['invoice']}: the customer was told at {done['accepted_at']}.")
    if charged:
        click.echo(f"It is charged at {charged} at the earliest.")
