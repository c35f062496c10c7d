"""Pay links: pages of the gateway on which the customer pays an open invoice.

    take the invoice's slot ─▶ create or find ─▶ compare ─▶ COMMIT open ─▶ hand the page out

Creating moves no money, so it may be repeated under its reference after a look-up. The customer must
never have a page that the books do not know. So the commit comes first, under a fence, and a caller
that lost the fence hands out nothing.

A gateway may charge when it creates a page. So everything that it states about an invoice whose page is
not handed out is settled, and what it may have made without an answer is searched by its reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from billing_worker.domain import card as card_rules
from billing_worker.domain.attempt import Attempt
from billing_worker.domain.card_setup import CardSetupStatus
from billing_worker.domain.errors import (
    ConcurrentChange,
    GatewayError,
    NotPayable,
    SlotTaken,
)
from billing_worker.domain.outcome import Case
from billing_worker.gateway.port import CheckoutOrder
from billing_worker.persistence import (
    card_setups,
    cards,
    claims,
    customers,
    pay_links,
)
from billing_worker.persistence.claims import DueInvoice
from billing_worker.services.charging.session import card_token
from billing_worker.services.guards.lost_memory import once_remembered
from billing_worker.services.hosted_pages import invoice_slot as slots
from billing_worker.services.hosted_pages.card_setup import open_again, open_card_page
from billing_worker.services.hosted_pages.gateway_page import (
    obtained,
    page_to_pay_on,
)
from billing_worker.services.hosted_pages.invoice_slot import Slot
from billing_worker.services.hosted_pages.page_address import (
    NamedPage,
    lock_page,
    named,
    unlock_page,
)
from billing_worker.services.hosted_pages.records import (
    CheckoutRecord,
    TokenisationRecord,
    parse_checkout,
)
from billing_worker.services.import_records.subscription import CustomerRecord, digest_of
from billing_worker.services.ports import Ports


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
    taken = once_remembered(ports, lambda connection: _take_link(ports, connection, wanted))
    if isinstance(taken, dict):
        return taken
    if isinstance(taken, _AnotherCard):
        return open_card_page(ports, taken.record)
    session = slots.session_of(ports, taken)
    try:
        slots.require_unpaid(session, taken)
        order = _checkout_order(ports, taken, wanted.return_url)
        said = obtained(session, order, may_exist=taken.create_may_have_been_sent)
    except (NotPayable, GatewayError) as error:
        slots.leave(session, taken, error)
        raise
    try:
        page = named(page_to_pay_on(said, order))
        locked = lock_page(ports.vault, page)
        with ports.store.transaction() as connection:
            slots.open_page(session, connection, taken, said.statement, locked, page.digest)
    except NotPayable as error:
        raise slots.not_handed_out(session, taken, said, error.reason) from error
    slots.record(ports, taken)
    return _link_answer(taken.attempt, said.statement.gateway_id, page, wanted.invoice)


_PAY_LINK = "pay-link-"
"""How the reference of a card page begins that was asked for as a pay link."""


@dataclass(frozen=True, slots=True)
class _AnotherCard:
    """No card on file can pay: the customer enters one, on the page that this record orders."""

    record: TokenisationRecord


def _take_link(
    ports: Ports, connection: Connection, wanted: CheckoutRecord
) -> Slot | _AnotherCard | dict[str, Any]:
    """The invoice's slot, or the answer that was given for the page that is open already."""
    invoice = wanted.invoice
    subscription, item = slots.locked_owed_invoice(connection, invoice)
    live = item.live
    ours = card_setups.of_attempt(connection, live.id) if live else None
    if ours is not None and ours.reference_id.startswith(_PAY_LINK):
        if ours.status is CardSetupStatus.OPEN:
            return open_again(ports, connection, ours, invoice)
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
) -> TokenisationRecord:
    """The same order for as long as no other attempt of the invoice is made, whatever is known of the
    customer by then.
    """
    number = item.live.number if item.live else len(item.attempts) + 1
    payer = customers.of_invoice(connection, item.invoice.id)
    reference = f"{_PAY_LINK}{item.invoice.id}-{number}"
    return TokenisationRecord(
        reference_id=reference,
        customer=CustomerRecord(payer.reference_id, payer.name, payer.email),
        phone=None,
        money=None,
        invoice=item.invoice.reference_id,
        description=payer.description,
        return_url=wanted.return_url,
        metadata={},
        digest=digest_of(reference),
    )


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
        card_token=card_token(ports, payer),
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
        **page.form(attempt.money),
    }
