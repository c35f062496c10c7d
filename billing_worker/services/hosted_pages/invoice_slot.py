"""The invoice slot, taken for a page on which the customer pays.

Automatic attempts, manual ones and pages share it: a partial unique index allows one live attempt.
The slot is taken before the gateway creates the page, and `submitted` is committed before the page
is handed out, because from then on the customer may pay at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain.attempt import LIVE, PAID, Attempt, AttemptStatus, Origin
from billing_worker.domain.card_setup import PageStatement
from billing_worker.domain.errors import (
    AlreadyPaid,
    ConcurrentChange,
    GatewayError,
    InvalidInput,
    NotPayable,
    Refused,
    SlotTaken,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import OWED, InvoiceStatus
from billing_worker.domain.outcome import Case, News, NoAnswer, NothingSent, Stated
from billing_worker.domain.statement import NOT_SAID, Owner, Statement, page_may_be_paid
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence import claims, history, invoices, pay_links, subscriptions, switches
from billing_worker.persistence.attempts import CaseKey, LockedCases
from billing_worker.persistence.book.identity import Book
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle, wire_data
from billing_worker.services.attempts.submit import why_not
from billing_worker.services.charging.find_by_reference import (
    KNOWN_THERE,
    LATER_KNOWN,
    MAYBE_SOLD,
    Foreign,
    by_reference,
    later_number,
)
from billing_worker.services.charging.previous_attempts import why_no_other
from billing_worker.services.charging.session import GatewaySession
from billing_worker.services.guards import lost_memory
from billing_worker.services.guards.refusals import enter_mode, right_now
from billing_worker.services.hosted_pages.gateway_page import nothing_was_made
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.ports import Ports

BY = "hosted_pages"

MAYBE_PAID = "it may be paid already, and the gateway is asked until that is decided: "


@dataclass(frozen=True, slots=True)
class Slot:
    """A prepared link. It belongs to the caller with the newest fence until its lease ends."""

    key: CaseKey
    attempt: Attempt
    earlier: tuple[Attempt, ...]  # of the same invoice; to be proven unpaid
    may_be_forgotten: bool = False  # see `Claimed`
    owner: Owner = NOT_SAID  # the owner that its gateway invoice must have
    restored_at: datetime | None = None
    book: Book | None = None

    @property
    def create_may_have_been_sent(self) -> bool:
        return self.attempt.fence > 1


def lapses_at(ports: Ports, now: datetime) -> datetime:
    """When a caller that has not handed out its page counts as gone."""
    return now + max(ports.timings.longest_charge, ports.timings.stuck_after)


def locked_owed_invoice(connection: Connection, reference: str) -> tuple[Subscription, DueInvoice]:
    """Lock and return an owed invoice. Raises InvalidInput on `invoice` if there is none,
    NotPayable if it is not owed.
    """
    row = invoices.find(connection, reference)
    if row is None:
        raise InvalidInput("invoice", f"there is no invoice {reference!r}")
    subscription = subscriptions.lock(connection, row.subscription_reference)
    item = claims.lock_one(connection, row.id)
    if subscription is None or item is None:
        raise InvalidInput("invoice", "is gone")
    if item.invoice.status is InvoiceStatus.PAID:
        raise AlreadyPaid(f"{item.invoice.reference_id} is paid")
    if item.invoice.status not in OWED:
        raise NotPayable(f"{item.invoice.reference_id} is {item.invoice.status}")
    return subscription, item


def take(
    ports: Ports, connection: Connection, subscription: Subscription, item: DueInvoice
) -> Slot:
    """Take the slot, or take over a prepared link of the same kind whose caller may be gone.

    `item.card_id` None: the customer will enter a new card. Raises SlotTaken while another attempt
    is live, NotPayable for everything that forbids a charge. After an error the caller rolls the
    transaction back.
    """
    now = right_now(ports, connection)
    item = pause_collection.release_held(connection, item, Moment(now, BY))
    live, until = item.live, lapses_at(ports, now)
    if live is None:
        attempt = pay_links.prepare(
            connection, item, test_mode=ports.test_mode, now=now, lapses_at=until
        )
    elif is_link(live, item.card_id) and live.status is AttemptStatus.PREPARED:
        attempt = pay_links.take_over(connection, live, until)
    else:
        raise SlotTaken(f"{live.reference_id}, of origin {live.origin}, is {live.status}")
    require_payable(ports, connection, Case(attempt, item.invoice, subscription))
    switched = switches.read(connection)
    forgotten = switched.may_be_forgotten(item.invoice) or item.may_be_charged_elsewhere
    key = _key(item, attempt)
    owner = LockedCases(connection, [key]).case(key).owner
    slot = Slot(
        key,
        attempt,
        item.besides(attempt),
        forgotten,
        owner,
        switched.restored_at,
        switched.book,
    )
    data = {"reference_id": attempt.reference_id, "fence": attempt.fence, "origin": attempt.origin}
    kind = EventKind.ATTEMPT_CLAIMED if live else EventKind.ATTEMPT_PREPARED
    _write(connection, slot, Event(kind, now, BY, data))
    return slot


def require_payable(ports: Ports, connection: Connection, case: Case) -> None:
    """Raise NotPayable with the reason if a page for this attempt is not allowed, open or not."""
    obstacle = why_not(ports, connection, case, right_now(ports, connection))
    if obstacle is not None:
        raise NotPayable(obstacle)


def is_link(attempt: Attempt, card_id: int | None) -> bool:
    """Return whether it is a page of the same kind: for a stored card, or for a new one."""
    same_kind = (attempt.card_id is None) == (card_id is None)
    return attempt.origin is Origin.LINK and same_kind


def _key(item: DueInvoice, attempt: Attempt) -> CaseKey:
    return CaseKey(item.invoice.subscription_id, item.invoice.id, attempt.id)


def session_of(ports: Ports, slot: Slot) -> GatewaySession:
    return GatewaySession(ports=ports, by=BY, owner=slot.owner, forgetful=slot.may_be_forgotten)


def require_unpaid(session: GatewaySession, slot: Slot) -> None:
    """Poll every ended attempt of the invoice once more: a late payment pays it (§11.6).

    Raises NotPayable if one was paid or may still be, GatewayError if that is unknown.
    """
    obstacle = why_no_other(
        session, slot.key, slot.earlier, origin=slot.attempt.origin, patient=False
    )
    if obstacle is not None:
        raise NotPayable(str(obstacle))
    if slot.may_be_forgotten:
        _require_unknown(session, slot)


def _require_unknown(session: GatewaySession, slot: Slot) -> None:
    """Require that the gateway has nothing that restored books have lost, under this reference or a
    later one: a second page is a second way to pay the same.
    """
    found = by_reference(session, slot.key, slot.attempt)
    if isinstance(found, Foreign):
        raise NotPayable(found.whose)
    if found is not None:
        if not found.maybe_sold:
            _tell(session, slot, Stated(found.statement))
        raise NotPayable(MAYBE_SOLD)
    if later_number(session, slot.key, slot.attempt):
        raise NotPayable(LATER_KNOWN)


def open_page(
    session: GatewaySession,
    connection: Connection,
    slot: Slot,
    statement: Statement,
    page: bytes,
    page_digest: str | None,
) -> None:
    """Write `submitted` under the fence. The caller commits and only then hands the page out.

    `page_digest` None: the page's name leads to a card page and not to this attempt. Raises
    NotPayable for everything that forbids a charge, ConcurrentChange if another caller has the
    slot.
    """
    ports = session.ports
    now = right_now(ports, connection)
    cases = LockedCases(connection, [slot.key])
    if not cases.knows(slot.key):
        raise ConcurrentChange(f"{slot.attempt.reference_id} is not in the books any more")
    require_payable(ports, connection, cases.case(slot.key))
    switched = switches.read(connection)
    if switched.restored_at != slot.restored_at:
        raise NotPayable(lost_memory.NOTICED_SINCE)
    if (other := enter_mode(ports, connection, switched)) is not None:
        raise NotPayable(other)
    pay_links.open_page(
        connection,
        slot.attempt,
        gateway_id=statement.gateway_id,
        page=page,
        page_digest=page_digest,
        now=now,
        next_poll_at=now + ports.timings.reconcile_after,
    )
    data = {
        "gateway_id": statement.gateway_id,
        "origin": slot.attempt.origin,
        "calls": wire_data(session.shown()),
    }
    _write(connection, slot, Event(EventKind.ATTEMPT_SUBMITTED, now, BY, data))


def record(ports: Ports, slot: Slot) -> None:
    """Record the page outside of the database before it is handed out, as a sale is: it may be
    paid.
    """
    lost_memory.record(ports, slot.book, slot.attempt, slot.restored_at, ports.clock.now())


def give_back(session: GatewaySession, slot: Slot, reason: str, *, hold: bool) -> None:
    """Free the slot: the gateway has nothing under its reference that could be paid. `hold` alerts
    a person.
    """
    _tell(session, slot, NothingSent(reason, hold=hold))


def leave(session: GatewaySession, slot: Slot, error: NotPayable | GatewayError) -> None:
    """Free the slot if nothing can be paid under its reference. Otherwise the next caller
    continues, and the poll sweep asks about it when this caller counts as gone.
    """
    if nothing_was_made(error, may_exist=slot.create_may_have_been_sent):
        give_back(session, slot, error.reason, hold=isinstance(error, NotPayable | Refused))
    else:
        _tell(session, slot, NoAnswer(error.reason))


def not_handed_out(
    session: GatewaySession, slot: Slot, found: PageStatement, why: str
) -> NotPayable:
    """Settle what the gateway made of a page that is not handed out. Returns what to tell the
    caller.
    """
    said, unexpected = found.statement, found.made_by_somebody
    news: News = NothingSent(why, hold=True, statement=said)
    if unexpected:
        lost_memory.notice(session.ports, KNOWN_THERE, seen=slot.restored_at, by=BY)
    if unexpected or page_may_be_paid(said):
        news = Stated(said, maybe_sold=unexpected)
    case = _tell(session, slot, news)
    if case.attempt.status in PAID:
        return AlreadyPaid(f"{case.invoice.reference_id} is paid")
    return NotPayable(MAYBE_PAID + why if case.attempt.status in LIVE else why)


def _tell(session: GatewaySession, slot: Slot, news: News) -> Case:
    request = Settle(slot.key, news, BY, session.shown(), fence=slot.attempt.fence)
    return settle(session.ports, request)


def _write(connection: Connection, slot: Slot, event: Event) -> None:
    key = slot.key
    history.write(connection, [Entry.about(key, event)])
