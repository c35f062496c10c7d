"""Notices that the database has forgotten what was committed, and what may be sold after that.

    what is seen                                  what follows
    same server, newer timeline (fail-over)       treated as restored books; sales go on
    a recorded sale is not in the books           treated as restored books; sales go on
    a recorded loss is not in the books           treated as restored books; sales go on
    the folder of an SQLite file is elsewhere     treated as restored books; sales go on
    another server, another file or machine       a copy: sales stop until a person says `--moved`
    a record of a later server                    an older copy: nothing is sold from it

"Treated as restored books" means: what is due by now is looked for at the gateway, under the
reference that a forgotten charge had, before it is created there. See docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, auto
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from billing_worker.domain.attempt import Attempt
from billing_worker.domain.errors import ConcurrentChange, InvalidInput, NotPayable
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.persistence import counters, history, switches
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import Book, Server, ServerNow
from billing_worker.persistence.book.outside import Record, Sale
from billing_worker.persistence.history import Entry
from billing_worker.persistence.switches import Switches
from billing_worker.services.guards.refusals import refusal, right_now, wrong_clock
from billing_worker.services.ports import Outside, Ports

BY = "lost_memory"
TELL_AGAIN_AFTER = timedelta(days=1)

NOTICED_SINCE = "the books were found to have forgotten something since this charge was begun"
OTHER_SERVER = "the database is not the one that this charge was begun on"
LOSS_IS_LOST = "a loss of memory that was noticed at {at} is not in the books any more"
FIRST_CHARGE = "the first charge from this database"
BEFORE_ITS_FIRST = "charges are recorded outside of a book that has no memory of any"
COPY = (
    "this database is a copy of a book that was charged from another one ({was}, now {now}): sales "
    "are stopped. If the other one is gone, `billing-worker sales start --moved` goes on here"
)
NO_FILE = (
    "this database is a copy: {file}.outside, which is kept beside it, is missing. Sales are "
    "stopped. If the original is gone, `billing-worker sales start --moved` goes on here"
)
MOVED = (
    "the folder of this database was moved ({was} -> {now}) and is treated as restored. If it was "
    "copied, and the original still charges on another machine, stop one of the two at once"
)
OLDER = (
    "this database is an older copy: its book is charged from another one since {since}. Nothing is "
    "sold from this one, unless `billing-worker sales start --moved` says that the other is gone"
)

RESOLVED_AT_ONCE = 3
"""So many doubts are resolved before a caller gives up: one may reveal the next."""

T = TypeVar("T")

log = structlog.get_logger()


class Kind(Enum):
    FIRST = auto()  # nobody has charged from this book before
    MOVED = auto()
    FORGOT = auto()
    COPIED = auto()
    OLDER = auto()
    REFUSED = auto()  # by `refusals`


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why nothing may be claimed before `resolve` has been called."""

    kind: Kind
    why: str
    seen: Switches
    name: str = ""  # of a refusal


# --- what is seen -----------------------------------------------------------------------------


def read_outside(ports: Ports) -> list[Record]:
    """Before the transaction in which `doubt` compares them: nothing waits for Redis in there."""
    with ports.store.reading() as connection:
        book = books.identity(connection)
    if book is None:
        return []
    return [record for keeper in ports.outside if (record := keeper.read(book)) is not None]


def poll(ports: Ports) -> bool:
    """Notice a loss before anything is due: what people have decided may be forgotten with it.

    False: the clock is wrong, so nobody knows what is due.
    """
    records = read_outside(ports)
    with ports.store.reading() as connection:
        found = doubt(ports, connection, switches.read(connection), records)
    if found is not None:
        resolve(ports, found)
    return found is None or found.name != "clock"


def doubt(
    ports: Ports, connection: Connection, switched: Switches, records: Sequence[Record]
) -> Doubt | None:
    """What this transaction must not go on with. `records`: see `read_outside`."""
    if switched.book is None:
        return None
    refused = refusal(ports, switched)
    if refused is not None:
        return Doubt(Kind.REFUSED, refused.why, switched, refused.name)
    changed = _server_changed(ports.outside, switched.book, switched.server)
    if changed is not None and changed[0] is Kind.FIRST:
        known = any(record.book == switched.book.identity for record in records)
        changed = (Kind.FORGOT, BEFORE_ITS_FIRST) if known else changed
    if changed is not None:
        return Doubt(*changed, switched)
    for record in records:
        forgot = _contradicted(connection, ports.outside, switched, record)
        if forgot is not None:
            return Doubt(*forgot, switched)
    return None


