"""What no log line shows: names of pay pages, parameters of SQL, characters that a terminal obeys."""

from __future__ import annotations

import io
import logging

import pytest
import structlog
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError

from billing_worker import logs
from billing_worker.entrypoints.cli.preview import _no_formula
from billing_worker.persistence.schema.tables import customers

NAME = "q7Jw1yTn9Xc0RC60NN3x4c9jHUgeL1SD"


@pytest.fixture(params=[True, False], ids=["json", "terminal"])
def logged(request):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(as_json=request.param)
    written = io.StringIO()
    root.handlers[0].setStream(written)
    yield written.getvalue
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_the_name_of_a_pay_page_is_in_no_line_and_no_traceback(logged):
    def render():
        raise RuntimeError(f"cannot render /pay/{NAME}")

    try:
        render()
    except RuntimeError:
        logging.getLogger("flask").exception("Exception on %s [GET]", f"/pay/{NAME}")
    structlog.get_logger("x").warning("request.failed", path=f"/pay/{NAME}?x=1")
    shown = logged()
    assert "/pay/***" in shown
    assert "Traceback" in shown
    assert NAME not in shown


def test_no_line_holds_a_character_that_a_terminal_obeys_or_a_second_line(logged):
    forged = 'x\x1b[2J\r\n{"event": "billing.alert"}\x9b'
    logging.getLogger("celery").warning("got %s", forged)
    structlog.get_logger("x").warning("refused", reason=forged)
    shown = logged()
    assert "\x9b" not in shown
    assert "\x1b[2J" not in shown
    assert "\\u001b" not in shown
    assert len(shown.splitlines()) == 2


def test_an_error_of_the_database_holds_no_parameters(world):
    someone = {"reference_id": "ann", "name": "Ann Secret", "email": "ann@secret.test",
               "created_at": world.clock.now()}  # fmt: skip
    with pytest.raises(IntegrityError) as raised, world.store.transaction() as connection:
        connection.execute(insert(customers), [someone, someone])
    assert "secret" not in str(raised.value).lower()
    with pytest.raises(Exception, match=r"[Nn]o such table|does not exist") as raised, \
            world.store.transaction() as connection:  # fmt: skip
        connection.execute(text("SELECT * FROM nowhere WHERE x = :x"), {"x": "Ann Secret"})
    assert "Secret" not in str(raised.value)


@pytest.mark.parametrize("cell", ["=HYPERLINK(1)", "+1", "-1+cmd", "@SUM(1)", "\t=1"])
def test_no_cell_of_the_preview_is_a_formula(cell):
    assert _no_formula(cell) == "'" + cell
    assert _no_formula("sub-1") == "sub-1"
    assert _no_formula(7) == 7
