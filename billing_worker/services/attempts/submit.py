"""The last safe commit before a sale: prepared -> submitted, under the fence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from billing_worker.domain import card as card_rules
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.dunning import ASKED_FOR
from billing_worker.domain.errors import InvariantBroken
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import OWED, InvoiceStatus
from billing_worker.domain.outcome import Case, Forbidden, is_unknown, not_before
from billing_worker.domain.secret import Secret, bearer_of
from billing_worker.domain.statement import Statement
from billing_worker.domain.subscription import (
    COLLECTABLE,
    PAYABLE,
    PAYABLE_DEBT,
    SubscriptionStatus,
)
from billing_worker.gateway.port import WireCall
from billing_worker.persistence import attempts as case_rows
from billing_worker.persistence import cards, pay_links, switches
from billing_worker.persistence.attempts import CaseKey, LockedCases, Submission
from billing_worker.persistence.history import Entry
from billing_worker.persistence.switches import Switches
from billing_worker.services.attempts.claim import BY, Claimed
from billing_worker.services.attempts.retry_limits import Budget
from billing_worker.services.attempts.settle import wire_data
from billing_worker.services.guards import lost_memory
from billing_worker.services.guards.refusals import enter_mode
from billing_worker.services.ports import Ports


@dataclass(frozen=True, slots=True)
class Submit:
    claimed: Claimed
    statement: Statement
    calls: tuple[WireCall, ...]

    @property
    def key(self) -> CaseKey:
        return self.claimed.key

    @property
    def bearer(self) -> Secret:
        if self.statement.bearer is None:
            raise InvariantBroken("an invoice without a bearer must not be armed")
        return self.statement.bearer


@dataclass(frozen=True, slots=True)
class Submitted:
    """`submitted` is committed: the caller may now send the sale, once."""

    committed_at: float  # monotonic seconds before COMMIT, so that a slow commit counts too


@dataclass(frozen=True, slots=True)
class NotSubmitted:
    """Something changed since the claim. Nothing was committed, and nothing may be sent."""

    obstacle: str
    held: bool = False  # the invoice waits for a person and keeps its reason
    later: bool = False  # the same attempt may continue later
    forbidden: Forbidden | None = None  # the rule that forbids this attempt


def submit_all(
    ports: Ports,
    connection: Connection,
    cases: LockedCases,
    requests: Sequence[Submit],
    now: datetime,
) -> tuple[list[Submitted | NotSubmitted | None], list[Entry]]:
    """Mark as `submitted` what nothing forbids. Returns one answer for each request (None if
    another claim owns the attempt), and the history entries.
    """
    # Read in this transaction: a process that is suspended between COMMIT and a later reading would
    # not notice it.
    submitted = Submitted(ports.clock.monotonic())
    switched = switches.read(connection)
    doubted = lost_memory.stands_against_submitting(ports, switched)
    budget = Budget(connection, card_ids(requests), now)
    answers: list[Submitted | NotSubmitted | None] = []
    for request in requests:
        case = cases.case(request.key)
        if doubted is not None or request.claimed.restored_at != switched.restored_at:
            answers.append(NotSubmitted(doubted or lost_memory.NOTICED_SINCE, later=True))
        elif _is_ours(case.attempt, request.claimed.attempt):
            against = _held(case) or _obstacle(ports, case, switched) or _forbidden(budget, case)
            answers.append(against or submitted)
        else:
            answers.append(None)
    if submitted in answers and (other := enter_mode(ports, connection, switched)) is not None:
        refused = NotSubmitted(other, later=True)
        answers = [refused if answer is submitted else answer for answer in answers]
    allowed = [r for r, answer in zip(requests, answers, strict=True) if answer is submitted]
    _submit(ports, connection, allowed, now)
    return answers, [_entry(request, now) for request in allowed]


def _is_ours(stored: Attempt, claimed: Attempt) -> bool:
    """Compare the reference too: a database that has lost data gives the same ids to other rows."""
    ours = (AttemptStatus.PREPARED, claimed.fence, claimed.reference_id)
    return (stored.status, stored.fence, stored.reference_id) == ours


def _held(case: Case) -> NotSubmitted | None:
    """Return whether the invoice is held since the claim: an earlier attempt may still pay, or a
    person must look. Both remove its next attempt.
    """
    if case.invoice.status is InvoiceStatus.OPEN and case.invoice.next_attempt_at is None:
        return NotSubmitted(f"held: {case.invoice.reason or 'no next attempt'}", held=True)
    return None


def _obstacle(ports: Ports, case: Case, switched: Switches) -> NotSubmitted | None:
    """Return what has changed since the claim, read under the locks of this commit."""
    if case.invoice.status not in _payable(case.attempt):
        return NotSubmitted(f"invoice is {case.invoice.status}")
    if case.subscription.status not in _collectable(case):
        return NotSubmitted(f"subscription is {case.subscription.status}")
    off = switched.obstacle(ports.gateway.service(case.attempt.money.currency))
    return NotSubmitted(off, later=True) if off is not None else None


def why_not(ports: Ports, connection: Connection, case: Case, now: datetime) -> str | None:
    """Return why a customer's page may not be handed out: the same rules as for a charge.

    `case`: a prepared link, or one whose page is open. Its invoice is locked.
    """
    switched = switches.read(connection)
    doubted = lost_memory.stands_against_submitting(ports, switched)
    if doubted is not None:
        return doubted
    against = _obstacle(ports, case, switched)
    if against is not None:
        return against.obstacle
    return _others_may_pay(ports, connection, case, now) or _card_forbidden(
        connection, case.attempt, now
    )


def _others_may_pay(ports: Ports, connection: Connection, case: Case, now: datetime) -> str | None:
    """Return whether other attempts may pay. `_held` cannot tell it for a page, because an invoice
    that waits for its customer has no date.
    """
    others = pay_links.others(connection, case.attempt)
    earliest = not_before(Origin.LINK, others, ports.timings)
    if earliest is not None and earliest > now:
        return (
            "an earlier sale may have arrived before the gateway's invoice expired, and may still "
            f"be paid: a page can be opened from {earliest:%Y-%m-%d %H:%M} UTC on"
        )
    for other in others:
        if other.undecided_since is not None:
            return f"{other.reference_id} is undecided again: it may still be paid"
    newest = next((a for a in reversed(others) if a.status is AttemptStatus.DECLINED), None)
    if newest is not None and is_unknown(newest):
        return f"{newest.reference_id} may have been paid ({newest.outcome}): a person looks first"
    return None


def _card_forbidden(connection: Connection, attempt: Attempt, now: datetime) -> str | None:
    if attempt.card_id is None:
        return None
    if attempt.status is AttemptStatus.SUBMITTED:  # its retry limits count it already
        card = cards.by_ids(connection, {attempt.card_id})[attempt.card_id]
        return card_rules.obstacle(card, now)
    forbidden = Budget(connection, {attempt.card_id}, now).spend(
        attempt.card_id, attempt.money, attempt.invoice_id
    )
    return forbidden.reason if forbidden else None


def _payable(attempt: Attempt) -> frozenset[InvoiceStatus]:
    """Return whether it can be paid: the worker charges open invoices; a customer may also pay one
    that was given up.
    """
    return OWED if attempt.origin is Origin.LINK else frozenset({InvoiceStatus.OPEN})


def _collectable(case: Case) -> frozenset[SubscriptionStatus]:
    if case.attempt.origin not in ASKED_FOR:
        return COLLECTABLE
    return PAYABLE_DEBT if case.invoice.status is InvoiceStatus.UNCOLLECTIBLE else PAYABLE


def card_ids(requests: Iterable[Submit]) -> set[int]:
    """Return the ids of the cards to charge."""
    return {card_id for r in requests if (card_id := r.claimed.attempt.card_id) is not None}


def _forbidden(budget: Budget, case: Case) -> NotSubmitted | None:
    attempt = case.attempt
    if attempt.card_id is None:
        return None
    forbidden = budget.spend(attempt.card_id, attempt.money, attempt.invoice_id)
    return NotSubmitted(forbidden.reason, forbidden=forbidden) if forbidden else None


def _submit(ports: Ports, connection: Connection, allowed: Sequence[Submit], now: datetime) -> None:
    next_poll_at = now + ports.timings.reconcile_after
    submissions = [
        Submission(
            request.claimed.attempt,
            request.statement.gateway_id,
            ports.vault.lock(request.bearer, bearer_of(request.claimed.attempt.id)),
            next_poll_at,
        )
        for request in allowed
    ]
    case_rows.mark_submitted(connection, submissions, now)


def _entry(request: Submit, now: datetime) -> Entry:
    data = {"gateway_id": request.statement.gateway_id, "calls": wire_data(request.calls)}
    event = Event(EventKind.ATTEMPT_SUBMITTED, now, BY, data)
    return Entry.about(request.key, event)
