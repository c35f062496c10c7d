"""The calendar's page shows what the calendar says."""

from __future__ import annotations

import doctest

from tests.support.processes import ROOT


def test_every_example_on_the_page_of_the_calendar_is_true():
    found = doctest.testfile(str(ROOT / "docs/calendar.md"), module_relative=False)
    assert found.attempted > 8
    assert found.failed == 0
