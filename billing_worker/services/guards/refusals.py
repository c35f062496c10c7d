"""Why this process charges nothing from this book, whatever is due."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from billing_worker.persistence import switches
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import ServerNow
from billing_worker.persistence.switches import Switches
from billing_worker.services.ports import Ports, Timekeeper

CLOCK_MAY_DIFFER = timedelta(minutes=1)

_WAITS_FOR_A_STANDBY = frozenset({"on", "remote_apply"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """One sentence for a person, and the name under which it is reported once a day."""

    name: str
    why: str


def refusal(ports: Ports, switched: Switches) -> Refusal | None:
    """Return why nothing is charged, or None. The clock comes first: with a wrong clock no record
    can be dated.
    """
    return (
        wrong_clock(ports.timekeeper, switched.server)
        or _other_mode(ports, switched)
        or _weak_standby(ports, switched.server)
    )


def wrong_clock(timekeeper: Timekeeper | None, server: ServerNow) -> Refusal | None:
    if timekeeper is None:
        return None
    ahead = timekeeper.ahead_by(server.clock)
    if abs(ahead) <= CLOCK_MAY_DIFFER:
        return _went_back(timekeeper, server)
    off = _in_seconds(ahead)
    how = f"{off} {'ahead of' if ahead > timedelta(0) else 'behind'}"
    if server.clock is None:
        mend = "if it is right now, restart this process"
        return Refusal("clock", f"the clock of this machine was set to {how} what it was: {mend}")
    return Refusal("clock", f"the clock of this machine is {how} the database's: set it right")


def _went_back(timekeeper: Timekeeper, server: ServerNow) -> Refusal | None:
    """SQLite has no clock of its own, but its history does not lie in the future."""
    if server.newest_entry is None:
        return None
    ahead = timekeeper.ahead_by(server.newest_entry)
    if ahead >= -CLOCK_MAY_DIFFER:
        return None
    why = (
        f"the clock of this machine is {_in_seconds(ahead)} behind the newest entry of the history: "
        "set it right. If it is right, that entry was written by a clock that was ahead, and "
        "`billing-worker sales start` says so"
    )
    return Refusal("clock", why)


def _in_seconds(ahead: timedelta) -> timedelta:
    return timedelta(seconds=round(abs(ahead).total_seconds()))


def right_now(ports: Ports, connection: Connection) -> datetime:
    """Return the time for records that cannot wait for a right clock: a sale has been sent.

    The database is asked only if the clock was changed since this process started, because asking
    before every commit costs each charge a query.
    """
    keeper = ports.timekeeper
    if keeper is None or abs(keeper.ahead_by(None)) <= CLOCK_MAY_DIFFER:
        return ports.clock.now()
    ahead = keeper.ahead_by(switches.read(connection).server.clock)
    return ports.clock.now() - (ahead if abs(ahead) > CLOCK_MAY_DIFFER else timedelta(0))


def _other_mode(ports: Ports, switched: Switches) -> Refusal | None:
    booked = None if switched.book is None else switched.book.test_mode
    why = other_mode(booked=booked, test_mode=ports.test_mode)
    return None if why is None else Refusal("mode", why)


def other_mode(*, booked: bool | None, test_mode: bool) -> str | None:
    """Return why this mode is refused, or None. `booked`: the book's mode; None: no charge yet, so
    any mode is allowed.
    """
    if booked is None or booked == test_mode:
        return None
    ours, theirs = ("test", "live") if test_mode else ("live", "test")
    return (
        f"this book charges in {theirs} mode, and BILLING_TEST_MODE={str(test_mode).lower()} says "
        f"{ours}: nothing is sold"
    )


def enter_mode(ports: Ports, connection: Connection, switched: Switches) -> str | None:
    """Write the mode of the first charge, in a transaction of its own. Returns why it must not
    continue.
    """
    if switched.book is None or switched.book.test_mode is not None:
        return None
    if books.set_mode(connection, test_mode=ports.test_mode):
        return None
    return other_mode(booked=not ports.test_mode, test_mode=ports.test_mode)


def _weak_standby(ports: Ports, server: ServerNow) -> Refusal | None:
    why = weak_standby(server) if ports.needs_synchronous_standby else None
    return None if why is None else Refusal("standby", why)


def weak_standby(server: ServerNow) -> str | None:
    """Return why a fail-over may lose commits, by the server's settings, or None."""
    if server.synchronous_standby_names is None:
        return "SQLite has no standby"
    if not server.synchronous_standby_names.strip():
        return "synchronous_standby_names is empty: a fail-over may lose commits"
    if server.synchronous_commit not in _WAITS_FOR_A_STANDBY:
        return f"synchronous_commit is {server.synchronous_commit}: a fail-over may lose commits"
    return None
