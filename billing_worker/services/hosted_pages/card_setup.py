"""Card setups: pages of the gateway on which the customer pays once, and the card gets a token.

    prepare ─▶ create or find ─▶ compare ─▶ COMMIT open ─▶ hand the page out

The rules of `pay_link` hold here too. Where the setup also pays an invoice, it takes the invoice's
slot as a pay link does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from billing_worker.domain import card_setup as rules
from billing_worker.domain.card_setup import CardSetup, CardSetupStatus, PageStatement
from billing_worker.domain.errors import (
    AlreadyPaid,
    ConcurrentChange,
    GatewayError,
    InvalidInput,
    NotPayable,
    Refused,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.outcome import Case, Context
from billing_worker.domain.subscription import Subscription
from billing_worker.gateway.port import TokenisationOrder
from billing_worker.persistence import (
    card_setups,
    history,
    switches,
)
from billing_worker.persistence.book import identity
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.services.attempts.settle import wire_data
from billing_worker.services.charging.session import GatewaySession
from billing_worker.services.customers import known_as
from billing_worker.services.guards.lost_memory import once_remembered
from billing_worker.services.guards.refusals import enter_mode, right_now
from billing_worker.services.hosted_pages import invoice_slot as slots
from billing_worker.services.hosted_pages.gateway_page import (
    CONFIGURATION_ANSWERS,
    nothing_was_made,
    obtained,
    page_to_pay_on,
)
from billing_worker.services.hosted_pages.invoice_slot import BY, Slot
from billing_worker.services.hosted_pages.page_address import (
    NamedPage,
    lock_page,
    named,
    unlock_page,
)
from billing_worker.services.hosted_pages.poll import settle_page
from billing_worker.services.hosted_pages.records import (
    TokenisationRecord,
    parse_tokenisation,
)
from billing_worker.services.ports import Ports


@dataclass(frozen=True, slots=True)
class _CardPage:
    """A prepared tokenisation, and the slot of the invoice that it pays, if any."""

    setup: CardSetup
    slot: Slot | None
    may_be_forgotten: bool = False
    """The books were restored from a backup: the page may have been opened in the time that they
    lost.
    """

    @property
    def create_may_have_been_sent(self) -> bool:
        return self.setup.fence > 1 or self.may_be_forgotten


def start_tokenisation(ports: Ports, record: Mapping[str, Any]) -> dict[str, Any]:
    """Open a page on which the customer pays and we get a token for the card.

    `record`: {reference_id, customer: {reference_id, name?, email?}, phone?, amount, currency,
    invoice?, description?, return_url?}. With `invoice` the payment is booked to it, and amount and
    currency may be left out. Returns {reference_id, gateway_reference, gateway_id, invoice, amount,
    currency, action, method, params, pay_path}.

    Idempotent by `reference_id`: asked again, it looks for what it may have created before, and
    returns the page that is open. Raises BadRecord or InvalidInput; SlotTaken while another attempt
    for the invoice is live; AlreadyPaid, also when the gateway charged for the page as it was
    created; NotPayable when the invoice may not be paid now, or this reference is used up;
    GatewayError, and then the same record may be sent again.
    """
    return open_card_page(ports, parse_tokenisation(record))


def open_card_page(ports: Ports, wanted: TokenisationRecord) -> dict[str, Any]:
    """As `start_tokenisation` does, for a record that has been read."""
    taken = once_remembered(ports, lambda connection: _take_card_page(ports, connection, wanted))
    if isinstance(taken, dict):
        return taken
    session = _session(ports, taken)
    try:
        if taken.slot is not None:
            slots.require_unpaid(session, taken.slot)
        order = _tokenisation_order(ports, taken.setup, wanted)
        said = obtained(session, order, may_exist=taken.create_may_have_been_sent)
    except (NotPayable, GatewayError) as error:
        _leave(session, taken, error)
        raise
    try:
        page = named(page_to_pay_on(said, order))
        _commit_card_page(session, taken, said, page)
    except NotPayable as error:
        raise _not_handed_out(session, taken, said, error.reason) from error
    return _card_page_answer(taken.setup, said.statement.gateway_id, page, wanted.invoice)


def _session(ports: Ports, taken: _CardPage) -> GatewaySession:
    if taken.slot is not None:
        return slots.session_of(ports, taken.slot)
    owner = taken.setup.whose.owner
    return GatewaySession(ports=ports, by=BY, owner=owner, forgetful=taken.may_be_forgotten)


def _take_card_page(
    ports: Ports, connection: Connection, wanted: TokenisationRecord
) -> _CardPage | dict[str, Any]:
    known = card_setups.find(connection, wanted.reference_id)
    if known is None:
        return _begin(ports, connection, wanted)
    setup, digest = known
    if digest != wanted.digest:
        raise InvalidInput("reference_id", "is known, with other contents")
    if setup.status is CardSetupStatus.PREPARED:
        return _continue(ports, connection, setup)
    if setup.status in rules.PAID_SETUPS:
        raise AlreadyPaid(f"{setup.reference_id} is paid")
    if setup.status is not CardSetupStatus.OPEN:
        raise NotPayable(f"it has ended ({setup.outcome}): use a new reference_id")
    return open_again(ports, connection, setup, wanted.invoice)


def open_again(
    ports: Ports, connection: Connection, setup: CardSetup, invoice: str | None
) -> dict[str, Any]:
    """The answer that was given when the page was opened."""
    if setup.attempt_id is not None:
        _require_still_payable(ports, connection, setup)
    locked = card_setups.page_of(connection, setup.id)
    if locked is None or setup.gateway_id is None:
        raise NotPayable("nobody paid on its page in time: it is not settled yet")
    page = unlock_page(ports.vault, locked, partial(card_setups.name_page, connection, setup.id))
    return _card_page_answer(setup, setup.gateway_id, page, invoice)


def _begin(ports: Ports, connection: Connection, wanted: TokenisationRecord) -> _CardPage:
    now = right_now(ports, connection)
    subscription, item = _invoice_to_pay(connection, wanted) or (None, None)
    person = wanted.customer
    customer_id = known_as(connection, [person], BY, now)[person.reference_id]
    slot = slots.take(ports, connection, subscription, item) if subscription and item else None
    money = item.invoice.money if item else wanted.money
    if money is None:
        raise InvalidInput("amount", "is missing")
    try:
        card_setups.add(
            connection,
            {
                "reference_id": wanted.reference_id,
                "gateway_reference": slot.attempt.reference_id
                if slot
                else identity.read(connection).prefix + wanted.reference_id,
                "record_digest": wanted.digest,
                "customer_id": customer_id,
                "attempt_id": slot.attempt.id if slot else None,
                "amount_minor": money.minor,
                "currency": money.currency,
                "test_mode": ports.test_mode,
                "created_at": now,
                "next_poll_at": slots.lapses_at(ports, now),
            },
        )
    except IntegrityError:
        raise ConcurrentChange(f"{wanted.reference_id} is being prepared by another") from None
    found = card_setups.find(connection, wanted.reference_id)
    assert found is not None  # noqa: S101 - written above
    restored = switches.read(connection).have_forgotten
    return _CardPage(found[0], slot, may_be_forgotten=restored and slot is None)


def _invoice_to_pay(
    connection: Connection, wanted: TokenisationRecord
) -> tuple[Subscription, DueInvoice] | None:
    """Lock and return the open invoice, to be paid with a new card."""
    if wanted.invoice is None:
        return None
    subscription, item = slots.locked_owed_invoice(connection, wanted.invoice)
    owner = card_setups.customer_reference(connection, subscription.customer_id)
    if owner != wanted.customer.reference_id:
        raise InvalidInput("invoice", "belongs to another customer")
    if wanted.money not in {None, item.invoice.money}:
        raise InvalidInput("amount", f"the invoice asks for {item.invoice.money}")
    return subscription, replace(item, card_id=None)


def _continue(ports: Ports, connection: Connection, setup: CardSetup) -> _CardPage:
    """Take over a prepared page. Its older caller, if still alive, hands out nothing."""
    now = right_now(ports, connection)
    slot = _slot_of(ports, connection, setup) if setup.attempt_id else None
    setup = card_setups.lock(connection, setup.id)
    if setup.status is not CardSetupStatus.PREPARED:
        raise ConcurrentChange(f"{setup.reference_id} was handed out by another")
    fence = card_setups.take_over(connection, setup, slots.lapses_at(ports, now))
    return _CardPage(replace(setup, fence=fence), slot)


def _slot_of(ports: Ports, connection: Connection, setup: CardSetup) -> Slot:
    subscription, item = slots.locked_owed_invoice(connection, setup.gateway_reference)
    if item.live is None or item.live.id != setup.attempt_id:
        raise NotPayable("it was given up before it was handed out: use a new reference_id")
    return slots.take(ports, connection, subscription, replace(item, card_id=None))


def _require_still_payable(ports: Ports, connection: Connection, setup: CardSetup) -> None:
    """Require that the open page may still be paid: its invoice may be paid, cancelled or stopped
    meanwhile.
    """
    subscription, item = slots.locked_owed_invoice(connection, setup.gateway_reference)
    if item.live is None or item.live.id != setup.attempt_id:
        raise NotPayable("its attempt on the invoice has ended: use a new reference_id")
    slots.require_payable(ports, connection, Case(item.live, item.invoice, subscription))


def _tokenisation_order(
    ports: Ports, setup: CardSetup, wanted: TokenisationRecord
) -> TokenisationOrder:
    return TokenisationOrder(
        reference_id=setup.gateway_reference,
        money=setup.money,
        test_mode=setup.test_mode,
        customer_reference_id=setup.customer_reference,
        customer_name=wanted.customer.name,
        customer_email=wanted.customer.email,
        customer_phone=wanted.phone,
        metadata=wanted.metadata,
        description=wanted.description,
        book=setup.book,
        create=ports.name_create(),
        return_url=wanted.return_url,
    )


def _commit_card_page(
    session: GatewaySession, taken: _CardPage, said: PageStatement, page: NamedPage
) -> None:
    """Commit the page together with the attempt on the invoice that it pays."""
    ports = session.ports
    gateway_id, locked = said.statement.gateway_id, lock_page(ports.vault, page)
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        if taken.slot is not None:
            slots.open_page(session, connection, taken.slot, said.statement, locked, None)
        elif (other := enter_mode(ports, connection, switches.read(connection))) is not None:
            raise NotPayable(other)
        card_setups.open_page(
            connection,
            taken.setup,
            gateway_id=gateway_id,
            page=locked,
            page_digest=page.digest,
            now=now,
            next_poll_at=now + ports.timings.reconcile_after,
        )
        data = {
            "reference_id": taken.setup.reference_id,
            "customer": taken.setup.customer_reference,
            "gateway_id": gateway_id,
            "calls": wire_data(session.shown()),
        }
        event = Event(EventKind.CARD_PAGE_OPENED, now, BY, data)
        history.write(connection, [_entry(event, taken.slot)])
    if taken.slot is not None:
        slots.record(ports, taken.slot)


def _leave(session: GatewaySession, taken: _CardPage, error: NotPayable | GatewayError) -> None:
    """Give the set-up up if nothing can be paid under its reference. Otherwise the same record may
    be sent again, and the poll sweep asks about it when its caller counts as gone.
    """
    if not nothing_was_made(error, may_exist=taken.create_may_have_been_sent):
        return
    if isinstance(error, NotPayable):
        _give_up(session, taken, error.reason)
    elif isinstance(error, Refused) and error.http_status not in CONFIGURATION_ANSWERS:
        _give_up(session, taken, f"gateway refused the page: {error.reason}")


def _not_handed_out(
    session: GatewaySession, taken: _CardPage, said: PageStatement, why: str
) -> NotPayable:
    """Settle what the gateway made of a page that is not handed out. Returns what to tell the
    caller.
    """
    told = None
    if taken.slot is not None:
        told = slots.not_handed_out(session, taken.slot, said, why)
    setup = settle_page(session, taken.setup, said, not_handed_out=why)
    if told is not None:
        return told
    if setup.status in rules.PAID_SETUPS:
        return AlreadyPaid(f"{setup.reference_id} is paid")
    return NotPayable(slots.MAYBE_PAID + why if setup.status is CardSetupStatus.OPEN else why)


def _give_up(session: GatewaySession, taken: _CardPage, reason: str) -> None:
    ports = session.ports
    with ports.store.transaction() as connection:
        context = Context(right_now(ports, connection), BY, ports.timings)
        setup = card_setups.lock(connection, taken.setup.id)
        if setup.fence != taken.setup.fence or setup.status is not CardSetupStatus.PREPARED:
            return
        ended = rules.given_up(setup, reason, context)
        card_setups.save(connection, setup, ended.setup, None)
        history.write(connection, [_entry(event, taken.slot) for event in ended.events])
    if taken.slot is not None:
        slots.give_back(session, taken.slot, reason, hold=True)


def _entry(event: Event, slot: Slot | None) -> Entry:
    if slot is None:
        return Entry(event)
    return Entry(event, slot.key.subscription_id, slot.key.invoice_id, slot.key.attempt_id)


def _card_page_answer(
    setup: CardSetup, gateway_id: str, page: NamedPage, invoice: str | None
) -> dict[str, Any]:
    return {
        "reference_id": setup.reference_id,
        "gateway_reference": setup.gateway_reference,
        "gateway_id": gateway_id,
        "invoice": invoice,
        **page.form(setup.money),
    }
