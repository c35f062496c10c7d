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
from billing_worker.domain.outcome import Case
from billing_worker.persistence import history
from billing_worker.persistence.attempts import LockedCases
from billing_worker.services.attempts.history_throttle import worth_saying
from billing_worker.services.attempts.settle import Settle, Settled, settle_all
from billing_worker.services.attempts.submit import (
    NotSubmitted,
    Submit,
    Submitted,
    card_ids,
    submit_all,
)
from billing_worker.services.guards import lost_memory
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.ports import Ports

log = structlog.get_logger()


def settle(ports: Ports, request: Settle) -> Case:
    """Apply one piece of news and return the case as it stands now.

    Raises ConcurrentChange when another claim owns the attempt, CommitUnknown when the commit
    failed: the sweeps come back to both.
    """
    settled: Settled = ports.commit_group(_commit, ports, request)
    if settled.case is None:
        raise ConcurrentChange(f"attempt {request.key.attempt_id} was claimed by another")
    for event in settled.events:
        if event.alert:
            _alert(settled.case, event)
    return settled.case


def submit(ports: Ports, request: Submit) -> Submitted | NotSubmitted:
    """Commit `submitted`, or say what stands in the way.

    Raises ConcurrentChange when the claim is no longer ours, and CommitUnknown when COMMIT itself
    failed: then the sale must not be sent.
    """
    answer: Submitted | NotSubmitted | None = ports.commit_group(_commit, ports, request)
    if answer is None:
        raise ConcurrentChange(f"{request.claimed.attempt.reference_id} was claimed by another")
    return answer


def _commit(
    ports: Ports, requests: Sequence[Settle | Submit]
) -> list[Settled | Submitted | NotSubmitted | None]:
    settled: list[Settled] = []
    submitted: list[Submitted | NotSubmitted | None] = []
    entries: list[history.Entry] = []
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        cases = LockedCases(connection, (request.key for request in requests))
        known = [cases.knows(request.key) for request in requests]
        kept = list(compress(requests, known))
        news = [request for request in kept if isinstance(request, Settle)]
        sales = [request for request in kept if isinstance(request, Submit)]
        if news:
            to_submit = card_ids(sales)
            settled, said = settle_all(ports, connection, cases, news, now, to_submit)
            now_as = [one.case.attempt for one in settled if one.case is not None]
            entries += worth_saying(connection, said, now_as, now)
        if sales:
            submitted, said = submit_all(ports, connection, cases, sales, now)
            entries += said
        history.write(connection, entries)
    _record_the_newest(ports, sales, submitted)
    for entry in entries:
        if entry.event.kind is EventKind.ATTEMPT_UNDECIDED:
            log.error("billing.alert", kind=str(entry.event.kind), details=dict(entry.event.data))
    of_news, of_sales = iter(settled), iter(submitted)
    answers = iter([next(of_news if isinstance(one, Settle) else of_sales) for one in kept])
    return [
        next(answers) if is_known else _of_a_forgotten_row(request)
        for request, is_known in zip(requests, known, strict=True)
    ]


def _of_a_forgotten_row(request: Settle | Submit) -> Settled | None:
    """As if another claim owned it: one such row must not cost its neighbours their commit."""
    return Settled(None) if isinstance(request, Settle) else None


def _record_the_newest(
    ports: Ports, sales: Sequence[Submit], submitted: Sequence[Submitted | NotSubmitted | None]
) -> None:
    just_submitted = [
        request.claimed
        for request, answer in zip(sales, submitted, strict=True)
        if isinstance(answer, Submitted)
    ]
    if just_submitted:
        newest = just_submitted[-1]
        lost_memory.record(ports, newest.book, newest.attempt, ports.clock.now())


def _alert(case: Case, event: Event) -> None:
    log.error(
        "billing.alert",
        kind=str(event.kind),
        attempt=case.attempt.reference_id,
        invoice=case.invoice.reference_id,
        details=dict(event.data),
    )
