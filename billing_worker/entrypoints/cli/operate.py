"""Commands of the people who keep it running."""

from __future__ import annotations

import getpass
import json
from datetime import timedelta
from typing import Any

import click

from billing_worker import config
from billing_worker.bootstrap import build_outside
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints.cli.shared import (
    as_words,
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
    shown_url,
)
from billing_worker.persistence import switches
from billing_worker.services.kill_switch import switch
from billing_worker.services.reports import status as report

_SHOWN_OF_AN_ANSWER = 300


@click.command()
@json_option
def migrate(*, as_json: bool) -> None:
    """Bring the database to this version's schema. Safe to run again, and twice at once."""
    from billing_worker.persistence.schema.migrate import migrate as run  # noqa: PLC0415 - alembic is slow

    settings = settings_for(*config.DATABASE)
    with open_store(settings, migrated=False) as store:
        before, after = run(store)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"{shown_url(settings.database_url)} is already at {after}.")
    else:
        click.echo(f"{shown_url(settings.database_url)}: {before or 'empty'} -> {after}.")


@click.command()
@json_option
def check(*, as_json: bool) -> None:
    """Test every part that the worker needs; exit 1 if something is wrong with one of them.

    Database, schema, book, clock, standby, Redis, gateway, its look-up by reference, cardgate, vault
    keys, callbacks. Nothing is written and no
    money moves.
    """
    from billing_worker.entrypoints.checks import run_checks  # noqa: PLC0415 - needs the client

    settings = settings_for(*config.EVERYTHING)
    results = run_checks(settings)
    if as_json:
        print_json([{"part": r.part, "ok": r.ok, "details": r.details} for r in results])
    else:
        for result in results:
            click.echo(f"{'ok  ' if result.ok else 'FAIL'}  {result.part}: {result.details}")
    if not all(result.ok for result in results):
        raise SystemExit(1)


@click.command()
@json_option
def status(*, as_json: bool) -> None:
    """What was charged, what is open, what is unknown and for how long."""
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = report.status(connection, SystemClock().now())
    if as_json:
        print_json(data)
        return
    print_status(data)


def print_status(data: dict[str, Any]) -> None:
    print_table(
        "Invoices",
        ("fate", "count", "amount", "currency"),
        [(i["fate"], i["count"], i["amount"], i["currency"]) for i in data["invoices"]],
    )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(data["subscriptions"].items()))
    click.echo(f"Subscriptions: {counts or 'none'}. Next period due: {data['next_due_at'] or '-'}.")
    if data["unknown"]:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(data["unknown"].items()))
        age = timedelta(seconds=int(data["oldest_unknown_seconds"] or 0))
        click.echo(f"Unknown, the oldest for {age}: {kinds}. They are held, and asked about.")
    for page in data["card_pages"]:
        click.echo(f"Card pages, {page['fate']}: {page['count']}, {_money(page)}.")
    if data["waits_for_decisions_since"]:
        click.echo(
            "BOOKS FROM A BACKUP: nothing becomes due and nothing is sold since "
            f"{data['waits_for_decisions_since']}. Say again what was decided since the backup, "
            "with --decided-at, then `billing-worker sales start --restored --reason TEXT`."
        )
    elif not data["sales_on"]:
        click.echo(
            "SALES ARE STOPPED: `billing-worker sales start --reason TEXT` sends them again "
            "(with --restored, if the database is from a backup)."
        )
    handed = data["handed_over"]
    if handed["since"] or handed["subscriptions"]:
        since = f" since {handed['since']}: nothing new begins here" if handed["since"] else ""
        click.echo(
            f"HANDED OVER to another book{since}. {handed['subscriptions']} subscriptions are billed "
            f"there; {handed['open_invoices']} open invoices of theirs are still collected here."
        )
    if data["restored_at"]:
        click.echo(f"BOOKS RESTORED: what was due by {data['restored_at']} is looked for first.")
    for service, reason in data["paused_services"].items():
        click.echo(f"PAUSED {service}: {reason}. `sales start --service {service}` resumes it.")
    _print_surplus(data["surplus"])
    for alert in data["alerts"]:
        told = as_words(alert["data"])
        click.echo(f"ALERT {alert['at']} {alert['kind']} {alert['invoice'] or ''} {told}")