def _server_changed(
    outside: Sequence[Outside], book: Book, now: ServerNow
) -> tuple[Kind, str] | None:
    keeper = _beside(outside)
    if keeper is not None:
        return _file_changed(book, keeper)
    was, current = book.server, now.server
    if current is None or current == was:
        return None
    if was is None:
        return Kind.FIRST, FIRST_CHARGE
    if current.identity == was.identity and current.timeline > was.timeline:
        return Kind.FORGOT, f"fail-over: timeline {was.timeline} -> {current.timeline}"
    return Kind.COPIED, COPY.format(was=_told(was), now=_told(current))


def _file_changed(book: Book, keeper: Outside) -> tuple[Kind, str] | None:
    was, current = book.server, _server_of(keeper)
    if was is None:
        return Kind.FIRST, FIRST_CHARGE
    if keeper.is_missing:
        return Kind.COPIED, NO_FILE.format(file=Path(current.identity).name)
    if _is_on_another_machine(book, keeper):
        return Kind.COPIED, COPY.format(
            was=f"{was.identity} on another machine", now=_told(current)
        )
    if current == was:
        return None
    if _moved_as_a_whole(book, keeper, was):
        return Kind.MOVED, MOVED.format(was=was.identity, now=current.identity)
    return Kind.COPIED, COPY.format(was=_told(was), now=_told(current))


def _current(outside: Sequence[Outside], now: ServerNow) -> Server | None:
    keeper = _beside(outside)
    return now.server if keeper is None else _server_of(keeper)


def _server_of(keeper: Outside) -> Server:
    return Server(f"file:{keeper.path}")


def _beside(outside: Sequence[Outside]) -> Outside | None:
    return next((keeper for keeper in outside if keeper.path is not None), None)


def _told(server: Server) -> str:
    return f"{server.identity}, timeline {server.timeline}" if server.timeline else server.identity


def _is_on_another_machine(book: Book, keeper: Outside) -> bool:
    record = keeper.known
    if record is None or record.book != book.identity or record.machine is None:
        return False
    return keeper.machine is not None and keeper.machine != record.machine


def _moved_as_a_whole(book: Book, keeper: Outside, was: Server) -> bool:
    """The record came along, and the file is not at its old place any more."""
    record, here = keeper.known, keeper.path
    if record is None or record.book != book.identity or here is None:
        return False
    old = Path(was.identity.removeprefix("file:"))
    return not old.exists() or old.samefile(here)


def _contradicted(
    connection: Connection, outside: Sequence[Outside], switched: Switches, record: Record
) -> tuple[Kind, str] | None:
    book = switched.book
    if book is None or record.book != book.identity:
        return None
    if _is_later(record.server_since, book.server_since) and not _is_here(
        record, _current(outside, switched.server)
    ):
        return Kind.OLDER, OLDER.format(since=record.server_since)
    for noticed_at, known in (
        (record.restored_at, switched.restored_at),
        (record.server_since, book.server_since),
    ):
        if _is_later(noticed_at, known):
            return Kind.FORGOT, LOSS_IS_LOST.format(at=noticed_at)
    if record.server_since != book.server_since:
        return None  # of an earlier server
    missing = record.missing_in(connection)
    if missing is not None:
        return Kind.FORGOT, f"a recorded sale, {missing.reference_id}, is not in the books any more"
    return None


def _is_later(recorded: datetime | None, known: datetime | None) -> bool:
    return recorded is not None and (known is None or recorded > known)


def _is_here(record: Record, current: Server | None) -> bool:
    """Whether the record was begun on this very server, which no other one has replaced since."""
    return current is not None and (record.server, record.timeline) == (
        current.identity,
        current.timeline,
    )


def stands_against_submitting(ports: Ports, switched: Switches) -> str | None:
    """Read in the very transaction that commits `submitted`: a pooler may have led it elsewhere."""
    refused = refusal(ports, switched)
    if refused is not None:
        return refused.why
    if switched.book is None or switched.server.server is None:
        return None
    changed = _server_changed(ports.outside, switched.book, switched.server)
    return None if changed is None or changed[0] is Kind.FIRST else OTHER_SERVER


