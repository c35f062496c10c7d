from __future__ import annotations

import json
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
    settings_for,
)
from billing_worker.entrypoints.cli.what_follows import charge_settings
from billing_worker.services.reports.question import explain_any

_SHOWN_OF_AN_ANSWER = 300


@click.command()
@click.argument("reference")
@click.option(
    "--at",
    metavar="DATE",
    help="Of a subscription or customer: on this day, or at this time with its UTC offset.",
)
@json_option
def explain(reference: str, *, at: str | None, as_json: bool) -> None:
    """Explain one thing: its state, why, what happens next, and every gateway call.

    REFERENCE is the reference of an invoice (sub-1-p0), an attempt (sub-1-p0-a1), a card page, a
    subscription or a customer, or the gateway's id (cgi_…). Of a subscription it says what was charged
    on a day, or why nothing was: the rule, who set it, since when, and what has to happen.

    \b
    Example:
      billing-worker explain sub-1 --at 2026-03-03
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store, store.reading() as connection:
        now = SystemClock().now()
        data = explain_any(connection, reference, now, charge_settings(settings), at=at)
    if data is None:
        raise click.ClickException(
            f"no invoice, attempt, card page, subscription, customer or gateway id {reference!r}"
        )
    if as_json:
        print_json(data)
    elif "subscriptions" in data:
        click.echo(f"{data['customer']}: {len(data['subscriptions'])} subscription(s)")
        for one in data["subscriptions"]:
            _print_why_not(one)
    elif "reasons" in data:
        _print_why_not(data)
    else:
        _print_one(data)


def _print_one(data: dict[str, Any]) -> None:
    if "invoice" in data:
        _print_invoice(data)
    else:
        click.echo(f"{data['card_page']}: {money_of(data)}, {data['fate']}")
        click.echo(f"  card page of customer {data['customer']}, {data['gateway_id'] or 'no id'}")
    click.echo(f"  why:  {data['why']}")
    click.echo(f"  next: {data['next']}")
    _print_history(data["history"])


def _print_why_not(data: dict[str, Any]) -> None:
    click.echo(f"{data['subscription']} of {data['customer']}, now {data['status']}")
    for one in data["attempts"]:
        click.echo(
            f"  charge at {one['at']}: {one['attempt']}, {money_of(one)}, {one['origin']}: "
            f"{one['became']}"
        )
    if not data["attempts"]:
        click.echo("  no charge was sent on that day")
    click.echo(f"  at {data['at']}:")
    for reason in data["reasons"]:
        click.echo(f"  {reason['about']}: {reason['why']}.")
        said = f" by {reason['by']}" if reason["by"] else ""
        since = f", since {reason['since']}" if reason["since"] else ""
        click.echo(f"    rule:   {reason['rule']}{said}{since} ({reason['source']})")
        click.echo(f"    needed: {reason['needed'] or 'nothing'}")


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
