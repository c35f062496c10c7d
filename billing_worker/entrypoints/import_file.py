"""Import files, JSON Lines or CSV, read line by line in bounded memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from billing_worker.clock import Clock
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Vault
from billing_worker.services.records import BadRecord, SubscriptionRecord, parse_record
from billing_worker.services.subscribe import subscribe

BATCH = 500
KEPT_FAULTS = 1_000
"""A file of the wrong kind has a fault a line; nobody reads more than these."""


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

    def refuse(self, line: int, faults: list[tuple[str, str]]) -> None:
        self.bad_lines += 1
        room = KEPT_FAULTS - len(self.faults)
        self.faults += [LineFault(line, name, reason) for name, reason in faults[:room]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_file(
    path: Path, store: Store, vault: Vault, clock: Clock, *, by: str, dry_run: bool
) -> ImportReport:
    """Import every good line, in committed batches; the report names the bad ones."""
    report = ImportReport()
    lines = _csv_lines(path) if path.suffix.lower() == ".csv" else _json_lines(path)
    records = _parsed(lines, report)
    while batch := list(islice(records, BATCH)):
        done = subscribe(
            store, vault, clock, [record for _, record in batch], by=by, dry_run=dry_run
        )
        for (line, _), outcome in zip(batch, done.outcomes, strict=True):
            if outcome == "conflict":
                report.refuse(line, [("reference_id", "is already used by a different record.")])
            elif outcome == "added":
                report.added += 1
            else:
                report.unchanged += 1
    report.faults.sort(key=lambda fault: fault.line)
    return report


_Line = tuple[int, Any, str | None]  # number, raw record, or why it cannot be read


def _parsed(
    lines: Iterator[_Line], report: ImportReport
) -> Iterator[tuple[int, SubscriptionRecord]]:
    for number, raw, trouble in lines:
        if trouble is not None:
            report.refuse(number, [("", trouble)])
            continue
        try:
            yield number, parse_record(raw)
        except BadRecord as error:
            report.refuse(number, [(fault.field, fault.reason) for fault in error.faults])


def _json_lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), None
            except (ValueError, RecursionError) as error:
                yield number, None, f"is not JSON: {error}"


_NUMBERS = frozenset(
    {
        "interval_count",
        "ends_after_periods",
        "card.expiry_month",
        "card.expiry_year",
    }
)


def _csv_lines(path: Path) -> Iterator[_Line]:
    """Columns are the record's fields, nested ones dotted (`card.token`); empty means absent."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, *_unflattened(row)
        except (csv.Error, UnicodeDecodeError) as error:
            yield reader.line_num + 1, None, f"is not CSV: {error}"


def _unflattened(row: dict[str | Any, Any]) -> tuple[Any, str | None]:
    record: dict[str, Any] = {}
    if None in row:
        return None, "has more cells than the header."
    for name, text in row.items():
        if text is None or text == "":
            continue
        try:
            value = _cell(name, text)
        except ValueError as error:
            return None, f"{name}: {error}"
        inner = record
        *parents, leaf = name.split(".")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return record, None


def _cell(name: str, text: str) -> Any:
    if name in _NUMBERS and text.lstrip("-").isdigit():
        return int(text)
    if name == "metadata":
        return json.loads(text)
    return text