def has_forgotten_nothing_since(
    attempt: Attempt, invoice: Invoice, switched: Switches, records: Sequence[Record]
) -> bool:
    """Whether a row that says `prepared` proves that nothing was sold: every sale since its period
    began has been recorded outside, and those recorded last are in the books. From the row on is
    not enough: a life that these books have forgotten may have sold the same before.

    A process that dies while Redis is away records nothing of its last sales. So a record proves
    something only as long as nothing was forgotten and the server is the same, and where that can
    be seen: a fail-over to a late standby is how a database forgets its last sales.
    """
    since = min(attempt.created_at, invoice.period_start)
    book, restored_at = switched.book, switched.restored_at
    if book is None or switched.server.is_hidden:
        return False
    if restored_at is not None and attempt.created_at <= restored_at:
        return False
    return any(
        _is_about(record, book) and record.begun_at is not None and record.begun_at <= since
        for record in records
    )


def once_remembered(ports: Ports, work: Callable[[Connection], T]) -> T:
    """Return `work` of a transaction whose books are known to have forgotten nothing, or to have
    been marked as restored.

    Raises NotPayable if nothing may be sold from these books, ConcurrentChange if they change all
    the time.
    """
    for _ in range(RESOLVED_AT_ONCE):
        records = read_outside(ports)
        with ports.store.transaction() as connection:
            found = doubt(ports, connection, switches.read(connection), records)
            if found is None:
                return work(connection)
        if not resolve(ports, found):
            raise NotPayable(found.why)
    raise ConcurrentChange(NOTICED_SINCE)


# --- what follows -----------------------------------------------------------------------------


def resolve(ports: Ports, doubt: Doubt) -> bool:
    """Act on it, in a transaction of its own. True: sales may go on, once all is read again."""
    now = _right_time(ports, doubt)
    with ports.store.transaction() as connection:
        book, server = books.lock(connection)
        switched = switches.read(connection)
        if not _stands_as(doubt.seen, book, switched):
            return True  # somebody else has acted meanwhile
        told = _act(connection, doubt, _current(ports.outside, server), now)
        acted = switches.read(connection)
        unbegun = list(ports.outside)
        if doubt.kind is Kind.FIRST:  # Before the commit: without its file it is a copy.
            begin_record([keeper for keeper in unbegun if keeper.path is not None], acted, now)
            unbegun = [keeper for keeper in unbegun if keeper.path is None]
    if doubt.kind in {Kind.FIRST, Kind.MOVED, Kind.FORGOT}:
        begin_record(unbegun, acted, now)
    if told:
        log.error("billing.alert", kind=str(_EVENTS[doubt.kind]), reason=doubt.why)
    return doubt.kind not in {Kind.COPIED, Kind.OLDER, Kind.REFUSED}


def _right_time(ports: Ports, doubt: Doubt) -> datetime:
    now = ports.clock.now()
    if doubt.name != "clock" or ports.timekeeper is None:
        return now
    return now - ports.timekeeper.ahead_by(doubt.seen.server.clock)


def _stands_as(seen: Switches, book: Book, switched: Switches) -> bool:
    return book == seen.book and switched.restored_at == seen.restored_at


_EVENTS = {
    Kind.FORGOT: EventKind.BOOK_FORGOT,
    Kind.MOVED: EventKind.BOOK_MOVED,
    Kind.COPIED: EventKind.BOOK_REFUSED,
    Kind.OLDER: EventKind.BOOK_REFUSED,
    Kind.REFUSED: EventKind.BOOK_REFUSED,
}


def _act(connection: Connection, doubt: Doubt, current: Server | None, now: datetime) -> bool:
    """Returns whether a person is to be alerted."""
    if current is not None and doubt.kind in {Kind.FIRST, Kind.MOVED, Kind.FORGOT}:
        books.remember_server(connection, current, now)
    if doubt.kind is Kind.FIRST:
        return False
    if doubt.kind in {Kind.FORGOT, Kind.MOVED}:  # Whether its original still charges is not seen.
        switches.mark_restored(connection, by=BY, reason=doubt.why, now=now)
    if doubt.kind is Kind.COPIED and switches.sales_are_on(connection):
        switches.turn_sales(connection, on=False, by=BY, reason=doubt.why, now=now)
    if not _not_told_lately(connection, doubt, now):
        return False
    event = Event(_EVENTS[doubt.kind], now, BY, {"reason": doubt.why}, alert=True)
    history.write(connection, [Entry(event)])
    return True


def _not_told_lately(connection: Connection, doubt: Doubt, now: datetime) -> bool:
    if doubt.kind in {Kind.FORGOT, Kind.MOVED}:
        return True  # each is one of its own
    name = f"book.refused:{doubt.name or doubt.kind.name.lower()}"
    return counters.add_unless_recent(connection, name, now, now - TELL_AGAIN_AFTER)


