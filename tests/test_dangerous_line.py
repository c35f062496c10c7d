"""The promises that can be read off the source."""

from __future__ import annotations

import ast

from tests.support.processes import ROOT

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "billing_worker").rglob("*.py")
}


def callers_of(method):
    return [
        name
        for name, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
    ]


def test_one_line_of_the_product_sends_a_sale():
    assert callers_of("sale") == ["billing_worker/services/charging/charge.py"]


def test_only_the_arming_transaction_marks_an_attempt_submitted():
    assert callers_of("mark_submitted") == ["billing_worker/services/attempts/submit.py"]


def test_nobody_but_the_clock_reads_the_time():
    for name, source in SOURCES.items():
        if name != "billing_worker/clock.py":
            assert "datetime.now" not in source, name
            assert "utcnow" not in source, name


def test_no_float_is_made_of_an_amount():
    for name, source in SOURCES.items():
        if name.startswith(("billing_worker/domain", "billing_worker/services")):
            assert "float(" not in source, name


def test_no_service_asks_whether_it_is_under_test():
    for name, source in SOURCES.items():
        for word in ("pytest", "UNDER_TEST", "TESTING"):
            assert word not in source, f"{name} mentions {word}"
