from __future__ import annotations

import csv
import getpass
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress as Bar
from sqlalchemy import Row

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.subscription import OVER
from billing_worker.entrypoints.cli import bulk, lifecycle, notices
from billing_worker.entrypoints.cli.details import as_words
from billing_worker.entrypoints.cli.dunning import dunning
from billing_worker.entrypoints.cli.shared import (
    by_option,
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
    why_option,
)
from billing_worker.entrypoints.cli.vault_keys import open_vault
from billing_worker.entrypoints.import_files import csv_rows
from billing_worker.entrypoints.import_files.import_file import ImportReport, Progress, import_file
from billing_worker.persistence import subscriptions as stored
from billing_worker.persistence.book import identity
from billing_worker.persistence.rows import subscription_from
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.commands.moved_commands import done_lines
from billing_worker.services.import_records.export import leaving, why_left_out
from billing_worker.services.operators.vault import tokens_exported
from billing_worker.services.reports import status
from billing_worker.services.subscriptions import activate_imports
from billing_worker.services.subscriptions import hand_over as moving

SHOWN_FAULTS = 20
LIST_BATCH = 1_000


class _WithFormerNames(click.Group):
    """`arm` is what `activate` was called first: scripts may still say so."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, "activate" if cmd_name == "arm" else cmd_name)


@click.group(cls=_WithFormerNames)
def subscriptions() -> None:
    """Import, list, show and change subscriptions."""


for _command in (*lifecycle.LIFECYCLE_COMMANDS, bulk.redenominate, dunning, notices.sent):
    subscriptions.add_command(_command)


@subscriptions.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option(
    "--armed/--held",
    default=True,
    help="Held subscriptions are billed only after `subscriptions activate`.  [default: armed]",
)
@click.option(
    "--snap-paid-through",
    "snap",
    is_flag=True,
    help="Put a paid_through less than a day after a boundary on that boundary, not refuse it.",
)
@json_option
def import_(file: Path, *, dry_run: bool, armed: bool, snap: bool, as_json: bool) -> None:
    """Import subscriptions from JSON Lines, or from CSV if FILE ends in .csv.

    Idempotent by reference_id. Bad lines are reported with their number and field, the other lines
    are imported, and the exit status is then 1.

    \b
    Example:
      billing-worker subscriptions import customers.jsonl --dry-run
    """
    settings = settings_for(*config.DATABASE, *config.VAULT)
    with open_store(settings, decides=True) as store, _progress_bar(file) as progress:
        report = import_file(
            file,
            store,
            open_vault(settings, store),
            SystemClock(),
            by=f"import:{getpass.getuser()}",
            dry_run=dry_run,
            held=not armed,
            snap=snap,
            progress=progress,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report, dry_run=dry_run, snap=snap)
    if report.faults or report.still_held:
        raise SystemExit(1)


@contextmanager
def _progress_bar(file: Path) -> Iterator[Progress]:
    """Show a progress bar on stderr if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"importing {file.name}", total=file.stat().st_size)
        yield lambda done: bar.update(task, completed=done)


def _print_report(report: ImportReport, *, dry_run: bool, snap: bool) -> None:
    for fault in report.faults[:SHOWN_FAULTS]:
        where = f", {fault.field}" if fault.field else ""
        click.echo(f"line {fault.line}{where}: {fault.reason}", err=True)
    if len(report.faults) > SHOWN_FAULTS:
        click.echo(f"… and {len(report.faults) - SHOWN_FAULTS} more faults", err=True)
    verb = "would be added" if dry_run else "added"
    click.echo(
        f"{report.added} {verb}, {report.unchanged} unchanged, {report.bad_lines} line(s) refused."
    )
    if report.still_held:
        click.echo(
            f"{report.still_held} of them are held since their import, and not billed: "
            "`billing-worker subscriptions activate REFERENCE...`, or `activate --all`, lets them be.",
            err=True,
        )
    if report.to_be_cancelled:
        click.echo(
            f"{report.to_be_cancelled} of them are about to be cancelled: "
            "`billing-worker subscriptions uncancel REFERENCE` keeps one."
        )
    _print_likely_slips(report, snap=snap)
    if report.done_commands:
        click.echo(f"{report.done_commands} command(s) that another book has carried out.")
    for currency, total in report.totals().items():
        click.echo(f"  {total['count']} in {currency}, together {total['amount']} a period")


