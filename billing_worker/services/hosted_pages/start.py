"""Pages of the gateway on which the customer pays: for a token, or for an open invoice.

    prepare ─▶ create or find ─▶ compare ─▶ COMMIT open ─▶ hand the page out

Creating moves no money, so it may be repeated under its reference after a look-up. The customer must
never have a page that the books do not know. So the commit comes first, under a fence, and a caller
that lost the fence hands out nothing.

A gateway may charge when it creates a page. So everything that it states about an invoice whose page is
not handed out is settled, and what it may have made without an answer is searched by its reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from billing_worker.domain import card as card_rules
from billing_worker.domain import card_setup as rules
from billing_worker.domain.attempt import Attempt
from billing_worker.domain.card_setup import HostedPayment, HostedStatement, HostedStatus, Page
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
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import Case, Context
from billing_worker.domain.subscription import Subscription
from billing_worker.gateway.port import CallLog, CheckoutOrder, TokenisationOrder
from billing_worker.persistence import (
    card_setups,
    cards,
    claims,
    customers,
    history,
    pay_links,
    switches,
)
from billing_worker.persistence.book import identity
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.services.attempts.settle import wire_data
from billing_worker.services.customers import known_as
from billing_worker.services.guards.lost_memory import stands_against_submitting
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
    CheckoutRecord,
    TokenisationRecord,
    parse_checkout,
    parse_tokenisation,
)
from billing_worker.services.ports import Ports

# --- pay links --------------------------------------------------------------------------------


def start_checkout(ports: Ports, record: Mapping[str, Any]) -> dict[str, Any]:
    """Open a page on which the customer pays an unpaid invoice.

    It has the card on file filled in. Where that one cannot be charged, the customer types another
    card, which pays the subscription from then on (`start_tokenisation`).

    `record`: {invoice, return_url?}. Returns {reference_id, gateway_id, invoice, amount, currency,
    action, method, params, pay_path}: a form to submit, and the path of our page that submits it.
    While the page is open, a repeated call returns the same one. Raises BadRecord or InvalidInput;
    AlreadyPaid, also if the gateway charged when the page was created; SlotTaken while another
    attempt is live; NotPayable; GatewayError, and then nothing is open.
    """
    wanted = parse_checkout(record)
    taken = _take_link(ports, wanted)
    if isinstance(taken, dict):
        return taken
    if isinstance(taken, _AnotherCard):
        return start_tokenisation(ports, taken.record)
    calls: CallLog = []
    try:
        slots.require_unpaid(ports, taken, calls)
        order = _checkout_order(ports, taken, wanted.return_url)
        said = obtained(ports, order, calls, may_exist=taken.create_may_have_been_sent)
    except (NotPayable, GatewayError) as error:
        slots.leave(ports, taken, error, calls)
        raise
    try:
        page = named(page_to_pay_on(said, order))
        locked = lock_page(ports.vault, page)
        with ports.store.transaction() as connection:
            slots.open_page(ports, connection, taken, said.statement, locked, page.digest, calls)
    except NotPayable as error:
        raise slots.not_handed_out(ports, taken, said, error.reason, calls) from error
    slots.record(ports, taken)
    return _link_answer(taken.attempt, said.statement.gateway_id, page, wanted.invoice)


_PAY_LINK = "pay-link-"
"""How the reference of a card page begins that was asked for as a pay link."""


@dataclass(frozen=True, slots=True)
class _AnotherCard:
    """No card on file can pay: the customer enters one, on the page that this record orders."""

    record: Mapping[str, Any]


def _take_link(ports: Ports, wanted: CheckoutRecord) -> Slot | _AnotherCard | dict[str, Any]:
    """The invoice's slot, or the answer that was given for the page that is open already."""
    invoice = wanted.invoice
    with ports.store.transaction() as connection:
        subscription, item = slots.locked_owed_invoice(connection, invoice)
        live = item.live
        ours = card_setups.of_attempt(connection, live.id) if live else None
        if ours is not None and ours.reference_id.startswith(_PAY_LINK):
            if ours.status is HostedStatus.OPEN:
                return _open_card_page_again(ports, connection, ours, invoice)
            return _AnotherCard(_for_another_card(connection, item, wanted))
        if live is None and _is_dead(ports, connection, item):
            return _AnotherCard(_for_another_card(connection, item, wanted))
        if live is None or not slots.is_link(live, item.card_id) or live.gateway_id is None:
            return slots.take(ports, connection, subscription, item)
        slots.require_payable(ports, connection, Case(live, item.invoice, subscription))
        locked = pay_links.page_of(connection, live.id)
        if locked is None:
            raise SlotTaken(f"the page of {live.reference_id} has ended and is not settled yet")
        page = unlock_page(ports.vault, locked, partial(pay_links.name_page, connection, live.id))
        return _link_answer(live, live.gateway_id, page, invoice)


