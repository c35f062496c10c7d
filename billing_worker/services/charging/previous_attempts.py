"""Polls ended attempts of an invoice once more before another attempt may pay it.

    with a gateway id     polled by it
    without one           searched by our reference: the create may have arrived unanswered

A late payment pays the invoice (gateway.md §11.6), and a final state at the gateway may still change
(§0 H). An attempt without an id ended before its create was answered. Unless it is proven that these
books have lost no sale, it may even have been sold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from billing_worker.domain.attempt import PAID, Attempt, Origin
from billing_worker.domain.outcome import (
    Case,
    Stated,
    is_overruled,
    not_before,
    was_never_sold,
)
from billing_worker.domain.statement import UNSOLD_STATUSES, Statement, Verdict, judge
from billing_worker.persistence.attempts import CaseKey
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.find_by_reference import Foreign, by_reference
from billing_worker.services.charging.session import GatewaySession
from billing_worker.services.ports import Ports


class Obstacle(StrEnum):
    """The reason why no other attempt may pay the invoice now."""

    PAID = "an earlier attempt turned out paid"
    UNDECIDED = "an earlier attempt is undecided again"
    ELSEWHERE = "the other book that billed this subscription may have been paid for it"
    OPEN = "what an earlier attempt may have left at the gateway has not ended yet"


@dataclass(frozen=True, slots=True)
class TooEarly:
    """The gateway reported news of an earlier attempt, whose money may come until then."""

    until: datetime

    def __str__(self) -> str:
        return f"late money of an earlier attempt may come until {self.until:%Y-%m-%d %H:%M} UTC"


def why_no_other(
    session: GatewaySession,
    key: CaseKey,
    earlier: Iterable[Attempt],
    *,
    origin: Origin,
    patient: bool = True,
) -> Obstacle | TooEarly | None:
    """Poll `earlier`, the ended attempts of the invoice, and return why no other may pay it, or
    None.

    News is settled. Calls without news stay with the session, for the caller's history. Raises
    GatewayError if an attempt cannot be polled.

    `origin`: of the attempt that wants to pay. News may make it wait longer than its claim knew.

    `patient`: wait for the end of an invoice that is found pending only by its reference. Books
    that have lost nothing never sold it, so it cannot be paid, and a customer on a page need not
    wait for it, unless there are more invoices than creates of these books.
    """
    for one in earlier:
        apart = session.apart()
        its_key = replace(key, attempt_id=one.id)
        heard = _heard(apart, its_key, one, patient=patient)
        if not isinstance(heard, Stated):
            session.calls += apart.calls
            if heard is not None:
                return heard
            continue
        case = settle(session.ports, Settle(its_key, heard, session.by, apart.shown()))
        obstacle = _obstacle(session, case, heard.statement, origin)
        if obstacle is not None:
            return obstacle
    return None


def _heard(
    session: GatewaySession, key: CaseKey, one: Attempt, *, patient: bool
) -> Stated | Obstacle | None:
    """Return what the gateway states of an ended attempt; None if nothing there can be paid."""
    if one.gateway_id is not None:
        session.wait()
        asked_at = session.ports.clock.now()
        return Stated(session.poll(one.gateway_id), asked_at)
    asked_at = session.ports.clock.now()
    found = by_reference(session, key, one)
    if isinstance(found, Foreign):
        # Under a reference without a prefix the other book bills the very same debt.
        return Obstacle.ELSEWHERE if session.forgetful and found.may_be_paid else None
    if found is None:
        return None
    if found.statement.status in UNSOLD_STATUSES:
        may_be_paid = patient or session.forgetful or found.count > one.fence
        return Obstacle.OPEN if may_be_paid else None
    return Stated(found.statement, asked_at)


def _obstacle(
    session: GatewaySession, case: Case, statement: Statement, origin: Origin
) -> Obstacle | TooEarly | None:
    """Return why no other attempt may pay beside this one, as it is settled now."""
    if case.attempt.status in PAID:
        return Obstacle.PAID
    if case.attempt.undecided_since is not None or _may_still_pay(case, statement):
        return Obstacle.UNDECIDED
    ports = session.ports
    waits = [not_before(origin, [case.attempt], ports.timings)]
    if not session.remembers:
        waits.append(_as_if_sold(ports, case.attempt))
    earliest = max((until for until in waits if until is not None), default=None)
    if earliest is not None and earliest > ports.clock.now():
        return TooEarly(earliest)
    return None


def _as_if_sold(ports: Ports, attempt: Attempt) -> datetime | None:
    """Return until when its money may come, although these books have not sold it: it may have been
    sold in a time that they have lost. The wait begins when the books see that it has ended.
    """
    since = attempt.unpaid_since if attempt.submitted_at is None else None
    return None if since is None else since + ports.timings.expired_retry


def _may_still_pay(case: Case, statement: Statement) -> bool:
    """Return whether the statement allows a later payment. The stored state may be newer by another
    clock.
    """
    finding = judge(statement, case.expected)
    if finding.verdict not in {Verdict.PENDING, Verdict.CONTRADICTORY}:
        return False
    if is_overruled(case.attempt, finding):
        return False  # A named person recorded that it was not paid, and knew this state.
    return not (was_never_sold(case.attempt) and statement.status in UNSOLD_STATUSES)
