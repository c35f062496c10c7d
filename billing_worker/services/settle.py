"""The one writer of outcomes: loads the rows, asks the domain what follows, writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.evidence import DECLINED_STATUSES, UNPAID_FINAL_STATUSES, SaleAnswer
from billing_worker.domain.settlement import (
    Case,
    Conclusion,
    Context,
    News,
    NothingSent,
    Postponed,
    Stated,
    conclude,
)
from billing_worker.gateway.port import WireCall
from billing_worker.persistence import cards, claims, switches
from billing_worker.persistence.cases import CaseKey, LockedCases
from billing_worker.persistence.history import Entry
from billing_worker.services.ports import Ports


@dataclass(frozen=True, slots=True)
class Settle:
    """One piece of news about one attempt, with the calls that brought it."""

    key: CaseKey
    news: News
    by: str
    calls: tuple[WireCall, ...] = ()
    hint: SaleAnswer | None = None  # what the answer to the sale claimed
    fence: int | None = None  # of the claim that speaks; only the gateway's word needs none


@dataclass(frozen=True, slots=True)
class Settled:
    case: Case | None  # None: another claim owns the attempt, and this news was dropped
    events: tuple[Event, ...] = field(default=())


def settle_all(
    ports: Ports,
    connection: Connection,
    cases: LockedCases,
    requests: Sequence[Settle],
    now: datetime,
) -> tuple[list[Settled], list[Entry]]:
    """Apply each piece of news to its case, in order, and save them. One result for each request,
    and what the history is to say.
    """
    results: list[Settled] = []
    entries: list[Entry] = []
    cases.look_back([request.key for request in requests if _may_decline(request)], now)
    for request in requests:
        before = cases.case(request.key)
        if _is_outdated(before, request):
            results.append(Settled(None))
            continue
        context = Context(now, request.by, ports.terms)
        concluded = conclude(_with_hint(before, request.hint), request.news, context)
        cases.put(concluded.case)
        results.append(Settled(concluded.case, concluded.events))
        said = _with_calls(concluded, request, context)
        said += _carry_out(ports, connection, before, concluded, context)
        entries += [_entry(request.key, event) for event in said]
    cases.save()
    return results, entries


def _may_decline(request: Settle) -> bool:
    if not isinstance(request.news, Stated):
        return False
    return request.news.statement.status in DECLINED_STATUSES | UNPAID_FINAL_STATUSES


def _carry_out(
    ports: Ports, connection: Connection, before: Case, concluded: Conclusion, context: Context
) -> list[Event]:
    """What a conclusion means beyond its own rows: for the card, the service, the next invoice."""
    case = concluded.case
    said: list[Event] = []
    if AttemptStatus.DECLINED is case.attempt.status is not before.attempt.status:
        said += _remember_decline(connection, concluded, context)
    if reason := concluded.pauses_service:
        service = ports.gateway.service(case.attempt.money.currency)
        if switches.pause_service(connection, service, by=context.by, reason=reason,
                                  now=context.now):  # fmt: skip
            event = context.event(
                EventKind.SERVICE_PAUSED, alert=True, service=service, reason=reason
            )
            said.append(event)
    recovering = before.invoice.first_declined_at is not None
    if recovering and before.invoice.status is not case.invoice.status:
        claims.stop_waiting(connection, [case.invoice.subscription_id], context.now)
    return said


def _remember_decline(
    connection: Connection, concluded: Conclusion, context: Context
) -> list[Event]:
    card_id = concluded.case.attempt.card_id
    if card_id is None:
        return []
    cards.remember_decline(connection, card_id, context.now, concluded.kills_card)
    if concluded.kills_card is None:
        return []
    return [context.event(EventKind.CARD_UNUSABLE, card_id=card_id, reason=concluded.kills_card)]


def _is_outdated(case: Case, request: Settle) -> bool:
    """Does the news come from a claim that another one has replaced?

    What the gateway states of a submitted attempt is true whoever brings it. Everything else (that
    nothing was sent, that it goes on later) is the word of the claim that holds the attempt: an old
    one knows nothing of the sale that its successor may have sent.
    """
    if request.fence is None or request.fence == case.attempt.fence:
        return False
    is_own_word = isinstance(request.news, NothingSent | Postponed)
    return is_own_word or case.attempt.status is AttemptStatus.PREPARED


def _with_hint(case: Case, hint: SaleAnswer | None) -> Case:
    if hint is None:
        return case
    status = "needs_customer" if hint.needs_customer else hint.status
    return replace(
        case,
        attempt=replace(case.attempt, sale_status=status, sale_resolution=hint.resolution),
    )


def _with_calls(concluded: Conclusion, request: Settle, context: Context) -> list[Event]:
    """The first event of the news carries the wire calls; calls without an event get their own."""
    events = list(concluded.events)
    if not request.calls:
        return events
    shown = wire_data(request.calls)
    if not events:
        return [context.event(EventKind.ATTEMPT_LOOKED, found="nothing new", calls=shown)]
    first = events[0]
    return [replace(first, data={**first.data, "calls": shown}), *events[1:]]


def wire_data(calls: Sequence[WireCall]) -> list[dict[str, object]]:
    """Wire calls as JSON for the history."""
    return [
        {
            "operation": call.operation,
            "method": call.method,
            "path": call.path,
            "at": call.at.isoformat(),
            "duration_ms": call.duration_ms,
            "outcome": call.outcome,
            "request": call.request,
            "answer": call.answer,
        }
        for call in calls
    ]


def _entry(key: CaseKey, event: Event) -> Entry:
    return Entry(event, key.subscription_id, key.invoice_id, key.attempt_id)