def _is_dead(ports: Ports, connection: Connection, item: DueInvoice) -> bool:
    """Whether the default card cannot be charged. A backup is no card that a customer is shown."""
    if item.card_id is None:
        return True
    card = cards.by_ids(connection, [item.card_id])[item.card_id]
    return card_rules.obstacle(card, ports.clock.now()) is not None


def _for_another_card(
    connection: Connection, item: DueInvoice, wanted: CheckoutRecord
) -> dict[str, Any]:
    """The same for as long as no other attempt of the invoice is made."""
    number = item.live.number if item.live else len(item.attempts) + 1
    payer = customers.of_invoice(connection, item.invoice.id)
    return {
        "reference_id": f"{_PAY_LINK}{item.invoice.id}-{number}",
        "customer": {"reference_id": payer.reference_id, "name": payer.name, "email": payer.email},
        "invoice": item.invoice.reference_id,
        "description": payer.description,
        "return_url": wanted.return_url,
    }


def _checkout_order(ports: Ports, slot: Slot, return_url: str | None) -> CheckoutOrder:
    attempt = slot.attempt
    with ports.store.reading() as connection:
        payer = claims.payers(connection, [attempt.id]).get(attempt.id)
    if payer is None:
        raise ConcurrentChange(f"{attempt.reference_id} is not in the books any more")
    return CheckoutOrder(
        reference_id=attempt.reference_id,
        money=attempt.money,
        test_mode=attempt.test_mode,
        card_token=ports.vault.unlock(payer.card_token),
        customer_reference_id=payer.customer_reference,
        customer_name=payer.customer_name,
        customer_email=payer.customer_email,
        description=payer.description,
        book=payer.owner.book,
        create=ports.name_create(),
        return_url=return_url,
    )


def _link_answer(
    attempt: Attempt, gateway_id: str, page: NamedPage, invoice: str
) -> dict[str, Any]:
    return {
        "reference_id": attempt.reference_id,
        "gateway_id": gateway_id,
        "invoice": invoice,
        **_form(attempt.money, page.page),
        "pay_path": page.path,
    }


def _form(money: Money, page: Page) -> dict[str, Any]:
    return {
        "amount": str(money.amount),
        "currency": money.currency,
        "action": page.action,
        "method": page.method,
        "params": dict(page.params),
    }


# --- tokenisation -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _CardPage:
    """A prepared tokenisation, and the slot of the invoice that it pays, if any."""

    payment: HostedPayment
    slot: Slot | None
    may_be_forgotten: bool = False
    """The books were restored from a backup: the page may have been opened in the time that they
    lost.
    """

    @property
    def create_may_have_been_sent(self) -> bool:
        return self.payment.fence > 1 or self.may_be_forgotten


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
    wanted = parse_tokenisation(record)
    taken = _take_card_page(ports, wanted)
    if isinstance(taken, dict):
        return taken
    calls: CallLog = []
    try:
        if taken.slot is not None:
            slots.require_unpaid(ports, taken.slot, calls)
        order = _tokenisation_order(ports, taken.payment, wanted)
        said = obtained(ports, order, calls, may_exist=taken.create_may_have_been_sent)
    except (NotPayable, GatewayError) as error:
        _leave(ports, taken, error, calls)
        raise
    try:
        page = named(page_to_pay_on(said, order))
        _open_card_page(ports, taken, said, page, calls)
    except NotPayable as error:
        raise _not_handed_out(ports, taken, said, error.reason, calls) from error
    return _card_page_answer(taken.payment, said.statement.gateway_id, page, wanted.invoice)


