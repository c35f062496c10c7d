from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.timings import Timings
from billing_worker.entrypoints.cli.shared import (
    json_option,
    open_store,
    print_table,
    settings_for,
)
from billing_worker.persistence.store import Store
from billing_worker.services.forecast.line import Expected, Totals
from billing_worker.services.forecast.preview import preview as expected_charges
from billing_worker.services.forecast.variance import Comparison, Deviation, compare

_COLUMNS = ("invoice", "customer", "at", "amount", "currency", "rule", "reason")
CSV_COLUMNS = ("subscription", "customer", "invoice", "period", "start", "at", "amount",
               "currency", "rule", "charged", "reason", "if_armed")  # fmt: skip
SHOWN_LINES = 50


class _Instant(click.ParamType[datetime]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> datetime:
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail("must be an ISO 8601 date and time, such as 2026-03-01T00:00:00Z", param, ctx)
        if moment.utcoffset() is None:
            self.fail("needs a UTC offset, such as a final Z", param, ctx)
        return moment


@click.command()
@click.option("--until", type=_Instant(), help="End of the preview, such as 2026-03-01T00:00:00Z.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV; the totals go to stderr.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the preview in this file for a later --diff.",
)
@click.option(
    "--diff",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare a saved preview with what happened; exit status 1 if a difference is unexplained.",
)
@json_option
def preview(
    until: datetime | None, save: Path | None, diff: Path | None, *, as_csv: bool, as_json: bool
) -> None:
    """List every charge until a date, with totals, and why other invoices are not charged.

    \b
    Example:
      billing-worker preview --until 2026-12-31T00:00:00Z
    """
    if (until is None) == (diff is None):
        raise click.UsageError("give either --until TIME or --diff FILE")
    settings = settings_for(*config.DATABASE)
    with open_store(settings) as store:
        if diff is not None:
            _compare(store, diff, as_json=as_json)
        elif until is not None:
            _preview(store, settings.timings, until, save, as_csv=as_csv, as_json=as_json)


# --- before ----------------------------------------------------------------------------------


def _preview(
    store: Store,
    timings: Timings,
    until: datetime,
    save: Path | None,
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    now = SystemClock().now()
    header = {"made_at": now.isoformat(), "until": until.isoformat()}
    totals = Totals()
    with ExitStack() as files:
        lines = _counted(expected_charges(store, now, until, timings), totals)
        if save is not None:
            lines = _saved(lines, header, files.enter_context(save.open("w", encoding="utf-8")))
        try:
            _show(lines, header, totals, as_csv=as_csv, as_json=as_json)
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None


def _counted(lines: Iterable[Expected], totals: Totals) -> Iterator[Expected]:
    for line in lines:
        totals.add(line)
        yield line


def _saved(lines: Iterable[Expected], header: dict[str, str], file: TextIO) -> Iterator[Expected]:
    """Write JSON Lines: a header, one charge a line, and an end line.

    The end line has the number of charges, which shows that the file is whole, and the time at
    which the last of the book was read: sweeps charge meanwhile.
    """
    file.write(json.dumps(header) + "\n")
    count = 0
    for line in lines:
        file.write(json.dumps(line.as_dict(), ensure_ascii=False) + "\n")
        count += 1
        yield line
    file.write(json.dumps({"lines": count, "read_by": SystemClock().now().isoformat()}) + "\n")


def _show(
    lines: Iterator[Expected],
    header: dict[str, str],
    totals: Totals,
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    if as_json:
        _print_json(lines, header, totals)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, CSV_COLUMNS)
        writer.writeheader()
        for line in lines:
            writer.writerow({name: _no_formula(cell) for name, cell in line.as_dict().items()})
        click.echo(json.dumps(totals.as_dict()), err=True)
    else:
        _print(lines, header, totals)


def _no_formula(cell: object) -> object:
    """A spreadsheet runs a cell that begins like this. An apostrophe makes it text (OWASP)."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _print_json(lines: Iterable[Expected], header: dict[str, str], totals: Totals) -> None:
    """Print one JSON object piece by piece: the book may be larger than the memory."""
    click.echo(json.dumps(header)[:-1] + ', "charges": [')
    comma = ""
    for line in lines:
        sys.stdout.write(comma + json.dumps(line.as_dict(), ensure_ascii=False))
        comma = ",\n"
    click.echo(f'\n], "totals": {json.dumps(totals.as_dict(), ensure_ascii=False)}}}')


def _print(lines: Iterator[Expected], header: dict[str, str], totals: Totals) -> None:
    shown: list[dict[str, Any]] = []
    more = 0
    for line in lines:
        if len(shown) < SHOWN_LINES:
            shown.append(line.as_dict())
        else:
            more += 1
    columns = _COLUMNS + (("if_armed",) if any(row["if_armed"] for row in shown) else ())
    print_table(
        f"Until {header['until']}", columns, [[row[column] for column in columns] for row in shown]
    )
    if more:
        click.echo(f"… and {more} more: --json and --csv print all of them.")
    sums = totals.as_dict()
    _print_sums("Charges", "Not charged", sums)
    if "if_armed" in sums:
        _print_sums("Charges if armed", "Not charged even then", sums["if_armed"])


def _print_sums(charged: str, not_charged: str, sums: dict[str, Any]) -> None:
    columns = ("currency", "count", "amount")
    print_table(charged, columns, [[s[column] for column in columns] for s in sums["charged"]])
    if sums["not_charged"]:
        print_table(not_charged, ("reason", "count"), sums["not_charged"].items())


# --- afterwards ------------------------------------------------------------------------------


class _NoPreview(click.ClickException):
    exit_code = 2  # 1: a difference is unexplained


def _compare(store: Store, path: Path, *, as_json: bool) -> None:
    comparison = Comparison()
    with path.open(encoding="utf-8") as file:
        made_at, until = _header(path, file)
        lines, read_by = _whole(path, file)
        file.seek(0)
        next(file)
        deviations = compare(
            store,
            SystemClock().now(),
            made_at,
            read_by or made_at,
            until,
            islice(_objects(path, file), lines),
            comparison,
        )
        if as_json:
            _print_comparison_json(deviations, comparison)
        else:
            _print_comparison(deviations, comparison)
    if comparison.unexplained:
        raise SystemExit(1)


def _header(path: Path, file: TextIO) -> tuple[datetime, datetime]:
    try:
        header = json.loads(next(file, ""))
        made_at, until = (datetime.fromisoformat(header[name]) for name in ("made_at", "until"))
    except (ValueError, KeyError, TypeError):
        raise _NoPreview(f"{path} is no saved preview") from None
    return made_at, until


def _whole(path: Path, file: TextIO) -> tuple[int, datetime | None]:
    """Read the file to its end. Return its number of charges and when the book was read.

    An incomplete file is compared with nothing.
    """
    count = 0
    last: Any = None
    for last in _objects(path, file):  # noqa: B007 - the last one is the point
        count += 1
    if not isinstance(last, dict) or last.get("lines") != count - 1:
        raise _NoPreview(f"{path} is cut off: its last line does not tell how many came before it")
    try:
        return count - 1, datetime.fromisoformat(last["read_by"]) if "read_by" in last else None
    except (ValueError, TypeError):
        raise _NoPreview(f"{path} is no saved preview") from None


def _objects(path: Path, file: TextIO) -> Iterator[Any]:
    number = 1
    try:
        for line in file:
            number += 1
            yield json.loads(line)
    except ValueError:
        raise _NoPreview(f"{path} is damaged or cut off at line {number}") from None


def _print_comparison_json(deviations: Iterable[Deviation], comparison: Comparison) -> None:
    sys.stdout.write('{"deviations": [\n')
    comma = ""
    for deviation in deviations:
        sys.stdout.write(comma + json.dumps(deviation.as_dict(), ensure_ascii=False))
        comma = ",\n"
    counts = json.dumps(dict(comparison.counts))
    click.echo(f'\n], "counts": {counts}, "unexplained": {comparison.unexplained}}}')


def _print_comparison(deviations: Iterable[Deviation], comparison: Comparison) -> None:
    for deviation in deviations:
        because = deviation.because or "UNEXPLAINED"
        click.echo(f"{deviation.invoice}: planned {deviation.planned}; {deviation.happened}")
        click.echo(f"    {because}")
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(comparison.counts.items()))
    click.echo(f"{counts or 'nothing was planned'}. Unexplained: {comparison.unexplained}.")