def _print_likely_slips(report: ImportReport, *, snap: bool) -> None:
    if report.near_boundary:
        done = "put on it" if snap else "refused; --snap-paid-through puts them on it"
        click.echo(
            f"{report.near_boundary} have a paid_through that just misses a boundary: {done}."
        )
    if report.due_at_once:
        click.echo(
            f"{report.due_at_once} would be due at once: their first period to be charged has begun."
        )
    if report.after_2100:
        click.echo(f"{report.after_2100} have a date after the year 2100.")


@subscriptions.command()
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
@click.option("--all", "everything", is_flag=True, help="All held subscriptions.")
@json_option
def activate(references: tuple[str, ...], *, everything: bool, as_json: bool) -> None:
    """Start billing subscriptions that were imported with --held. Also called `arm`.

    \b
    Example:
      billing-worker subscriptions activate sub-1 sub-2
    """
    if everything == bool(references):
        raise click.UsageError("give either references or --all")
    by = f"operator:{getpass.getuser()}"
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        if everything:
            result = activate_imports.activate_all(store, SystemClock(), by=by)
        else:
            result = activate_imports.arm(store, SystemClock(), references, by=by)
        with store.reading() as connection:
            due = stored.earliest_due(connection)
    if as_json:
        print_json(asdict(result) | {"next_due_at": due.isoformat() if due else None})
    else:
        for reference, reason in result.refused.items():
            click.echo(f"{reference}: {reason}", err=True)
        click.echo(f"{result.armed} activated. {_next_period(due)}")
    if result.refused:
        raise SystemExit(1)


def _next_period(due: datetime | None) -> str:
    if due is None:
        return "No period of any subscription becomes due."
    late = due <= SystemClock().now()
    how = "; what is late is decided by the catch-up policies (`catch-up plan`)" if late else ""
    return f"The next period of any subscription is due at {due.isoformat()}{how}."


@subscriptions.command()
@click.option(
    "--with-tokens", is_flag=True, help="Write card tokens in clear text: protect the file."
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="`import` reads CSV from a file that ends in .csv.",
)
@click.option(
    "--hand-over",
    is_flag=True,
    help="Another book continues these subscriptions: they are not billed here any more, and no new "
    "ones begin. Needs --with-tokens and --why. Open invoices are still collected here.",
)
@click.option("--why", help="With --hand-over: reason in the history.")
@by_option
def export(*, with_tokens: bool, format_: str, hand_over: bool, why: str | None, by: str) -> None:
    """Write every subscription that continues, in the format that `import` reads.

    Cards have no token without --with-tokens, and `import` refuses such records. Cancelled and ended
    subscriptions are left out. A suspended one cannot be written as a record: it is counted on
    stderr, and the exit status is then 1.

    With --hand-over each subscription stops here before it is written. The commands that were
    carried out here follow, so that the other book answers `unchanged` when they are sent again. An
    interrupted export is run again and writes the same. `subscriptions take-back` undoes it.

    \b
    Example:
      billing-worker subscriptions export --with-tokens > subscriptions.jsonl
    """
    if hand_over and not (with_tokens and why and format_ == "jsonl"):
        raise click.UsageError("--hand-over needs --with-tokens, --why, and JSON Lines")
    settings = settings_for(*config.DATABASE, *(config.VAULT if with_tokens else ()))
    write = _csv_writer(with_tokens=with_tokens) if format_ == "csv" else _write_json
    with open_store(settings, decides=hand_over) as store:
        vault = open_vault(settings, store) if with_tokens else None
        if with_tokens:
            tokens_exported(store, SystemClock(), by=f"operator:{by}", why=why)
        if hand_over and why:
            rows = moving.hand_over(store, SystemClock(), by=f"operator:{by}", why=why)
        else:
            rows = _every_whole_row(store)
        lost = _export(store, rows, vault, write, with_tokens=with_tokens)
        if hand_over:
            for line in done_lines(store):
                _write_json(line)
    if lost:
        raise SystemExit(1)


def _export(
    store: Store,
    rows: Iterator[Row[Any]],
    vault: FernetVault | None,
    write: Callable[[dict[str, Any]], bool],
    *,
    with_tokens: bool,
) -> bool:
    """Return whether a subscription was left out that is not over."""
    over: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with store.reading() as connection:
        here = identity.read(connection)
    for row in rows:
        subscription = subscription_from(row)
        if reason := why_left_out(subscription):
            # What is over is billed no more: it is left out without a loss.
            (over if reason in OVER else lost)[reason] += 1
        elif not write(leaving(row, vault, here).as_json(with_token=with_tokens)):
            lost["with a line end in its text: use --format jsonl"] += 1
    for reason, count in [*sorted(over.items()), *sorted(lost.items())]:
        click.echo(f"left out: {count} {reason}", err=True)
    return bool(lost)