def _take_card_page(ports: Ports, wanted: TokenisationRecord) -> _CardPage | dict[str, Any]:
    with ports.store.transaction() as connection:
        against = stands_against_submitting(ports, switches.read(connection))
        if against is not None:
            raise NotPayable(against)
        known = card_setups.find(connection, wanted.reference_id)
        if known is None:
            return _begin(ports, connection, wanted)
        payment, digest = known
        if digest != wanted.digest:
            raise InvalidInput("reference_id", "is known, with other contents")
        if payment.status is HostedStatus.PREPARED:
            return _continue(ports, connection, payment)
        if payment.status in rules.PAID_SETUPS:
            raise AlreadyPaid(f"{payment.reference_id} is paid")
        if payment.status is not HostedStatus.OPEN:
            raise NotPayable(f"it has ended ({payment.outcome}): use a new reference_id")
        return _open_card_page_again(ports, connection, payment, wanted.invoice)


def _open_card_page_again(
    ports: Ports, connection: Connection, payment: HostedPayment, invoice: str | None
) -> dict[str, Any]:
    """The answer that was given when the page was opened."""
    if payment.attempt_id is not None:
        _require_still_payable(ports, connection, payment)
    locked = card_setups.page_of(connection, payment.id)
    if locked is None or payment.gateway_id is None:
        raise NotPayable("nobody paid on its page in time: it is not settled yet")
    page = unlock_page(ports.vault, locked, partial(card_setups.name_page, connection, payment.id))
    return _card_page_answer(payment, payment.gateway_id, page, invoice)


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


def _continue(ports: Ports, connection: Connection, payment: HostedPayment) -> _CardPage:
    """Take over a prepared page. Its older caller, if still alive, hands out nothing."""
    now = right_now(ports, connection)
    slot = _slot_of(ports, connection, payment) if payment.attempt_id else None
    payment = card_setups.lock(connection, payment.id)
    if payment.status is not HostedStatus.PREPARED:
        raise ConcurrentChange(f"{payment.reference_id} was handed out by another")
    fence = card_setups.take_over(connection, payment, slots.lapses_at(ports, now))
    return _CardPage(replace(payment, fence=fence), slot)


def _slot_of(ports: Ports, connection: Connection, payment: HostedPayment) -> Slot:
    subscription, item = slots.locked_owed_invoice(connection, payment.gateway_reference)
    if item.live is None or item.live.id != payment.attempt_id:
        raise NotPayable("it was given up before it was handed out: use a new reference_id")
    return slots.take(ports, connection, subscription, replace(item, card_id=None))


def _require_still_payable(ports: Ports, connection: Connection, payment: HostedPayment) -> None:
    """Require that the open page may still be paid: its invoice may be paid, cancelled or stopped
    meanwhile.
    """
    subscription, item = slots.locked_owed_invoice(connection, payment.gateway_reference)
    if item.live is None or item.live.id != payment.attempt_id:
        raise NotPayable("its attempt on the invoice has ended: use a new reference_id")
    slots.require_payable(ports, connection, Case(item.live, item.invoice, subscription))


def _tokenisation_order(
    ports: Ports, payment: HostedPayment, wanted: TokenisationRecord
) -> TokenisationOrder:
    return TokenisationOrder(
        reference_id=payment.gateway_reference,
        money=payment.money,
        test_mode=payment.test_mode,
        customer_reference_id=payment.customer_reference,
        customer_name=wanted.customer.name,
        customer_email=wanted.customer.email,
        customer_phone=wanted.phone,
        metadata=wanted.metadata,
        description=wanted.description,
        book=payment.book,
        create=ports.name_create(),
        return_url=wanted.return_url,
    )


