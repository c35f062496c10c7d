"""What was tried for a subscription on a day, and why nothing else was: the rule, who set it, since when, and what has
to happen first.

Everything is read from the history, so that the answer about last month is not that of today.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row

from billing_worker.domain.declines import decline_for
from billing_worker.domain.events import EventKind as K
from billing_worker.domain.invoice import SUSPENDED
from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import RULES
from billing_worker.domain.outgoing.notice import RULE as NOTICE_RULE
from billing_worker.persistence import history
from billing_worker.persistence import invoices as invoice_rows
from billing_worker.persistence.switches import SALES_OFF
from billing_worker.services.reports.past import InvoiceThen, invoices_then, standing
from billing_worker.services.reports.wording import Fate, fate_of, next_of, reason_in_words

_LIFECYCLE: Final = "docs/lifecycle.md"
_CATCH_UP: Final = "docs/lifecycle.md#catch-up-after-an-outage"
_RECOVERY: Final = "docs/recovery.md"
_OPERATIONS: Final = "docs/operations.md"
_CALENDAR: Final = "docs/calendar.md"
_NOTICES: Final = "docs/notices.md"
_NETWORKS: Final = {rule.name: rule.source for rule in RULES}


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why nothing was charged."""

    about: str
    why: str
    rule: str
    source: str
    """Where the rule is written: a page of these docs, or the network's own."""
    by: str | None = None
    since: datetime | None = None
    needed: str = ""
    """What has to happen before it is charged."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"since": self.since.isoformat() if self.since else None}


@dataclass(frozen=True, slots=True)
class _Asked:
    connection: Connection
    subscription: Row[Any]
    moment: datetime
    events: Sequence[Row[Any]]
    invoices: Sequence[Row[Any]]

    @property
    def reference(self) -> str:
        return str(self.subscription.reference_id)

    @property
    def until_then(self) -> list[Row[Any]]:
        return [event for event in self.events if event.at <= self.moment]


def why_not(
    connection: Connection, subscription: Row[Any], day: tuple[datetime, datetime], moment: datetime
) -> dict[str, Any]:
    """`day`: in which attempts are looked for; `moment`: in it, when the reasons are looked for.

    Shape: {subscription, at, attempts: [{attempt, invoice, amount, currency, at, origin, became}],
    reasons: [{about, why, rule, source, by, since, needed}]}.
    """
    asked = _Asked(
        connection,
        subscription,
        moment,
        history.all_about(connection, subscription.id),
        invoice_rows.of_subscription(connection, subscription.id),
    )
    return {
        "subscription": asked.reference,
        "at": moment.isoformat(),
        "attempts": list(_attempts(asked, day)),
        "reasons": [reason.as_dict() for reason in _reasons(asked)],
    }


_RESULTS: Final = frozenset(
    {K.ATTEMPT_SUCCEEDED, K.ATTEMPT_DECLINED, K.ATTEMPT_NOT_CHARGED, K.ATTEMPT_SURPLUS}
)


def _attempts(asked: _Asked, day: tuple[datetime, datetime]) -> Iterator[dict[str, Any]]:
    amounts = {row.reference_id: row for row in asked.invoices}
    for event in asked.events:
        if event.kind != K.ATTEMPT_SUBMITTED or not day[0] <= event.at < day[1]:
            continue
        ended = [e for e in asked.events if e.attempt_id == event.attempt_id and e.kind in _RESULTS]
        invoice = amounts[event.invoice_reference]
        yield {
            "attempt": event.attempt_reference,
            "invoice": event.invoice_reference,
            "amount": str(Money.from_minor(invoice.amount_minor, invoice.currency).amount),
            "currency": invoice.currency,
            "at": event.at.isoformat(),
            "origin": event.origin,
            "became": ended[-1].kind.partition(".")[2] if ended else "unknown",
        }


def _reasons(asked: _Asked) -> list[Reason]:
    stopped = _stopped(asked)
    if stopped is not None and not stopped.rule.endswith(_STILL_COLLECTED):
        return [stopped]
    found = [stopped] if stopped is not None else []
    then = invoices_then(asked.until_then)
    waiting = [one for one in then if one.state == "open" and not _waits_with_it(one)]
    found += [_of_invoice(asked, one) for one in waiting]
    if not waiting and stopped is None:
        found.append(_of_calendar(asked, then))
    if any(one.rule in _NOBODY_BEGAN for one in found):
        found += _of_book(asked)
    return found


def _waits_with_it(invoice: InvoiceThen) -> bool:
    """Whether the subscription is suspended, which is said already."""
    return bool(invoice.last.data.get("reason") == SUSPENDED)


# --- the subscription --------------------------------------------------------------------------

_STILL_COLLECTED: Final = ("ended", "suspended")
"""What is open then may still be charged."""

_STOPS: Final = {
    "paused": ("It was paused", "`billing-worker subscriptions resume {0}`"),
    "cancelled": (
        "It was cancelled",
        "Nothing brings it back: a new agreement needs a new reference",
    ),
    "ended": ("It had ended", "No further period begins; a new agreement needs a new reference"),
    "suspended": (
        "It was suspended, because its recovery had ended without a payment",
        "A payment, another card (`cards replace {0}`), or `subscriptions forgive {0}`",
    ),
}


def _stopped(asked: _Asked) -> Reason | None:
    """Return why nothing new became due then, or None."""
    was = standing(asked.until_then)
    if was.status is None:
        made = asked.events[0] if asked.events else None
        created = asked.subscription.created_at
        why = f"It did not exist: it was made at {created.isoformat()}"
        by = made.by if made else None
        return Reason(asked.reference, why, "subscription.subscribed", _LIFECYCLE, by, created)
    if was.held is not None:
        needed = f"`billing-worker subscriptions activate {asked.reference}`"
        return _said(
            asked, was.held, "It was a held import", "import.held", "docs/import.md", needed
        )
    if was.handed_over is not None:
        needed = "The other book decides; `billing-worker subscriptions take-back` brings it back"
        moved = "docs/operations.md#moving-a-book"
        return _said(asked, was.handed_over, "Another book billed it", "book.moved", moved, needed)
    if was.status not in _STOPS or was.since is None:
        return None
    why, needed = _STOPS[was.status]
    rule = f"subscription.{was.status}"
    return _said(asked, was.since, why, rule, _LIFECYCLE, needed.format(asked.reference))


def _said(asked: _Asked, event: Row[Any], why: str, rule: str, source: str, needed: str) -> Reason:
    given = event.data.get("why") or event.data.get("reason")
    until = event.data.get("resumes_at")
    why += f" ({given})" if given else ""
    needed = f"{needed}; otherwise it goes on by itself at {until}" if until else needed
    return Reason(asked.reference, why, rule, source, event.by, event.at, needed)


# --- an open invoice ---------------------------------------------------------------------------

_DUE: Final = "invoice.due"
_UNOPENED: Final = "period.due"
_NOBODY_BEGAN: Final = frozenset({_DUE, _UNOPENED, SALES_OFF})
_IN_FLIGHT: Final = "attempt.unknown"


def _of_invoice(asked: _Asked, invoice: InvoiceThen) -> Reason:
    last = invoice.last
    match last.kind:
        case K.ATTEMPT_SUBMITTED:
            why = f"{last.attempt_reference} was submitted, and its outcome was not known yet"
            needed = (
                "The gateway's answer, which is asked for, or a person's: "
                f"`billing-worker invoices resolve {last.attempt_reference}`"
            )
            source = "docs/recovery.md#when-the-gateway-does-not-decide"
            return Reason(invoice.reference, why, _IN_FLIGHT, source, last.by, last.at, needed)
        case K.ATTEMPT_PREPARED | K.ATTEMPT_POSTPONED | K.RETRY_ORDERED | K.INVOICE_GOES_ON:
            why = f"It was being charged ({last.kind}), and nothing had been sold"
            given = last.data.get("reason")
            why += f": {given}" if given else ""
            return Reason(
                invoice.reference,
                why,
                _DUE,
                _RECOVERY,
                last.by,
                last.at,
                "A worker goes on with it",
            )
        case K.INVOICE_OPENED:
            return _opened(asked, invoice)
        case _:
            return _waiting(asked, invoice)


def _opened(asked: _Asked, invoice: InvoiceThen) -> Reason:
    decided = invoice.last.data.get("catch_up")
    if not decided:
        why = "It was due, and no worker had begun"
        at = invoice.last.at
        return Reason(invoice.reference, why, _DUE, _LIFECYCLE, None, at, "A worker takes it up")
    why = str(decided["reason"])
    needed = _when(decided["at"]) or f"`billing-worker catch-up plan {asked.reference}`"
    said = invoice.last
    return Reason(invoice.reference, why, decided["rule"], _CATCH_UP, said.by, said.at, needed)


def _waiting(asked: _Asked, invoice: InvoiceThen) -> Reason:
    last, reason = invoice.last, str(invoice.last.data.get("reason") or "")
    at = last.data.get("next_attempt_at")
    rule = SALES_OFF if reason == SALES_OFF else str(last.data.get("rule") or reason or last.kind)
    asked_for = any(e.kind in {K.CARD_NEEDED, K.CUSTOMER_STEP_NEEDED} for e in invoice.events)
    fate = fate_of("open", None, known=None, waits=at is None, reason=reason, patient=asked_for)
    if rule == SALES_OFF:
        needed = "`billing-worker sales start --reason TEXT`"
    elif fate is Fate.DATED:
        needed = _when(at)
    else:
        needed = next_of(fate, invoice.reference, asked.reference)
    given = reason_in_words(reason)
    why = f"It waited: {given}" if given else "Its next step was decided, and not made yet"
    return Reason(invoice.reference, why, rule, _source_of(rule, reason), last.by, last.at, needed)


def _when(at: str | None) -> str:
    return f"Its date has to come: {at}" if at else ""


def _source_of(rule: str, reason: str) -> str:
    if rule == NOTICE_RULE:
        return _NOTICES
    if rule in _NETWORKS:
        return _NETWORKS[rule]
    kind, _, resolution = reason.partition(": ")
    if kind.startswith("declined_"):
        seen = decline_for(resolution)
        return f"{_RECOVERY}#the-ladder; {resolution}: docs/gateway.md, {seen.seen} ({seen.read})"
    return _OPERATIONS if rule == SALES_OFF else _RECOVERY


# --- the calendar ------------------------------------------------------------------------------

_SKIPS: Final = frozenset(
    {K.SUBSCRIPTION_RESUMED, K.SUBSCRIPTION_CHANGED, K.SUBSCRIPTION_FORGIVEN, K.SUBSCRIPTION_MOVED}
)


def _of_calendar(asked: _Asked, then: Sequence[InvoiceThen]) -> Reason:
    """Say why nothing was open: it was paid, void or given up, or no period had begun."""
    covering = [row for row in asked.invoices if row.period_start <= asked.moment < row.period_end]
    if not covering:
        return _no_period(asked)
    row = covering[-1]
    period = f"period {row.period_number} from {row.period_start.isoformat()}"
    known = {one.reference: one for one in then}.get(row.reference_id)
    if known is None:
        why = f"Its {period} had begun, and its invoice was opened at {row.created_at.isoformat()}"
        since = row.period_start
        return Reason(asked.reference, why, _UNOPENED, _CATCH_UP, None, since, "A sweep opens it")
    needed = f"Its next period has to begin: {_next_start(asked)}"
    last, given = known.last, reason_in_words(known.last.data.get("reason"))
    why = f"The invoice of its {period} was {known.state} already"
    why += f": {given}" if given else ""
    decided = last.data.get("catch_up")
    rule = decided["rule"] if decided else str(last.data.get("rule") or f"invoice.{known.state}")
    source = _CATCH_UP if decided else _LIFECYCLE
    if known.state == "uncollectible":
        needed = next_of(Fate.UNCOLLECTIBLE, known.reference, asked.reference)
        source = _RECOVERY
    return Reason(known.reference, why, rule, source, last.by, last.at, needed)


def _no_period(asked: _Asked) -> Reason:
    earlier = [row for row in asked.invoices if row.period_end <= asked.moment]
    skips = [e for e in asked.until_then if e.kind in _SKIPS]
    due = asked.subscription.next_billing_at
    if due is not None and due <= asked.moment:
        why = f"Its period from {due.isoformat()} had begun, and has no invoice yet"
        return Reason(asked.reference, why, _UNOPENED, _CATCH_UP, None, due, "A sweep opens it")
    needed = f"Its next period has to begin: {_next_start(asked)}"
    if earlier and skips:
        said = skips[-1]
        given = said.data.get("why")
        why = f"No period began: a decision ({said.kind}) has skipped or moved it"
        why += f" ({given})" if given else ""
        return Reason(asked.reference, why, said.kind, _LIFECYCLE, said.by, said.at, needed)
    why = "No period had begun yet"
    return Reason(asked.reference, why, "calendar", _CALENDAR, None, None, needed)


def _next_start(asked: _Asked) -> str:
    later = [row.period_start for row in asked.invoices if row.period_start > asked.moment]
    at = min(later, default=asked.subscription.next_billing_at)
    return at.isoformat() if at else "none is planned"


# --- the book ----------------------------------------------------------------------------------

_OF_BOOK: Final = frozenset({K.SALES_SWITCHED, K.WORK_RESUMED, K.BOOK_HANDED_OVER})


def _of_book(asked: _Asked) -> Iterator[Reason]:
    """Say what held back all charges of the book at the moment."""
    events = history.of_the_book(asked.connection, _OF_BOOK)
    switched = [
        e
        for e in events
        if e.kind == K.SALES_SWITCHED and not e.data.get("service") and e.at <= asked.moment
    ]
    if switched and not switched[-1].data["on"]:
        off = switched[-1]
        why = f"Sales were switched off ({off.data.get('reason') or 'no reason given'})"
        needed = "`billing-worker sales start --reason TEXT`"
        yield Reason("all", why, "sales.switched", _OPERATIONS, off.by, off.at, needed)
    for event in events:
        if event.kind == K.WORK_RESUMED:
            since = datetime.fromisoformat(event.data["silent_since"])
            if since <= asked.moment < event.at:
                why = (
                    f"No sweep ran until {event.at.isoformat()}: beat, worker or a server was down"
                )
                source = "docs/operations.md#silence"
                yield Reason("all", why, "work.silent", source, None, since, "They have to run")
