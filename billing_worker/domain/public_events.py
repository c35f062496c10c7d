"""What other systems are told, as a list of its own that is derived from the history.

The kinds of the history may change freely; what is listed here may not. A new detail is no new
version, a detail that changes its meaning is a new type. `docs/events.md` is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from billing_worker.domain.errors import InvariantBroken
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.statement import CHARGED_BACK_STATUSES

VERSION: Final = 1

LARGEST_BODY: Final = 20_000
"""Bytes. Standard Webhooks 1.0 advises receivers to expect less than 20 kB."""

LONGEST_TEXT: Final = 500
"""Characters of a detail. What people write has no limit of its own."""


class PublicType(StrEnum):
    SUBSCRIPTION_CREATED = "subscription.created"
    SUBSCRIPTION_CHANGED = "subscription.changed"
    SUBSCRIPTION_PAUSED = "subscription.paused"
    SUBSCRIPTION_RESUMED = "subscription.resumed"
    SUBSCRIPTION_PAST_DUE = "subscription.past_due"
    SUBSCRIPTION_SUSPENDED = "subscription.suspended"
    SUBSCRIPTION_RECOVERED = "subscription.recovered"
    SUBSCRIPTION_CANCELLED = "subscription.cancelled"
    SUBSCRIPTION_ENDED = "subscription.ended"
    INVOICE_OPENED = "invoice.opened"
    INVOICE_REOPENED = "invoice.reopened"
    INVOICE_PAID = "invoice.paid"
    INVOICE_FAILED = "invoice.failed"
    INVOICE_UNCOLLECTIBLE = "invoice.uncollectible"
    INVOICE_VOID = "invoice.void"
    INVOICE_UNKNOWN = "invoice.unknown"
    PAYMENT_SURPLUS = "payment.surplus"
    PAYMENT_REFUNDED = "payment.refunded"
    PAYMENT_DISPUTED = "payment.disputed"
    CARD_ADDED = "card.added"
    CARD_NEEDED = "card.needed"
    CARD_EXPIRING = "card.expiring"
    CARD_UNUSABLE = "card.unusable"
    CUSTOMER_STEP_NEEDED = "customer.step_needed"
    ATTENTION_NEEDED = "attention.needed"


@dataclass(frozen=True, slots=True)
class Detail:
    """One field of `data` beside the ones that all types have. None where it is not known."""

    name: str
    meaning: str
    kind: str = "text"  # text, integer or instant
    sources: tuple[str, ...] = ()  # names in the history's data, the first that is there; else name

    def taken_from(self, data: Mapping[str, Any]) -> Any:
        found = (data.get(source) for source in self.sources or (self.name,))
        value = next((value for value in found if value is not None), None)
        if self.kind == "integer":
            return value if isinstance(value, int) else None
        return None if value is None else str(value)[:LONGEST_TEXT]


@dataclass(frozen=True, slots=True)
class Described:
    """What a type means, and what it tells beside the state."""

    meaning: str
    details: tuple[Detail, ...] = ()


_WHY = Detail("why", "the reason that was given with the decision")
_UNTIL = Detail("until", "how long the customer is waited for", "instant")

CATALOGUE: Final[Mapping[PublicType, Described]] = {
    PublicType.SUBSCRIPTION_CREATED: Described("A subscription was added."),
    PublicType.SUBSCRIPTION_CHANGED: Described(
        "Its terms have changed, or its dates, or whether it is billed here.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_PAUSED: Described(
        "Nothing becomes due and nothing is charged.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_RESUMED: Described("It goes on after a pause.", (_WHY,)),
    PublicType.SUBSCRIPTION_PAST_DUE: Described(
        "It owes an invoice. Further periods still become due.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_SUSPENDED: Described(
        "Recovery has ended without money. No period becomes due until it pays.",
        (Detail("rule", "the rule that ended the recovery"),),
    ),
    PublicType.SUBSCRIPTION_RECOVERED: Described("It owes nothing any more and goes on.", (_WHY,)),
    PublicType.SUBSCRIPTION_CANCELLED: Described("It is over.", (_WHY,)),
    PublicType.SUBSCRIPTION_ENDED: Described(
        "No further period becomes due. What is open is still owed.", (_WHY,)
    ),
    PublicType.INVOICE_OPENED: Described("A period became due, or a one-off charge was ordered."),
    PublicType.INVOICE_REOPENED: Described(
        "It is owed and tried again, because somebody ordered it or took back that it was paid.",
        (_WHY,),
    ),
    PublicType.INVOICE_PAID: Described("The money for it has come."),
    PublicType.INVOICE_FAILED: Described(
        "A try to collect it was declined.",
        (
            Detail("attempt", "which step of the retry schedule this was", "integer"),
            Detail("of", "how many steps the schedule has", "integer"),
            Detail("resolution", "the gateway's word for the reason"),
            Detail("because", "the reason in words"),
            Detail("follows", "whose turn it is now: ours, card, customer, person or nobody"),
            Detail("next_attempt_at", "when it is tried again", "instant"),
            Detail("waits_until", "how long the customer is waited for", "instant"),
            Detail("consequence", "what happens to the subscription when recovery ends"),
        ),
    ),
    PublicType.INVOICE_UNCOLLECTIBLE: Described(
        "Recovery has ended. Money that comes late still pays it.",
        (Detail("rule", "the rule that ended the recovery"),),
    ),
    PublicType.INVOICE_VOID: Described(
        "It is owed no longer, or its period is not charged.",
        (Detail("why", "the reason", sources=("why", "reason", "rule")),),
    ),
    PublicType.INVOICE_UNKNOWN: Described(
        "Its outcome has been open for a day: the card may have been charged. No other try is made.",
        (
            Detail("since", "when the try began", "instant"),
            Detail("why", "what is known", sources=("reason", "found")),
        ),
    ),
    PublicType.PAYMENT_SURPLUS: Described(
        "Money came that is not owed. It has to go back.",
        (Detail("gateway_status", "the gateway's word for the payment"),),
    ),
    PublicType.PAYMENT_REFUNDED: Described(
        "A payment went back to the customer.",
        (Detail("gateway_status", "the gateway's word", sources=("status",)),),
    ),
    PublicType.PAYMENT_DISPUTED: Described(
        "A payment was charged back.",
        (Detail("gateway_status", "the gateway's word", sources=("status",)),),
    ),
    PublicType.CARD_ADDED: Described(
        "A card was stored.",
        (
            Detail("role", "default, backup, or stored when a page has brought it"),
            Detail("last4", "its last four digits", sources=("mask",)),
        ),
    ),
    PublicType.CARD_NEEDED: Described(
        "No charge is made before the customer gives another card.",
        (Detail("why", "the reason", sources=("reason",)), _UNTIL),
    ),
    PublicType.CARD_EXPIRING: Described(
        "A card that is charged expires soon.",
        (
            Detail("last4", "its last four digits", sources=("mask",)),
            Detail("expires", "its last month, as YYYY-MM"),
            Detail("days", "how many days ahead this warning is for", "integer"),
        ),
    ),
    PublicType.CARD_UNUSABLE: Described(
        "A card was refused for good. It is charged no more.",
        (Detail("why", "the reason", sources=("reason",)),),
    ),
    PublicType.CUSTOMER_STEP_NEEDED: Described(
        "The customer has to take part. `billing.start_checkout` makes the page where they pay.",
        (Detail("why", "the reason", sources=("reason",)), _UNTIL),
    ),
    PublicType.ATTENTION_NEEDED: Described(
        "A person of yours has to look.",
        (
            Detail("about", "what it is about, for people: these words may change"),
            Detail("why", "the reason", sources=("reason", "evidence", "why", "found", "status")),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Told:
    """One public event before it has a number."""

    type: PublicType
    at: datetime
    details: Mapping[str, Any] = field(default_factory=dict)


def told_by(event: Event) -> list[Told]:
    """The public events that follow from one line of history, mostly none."""
    found = [_told(kind, event, event.data) for kind in _types(event)]
    if event.alert:
        found.append(_told(PublicType.ATTENTION_NEEDED, event, {**event.data, "about": event.kind}))
    return found


def _told(kind: PublicType, event: Event, data: Mapping[str, Any]) -> Told:
    if event.kind is EventKind.CARD_STORED:
        data = {**data, "role": "stored"}
    details = {detail.name: detail.taken_from(data) for detail in CATALOGUE[kind].details}
    if details.get("last4"):
        details["last4"] = details["last4"][-4:]
    # A page that pays no invoice belongs to a customer, and to no subscription.
    customer = event.data.get("customer")
    return Told(kind, event.at, details | ({"customer": customer} if customer else {}))


_T = PublicType

_ALWAYS: Final[Mapping[EventKind, PublicType]] = {
    EventKind.SUBSCRIBED: _T.SUBSCRIPTION_CREATED,
    EventKind.SUBSCRIPTION_CHANGED: _T.SUBSCRIPTION_CHANGED,
    EventKind.CANCELLATION_SCHEDULED: _T.SUBSCRIPTION_CHANGED,
    EventKind.CANCELLATION_WITHDRAWN: _T.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_ARMED: _T.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_HANDED_OVER: _T.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_TAKEN_BACK: _T.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_PAUSED: _T.SUBSCRIPTION_PAUSED,
    EventKind.SUBSCRIPTION_RESUMED: _T.SUBSCRIPTION_RESUMED,
    EventKind.SUBSCRIPTION_SUSPENDED: _T.SUBSCRIPTION_SUSPENDED,
    EventKind.SUBSCRIPTION_CANCELLED: _T.SUBSCRIPTION_CANCELLED,
    EventKind.SUBSCRIPTION_ENDED: _T.SUBSCRIPTION_ENDED,
    EventKind.RETRY_ORDERED: _T.INVOICE_REOPENED,
    EventKind.INVOICE_PAID: _T.INVOICE_PAID,
    EventKind.PAYMENT_FAILED: _T.INVOICE_FAILED,
    EventKind.ATTEMPT_UNDECIDED: _T.INVOICE_UNKNOWN,
    EventKind.ATTEMPT_SURPLUS: _T.PAYMENT_SURPLUS,
    EventKind.CARD_ADDED: _T.CARD_ADDED,
    EventKind.CARD_STORED: _T.CARD_ADDED,
    EventKind.CARD_NEEDED: _T.CARD_NEEDED,
    EventKind.CARD_EXPIRING: _T.CARD_EXPIRING,
    EventKind.CARD_UNUSABLE: _T.CARD_UNUSABLE,
    EventKind.CUSTOMER_STEP_NEEDED: _T.CUSTOMER_STEP_NEEDED,
}

_BY_STATUS: Final[Mapping[str, PublicType]] = {
    "active": _T.SUBSCRIPTION_RECOVERED,
    "past_due": _T.SUBSCRIPTION_PAST_DUE,
    "cancelled": _T.SUBSCRIPTION_CANCELLED,
    "ended": _T.SUBSCRIPTION_ENDED,
}
"""`suspended` is told by an event of its own."""


def _moved(data: Mapping[str, Any]) -> Iterator[PublicType]:
    if data.get("after") in _BY_STATUS:
        yield _BY_STATUS[data["after"]]


def _opened(data: Mapping[str, Any]) -> Iterator[PublicType]:
    yield _T.INVOICE_OPENED
    if data.get("last_period"):
        yield _T.SUBSCRIPTION_ENDED


def _voided(data: Mapping[str, Any]) -> Iterator[PublicType]:
    yield _T.INVOICE_VOID
    if data.get("last_period"):
        yield _T.SUBSCRIPTION_ENDED


def _given_back(data: Mapping[str, Any]) -> Iterator[PublicType]:
    charged_back = data.get("status") in CHARGED_BACK_STATUSES
    yield _T.PAYMENT_DISPUTED if charged_back else _T.PAYMENT_REFUNDED


def _recovery_ended(data: Mapping[str, Any]) -> Iterator[PublicType]:
    if data.get("invoice") == "uncollectible":
        yield _T.INVOICE_UNCOLLECTIBLE


def _resolved(data: Mapping[str, Any]) -> Iterator[PublicType]:
    if not data.get("paid"):
        yield _T.INVOICE_REOPENED


_SOMETIMES: Final[Mapping[EventKind, Callable[[Mapping[str, Any]], Iterator[PublicType]]]] = {
    EventKind.SUBSCRIPTION_MOVED: _moved,
    EventKind.INVOICE_OPENED: _opened,
    EventKind.INVOICE_VOIDED: _voided,
    EventKind.ATTEMPT_GIVEN_BACK: _given_back,
    EventKind.RECOVERY_ENDED: _recovery_ended,
    EventKind.ATTEMPT_RESOLVED: _resolved,
}


def _types(event: Event) -> Sequence[PublicType]:
    if event.kind in _ALWAYS:
        return (_ALWAYS[event.kind],)
    chosen = _SOMETIMES.get(event.kind)
    return tuple(chosen(event.data)) if chosen else ()


# --- the body ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Numbered:
    """A public event with its place: in the feed, and within its subscription."""

    id: str
    told: Told
    number: int  # in the feed: whoever has seen it has seen all before it
    sequence: int  # counts up by one per subscription; events about none count among themselves


def body(event: Numbered, state: Mapping[str, Any]) -> dict[str, Any]:
    """The whole event as it is sent. `state`: {customer, subscription, invoice} as they are now.

    Shape: {type, timestamp, id, data: {version, number, sequence, customer, subscription, invoice,
    state: {subscription, invoice}, …details}}; the references are texts or None.
    """
    details = dict(event.told.details)
    of_page = details.pop("customer", None)
    return {
        "type": str(event.told.type),
        "timestamp": event.told.at.isoformat(),
        "id": event.id,
        "data": {
            "version": VERSION,
            "number": event.number,
            "sequence": event.sequence,
            "customer": state["customer"] or of_page,
            "subscription": _reference(state["subscription"]),
            "invoice": _reference(state["invoice"]),
            "state": {"subscription": state["subscription"], "invoice": state["invoice"]},
            **details,
        },
    }


def _reference(state: Mapping[str, Any] | None) -> str | None:
    return None if state is None else str(state["reference_id"])


def refuse_large(text: str) -> str:
    """The body as text, unless it is too large to be sent. Raises InvariantBroken."""
    size = len(text.encode())
    if size >= LARGEST_BODY:
        raise InvariantBroken(f"the event has {size} bytes, {LARGEST_BODY} are too many")
    return text
