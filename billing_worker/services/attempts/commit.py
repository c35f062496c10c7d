"""The transaction that changes attempts: it settles news, then submits charges.

Concurrent callers share one. News comes first, so that a charge is submitted with all that is
known, including a decline or a late payment of the same moment.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Apply one piece of news and return the case as it is now.

    Raises ConcurrentChange if another claim owns the attempt, CommitUnknown if the commit failed.
    The sweeps find both again.
    """
    settled = ports.commit_group(_commit, ports, request)
    if not isinstance(settled, Settled):
        raise ConcurrentChange(f"attempt {request.key.attempt_id} was claimed by another")
    for event in settled.events:
        if event.alert:
            _alert(settled.case, event)
    return settled.case


def submit(ports: Ports, request: Submit) -> Submitted | NotSubmitted:
    """Commit `submitted`, or return what forbids it.

    Raises ConcurrentChange if another claim owns the attempt, CommitUnknown if COMMIT itself
    failed: the sale must not be sent then.
    """
    answer = ports.commit_group(_commit, ports, request)
    if not isinstance(answer, Submitted | NotSubmitted):
        raise ConcurrentChange(f"{request.claimed.attempt.reference_id} was claimed by another")
    return answer


Answer = Settled | Submitted | NotSubmitted | None
"""The answer to a `Settle` is the first, to a `Submit` one of the next two. None: another claim
owns the attempt, or its row is lost. One such row must not cost the others their commit.
"""


def _commit(ports: Ports, requests: Sequence[Settle | Submit]) -> Sequence[Answer]:
    """Return one answer for each request, in order."""
    settled: Sequence[Settled | None] = ()
    submitted: Sequence[Submitted | NotSubmitted | None] = ()
    entries: list[history.Entry] = []
    with ports.store.transaction() as connection:
        now = right_now(ports, connection)
        cases = LockedCases(connection, (request.key for request in requests))
        known = [(n, request) for n, request in enumerate(requests) if cases.knows(request.key)]
        news = {n: request for n, request in known if isinstance(request, Settle)}
        sales = {n: request for n, request in known if isinstance(request, Submit)}
        if news:
            to_submit = card_ids(sales.values())
            settled, said = settle_all(
                ports, connection, cases, list(news.values()), now, to_submit
            )
            now_as = [one.case.attempt for one in settled if one is not None]
            entries += worth_saying(connection, said, now_as, now)
        if sales:
            submitted, said = submit_all(ports, connection, cases, list(sales.values()), now)
            entries += said
        history.write(connection, entries)
    _count(ports, [one for one in settled if one is not None])
    _record_the_newest(ports, list(sales.values()), submitted)
    for entry in entries:
        if entry.event.kind is EventKind.ATTEMPT_UNDECIDED:
            log.error("billing.alert", kind=str(entry.event.kind), details=dict(entry.event.data))
    answers = dict(zip(news, settled, strict=True)) | dict(zip(sales, submitted, strict=True))
    return [answers.get(n) for n in range(len(requests))]


_ENDS = frozenset(
    {
        EventKind.ATTEMPT_SUCCEEDED,
        EventKind.ATTEMPT_DECLINED,
        EventKind.ATTEMPT_NOT_CHARGED,
        EventKind.ATTEMPT_SURPLUS,
    }
)


def _count(ports: Ports, settled: Sequence[Settled]) -> None:
    for one in settled:
        for event in one.events:
            if event.kind in _ENDS:
                ports.meter.ended(one.case.attempt)
            elif event.kind is EventKind.ATTEMPT_FORBIDDEN:
                ports.meter.refused(str(event.data["rule"]))


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
        now = ports.clock.now()
        lost_memory.record(ports, newest.book, newest.attempt, newest.restored_at, now)


def _alert(case: Case, event: Event) -> None:
    log.error(
        "billing.alert",
        kind=str(event.kind),
        attempt=case.attempt.reference_id,
        invoice=case.invoice.reference_id,
        details=dict(event.data),
    )
