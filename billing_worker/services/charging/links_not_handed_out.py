"""Asks by reference about pay links that were not handed out, and about charges that were withdrawn
before their sale.

Their create may have arrived without an answer, and a gateway may charge when a page is created. So
such a link ends only when the gateway has nothing under its reference. A withdrawn charge has
ended, but may have been sold in a time that these books have lost.
"""

from __future__ import annotations

from billing_worker.domain.attempt import SUSPECTED, Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import ConcurrentChange, GatewayError
from billing_worker.domain.outcome import (
    LINK_NEVER_HANDED_OUT,
    NeverHandedOut,
    News,
    NoAnswer,
    NothingSent,
    Stated,
)
from billing_worker.domain.statement import page_may_be_paid
from billing_worker.persistence import claims, switches
from billing_worker.persistence.attempts import CaseKey, LockedCases
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.find_by_reference import (
    MAYBE_SOLD,
    UNPROVEN,
    Foreign,
    Found,
    by_reference,
    later_number,
)
from billing_worker.services.charging.forgotten_charges import suspect_up_to
from billing_worker.services.charging.session import GatewaySession
from billing_worker.services.ports import Ports

BY = "reconcile"


def ask_by_reference(ports: Ports, key: CaseKey) -> str:
    """Ask about a prepared link without a caller, or about an ended attempt without a gateway id.
    Returns the attempt's state.
    """
    with ports.store.transaction() as connection:
        cases = LockedCases(connection, [key])
        if not cases.knows(key):
            raise ConcurrentChange(f"attempt {key.attempt_id} is not in the books any more")
        case = cases.case(key)
        item = claims.lock_one(connection, key.invoice_id)
        elsewhere = item is not None and item.may_be_charged_elsewhere
        forgetful = switches.read(connection).may_be_forgotten(case.invoice) or elsewhere
    session = GatewaySession(ports=ports, by=BY, owner=case.owner, forgetful=forgetful)
    try:
        found = by_reference(session, key, case.attempt)
        if found is None and case.attempt.outcome == SUSPECTED:
            # The time that was lost may have given up this attempt, and charged a later one.
            suspect_up_to(ports, key, later_number(session, key, case.attempt))
        news = _news(case.attempt, found, forgetful=forgetful)
    except GatewayError as error:
        news = NoAnswer(error.reason)
    request = Settle(key, news, BY, session.shown(), fence=case.attempt.fence)
    return str(settle(ports, request).attempt.status)


def _news(attempt: Attempt, found: Found | Foreign | None, *, forgetful: bool) -> News:
    if found is None or isinstance(found, Foreign):
        return NeverHandedOut()
    if found.maybe_sold and forgetful and attempt.status is AttemptStatus.PREPARED:
        return NoAnswer(MAYBE_SOLD)  # A time that was lost, or another book, may have sold it.
    if found.maybe_sold and (forgetful or attempt.origin is not Origin.LINK):
        # The id is not stored, so the next attempt still waits for an end.
        return NeverHandedOut(MAYBE_SOLD if forgetful else UNPROVEN)
    if attempt.status is AttemptStatus.PREPARED and not page_may_be_paid(found.statement):
        return NothingSent(LINK_NEVER_HANDED_OUT, statement=found.statement)
    return Stated(found.statement)
