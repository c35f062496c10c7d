"""Ended attempts of an invoice are asked about once more before another one may pay it.

    known by the gateway's id   look
    known by our reference      find; nobody has told us whether anything was made under it

Late money pays the invoice (gateway.md §11.6), and finals of the gateway are not frozen (§0 H). An
attempt without an id ended before its create was answered. Unless it is proven that these books have
forgotten no sale, it may even have been sold.
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
from billing_worker.gateway.port import CallLog
from billing_worker.persistence.attempts import CaseKey
from billing_worker.services.attempts.commit import settle
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.charging.find_by_reference import Asking, Foreign, by_reference
from billing_worker.services.ports import Ports


class Obstacle(StrEnum):
    """Why no other attempt may pay the invoice now."""

    PAID = "an earlier attempt turned out paid"
    UNDECIDED = "an earlier attempt is undecided again"
    OPEN = "what an earlier attempt may have left at the gateway has not ended yet"


@dataclass(frozen=True, slots=True)
class TooEarly:
    """The gateway has told something new of an earlier attempt, whose money may come until then."""

    until: datetime

    def __str__(self) -> str:
        return f"late money of an earlier attempt may come until {self.until:%Y-%m-%d %H:%M} UTC"


def why_no_other(
    ports: Ports,
    key: CaseKey,
    earlier: Iterable[Attempt],
    asking: Asking,
    calls: CallLog,
    *,
    origin: Origin,
    patient: bool = True,
) -> Obstacle | TooEarly | None:
    """Settles what it hears about `earlier`, the ended attempts of the invoice of `key`. Calls that
    found nothing are added to `calls`: the caller tells of them. Raises GatewayError when an
    attempt cannot be asked about.

    `origin`: of the attempt that wants to pay. What is heard now may make it wait longer than its
    claim knew.

    `patient`: what is found pending under a reference alone is left to end. By books that have
    forgotten nothing it was never sold, so nobody can pay it, and whoever is watched by a customer
    need not wait; unless there are more invoices than creates that these books may have sent.
    """
    for one in earlier:
        heard: CallLog = []
        asked_at = ports.clock.now()
        its_key = replace(key, attempt_id=one.id)
        if one.gateway_id is not None:
            asking.wait()
            asked_at = ports.clock.now()
            statement = ports.gateway.poll(one.gateway_id, heard)
        else:
            found = by_reference(ports, its_key, one, asking, heard)
            if found is None or isinstance(found, Foreign):
                calls += heard
                continue
            if found.statement.status in UNSOLD_STATUSES:
                calls += heard
                if patient or asking.forgetful or found.count > one.fence:
                    return Obstacle.OPEN
                continue
            statement = found.statement
        news = Stated(statement, asked_at)
        case = settle(ports, Settle(its_key, news, asking.by, asking.shown(heard)))
        if case.attempt.status in PAID:
            return Obstacle.PAID
        if case.attempt.undecided_since is not None or _may_still_pay(case, statement):
            return Obstacle.UNDECIDED
        waits = [not_before(origin, [case.attempt], ports.timings)]
        if not asking.remembers:
            waits.append(_as_if_sold(ports, case.attempt))
        earliest = max((until for until in waits if until is not None), default=None)
        if earliest is not None and earliest > ports.clock.now():
            return TooEarly(earliest)
    return None


def _as_if_sold(ports: Ports, attempt: Attempt) -> datetime | None:
    """Return until when its money may come, although these books have not sold it: a life that they
    have forgotten may have. The wait begins when they see that it has ended.
    """
    since = attempt.unpaid_since if attempt.submitted_at is None else None
    return None if since is None else since + ports.timings.expired_retry


def _may_still_pay(case: Case, statement: Statement) -> bool:
    """Judged by the statement itself: what is settled may have been newer by another's clock."""
    finding = judge(statement, case.expected)
    if finding.verdict not in {Verdict.PENDING, Verdict.CONTRADICTORY}:
        return False
    if is_overruled(case.attempt, finding):
        return False  # A named person has said that it was not paid, and knew that much.
    return not (was_never_sold(case.attempt) and statement.status in UNSOLD_STATUSES)
