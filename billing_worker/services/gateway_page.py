"""The gateway's invoice behind a page: created, or found under the reference that we gave it."""

from __future__ import annotations

from billing_worker.domain.errors import GatewayError, NotPayable, NotSent, OutcomeUnknown, Refused
from billing_worker.domain.evidence import Expected, may_be_paid, most_telling
from billing_worker.domain.hosted import HostedStatement, Page
from billing_worker.gateway.port import CallLog, HostedOrder
from billing_worker.services.ports import Ports


def obtained(
    ports: Ports, order: HostedOrder, calls: CallLog, *, may_exist: bool
) -> HostedStatement:
    """Found if a create may have reached the gateway before, created otherwise.

    Raises GatewayError.
    """
    said = find_page(ports, order.reference_id, calls) if may_exist else None
    return said or _created(ports, order, calls, may_exist=may_exist)


def _created(
    ports: Ports, order: HostedOrder, calls: CallLog, *, may_exist: bool
) -> HostedStatement:
    ports.pace.wait()
    try:
        return ports.gateway.create_hosted(order, calls)
    except (OutcomeUnknown, Refused) as error:
        # Only the refusal of a first send is certain: a later one may collide with its twin (§1.2).
        if isinstance(error, Refused) and not may_exist:
            raise
        try:
            found = find_page(ports, order.reference_id, calls)
        except GatewayError as untold:
            raise OutcomeUnknown(error.reason) from untold
        if found is None:
            raise
        return found


def find_page(ports: Ports, reference_id: str, calls: CallLog) -> HostedStatement | None:
    """Ours by reference, whole: of several the one that has come furthest towards money.

    Raises GatewayError.
    """
    ports.pace.wait()
    matches = ports.gateway.find(reference_id, calls)
    if not matches:
        return None
    ports.pace.wait()
    return ports.gateway.look_hosted(most_telling(matches).gateway_id, calls)


def page_to_pay_on(said: HostedStatement, order: HostedOrder) -> Page:
    """Raises NotPayable when it is not the invoice that was ordered, or not a fresh one, or has no
    page.
    """
    expected = Expected(order.reference_id, order.money, test_mode=order.test_mode)
    unfit = may_be_paid(said.statement, expected)
    if unfit is not None:
        raise NotPayable(unfit)
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
