from __future__ import annotations

import json
from typing import Any

import click

from billing_worker import config
from billing_worker.entrypoints.cli.shared import (
    as_words,
    json_option,
    money_of,
    open_store,
    print_json,
    settings_for,
)
from billing_worker.entrypoints.cli.what_follows import charge_settings
from billing_worker.services.reports import status as report

_SHOWN_OF_AN_ANSWER = 300


@click.command()
@click.argument("reference")
@json_option
def explain(reference: str, *, as_json: bool) -> None:
    """Explain one invoice or card page: its state, why, what happens next, and every gateway call.

    REFERENCE is the reference of an invoice (sub-1-p0), an attempt (sub-1-p0-a1) or a card page, or
    the gateway's id (cgi_…).

    \b
    Example:
      billing-worker explain sub-1-p0
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store, store.reading() as connection:
        data = report.explain(connection, reference, charge_settings(settings))
    if data is None:
        raise click.ClickException(f"no invoice, attempt, card page or gateway id {reference!r}")
    if as_json:
        print_json(data)
        return
    if "invoice" in data:
        _print_invoice(data)
    else:
        click.echo(f"{data['card_page']}: {money_of(data)}, {data['fate']}")
        click.echo(f"  card page of customer {data['customer']}, {data['gateway_id'] or 'no id'}")
    click.echo(f"  why:  {data['why']}")
    click.echo(f"  next: {data['next']}")
    _print_history(data["history"])


def _print_invoice(data: dict[str, Any]) -> None:
    period = data["period"]
    known = f", {data['known']}" if data["known"] else ""
    click.echo(f"{data['invoice']}: {money_of(data)}, {data['fate']}{known}")
    click.echo(f"  subscription {data['subscription']}, period {period['number']}")
    click.echo(f"  {period['start']} to {period['end']} ({period['timezone']})")
    if data["handed_over_at"]:
        click.echo(
            f"  another book bills the subscription since {data['handed_over_at']}; what was open "
            "then is collected here"
        )
    for attempt in data["surplus"]:
        click.echo(f"  SURPLUS: {attempt} took money that is not owed; give it back")


def _print_history(events: list[dict[str, Any]]) -> None:
    for event in events:
        told = as_words({k: v for k, v in event["data"].items() if k != "calls"})
        number = f" attempt {event['attempt']}" if event["attempt"] else ""
        alert = " ALERT" if event["alert"] else ""
        click.echo(f"{event['at']}  {event['kind']}{number} by {event['by']}{alert}  {told}")
        for call in event["data"].get("calls", ()):
            click.echo(f"    {call['at']}  {call['method']} {call['path']} -> {call['outcome']}"
                       f" in {call['duration_ms']} ms")  # fmt: skip
            if call["request"]:
                click.echo(f"      sent: {json.dumps(call['request'], ensure_ascii=False)}")
            if call["answer"]:
                click.echo(f"      got:  {_beginning(call['answer'])}")


def _beginning(answer: str) -> str:
    if len(answer) <= _SHOWN_OF_AN_ANSWER:
        return answer
    return answer[:_SHOWN_OF_AN_ANSWER] + " … (more with --json)"
