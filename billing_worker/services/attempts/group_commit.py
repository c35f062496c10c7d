"""Group commit: concurrent callers share one transaction.

A commit waits for the disk whether it holds one charge or fifty. While one batch commits, the next
callers queue, and the first of them then commits for all.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.ports import Ports

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Work = Callable[[Ports, Sequence[Request]], Sequence[Answer]]

MAX_BATCH = 64
"""Limits how many attempts a crash between commit and sale leaves to be reconciled."""


@dataclass(slots=True)
class _Ticket(Generic[Request, Answer]):
    request: Request
    done: bool = False
    alone: bool = False  # its batch failed, perhaps because of another request: it runs again alone
    answer: Answer = field(init=False)
    error: BaseException | None = None


@dataclass(slots=True)
class _Queue(Generic[Request, Answer]):
    turn: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[_Ticket[Request, Answer]] = field(default_factory=list)


class GroupCommit:
    """`group(work, ports, request)` returns the answer of `work` to this request.

    `work` takes the ports and a list of requests, runs them in one transaction and returns one
    answer each. One GroupCommit serves one set of ports. After an error before the commit each
    request runs again alone. After an error *of* the commit nobody knows the result, so all of them
    fail.
    """

    def __init__(self) -> None:
        self._queues: dict[Work[Any, Any], _Queue[Any, Any]] = defaultdict(_Queue)
        self._guard = threading.Lock()

    def __call__(self, work: Work[Request, Answer], ports: Ports, request: Request) -> Answer:
        ticket: _Ticket[Request, Answer] = _Ticket(request)
        with self._guard:
            queue = self._queues[work]
            queue.waiting.append(ticket)
        while not ticket.done:
            with queue.turn:
                if not ticket.done:
                    self._run_next(work, ports, queue)
        if ticket.alone:
            # In its own thread: waiting for the others costs a sale its few seconds.
            return work(ports, [request])[0]
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _run_next(
        self, work: Work[Request, Answer], ports: Ports, queue: _Queue[Request, Answer]
    ) -> None:
        with self._guard:
            batch, queue.waiting = queue.waiting[:MAX_BATCH], queue.waiting[MAX_BATCH:]
        try:
            _run(work, ports, batch)
        finally:
            for ticket in batch:
                ticket.done = True


def _run(work: Work[Request, Answer], ports: Ports, batch: list[_Ticket[Request, Answer]]) -> None:
    try:
        answers = work(ports, [ticket.request for ticket in batch])
    except Exception as error:  # noqa: BLE001 - handed to the callers it belongs to
        if len(batch) == 1 or isinstance(error, CommitUnknown):
            _fail(batch, error)
            return
        for ticket in batch:
            ticket.alone = True
    except BaseException as error:
        _fail(batch, error)
        raise
    else:
        for ticket, answer in zip(batch, answers, strict=True):
            ticket.answer = answer


def _fail(batch: list[_Ticket[Request, Answer]], error: BaseException) -> None:
    for ticket in batch:
        ticket.error = error