def _print_surplus(surplus: dict[str, Any]) -> None:
    for total in surplus["totals"]:
        click.echo(f"SURPLUS, to be given back: {total['count']}, {_money(total)}.")
    for one in surplus["attempts"]:
        click.echo(f"  {one['attempt']} ({one['gateway_id']}): {_money(one)}, since {one['at']}")


def _money(what: dict[str, Any]) -> str:
    return f"{what['amount']} {what['currency']}"


@click.command()
@click.argument("reference")
@json_option
def explain(reference: str, *, as_json: bool) -> None:
    """Explain one invoice or card page: why it is so, what happens next, and every wire call.

    REFERENCE is the invoice's (sub-1-p0), an attempt's (sub-1-p0-a1), a card page's, or the
    gateway's id (cgi_…).
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = report.explain(connection, reference)
    if data is None:
        raise click.ClickException(f"no invoice, attempt, card page or gateway id {reference!r}")
    if as_json:
        print_json(data)
        return
    if "invoice" in data:
        _print_invoice(data)
    else:
        click.echo(f"{data['card_page']}: {_money(data)}, {data['fate']}")
        click.echo(f"  card page of customer {data['customer']}, {data['gateway_id'] or 'no id'}")
    click.echo(f"  why:  {data['why']}")
    click.echo(f"  next: {data['next']}")
    _print_history(data["history"])


def _print_invoice(data: dict[str, Any]) -> None:
    period = data["period"]
    known = f", {data['known']}" if data["known"] else ""
    click.echo(f"{data['invoice']}: {_money(data)}, {data['fate']}{known}")
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


@click.command()
@click.argument("action", type=click.Choice(["stop", "start"]))
@click.option("--reason", required=True, help="Kept in the history.")
@click.option("--by", default=getpass.getuser, help="Who decides; default: the system user.")
@click.option("--service", help="Only this service, such as payment_card_usd_hpp.")
@click.option(
    "--restored",
    is_flag=True,
    help="The database is from a backup. With stop: nothing becomes due until what was decided "
    "since the backup has been said again. With start: it has been, and what was due by now is "
    "looked for at the gateway before it is created there.",
)
@click.option(
    "--moved",
    is_flag=True,
    help="With start: this database is a copy, and the original is gone. Implies --restored.",
)
@json_option
def sales(
    action: str,
    reason: str,
    by: str,
    service: str | None,
    *,
    restored: bool,
    moved: bool,
    as_json: bool,
) -> None:
    """Stop or start sending sales, everywhere. Once it returns, no further charge is armed.

    A service is paused by itself when the gateway refuses our configuration: start it again here
    once that is mended.
    """
    now = SystemClock().now()
    on = action == "start"
    restored = restored or moved
    if restored and service:
        raise click.UsageError("--restored and --moved are said of all services.")
    if moved and not on:
        raise click.UsageError("--moved is said with `start`.")
    who = f"operator:{by}"
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store:
        try:
            switch(
                store,
                on=on,
                service=service,
                by=who,
                reason=reason,
                now=now,
                restored=restored,
                moved=moved,
                outside=build_outside(settings),
            )
        except InvalidInput as error:
            raise click.ClickException(error.reason if not service else str(error)) from None
        with store.reading() as connection:
            switched = switches.read(connection)
    if as_json:
        said = {"on": on, "service": service, "reason": reason, "by": who, "restored": restored}
        print_json(said | {"moved": moved})
        return
    if service is not None:
        click.echo(f"{service} is {'resumed' if on else 'paused'}.")
    if restored and on:
        click.echo("What was due by now is looked for at the gateway before it is created there.")
    if restored and not on:
        click.echo("Nothing becomes due before `sales start --restored`.")
    sent = "Sales are sent." if switched.sales_on else "Sales are stopped: prepared charges wait."
    click.echo(sent)


@click.command("new-key")
def new_key() -> None:
    """Print a fresh key for BILLING_VAULT_KEYS."""
    from cryptography.fernet import Fernet  # noqa: PLC0415 - only here

    click.echo(Fernet.generate_key().decode())
