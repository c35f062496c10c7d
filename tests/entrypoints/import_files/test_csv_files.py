"""CSV files that are not what they seem: cut off, quoted, of other bytes."""

from __future__ import annotations

import pytest

from tests.entrypoints.cli.test_commands import RECORD, imported, lines, run
from tests.entrypoints.import_files.test_import_export import listed

__all__ = ["lines", "run"]  # fixtures

TOKEN = RECORD["card"]["token"]
HEADER = (
    "reference_id,customer.reference_id,card.token,amount,currency,interval,anchor_at,"
    "paid_through,description"
)


def csv_row(number, description="Pro"):
    return (
        f"sub-{number},cust-{number},tok{number},9.99,USD,month,2025-01-31T00:00:00Z,"
        f"2026-06-30T00:00:00Z,{description}"
    )


@pytest.fixture
def csv_import(run, tmp_path):
    def csv_import(*rows, status=1, end="\n"):
        path = tmp_path / "book.csv"
        rows = [row if isinstance(row, bytes) else row.encode() for row in rows]
        path.write_bytes(b"\n".join(rows) + end.encode())
        report = imported(run, str(path), status)
        faults = [(fault["line"], fault["field"]) for fault in report["faults"]]
        return [s["reference_id"] for s in listed(run)], faults, report

    return csv_import


def test_a_row_that_was_cut_off_is_refused_and_not_imported_without_what_it_lost(csv_import):
    cut = csv_row(2).partition(",2026-06-30")[0]
    added, faults, _ = csv_import(HEADER, csv_row(1), cut, end="")
    assert (added, faults) == (["sub-1"], [(3, "paid_through")])


def test_a_last_cell_that_may_have_been_cut_off_is_refused(csv_import):
    last = HEADER.removesuffix(",description")
    row = csv_row(1).removesuffix(",Pro")
    added, faults, _ = csv_import(last, row, row.removesuffix("2026-06-30T00:00:00Z"), end="")
    assert (added, faults) == (["sub-1"], [(3, "paid_through")])


def test_a_row_with_more_cells_than_the_header_is_refused(csv_import):
    added, faults, _ = csv_import(HEADER, csv_row(1) + ",x", csv_row(2))
    assert (added, faults) == (["sub-2"], [(2, "")])


def test_no_line_disappears_within_a_quote_without_a_fault(csv_import):
    rows = [csv_row(1, '"Pro'), csv_row(2), csv_row(3, '"Basic"'), csv_row(4)]
    added, faults, report = csv_import(HEADER, *rows)
    assert (added, report["bad_lines"]) == (["sub-4"], 3)
    assert [line for line, _ in faults] == [2, 3, 4]


def test_a_quote_that_is_never_closed_is_a_fault_of_its_line(csv_import):
    added, faults, report = csv_import(HEADER, csv_row(1), csv_row(2, '"Pro'), csv_row(3))
    assert (added, [line for line, _ in faults]) == (["sub-1"], [3, 4])
    assert "never closed" in report["faults"][0]["reason"]


def test_a_row_within_a_cell_is_no_row(csv_import):
    inner = f'"Pro\n{csv_row(6)}\nx"'
    added, faults, _ = csv_import(HEADER, csv_row(1, inner), csv_row(2))
    assert (added, [line for line, _ in faults]) == (["sub-2"], [2, 3, 4])


def test_a_quote_in_a_large_file_ends_the_reading_and_not_the_memory(csv_import):
    many = [csv_row(number) for number in range(10, 4_000)]
    added, faults, _ = csv_import(HEADER, csv_row(1), csv_row(2, '"Pro'), *many)
    assert added == ["sub-1"]
    assert faults[0] == (3, "")


def test_a_byte_that_is_no_utf8_costs_its_own_line_only(csv_import):
    bad = csv_row(3, "Café").encode("latin-1")
    rows = [csv_row(number) for number in range(4, 200)]
    added, faults, report = csv_import(HEADER, csv_row(1), csv_row(2), bad, *rows)
    assert (len(added), faults) == (198, [(4, "description")])
    assert report["faults"][0]["reason"] == "is not UTF-8 text."


def test_a_header_that_names_a_field_and_what_holds_it_is_one_fault(csv_import):
    added, faults, _ = csv_import("customer," + HEADER, "x," + csv_row(1))
    assert (added, faults) == ([], [(1, "customer.reference_id"), (1, "")])


def test_a_column_that_comes_twice_is_refused(csv_import):
    added, faults, _ = csv_import(HEADER + ",paid_through", csv_row(1) + ",")
    assert (added, faults) == ([], [(1, "paid_through"), (1, "")])


@pytest.mark.parametrize("depth", [40, 985, 50_000])
def test_metadata_of_any_depth_costs_its_own_line_only_in_csv(csv_import, depth):
    deep = '"{""a"":' + "[" * depth + "]" * depth + '}"'
    rows = [csv_row(1) + ",", csv_row(2) + f",{deep}", csv_row(3) + ","]
    added, faults, _ = csv_import(HEADER + ",metadata", *rows)
    assert (added, faults) == (["sub-1", "sub-3"], [(3, "metadata")])


def test_a_csv_export_without_tokens_is_refused_rather_than_imported_without_cards(
    run, lines, tmp_path
):
    imported(run, lines(RECORD | {"card": {"token": TOKEN}}))
    book = run("subscriptions", "export", "--format", "csv").stdout
    assert TOKEN not in book
    path = tmp_path / "copy.csv"
    path.write_text(book.replace("sub-1", "sub-2"))
    assert imported(run, str(path), 1)["added"] == 0


def test_text_with_a_line_end_is_left_out_of_a_csv_export_with_its_reason(run, lines):
    imported(run, lines(RECORD, RECORD | {"reference_id": "sub-2", "description": "two\nlines"}))
    result = run("subscriptions", "export", "--format", "csv", status=1)
    assert "sub-1" in result.stdout
    assert "sub-2" not in result.stdout
    assert "left out: 1 with a line end" in result.stderr
