"""Reads import files, JSON Lines or CSV, line by line in bounded memory."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from billing_worker.clock import Clock
from billing_worker.domain.card import fingerprint
from billing_worker.domain.money import Money
from billing_worker.entrypoints import unique_json
from billing_worker.entrypoints.import_files.csv_rows import Line, read_lines
from billing_worker.persistence.customers import FOREIGN_CARD
from billing_worker.persistence.store import Store
from billing_worker.services.commands.moved_commands import is_done_command, parse_done, remember
from billing_worker.services.import_records.export import Difference, differences_shown
from billing_worker.services.import_records.subscription import (
    BadRecord,
    SubscriptionRecord,
    parse_record,
)
from billing_worker.services.ports import Vault
from billing_worker.services.subscriptions.subscribe import (
    FOREIGN,
    Standing,
    Subscribed,
    subscribe,
)

IMPORT_BATCH = 500
LONGEST_LINE = 1_048_576
"""Bytes. Without a limit a file without line ends is read whole."""

KEPT_FAULTS = 1_000
"""A file of the wrong kind has a fault in every line; the report keeps these."""

COUNTED = (
    "done_commands", "still_held", "to_be_cancelled", "near_boundary", "due_at_once", "after_2100",
)  # fmt: skip
"""What a report mentions only where there is any."""

LAST_LIKELY_YEAR = 2100

Progress = Callable[[int], None]
"""Receives the number of bytes read so far."""


@dataclass(frozen=True, slots=True)
class LineFault:
    line: int
    field: str
    reason: str


@dataclass(slots=True)
class ImportReport:
    added: int = 0
    unchanged: int = 0
    bad_lines: int = 0
    faults: list[LineFault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of what was added, by currency
    sums: Counter[str] = field(default_factory=Counter)  # minor units a period, by currency
    done_commands: int = 0  # lines that say what another book has carried out
    still_held: int = 0  # asked to be billed, and held since an earlier import
    to_be_cancelled: int = 0  # asked to be billed, and about to be cancelled
    near_boundary: int = 0  # `paid_through` just misses a boundary: refused, or put on it
    due_at_once: int = 0  # new, and the first period to be charged began before now
    after_2100: int = 0  # new, and with a date that far away

    def refuse(self, line: int, faults: Sequence[tuple[str, str]]) -> None:
        self.bad_lines += 1
        room = KEPT_FAULTS - len(self.faults)
        self.faults += [LineFault(line, name, reason) for name, reason in faults[:room]]

    def add(self, money: Money) -> None:
        self.added += 1
        self.counts[money.currency] += 1
        self.sums[money.currency] += money.minor

    def keep(self, record: SubscriptionRecord, standing: Standing | None, *, held: bool) -> None:
        """Count a record that changes nothing, and what keeps it from being billed."""
        self.unchanged += 1
        if standing is not None:
            wanted = not held and not record.state.held
            self.still_held += standing.held and wanted
            self.to_be_cancelled += standing.cancels_at != record.state.cancels_at

    def look_at(self, record: SubscriptionRecord, now: datetime, *, held: bool) -> None:
        """Count what is allowed in a new record, and may be a slip all the same."""
        dates = (record.starts_at, record.paid_through, record.ends_at)
        self.after_2100 += any(at is not None and at.year > LAST_LIKELY_YEAR for at in dates)
        waits = held or record.state.held or record.state.paused_at is not None or record.is_over
        self.due_at_once += record.starts_at < now and not waits

    def totals(self) -> dict[str, dict[str, Any]]:
        """Return totals of what was added: {"USD": {"count": 2, "amount": "19.98"}}."""
        return {
            currency: {"count": count, "amount": f"{Money(self.sums[currency], currency).amount:f}"}
            for currency, count in sorted(self.counts.items())
        }

    def as_dict(self) -> dict[str, Any]:
        shown = asdict(self)
        del shown["counts"], shown["sums"]
        for name in COUNTED:
            if not shown[name]:
                del shown[name]
        return shown | ({"totals": self.totals()} if self.added else {})


def import_file(
    path: Path,
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    by: str,
    dry_run: bool,
    held: bool = False,
    snap: bool = False,
    progress: Progress = lambda _: None,
) -> ImportReport:
    """Import every good line in committed batches. The report names the bad ones.

    An interrupted import is run again: committed lines are then `unchanged`. `snap` puts a
    `paid_through` that just misses a boundary on it. A dry run also counts what is likely a slip.
    """
    report = ImportReport()
    with path.open("rb") as file, closing(_EarlierLines(needed=dry_run)) as earlier:
        lines = read_lines(file) if path.suffix.lower() == ".csv" else _json_lines(file)
        lines = _but_done_commands(lines, report, store, dry_run=dry_run)
        batches = _batches(_parsed(lines, report, snap=snap))
        write = partial(_write, store, vault, clock, by=by, dry_run=dry_run, held=held)
        for batch, done in _written_meanwhile(batches, write):
            for position, (line, record) in enumerate(batch):
                outcome, conflict = earlier.judged(
                    record, done.outcomes[position], done.conflicts.get(position, ())
                )
                if (refused := done.refused.get(position)) is not None:
                    report.near_boundary += refused.field == "paid_through"
                    report.refuse(line, [(refused.field, f"{refused.reason}.")])
                    continue
                if outcome == "added" and dry_run:
                    report.look_at(record, clock.now(), held=held)
                if outcome == "unchanged":
                    report.keep(record, done.standing.get(position), held=held)
                else:
                    _account(report, line, record, outcome, conflict)
            progress(file.tell())
    report.faults.sort(key=lambda fault: fault.line)
    return report


_Batch = list[tuple[int, SubscriptionRecord]]  # each with its line number


def _batches(records: Iterator[tuple[int, SubscriptionRecord]]) -> Iterator[_Batch]:
    while batch := list(islice(records, IMPORT_BATCH)):
        yield batch


def _write(store: Store, vault: Vault, clock: Clock, batch: _Batch, **how: Any) -> Subscribed:
    return subscribe(store, vault, clock, [record for _, record in batch], **how)


def _written_meanwhile(
    batches: Iterator[_Batch], write: Callable[[_Batch], Subscribed]
) -> Iterator[tuple[_Batch, Subscribed]]:
    """Yield each batch with its results, in order. The next one is read while one is written."""
    with ThreadPoolExecutor(max_workers=1) as writer:
        before: tuple[_Batch, Future[Subscribed]] | None = None
        for batch in batches:
            writing = (batch, writer.submit(write, batch))
            if before is not None:
                yield before[0], before[1].result()
            before = writing
        if before is not None:
            yield before[0], before[1].result()


def _account(
    report: ImportReport,
    line: int,
    record: SubscriptionRecord,
    outcome: str,
    conflict: Sequence[Difference],
) -> None:
    if outcome == "added":
        report.add(record.money)
    elif outcome == FOREIGN:
        report.refuse(line, [("card.token", f"{FOREIGN_CARD}.")])
    else:
        taken = ("reference_id", "is already used by a different record.")
        both = [(d.field, f"stored {d.stored!r}, in the file {d.given!r}.") for d in conflict]
        report.refuse(line, [taken, *both])


class _EarlierLines:
    """The lines that a dry run would have added. A dry run stores nothing, so later lines are
    compared with these.

    Kept in a temporary SQLite file, because a million records do not fit bounded memory. It holds
    no card tokens.
    """

    def __init__(self, *, needed: bool) -> None:
        self._needed = needed
        self._lines = sqlite3.connect("")
        self._lines.execute(
            "CREATE TABLE lines (reference_id TEXT PRIMARY KEY, digest TEXT, card TEXT, shown TEXT)"
        )
        self._lines.execute("CREATE TABLE owners (card TEXT PRIMARY KEY, customer TEXT)")

    def judged(
        self, record: SubscriptionRecord, outcome: str, conflict: Sequence[Difference]
    ) -> tuple[str, Sequence[Difference]]:
        """Return outcome and differences as if earlier lines had been written."""
        if not self._needed or outcome != "added":
            return outcome, conflict
        card = fingerprint(record.card.token) if record.card else None
        shown = record.as_json(with_token=False)
        query = "SELECT digest, card, shown FROM lines WHERE reference_id = ?"
        earlier = self._lines.execute(query, (record.reference_id,)).fetchone()
        if earlier is None:
            if card is not None and self._owner(card, record) != record.customer.reference_id:
                return FOREIGN, ()
            row = (record.reference_id, record.digest, card, json.dumps(shown))
            self._lines.execute("INSERT INTO lines VALUES (?, ?, ?, ?)", row)
            return outcome, conflict
        if earlier[0] == record.digest:
            return "unchanged", ()
        return "conflict", differences_shown(
            json.loads(earlier[2]),
            shown,
            other_card=card is not None and earlier[1] not in {None, card},
        )

    def _owner(self, card: str, record: SubscriptionRecord) -> str:
        """Return the customer of the first line with this card."""
        row = (card, record.customer.reference_id)
        self._lines.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", row)
        query = "SELECT customer FROM owners WHERE card = ?"
        return str(self._lines.execute(query, (card,)).fetchone()[0])

    def close(self) -> None:
        self._lines.close()


def _parsed(
    lines: Iterator[Line], report: ImportReport, *, snap: bool
) -> Iterator[tuple[int, SubscriptionRecord]]:
    for number, raw, faults in lines:
        if faults:
            report.refuse(number, faults)
            continue
        try:
            record = parse_record(raw)
        except BadRecord as error:
            report.refuse(number, [(fault.field, fault.reason) for fault in error.faults])
            continue
        meant = record.snapped() if snap else record
        report.near_boundary += meant is not record
        yield number, meant


def _but_done_commands(
    lines: Iterator[Line], report: ImportReport, store: Store, *, dry_run: bool
) -> Iterator[Line]:
    """Yield all lines but commands of another book, which are recorded on the way."""
    done: list[dict[str, Any]] = []

    def write() -> None:
        if not dry_run:
            remember(store, done)
        report.done_commands += len(done)
        done.clear()

    for number, raw, faults in lines:
        if faults or not is_done_command(raw):
            yield number, raw, faults
            continue
        try:
            done.append(parse_done(raw))
        except BadRecord as error:
            report.refuse(number, [(fault.field, fault.reason) for fault in error.faults])
        if len(done) == IMPORT_BATCH:
            write()
    write()


def _json_lines(file: IO[bytes]) -> Iterator[Line]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            _skip_to_line_end(file)
            yield number, None, [("", f"is longer than {LONGEST_LINE} bytes.")]
        elif line.strip():
            try:
                yield number, unique_json.loads(line), ()
            except (ValueError, RecursionError) as error:
                yield number, None, [("", f"is not JSON: {error}")]


def _skip_to_line_end(file: IO[bytes]) -> None:
    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass
