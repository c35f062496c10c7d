"""Import records as rows of CSV: one column per field, nested fields with a dot, empty cells
absent.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from marshmallow import Schema, fields

from billing_worker.entrypoints import unique_json
from billing_worker.gateway.redaction import legible
from billing_worker.services.import_records.subscription import RecordSchema

LONGEST_RECORD = 200_000
"""Characters. Without a limit an unclosed quote reads the rest of the file."""

WITHHELD = "card.token_withheld"
"""Not a field of a record. An import of an export without tokens is refused row by row, so that no
subscription is added without its card.
"""

Line = tuple[int, Any, Sequence[tuple[str, str]]]
"""Line number, raw record, and its faults: (field, reason)."""

_Record = tuple[int, list[str], Sequence[tuple[str, str]]]
"""The same with cells instead of a record."""


def _fields_of(schema: Schema, parent: str = "") -> Iterator[tuple[str, fields.Field[Any]]]:
    for name, field in schema.fields.items():
        if isinstance(field, fields.Nested):
            yield from _fields_of(field.schema, f"{parent}{name}.")
        else:
            yield parent + name, field


_FIELDS = dict(_fields_of(RecordSchema()))
RECORD_COLUMNS = tuple(_FIELDS)


# --- in --------------------------------------------------------------------------------------


def read_lines(file: IO[bytes]) -> Iterator[Line]:
    """Yield every row with its faults. A file that cannot be split into rows is refused whole.

    A cell never continues over a line end. Otherwise, with one quote too many, the following lines
    are read as part of a cell, and later lines as rows that nobody wrote.
    """
    # Invalid UTF-8 becomes lone surrogates, so that only its own line is refused.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _rows(_Source(text))
    finally:
        text.detach()  # The caller closes the file.


class _Source:
    """Lines for the CSV reader. Knows where the present record begins and how long it is."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.number = 0
        self.begun = 1
        self.length = 0
        self.line = ""

    def begin(self) -> None:
        self.begun, self.length = self.number + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_RECORD)
        if not line:
            raise StopIteration
        self.number += 1
        self.line = line
        self.length += len(line)
        if self.length >= LONGEST_RECORD:
            raise _TooLongError
        return line

    def refused(self, reason: str) -> Iterator[_Record]:
        yield self.begun, [], [("", reason)]
        for number in range(self.begun + 1, self.number + 1):
            yield number, [], [("", f"is not read: it belongs to line {self.begun}.")]


class _TooLongError(Exception):
    pass


def _rows(source: _Source) -> Iterator[Line]:
    records = _records(source)
    for number, header, unreadable in records:
        if faults := [*unreadable, *_faults_of_header(header)]:
            yield number, None, [*faults, ("", "is the header: nothing more is read.")]
            return
        break
    else:
        return
    for number, cells, bad in records:
        if bad:
            yield number, None, bad
        else:
            yield number, *_record(header, cells, complete=source.line.endswith(("\n", "\r")))


def _records(source: _Source) -> Iterator[_Record]:
    reader = csv.reader(source, strict=True)
    while True:
        source.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            further = "nor is the file read further."
            yield from source.refused(f"is longer than {LONGEST_RECORD} characters, {further}")
            return
        except csv.Error as error:
            yield from source.refused(f"is not CSV: {_in_words(error)}")
            if source.length > csv.field_size_limit():
                yield source.number, [], [("", "the file is not read further.")]
                return  # The reader may be in the middle of a cell.
            continue
        if source.number > source.begun:
            yield from source.refused(f"has a line end within a cell, up to line {source.number}.")
        elif cells:
            yield source.begun, cells, ()


def _in_words(error: csv.Error) -> str:
    if str(error) == "unexpected end of data":
        return "a quote is opened and never closed."
    return f"{error}."


def _faults_of_header(header: Sequence[str]) -> list[tuple[str, str]]:
    faults = [
        (legible(name), f"is a column {count} times.")
        for name, count in Counter(header).items()
        if count > 1
    ]
    names = set(header)
    for name in sorted(names):
        parts = name.split(".")
        parents = {".".join(parts[:n]) for n in range(1, len(parts))}
        faults += [
            (legible(name), f"is a column, and so is {legible(parent)}.")
            for parent in sorted(parents & names)
        ]
    return faults


def _record(
    header: Sequence[str], cells: Sequence[str], *, complete: bool
) -> tuple[Any, list[tuple[str, str]]]:
    if len(cells) != len(header):
        missing = legible(header[len(cells)]) if len(cells) < len(header) else ""
        return None, [(missing, f"has {len(cells)} cells, and the header {len(header)}.")]
    if not complete and cells[-1] == "":
        # A missing column may be the one that prevents a second charge.
        reason = "is empty, and no line end follows: the file may have been cut off here."
        return None, [(legible(header[-1]), reason)]
    record: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for name, text in zip(header, cells, strict=True):
        if text == "":
            continue
        try:
            _put(record, name, _value(name, text))
        except (ValueError, RecursionError) as error:
            faults.append((legible(name), _reason(error)))
    return (None if faults else record), faults


def _put(record: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        record = record.setdefault(parent, {})
    record[leaf] = value


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "is not UTF-8 text."
    return f"is not readable: {error}."


def _value(name: str, text: str) -> Any:
    """Return the cell's value. Raises ValueError or RecursionError. The record's schema judges the
    rest.
    """
    text.encode()
    field = _FIELDS.get(name)
    if isinstance(field, fields.Integer) and text.removeprefix("-").isdecimal():
        return int(text)
    if isinstance(field, fields.Boolean):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(field, fields.Dict):
        return unique_json.loads(text)
    return text


# --- out -------------------------------------------------------------------------------------


def header_of(*, with_tokens: bool) -> tuple[str, ...]:
    return RECORD_COLUMNS if with_tokens else (*RECORD_COLUMNS, WITHHELD)


def row_of(record: Mapping[str, Any], *, with_tokens: bool) -> list[str] | None:
    """Return cells in the order of `header_of`, or None: a line end in a cell cannot be
    read again.
    """
    flat = {name: _cell(_found(record, name), field) for name, field in _FIELDS.items()}
    if any(end in cell for cell in flat.values() for end in "\r\n"):
        return None
    if with_tokens:
        return list(flat.values())
    return [*flat.values(), "" if record["card"] is None else "true"]


def _found(record: Any, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if record is not None else None
    return record


def _cell(value: Any, field: fields.Field[Any]) -> str:
    if value is None:
        return ""
    if isinstance(field, fields.Boolean):
        return "true" if value else "false"
    if isinstance(field, fields.Dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
