"""Checks of the book for `check` and start-up: identity, mode, and commits that the database may
lose.
"""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from billing_worker.bootstrap import build_outside, build_store
from billing_worker.clock import ClockWatch, SystemClock
from billing_worker.config import Settings
from billing_worker.domain.errors import BillingError
from billing_worker.persistence import switches
from billing_worker.persistence.book.identity import ServerNow
from billing_worker.persistence.switches import Switches
from billing_worker.services.guards.lost_memory import why_it_is_a_copy
from billing_worker.services.guards.refusals import CLOCK_MAY_DIFFER, other_mode, weak_standby


def check_book(settings: Settings) -> str:
    """Raise BillingError with one sentence if nothing can be charged from this book."""
    book = _read(settings).book
    if book is None:
        raise BillingError("there is none: run `billing-worker migrate`")
    mode = other_mode(booked=book.test_mode, test_mode=settings.test_mode)
    if mode is not None:
        raise BillingError(mode)
    with build_store(settings) as store, store.reading() as connection:
        copied = why_it_is_a_copy(connection, build_outside(settings))
    if copied is not None:
        raise BillingError(copied)
    charged = {None: "nothing was charged yet", True: "test mode", False: "live mode"}
    references = f"references begin with {book.prefix}" if book.prefix else "references as given"
    return f"{book.identity}, {references}, {charged[book.test_mode]}"


def check_clock(settings: Settings) -> str:
    server = _read(settings).server
    if server.clock is None:
        return "the database is on this machine"
    ahead = ClockWatch(SystemClock()).ahead_by(server.clock)
    if abs(ahead) > CLOCK_MAY_DIFFER:
        off = f"{abs(ahead.total_seconds()):.0f} s {'ahead of' if ahead.days >= 0 else 'behind'}"
        raise BillingError(f"{off} the database's: set it right, nothing is charged until then")
    return "within a minute of the database's"


def check_standby(settings: Settings) -> str:
    server = _read(settings).server
    weak = weak_standby(server)
    if weak is not None and settings.require_synchronous_standby:
        raise BillingError(f"{weak}, and BILLING_REQUIRE_SYNCHRONOUS_STANDBY is true")
    return f"{_noticed_by(server)}; {weak or 'a fail-over loses no commit'}"


def _noticed_by(server: ServerNow) -> str:
    if server.clock is None:
        return "a file that is put back is noticed"
    if server.server is None:
        return "this role may not read PostgreSQL's timeline, so a fail-over is not noticed by it"
    return f"a fail-over is noticed (timeline {server.server.timeline})"


def _read(settings: Settings) -> Switches:
    with build_store(settings) as store, store.reading() as connection:
        return switches.read(connection)


def why_nothing_is_sold(settings: Settings) -> str | None:
    """Return why nothing can be charged, for the log at start-up, or None.

    Also None while the database is unreachable: every claim compares the book again.
    """
    for check in (check_book, check_clock, check_standby):
        try:
            check(settings)
        except BillingError as error:
            return str(error)
        except SQLAlchemyError:
            return None
    return None
