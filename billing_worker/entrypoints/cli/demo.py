"""`billing-worker demo`: a real worker and beat bill 60 subscriptions of every outcome, and the
books are compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from billing_worker.clock import SystemClock
from billing_worker.config import load
from billing_worker.entrypoints.cli.shared import json_option, print_json, print_table
from billing_worker.entrypoints.local.stack import LocalStack
from billing_worker.persistence import invoices
from billing_worker.persistence.book import identity
from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.reports import status as report
from billing_worker.services.reports.wording import Fate
from billing_worker.services.subscriptions.subscribe import subscribe

CAST: Mapping[str, int] = {
    "approved": 34,
    "approved_later": 4,
    "decline_insufficient_funds": 4,
    "decline_card_expired": 2,
    "answer_lost_after": 4,
    "never_answers_after": 2,
    "html_502_after": 2,
    "answer_lost_before": 2,
    "pending_forever": 2,
    "wrong_amount": 2,
    "": 2,  # no card
}
"""Number of subscriptions by sandbox outcome: 60 in all."""

QUICK = {
    "BILLING_RENEW_EVERY_SECONDS": "1",
    "BILLING_RECONCILE_EVERY_SECONDS": "1",
    "BILLING_RECONCILE_AFTER_SECONDS": "1",
    "BILLING_GATEWAY_TIMEOUT_SECONDS": "2",
}
"""The demo's short waiting times: the defaults are made for a real gateway."""

MAY_STAY_OPEN = ("answer_lost_before", "pending_forever")
"""The gateway never decides these during the demo: unknown is the right state."""

LONGEST_SECONDS = 18
LATER_SECONDS = 3.0


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="For the database and the logs; default: a new temporary folder.",
)
@json_option
def demo(folder: Path | None, *, as_json: bool) -> None:
    """Bill 60 sample subscriptions on this machine. Then compare the books with the gateway's.

    BILLING_* settings are ignored. Exit status 1 if the books and the gateway's ledger differ, or
    if an outcome that the gateway decides is still open after the time limit.

    \b
    Example:
      billing-worker demo
    """
    folder = (folder or Path(tempfile.mkdtemp(prefix="billing-demo-"))).absolute()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("BILLING_")} | QUICK
    behaviour = Behaviour(later_seconds=LATER_SECONDS, second_sale="charge")
    started = time.monotonic()
    with LocalStack(folder, environ, behaviour=behaviour) as stack:
        if (folder / "billing.db").exists():
            raise click.ClickException(
                f"there are books in {folder} already: `up --folder {folder}` keeps them running, "
                "the demo needs an empty folder"
            )
        store = Store(stack.environ["BILLING_DATABASE_URL"])
        migrate(store)
        _subscribe_all(store, stack)
        stack.start_worker_and_beat()
        assert stack.sandbox is not None  # noqa: S101 - no gateway URL was passed; tells mypy
        settled = _watch(store, stack, quiet=as_json)
        result = _compare(store, stack.sandbox)
        result |= {"settled": settled, "seconds": round(time.monotonic() - started, 1)}
        result["folder"] = str(folder)
    store.close()
    if as_json:
        print_json(result)
    else:
        _print(result)
    if result["charged_twice"] or result["lost"] or not settled:
        raise SystemExit(1)


def _cast() -> list[str]:
    """Return the outcomes of demo-01, demo-02 …"""
    return [outcome for outcome, count in CAST.items() for _ in range(count)]


def _invoices() -> list[str]:
    return [f"demo-{number:02}-p0" for number in range(1, sum(CAST.values()) + 1)]


def _subscribe_all(store: Store, stack: LocalStack) -> None:
    now = SystemClock().now()
    anchor = (now - timedelta(minutes=1)).isoformat()
    records = [
        parse_record(
            {
                "reference_id": f"demo-{number:02}",
                "customer": {"reference_id": f"customer-{number:02}", "name": "Demo Customer"},
                "card": {"token": f"{outcome}.{number}", "mask": "512381******0000"}
                if outcome
                else None,
                "amount": f"{5 + number % 7}.99",
                "currency": ("USD", "EUR")[number % 2],
                "interval": "month",
                "anchor_at": anchor,
                "description": outcome or "no card",
            }
        )
        for number, outcome in enumerate(_cast(), start=1)
    ]
    vault = FernetVault(load(stack.environ).vault_keys)
    subscribe(store, vault, SystemClock(), records, by="demo")