def notice(ports: Ports, why: str, *, seen: datetime | None, by: str) -> bool:
    """The gateway knows what this book believes to be new: it has forgotten something.

    `seen`: `Claimed.restored_at` of the charge that has met it. False: somebody has noticed since,
    so this charge is begun anew under the rules for restored books. Either way nothing that was
    claimed before is submitted.
    """
    with ports.store.transaction() as connection:
        books.lock(connection)
        now = right_now(ports, connection)
        if switches.read(connection).restored_at != seen:
            return False
        switches.mark_restored(connection, by=by, reason=why, now=now)
        event = Event(EventKind.BOOK_FORGOT, now, by, {"reason": why}, alert=True)
        history.write(connection, [Entry(event)])
        noticed = switches.read(connection)
    begin_record(ports.outside, noticed, now)
    log.error("billing.alert", kind=str(EventKind.BOOK_FORGOT), reason=why)
    return True


def why_it_is_a_copy(connection: Connection, outside: Sequence[Outside]) -> str | None:
    switched = switches.read(connection)
    if switched.book is None:
        return None
    for keeper in outside:
        keeper.read(switched.book.identity)
    changed = _server_changed(outside, switched.book, switched.server)
    return changed[1] if changed is not None and changed[0] is Kind.COPIED else None


def start_here(
    connection: Connection, outside: Sequence[Outside], *, moved: bool, now: datetime
) -> None:
    """Sales are to start on this database. Raises InvalidInput when it is a copy.

    `moved`: a person says that the original is gone, so this is the book from now on.
    """
    book, server = books.lock(connection)
    copied = why_it_is_a_copy(connection, outside)
    if not moved:
        if copied is not None:
            raise InvalidInput("sales", copied)
        return
    current = _current(outside, server) or book.server
    if current is not None:
        books.remember_server(connection, current, now)


def clock_is_wrong(ports: Ports) -> bool:
    return why_the_clock_is_wrong(ports) is not None


def why_the_clock_is_wrong(ports: Ports) -> str | None:
    """Before a sweep or a command: what it would write down now would be wrong for as long as it is
    kept.
    """
    if ports.timekeeper is None:
        return None
    with ports.store.reading() as connection:
        switched = switches.read(connection)
    refused = wrong_clock(ports.timekeeper, switched.server)
    if refused is None:
        return None
    resolve(ports, Doubt(Kind.REFUSED, refused.why, switched, refused.name))
    return refused.why


# --- the record outside -----------------------------------------------------------------------


def begin_record(outside: Sequence[Outside], switched: Switches, now: datetime) -> None:
    """Begin the records anew: what they said was forgotten, or was said of another server.

    `switched`: as the transaction before has left it. Read again it might be forgotten already.
    """
    if switched.book is not None:
        for keeper in outside:
            keeper.begin(_first(keeper, switched.book, switched.restored_at, now))


def begin_missing(ports: Ports, switched: Switches) -> None:
    """A flushed Redis knows nothing of the sales before, and one that was away misses some: what
    is recorded is complete from now on. Not from the claim on: others may have sold since.
    """
    book = switched.book
    if book is None:
        return
    for keeper in ports.outside:
        known = keeper.known
        if known is None or not _is_about(known, book):
            keeper.begin(_first(keeper, book, switched.restored_at, ports.clock.now()))
        elif known.begun_at is None:
            keeper.renew(replace(known, begun_at=ports.clock.now()))
        elif known.machine is None and keeper.machine is not None:  # of an older version
            keeper.renew(replace(known, machine=keeper.machine))


def _is_about(record: Record, book: Book) -> bool:
    return record.book == book.identity and record.server_since == book.server_since


def _first(keeper: Outside, book: Book, restored_at: datetime | None, now: datetime) -> Record:
    server = book.server
    return Record(
        book.identity,
        now,
        server=server.identity if server else None,
        timeline=server.timeline if server else None,
        server_since=book.server_since,
        restored_at=restored_at,
        machine=keeper.machine,
    )


def record(
    ports: Ports, book: Book | None, attempt: Attempt, restored_at: datetime | None, now: datetime
) -> None:
    """Record a sale after its commit, and before it is sent. `restored_at`: see `Claimed`."""
    if book is None:
        return
    for keeper in ports.outside:
        known = keeper.known
        if known is None or not _is_about(known, book):
            keeper.begin(_first(keeper, book, restored_at, now))
        keeper.add(book.identity, Sale(attempt.id, attempt.reference_id))
