"""The gateway's invoice behind a page: created, or found under the reference that we gave it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from billing_worker.domain.card_setup import HostedStatement, Page
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
from billing_worker.gateway.port import CallLog, HostedOrder
from billing_worker.services.ports import Ports

CONFIGURATION_ANSWERS: Final = frozenset({401, 403})
"""Our credentials or permissions: the same page goes ahead once they are mended."""


def obtained(
    ports: Ports, order: HostedOrder, calls: CallLog, *, may_exist: bool
) -> HostedStatement:
    """Found if a create may have reached the gateway before, created otherwise.

    Raises GatewayError.
    """
    said = find_page(ports, _expected(order), calls) if may_exist else None
    return said or _created(ports, order, calls, may_exist=may_exist)


def _created(
    ports: Ports, order: HostedOrder, calls: CallLog, *, may_exist: bool
) -> HostedStatement:
    ports.pace.wait()
    sent_at = ports.clock.now()
    try:
        answered = ports.gateway.create_hosted(order, calls)
    except (OutcomeUnknown, Refused) as error:
        if error.http_status in CONFIGURATION_ANSWERS:
            raise
        try:
            found = find_page(ports, _expected(order), calls)
        except GatewayError as untold:
            raise OutcomeUnknown(error.reason) from untold
        if found is None and (isinstance(error, Refused) or error.reads_like_a_refusal):
            # No twin that it could have collided with: the refusal is meant, whatever its shape.
            raise Refused(error.reason, http_status=error.http_status or 0) from None
        if found is None:
            raise
        strange = not found.alone or _is_strange(found.statement, order, error)
        return _marked(found, order, strange=strange and not may_exist)
    strange = is_of_another_create(answered.statement, order.create, sent_at)
    return _marked(answered, order, strange=strange and not may_exist)


def _is_strange(found: Statement, order: HostedOrder, error: OutcomeUnknown | Refused) -> bool:
    """Whether what is found after a failed create is not its work: a 4xx may mean a duplicate."""
    return error.is_client_error if found.create is None else found.create != order.create


def _marked(said: HostedStatement, order: HostedOrder, *, strange: bool) -> HostedStatement:
    """An invoice of another book is strange in its own way: it shows no loss of memory."""
    ours = foreign(said.statement, _expected(order)) is None
    return replace(said, made_by_somebody=strange and ours)


def find_page(ports: Ports, expected: Expected, calls: CallLog) -> HostedStatement | None:
    """Ours by reference, whole: of several the one that has come furthest towards money. One of
    another book or customer only where there is none of ours.

    Raises GatewayError.
    """
    ports.pace.wait()
    matches = ports.gateway.find(expected.reference_id, calls)
    found = None
    while matches:
        chosen = most_telling(matches)
        ports.pace.wait()
        found = ports.gateway.poll_hosted(chosen.gateway_id, calls)
        if foreign(found.statement, expected) is None:
            return replace(found, alone=len(matches) == 1)
        matches = [one for one in matches if one is not chosen]
    return found


def _expected(order: HostedOrder) -> Expected:
    return Expected(
        order.reference_id,
        order.money,
        test_mode=order.test_mode,
        owner=Owner(order.book, order.customer_reference_id),
    )


def page_to_pay_on(said: HostedStatement, order: HostedOrder) -> Page:
    """Raises NotPayable when it is not the invoice that was ordered, or not a fresh one, or has no
    page.
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
    """Whether the gateway has no invoice that could be paid, for certain. `may_exist`: an earlier
    caller may have created it.
    """
    if isinstance(error, Refused):  # only said where no twin was found
        return True
    return not may_exist and isinstance(error, NotSent | NotPayable)
