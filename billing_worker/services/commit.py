"""The transaction in which attempts move: what was heard is settled, what is to be sold is armed.

Callers that wait at the same time share one. News goes first: an attempt is armed by what is known
then, a decline or a late payment that came in the same moment included.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import structlog

from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.settlement import Case
from billing_worker.persistence import history
from billing_worker.persistence.cases import LockedCases
from billing_worker.services import lost_memory
from billing_worker.services.arm import Arm, Armed, NotArmed, arm_all, card_ids
from billing_worker.services.ports import Ports
from billing_worker.services.settle import Settle, Settled, settle_all
from billing_worker.services.silence import worth_saying

log = structlog.get_logger()


def settle(ports: Ports, request: Settle) -> Case:
    """Apply one piece of news and return the case as it stands now.

    Raises ConcurrentChange when another claim owns the attempt, CommitUnknown when the commit
    failed: the sweeps come back to both.
    """
    settled: Settled = ports.together(_commit, ports, request)
    if settled.case is None:
        raise ConcurrentChange(f"attempt {request.key.attempt_id} was claimed by another")
    for event in settled.events:
        if event.alert:
            _alert(settled.case, event)
    return settled.case


def arm(ports: Ports, request: Arm) -> Armed | NotArmed:
    """Commit `submitted`, or say what stands in the way.

    Raises ConcurrentChange when the claim is no longer ours, and CommitUnknown when COMMIT itself
    failed: then the sale must not be sent.
    """
    answer: Armed | NotArmed | None = ports.together(_commit, ports, request)
    if answer is None:
        raise ConcurrentChange(f"{request.claimed.attempt.reference_id} was claimed by another")
    return answer


def _commit(
    ports: Ports, requests: Sequence[Settle | Arm]
) -> list[Settled | Armed | NotArmed | None]:
    now = ports.clock.now()
    settled: list[Settled] = []
    armed: list[Armed | NotArmed | None] = []
    entries: list[history.Entry] = []
    with ports.store.transaction() as connection:
        cases = LockedCases(connection, (request.key for request in requests))
        known = [cases.knows(request.key) for request in requests]
        kept = list(compress(requests, known))
        news = [request for request in kept if isinstance(request, Settle)]
        sales = [request for request in kept if isinstance(request, Arm)]
        if news:
            to_arm = card_ids(sales)
            settled, said = settle_all(ports, connection, cases, news, now, to_arm)
            now_as = [one.case.attempt for one in settled if one.case is not None]
            entries += worth_saying(connection, said, now_as, now)
        if sales:
            armed, said = arm_all(ports, connection, cases, sales, now)
            entries += said
        history.write(connection, entries)
    _record_the_newest(ports, sales, armed)
    for entry in entries:
        if entry.event.kind is EventKind.ATTEMPT_UNDECIDED:
            log.error("billing.alert", kind=str(entry.event.kind), details=dict(entry.event.data))
    of_news, of_sales = iter(settled), iter(armed)
    answers = iter([next(of_news if isinstance(one, Settle) else of_sales) for one in kept])
    return [
        next(answers) if is_known else _of_a_forgotten_row(request)
        for request, is_known in zip(requests, known, strict=True)
    ]


def _of_a_forgotten_row(request: Settle | Arm) -> Settled | None:
    """As if another claim owned it: one such row must not cost its neighbours their commit."""
    return Settled(None) if isinstance(request, Settle) else None


def _record_the_newest(
    ports: Ports, sales: Sequence[Arm], armed: Sequence[Armed | NotArmed | None]
) -> None:
    submitted = [
        request.claimed
        for request, answer in zip(sales, armed, strict=True)
        if isinstance(answer, Armed)
    ]
    if submitted:
        newest = submitted[-1]
        lost_memory.record(ports, newest.book, newest.attempt, ports.clock.now())


def _alert(case: Case, event: Event) -> None:
    log.error(
        "billing.alert",
        kind=str(event.kind),
        attempt=case.attempt.reference_id,
        invoice=case.invoice.reference_id,
        details=dict(event.data),
    )
