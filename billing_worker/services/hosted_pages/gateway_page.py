"""The gateway's invoice of a page: created, or found by our reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from billing_worker.domain.card_setup import Page, PageStatement
from billing_worker.domain.errors import GatewayError, NotPayable, NotSent, OutcomeUnknown, Refused
from billing_worker.domain.outcome import MADE_BY_SOMEBODY
from billing_worker.domain.statement import (
    Expected,
    Owner,
    Statement,
    foreign,
    is_of_another_create,
    may_be_paid,
    most_telling,
)
from billing_worker.gateway.port import PageOrder
from billing_worker.services.charging.session import GatewaySession

CONFIGURATION_ANSWERS: Final = frozenset({401, 403})
"""These answers mean our credentials or permissions: the same page continues when they are
corrected.
"""


def obtained(session: GatewaySession, order: PageOrder, *, may_exist: bool) -> PageStatement:
    """Return the invoice: found if an earlier create may have reached the gateway, created
    otherwise.

    Raises GatewayError.
    """
    said = find_page(session, _expected(order)) if may_exist else None
    return said or _created(session, order, may_exist=may_exist)


def _created(session: GatewaySession, order: PageOrder, *, may_exist: bool) -> PageStatement:
    session.wait()
    sent_at = session.ports.clock.now()
    try:
        answered = session.create_page(order)
    except (OutcomeUnknown, Refused) as error:
        if error.http_status in CONFIGURATION_ANSWERS:
            raise
        try:
            found = find_page(session, _expected(order))
        except GatewayError as untold:
            raise OutcomeUnknown(error.reason) from untold
        if found is None and (isinstance(error, Refused) or error.reads_like_a_refusal):
            # No invoice exists that could be a duplicate: the refusal is final, whatever its shape.
            raise Refused(error.reason, http_status=error.http_status or 0) from None
        if found is None:
            raise
        strange = not found.alone or _is_strange(found.statement, order, error)
        return _marked(found, order, strange=strange and not may_exist)
    strange = is_of_another_create(answered.statement, order.create, sent_at)
    return _marked(answered, order, strange=strange and not may_exist)


def _is_strange(found: Statement, order: PageOrder, error: OutcomeUnknown | Refused) -> bool:
    """Return whether an invoice that is found after a failed create is not its work: a 4xx may mean
    a duplicate.
    """
    return error.is_client_error if found.create is None else found.create != order.create


def _marked(said: PageStatement, order: PageOrder, *, strange: bool) -> PageStatement:
    """Mark an invoice that this create did not make. One of another book shows no loss of data."""
    ours = foreign(said.statement, _expected(order)) is None
    return replace(said, made_by_somebody=strange and ours)


def find_page(session: GatewaySession, expected: Expected) -> PageStatement | None:
    """Return our invoice with this reference, complete; of several the one that is nearest to a
    payment.

    Returns one of another book or customer only if there is none of ours. Raises GatewayError.
    """
    session.wait()
    matches = session.find(expected.reference_id)
    found = None
    while matches:
        chosen = most_telling(matches)
        session.wait()
        found = session.poll_page(chosen.gateway_id)
        if foreign(found.statement, expected) is None:
            return replace(found, alone=len(matches) == 1)
        matches = [one for one in matches if one is not chosen]
    return found


def _expected(order: PageOrder) -> Expected:
    return Expected(
        order.reference_id,
        order.money,
        test_mode=order.test_mode,
        owner=Owner(order.book, order.customer_reference_id),
    )


def page_to_pay_on(said: PageStatement, order: PageOrder) -> Page:
    """Return the page. Raises NotPayable if the invoice is not the ordered one, is not new, or has
    no page.
    """
    unfit = may_be_paid(said.statement, _expected(order))
    if unfit is not None:
        raise NotPayable(unfit)
    if said.made_by_somebody:
        raise NotPayable(MADE_BY_SOMEBODY)
    if said.page is None:
        raise NotPayable("the gateway names no page to pay on")
    return said.page


def nothing_was_made(error: NotPayable | GatewayError, *, may_exist: bool) -> bool:
    """Return whether the gateway certainly has no invoice that could be paid.

    `may_exist`: an earlier caller may have created it.
    """
    if isinstance(error, Refused):  # only returned if no duplicate was found
        return True
    return not may_exist and isinstance(error, NotSent | NotPayable)
