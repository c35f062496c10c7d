"""The one writer of outcomes: loads the rows, asks the domain what follows, writes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.outcome import (
    NEEDS_CUSTOMER,
    Case,
    Conclusion,
    Context,
    NeverHandedOut,
    News,
    NothingSent,
    Resolved,
    Stated,
    conclude,
)
from billing_worker.domain.statement import DECLINED_STATUSES, UNPAID_FINAL_STATUSES, SaleAnswer
from billing_worker.domain.subscription import Subscription
from billing_worker.gateway.port import WireCall
from billing_worker.persistence import cards, claims, switches
from billing_worker.persistence.attempts import CaseKey, LockedCases
from billing_worker.persistence.history import Entry
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment
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
    case: Case
    events: tuple[Event, ...] = field(default=())


def settle_all(
    ports: Ports,
    connection: Connection,
    cases: LockedCases,
    requests: Sequence[Settle],
    now: datetime,
    to_submit: Collection[int] = (),
) -> tuple[list[Settled | None], list[Entry]]:
    """Apply each piece of news to its case, in order, and save them.

    Returns one result for each request, None where another claim owns the attempt and the news was
    dropped; and what the history is to say. `to_submit`: ids of cards to be charged in the same
    transaction.
    """
    results: list[Settled | None] = []
    entries: list[Entry] = []
    declined: list[tuple[int, str | None]] = []
    moved: list[tuple[Subscription, Subscription, str]] = []
    closed: list[tuple[Case, str]] = []
    may_decline = [request.key for request in requests if _may_decline(request)]
    _lock_cards(connection, cases, may_decline, to_submit)
    cases.poll_back([request.key for request in requests if _may_end_unpaid(request)], now)
    cases.find_debts()
    for request in requests:
        before = cases.case(request.key)
        if _is_outdated(before, request):
            results.append(None)
            continue
        context = Context(now, request.by, ports.timings)
        concluded = conclude(_with_hint(before, request.hint), request.news, context)
        cases.put(concluded.case)
        if before.subscription.status is not concluded.case.subscription.status:
            moved.append((before.subscription, concluded.case.subscription, request.by))
        if before.invoice.next_attempt_at and not concluded.case.invoice.next_attempt_at:
            closed.append((concluded.case, request.by))
        results.append(Settled(concluded.case, concluded.events))
        said = _with_calls(concluded, request, context)
        said += _carry_out(ports, connection, before, concluded, context)
        if _is_declined_by_it(before, concluded) or concluded.kills_card:
            declined += _refused(concluded)
        entries += [Entry.about(request.key, event) for event in said]
    cases.save()
    for case, by in closed:
        _end_the_next(connection, case, Moment(now, by))
    for was, is_, by in moved:
        pause_collection.follow(connection, was, is_, Moment(now, by))
    cards.remember_declines(connection, declined, now)
    return results, entries


def _end_the_next(connection: Connection, case: Case, moment: Moment) -> None:
    """An earlier attempt has paid the invoice, or may: whoever had prepared the next one may be dead,
    and nobody would be rung for it any more.
    """
    item = claims.lock_one(connection, case.invoice.id)
    if item is not None and item.live is not None and item.live.id != case.attempt.id:
        pause_collection.end_prepared(connection, [item], case.invoice.reason or "paid", moment)


def _lock_cards(
    connection: Connection, cases: LockedCases, keys: Sequence[CaseKey], to_submit: Collection[int]
) -> None:
    """All that this transaction will lock, at once and in order: two of them never wait for each
    other in a circle. What cannot be declined locks no card here.
    """
    asked = {card_id for key in keys if (card_id := cases.case(key).attempt.card_id) is not None}
    if asked:
        cards.lock_budgets(connection, asked.union(to_submit))


def _is_declined_by_it(before: Case, concluded: Conclusion) -> bool:
    return AttemptStatus.DECLINED is concluded.case.attempt.status is not before.attempt.status


def _refused(concluded: Conclusion) -> list[tuple[int, str | None]]:
    """The card that was asked, if it is known, and why it must never be charged again."""
    card_id = concluded.case.attempt.card_id
    return [] if card_id is None else [(card_id, concluded.kills_card)]


def _may_decline(request: Settle) -> bool:
    if not isinstance(request.news, Stated):
        return False
    return request.news.statement.status in DECLINED_STATUSES | UNPAID_FINAL_STATUSES


def _may_end_unpaid(request: Settle) -> bool:
    return _may_decline(request) or isinstance(
        request.news, NothingSent | NeverHandedOut | Resolved
    )


def _carry_out(
    ports: Ports, connection: Connection, before: Case, concluded: Conclusion, context: Context
) -> list[Event]:
    """What a conclusion means beyond its own rows: for the card, the service, the next invoice."""
    case = concluded.case
    said: list[Event] = []
    card_id = case.attempt.card_id
    if (dead := concluded.kills_card) and card_id is not None:
        said.append(context.event(EventKind.CARD_UNUSABLE, card_id=card_id, reason=dead))
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


def _is_outdated(case: Case, request: Settle) -> bool:
    """Does the news come from a claim that another one has replaced?

    What the gateway states of a submitted attempt is true whoever brings it. Every other kind of
    news (that nothing was sent, that it goes on later) is the word of the claim that holds the attempt: an old
    one knows nothing of the sale that its successor may have sent.
    """
    if request.fence is None or request.fence == case.attempt.fence:
        return False
    is_own_word = not isinstance(request.news, Stated)
    return is_own_word or case.attempt.status is AttemptStatus.PREPARED


def _with_hint(case: Case, hint: SaleAnswer | None) -> Case:
    if hint is None:
        return case
    status = NEEDS_CUSTOMER if hint.needs_customer else hint.status
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
        return [context.event(EventKind.ATTEMPT_POLLED, found="nothing new", calls=shown)]
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