def _watch(store: Store, stack: LocalStack, *, quiet: bool) -> bool:
    """Show progress until everything that can be decided is decided. Return False if that takes too
    long.
    """
    decided_in_the_end = sum(
        count for outcome, count in CAST.items() if outcome not in MAY_STAY_OPEN
    )
    console = Console(quiet=quiet)
    with Progress(console=console, transient=not console.is_terminal) as progress:
        bar = progress.add_task("billing 60 subscriptions", total=decided_in_the_end)
        for _ in range(LONGEST_SECONDS * 5):
            decided = _decided(store)
            progress.update(bar, completed=decided)
            if decided >= decided_in_the_end:
                return True
            if ended := stack.ended_children():
                raise click.ClickException(stack.told(ended))
            time.sleep(0.2)
    return False


def _decided(store: Store) -> int:
    """Count invoices that are closed, whose newest attempt has ended, or that wait without one."""
    with store.reading() as connection:
        return sum(
            row.invoices
            for row in invoices.summary(connection)
            if row.status != "open"
            or row.attempt_status not in {None, "prepared", "submitted"}
            or (row.attempt_status is None and row.waits)
        )


def _compare(store: Store, sandbox: SandboxGateway) -> dict[str, Any]:
    """Compare the books with the gateway's own ledger of money moved."""
    with store.reading() as connection:
        status = report.status(connection, SystemClock().now())
        explained = [report.explain(connection, invoice) for invoice in _invoices()]
        prefix = identity.read(connection).prefix
    may_stay_open = {
        invoice
        for invoice, outcome in zip(_invoices(), _cast(), strict=True)
        if outcome in MAY_STAY_OPEN
    }
    ours = [debit.reference_id.removeprefix(prefix) for debit in sandbox.ledger]
    debits = Counter(reference.rpartition("-a")[0] for reference in ours)
    books = {item["invoice"]: item["fate"] for item in explained if item}
    return {
        "invoices": status["invoices"],
        "charged_twice": sum(1 for count in debits.values() if count > 1),
        "lost": sum(1 for item in explained if item is None)
        + sum(1 for invoice, fate in books.items() if fate == "paid" and not debits[invoice])
        + sum(1 for invoice in debits if books.get(invoice) not in {"paid", "unknown"}),
        "debits": debits.total(),
        "paid": sum(1 for fate in books.values() if fate == "paid"),
        "unknown": sorted(invoice for invoice, fate in books.items() if fate == Fate.UNKNOWN),
        "not_settled": sorted(
            invoice
            for invoice, fate in books.items()
            if invoice not in may_stay_open and fate in {Fate.UNKNOWN, Fate.IN_FLIGHT}
        )
        + [
            invoice
            for invoice, item in zip(_invoices(), explained, strict=True)
            if item is None or (not item["attempts"] and item["fate"] == Fate.DATED)
        ],
        "unknown_seconds": status["oldest_unknown_seconds"],
    }


def _print(result: dict[str, Any]) -> None:
    print_table(
        "What became of 60 subscriptions",
        ("fate", "count", "amount", "currency"),
        [(i["fate"], i["count"], i["amount"], i["currency"]) for i in result["invoices"]],
    )
    unknown = result["unknown"]
    click.echo(
        f"Sandbox ledger: {result['debits']} debits; our books: {result['paid']} paid. "
        f"Charged twice: {result['charged_twice']}, lost: {result['lost']}."
    )
    if unknown:
        click.echo(
            f"Unknown for {result['unknown_seconds']:.0f} s, and held until the gateway speaks: "
            + ", ".join(unknown)
        )
    us = Path(sys.argv[0])
    if not result["settled"]:
        late = result["not_settled"]
        click.echo(
            f"NOT SETTLED within {LONGEST_SECONDS} s, a slow machine or a fault: {len(late)} still "
            f"open: {', '.join(late) or '-'}. Look with `{us} explain {late[0] if late else 'REF'}`, "
            f"in {result['folder']}/worker.log and beat.log; `{us} up` below goes on with them."
        )
    click.echo(f"Finished in {result['seconds']} s. Look around next:")
    click.echo(f"  export BILLING_DATABASE_URL=sqlite:///{result['folder']}/billing.db")
    click.echo(f"  {us} status")
    click.echo(f"  {us} explain demo-45-p0     # an answer that was lost, and found")
    click.echo(f"  {us} subscriptions show demo-39")
    click.echo(f"  {us} up --folder {result['folder']}  # kept running, with a new sandbox")
