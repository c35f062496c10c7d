"""Pay links that were given to nobody, and charges that were withdrawn before these books sold them:
what the gateway has made of them is asked by reference.

Their create may have arrived without an answer, and a gateway may charge for a page as it is
created. So such a link ends only by the gateway's word that it has nothing under the reference.
A withdrawn charge has ended; a life that these books have forgotten may have sold it.
"""

from __future__ import annotations

from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
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
from billing_worker.gateway.port import CallLog
from billing_worker.persistence import claims, switches
from billing_worker.persistence.attempts import CaseKey, LockedCases
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.find_by_reference import (
    MAYBE_SOLD,
    UNPROVEN,
    Asking,
    Foreign,
    Found,
    by_reference,
)
from billing_worker.services.ports import Ports

BY = "reconcile"


def ask_by_reference(ports: Ports, key: CaseKey) -> str:
    """Ask about a link that is prepared and whose caller is gone, or about an attempt that has ended,
    whose id at the gateway nobody has told us. Returns the attempt's state.
    """
    with ports.store.transaction() as connection:
        cases = LockedCases(connection, [key])
        if not cases.knows(key):
            raise ConcurrentChange(f"attempt {key.attempt_id} is not in the books any more")
        case = cases.case(key)
        item = claims.lock_one(connection, key.invoice_id)
        elsewhere = item is not None and item.may_be_charged_elsewhere
        forgetful = switches.read(connection).may_be_forgotten(case.invoice) or elsewhere
    calls: CallLog = []
    asking = Asking(BY, ports.pace.wait, tuple, forgetful=forgetful, owner=case.owner)
    try:
        found = by_reference(ports, key, case.attempt, asking, calls)
        news = _news(case.attempt, found, asking)
    except GatewayError as error:
        news = NoAnswer(error.reason)
    request = Settle(key, news, BY, tuple(calls), fence=case.attempt.fence)
    return str(settle(ports, request).attempt.status)


def _news(attempt: Attempt, found: Found | Foreign | None, asking: Asking) -> News:
    if found is None or isinstance(found, Foreign):
        return NeverHandedOut()
    if found.maybe_sold and asking.forgetful and attempt.status is AttemptStatus.PREPARED:
        return NoAnswer(MAYBE_SOLD)  # Another life, or another book, may have.
    if found.maybe_sold and (asking.forgetful or attempt.origin is not Origin.LINK):
        # Its id is not kept: the next attempt goes on waiting for the end of what has none.
        return NeverHandedOut(MAYBE_SOLD if asking.forgetful else UNPROVEN)
    if attempt.status is AttemptStatus.PREPARED and not page_may_be_paid(found.statement):
        return NothingSent(LINK_NEVER_HANDED_OUT, statement=found.statement)
    return Stated(found.statement)