@subscriptions.command("take-back")
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
@click.option("--all", "everything", is_flag=True, help="All of them; new ones may begin again.")
@click.option("--from-book", help="With --all: identity of the other book, from `check` there.")
@click.option("--from-prefix", help="With --all: what its references begin with, from `check`.")
@click.option("--unused", is_flag=True, help="With --all: the other book never got a command.")
@why_option
@by_option
@json_option
def take_back(
    references: tuple[str, ...],
    *,
    everything: bool,
    from_book: str | None,
    from_prefix: str | None,
    unused: bool,
    why: str,
    by: str,
    as_json: bool,
) -> None:
    """Bill again here what was handed over. First make sure that no other book bills it.

    What the other book has charged is looked for at the gateway first, and counts. Decisions that
    were made there have to be made again here: see docs/import.md, "Moving back".

    \b
    Example:
      billing-worker subscriptions take-back sub-1 --why "the move was called off"
    """
    if everything == bool(references):
        raise click.UsageError("give either references or --all")
    is_told = from_book is not None and from_prefix is not None
    if everything and is_told == unused:
        raise click.UsageError("--all needs either --from-book and --from-prefix, or --unused")
    other = identity.Other(from_book or "", from_prefix or "") if is_told else None
    named = None if everything else references
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            taken = moving.take_back(
                store, SystemClock(), named, by=f"operator:{by}", why=why, other=other
            )
        except InvalidInput as error:
            raise click.ClickException(error.reason) from None
    if as_json:
        print_json({"taken_back": taken})
    else:
        click.echo(f"{taken} taken back.")


def _write_json(record: dict[str, Any]) -> bool:
    click.echo(json.dumps(record, ensure_ascii=False))
    return True


def _csv_writer(*, with_tokens: bool) -> Callable[[dict[str, Any]], bool]:
    """Write the header. The returned function writes a record and returns why it cannot, or
    None.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(csv_rows.header_of(with_tokens=with_tokens))

    def write(record: dict[str, Any]) -> bool:
        row = csv_rows.row_of(record, with_tokens=with_tokens)
        if row is not None:
            writer.writerow(row)
        return row is not None

    return write


def _every_whole_row(store: Store) -> Iterator[Row[Any]]:
    """Yield rows batch by batch, each in a transaction of its own: a million rows in bounded
    memory.
    """
    last_id = 0
    while True:
        with store.reading() as connection:
            page = stored.whole_page(connection, last_id, LIST_BATCH)
        yield from page
        if not page:
            return
        last_id = page[-1].id


@subscriptions.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List all subscriptions in the order of their creation.

    \b
    Example:
      billing-worker subscriptions list --json
    """
    rows: list[dict[str, Any]] = []
    last_id = 0
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        while page := stored.listed(connection, last_id, LIST_BATCH):
            rows += [status.described(row) for row in page]
            last_id = page[-1].id
    if as_json:
        print_json(rows)
        return
    columns = ("reference_id", "status", "amount", "currency", "every", "next_billing_at")
    shown = [row | {"status": f"{row['status']}, held" if row["held"] else row["status"]}
             for row in rows]  # fmt: skip
    print_table("", columns, [[row[column] for column in columns] for row in shown])


@subscriptions.command()
@click.argument("reference_id")
@json_option
def show(reference_id: str, *, as_json: bool) -> None:
    """Show one subscription with its invoices and its history.

    \b
    Example:
      billing-worker subscriptions show sub-1
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        data = status.show(connection, reference_id)
    if data is None:
        raise click.ClickException(f"no subscription {reference_id!r}")
    if as_json:
        print_json(data)
        return
    for key, value in data.items():
        if key not in {"invoices", "history"}:
            click.echo(f"{key:16} {_shown(key, value)}")
    columns = ("reference_id", "start", "status", "reason", "next_attempt_at", "paid_at")
    rows = [[_minute(i[c]) if c in _MOMENTS else i[c] for c in columns] for i in data["invoices"]]
    print_table("Invoices (UTC)", columns, rows)
    for event in data["history"]:
        told = as_words(event["data"])
        click.echo(f"{event['at']}  {event['kind']} by {event['by']}  {told}")


_MOMENTS = {"start", "next_attempt_at", "paid_at"}


def _minute(moment: str | None) -> str | None:
    return moment and moment[:16].replace("T", " ")


def _shown(key: str, value: Any) -> str:
    if key == "card" and value is not None:
        return " ".join(filter(None, (value["mask"], value["brand"]))) or "on file, mask unknown"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