def _open_card_page(
    ports: Ports, taken: _CardPage, said: HostedStatement, page: NamedPage, calls: CallLog
) -> None:
    """Commit the page together with the attempt on the invoice that it pays."""
    gateway_id, locked = said.statement.gateway_id, lock_page(ports.vault, page)
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        if taken.slot is not None:
            slots.open_page(ports, connection, taken.slot, said.statement, locked, None, calls)
        elif (other := enter_mode(ports, connection, switches.read(connection))) is not None:
            raise NotPayable(other)
        card_setups.open_page(
            connection,
            taken.payment,
            gateway_id=gateway_id,
            page=locked,
            page_digest=page.digest,
            now=now,
            next_poll_at=now + ports.timings.reconcile_after,
        )
        data = {
            "reference_id": taken.payment.reference_id,
            "customer": taken.payment.customer_reference,
            "gateway_id": gateway_id,
            "calls": wire_data(calls),
        }
        event = Event(EventKind.CARD_PAGE_OPENED, now, BY, data)
        history.write(connection, [_entry(event, taken.slot)])
    if taken.slot is not None:
        slots.record(ports, taken.slot)


def _leave(
    ports: Ports, taken: _CardPage, error: NotPayable | GatewayError, calls: CallLog
) -> None:
    """Give the set-up up if nothing can be paid under its reference. Otherwise the same record may
    be sent again, and the poll sweep asks about it when its caller counts as gone.
    """
    if not nothing_was_made(error, may_exist=taken.create_may_have_been_sent):
        return
    if isinstance(error, NotPayable):
        _give_up(ports, taken, error.reason, calls)
    elif isinstance(error, Refused) and error.http_status not in CONFIGURATION_ANSWERS:
        _give_up(ports, taken, f"gateway refused the page: {error.reason}", calls)


def _not_handed_out(
    ports: Ports, taken: _CardPage, said: HostedStatement, why: str, calls: CallLog
) -> NotPayable:
    """Settle what the gateway made of a page that is not handed out. Returns what to tell the
    caller.
    """
    told = None
    if taken.slot is not None:
        told = slots.not_handed_out(ports, taken.slot, said, why, calls)
    payment = settle_page(ports, taken.payment, said, calls, not_handed_out=why)
    if told is not None:
        return told
    if payment.status in rules.PAID_SETUPS:
        return AlreadyPaid(f"{payment.reference_id} is paid")
    return NotPayable(slots.MAYBE_PAID + why if payment.status is HostedStatus.OPEN else why)


def _give_up(ports: Ports, taken: _CardPage, reason: str, calls: CallLog) -> None:
    with ports.store.transaction() as connection:
        context = Context(right_now(ports, connection), BY, ports.timings)
        payment = card_setups.lock(connection, taken.payment.id)
        if payment.fence != taken.payment.fence or payment.status is not HostedStatus.PREPARED:
            return
        ended = rules.given_up(payment, reason, context)
        card_setups.save(connection, payment, ended.payment, None)
        history.write(connection, [_entry(event, taken.slot) for event in ended.events])
    if taken.slot is not None:
        slots.give_back(ports, taken.slot, reason, calls, hold=True)


def _entry(event: Event, slot: Slot | None) -> Entry:
    if slot is None:
        return Entry(event)
    return Entry(event, slot.key.subscription_id, slot.key.invoice_id, slot.key.attempt_id)


def _card_page_answer(
    payment: HostedPayment, gateway_id: str, page: NamedPage, invoice: str | None
) -> dict[str, Any]:
    return {
        "reference_id": payment.reference_id,
        "gateway_reference": payment.gateway_reference,
        "gateway_id": gateway_id,
        "invoice": invoice,
        **_form(payment.money, page.page),
        "pay_path": page.path,
    }
