"""The only writer of outcomes: it loads the rows, asks the domain what follows, and writes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain.attempt import AttemptStatus
from billing_worker.domain.declines import DUPLICATED
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
    """News about one attempt, with the gateway calls that brought it."""

    key: CaseKey
    news: News
    by: str
    calls: tuple[WireCall, ...] = ()
    hint: SaleAnswer | None = None  # what the sale's answer claimed
    fence: int | None = None  # fence of the reporting claim; a gateway statement needs none


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
    """Apply each piece of news to its case, in order, and save.

    Returns one result for each request (None if another claim owns the attempt and the news was
    dropped), and the history entries. `to_submit`: ids of cards to charge in the same transaction.
    """
    results: list[Settled | None] = []
    entries: list[Entry] = []
    declined: list[tuple[int, str | None]] = []
    moved: list[tuple[Subscription, Subscription, str]] = []
    closed: list[tuple[Case, str]] = []
    may_decline = [request.key for request in requests if _may_decline(request)]
    _lock_cards(connection, cases, may_decline, to_submit)
    cases.poll_back([request.key for request in requests if _may_end_unpaid(request)], now)
    cases.find_equal_charges([r.key for r in requests if _is_called_a_duplicate(r)])
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
    """End the next, prepared attempt: an earlier one has paid the invoice, or may. The worker that
    prepared it may be dead.
    """
    item = claims.lock_one(connection, case.invoice.id)
    if item is not None and item.live is not None and item.live.id != case.attempt.id:
        pause_collection.end_prepared(connection, [item], case.invoice.reason or "paid", moment)


def _lock_cards(
    connection: Connection, cases: LockedCases, keys: Sequence[CaseKey], to_submit: Collection[int]
) -> None:
    """Lock all cards of this transaction at once and in order, so that transactions never deadlock.
    A charge that cannot be declined locks no card.
    """
    asked = {card_id for key in keys if (card_id := cases.case(key).attempt.card_id) is not None}
    if asked:
        cards.lock_budgets(connection, asked.union(to_submit))


def _is_declined_by_it(before: Case, concluded: Conclusion) -> bool:
    return AttemptStatus.DECLINED is concluded.case.attempt.status is not before.attempt.status


def _refused(concluded: Conclusion) -> list[tuple[int, str | None]]:
    """Return the charged card, if known, and why it must never be charged again."""
    card_id = concluded.case.attempt.card_id
    return [] if card_id is None else [(card_id, concluded.kills_card)]


def _may_decline(request: Settle) -> bool:
    if not isinstance(request.news, Stated):
        return False
    return request.news.statement.status in DECLINED_STATUSES | UNPAID_FINAL_STATUSES


def _is_called_a_duplicate(request: Settle) -> bool:
    news = request.news
    return isinstance(news, Stated) and news.statement.resolution == DUPLICATED


def _may_end_unpaid(request: Settle) -> bool:
    return _may_decline(request) or isinstance(
        request.news, NothingSent | NeverHandedOut | Resolved
    )


def _carry_out(
    ports: Ports, connection: Connection, before: Case, concluded: Conclusion, context: Context
) -> list[Event]:
    """Apply a conclusion beyond its own rows: to the card, the service, the next invoice."""
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
    """Return whether the news comes from a claim that was replaced.

    A gateway statement about a submitted attempt is true whoever brings it. Any other news (nothing
    was sent, or it continues later) is known only to the claim that holds the attempt: an older
    claim does not know what its successor has sent.
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
    """Attach the gateway calls to the first event of the news, or to an event of their own."""
    events = list(concluded.events)
    if not request.calls:
        return events
    shown = wire_data(request.calls)
    if not events:
        return [context.event(EventKind.ATTEMPT_POLLED, found="nothing new", calls=shown)]
    first = events[0]
    return [replace(first, data={**first.data, "calls": shown}), *events[1:]]


def wire_data(calls: Sequence[WireCall]) -> list[dict[str, object]]:
    """Return gateway calls as JSON for the history."""
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
