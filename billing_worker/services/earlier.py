"""Ended attempts of an invoice are asked about once more before another one may pay it.

    known by the gateway's id   look
    known by our reference      find; nobody has told us whether anything was made under it

Late money pays the invoice (gateway.md §11.6), and finals of the gateway are not frozen (§0 H). An
attempt without an id ended before its create was answered; in books that were restored from a
backup it may even have been sold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from billing_worker.domain.attempt import PAID, Attempt
from billing_worker.domain.evidence import (
    UNSOLD_STATUSES,
    Expected,
    Statement,
    Verdict,
    judge,
    most_telling,
)
from billing_worker.domain.settlement import Stated, was_never_sold
from billing_worker.gateway.port import CallLog, WireCall
from billing_worker.persistence.cases import CaseKey
from billing_worker.services.commit import settle
from billing_worker.services.ports import Ports
from billing_worker.services.settle import Settle


class Obstacle(StrEnum):
    """Why no other attempt may pay the invoice now."""

    PAID = "an earlier attempt turned out paid"
    UNDECIDED = "an earlier attempt is undecided again"
    OPEN = "what an earlier attempt may have left at the gateway has not ended yet"


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks: for the history, and for the shared request cap.

    `patient`: what is found pending under a reference alone is left to end. By books that have
    forgotten nothing it was never sold, so nobody can pay it, and whoever is watched by a customer
    need not wait.
    """

    by: str
    wait: Callable[[], object]  # for the turn of one request
    shown: Callable[[CallLog], tuple[WireCall, ...]]
    patient: bool


def why_no_other(
    ports: Ports, key: CaseKey, earlier: Iterable[Attempt], asking: Asking, calls: CallLog
) -> Obstacle | None:
    """Settles what it hears about `earlier`, the ended attempts of the invoice of `key`. Calls that
    found nothing are added to `calls`: the caller tells of them. Raises GatewayError when an
    attempt cannot be asked about.
    """
    for one in earlier:
        heard: CallLog = []
        asking.wait()
        asked_at = ports.clock.now()
        if one.gateway_id is not None:
            statement = ports.gateway.look(one.gateway_id, heard)
        else:
            matches = ports.gateway.find(one.reference_id, heard)
            if not matches:
                calls += heard
                continue
            chosen = most_telling(matches)
            asking.wait()
            statement = ports.gateway.look(chosen.gateway_id, heard)
            if statement.status in UNSOLD_STATUSES:
                # Before a sale and during one it shows the same (§0 A).
                calls += heard
                if asking.patient:
                    return Obstacle.OPEN
                continue
        news = Stated(statement, asked_at)
        case = settle(
            ports, Settle(replace(key, attempt_id=one.id), news, asking.by, asking.shown(heard))
        )
        if case.attempt.status in PAID:
            return Obstacle.PAID
        if case.attempt.undecided_since is not None or _may_still_pay(case.attempt, statement):
            return Obstacle.UNDECIDED
    return None


def _may_still_pay(attempt: Attempt, statement: Statement) -> bool:
    """Judged by the statement itself: what is settled may have been newer by another's clock."""
    expected = Expected(attempt.reference_id, attempt.money, test_mode=attempt.test_mode)
    if judge(statement, expected).verdict not in {Verdict.PENDING, Verdict.CONTRADICTORY}:
        return False
    return not (was_never_sold(attempt) and statement.status in UNSOLD_STATUSES)
