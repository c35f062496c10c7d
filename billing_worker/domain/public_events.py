"""The public events for other systems, derived from the history.

The kinds of the history may change freely; the public types may not. A new detail needs no new
version. A detail with another meaning needs a new type. A test compares `docs/events.md` with this
file.
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

LARGEST_EVENT: Final = 20_000
"""In bytes. Standard Webhooks 1.0 advises receivers to expect less than 20 kB."""

LONGEST_TEXT: Final = 500
"""Characters of a detail. Some details hold text that people have written without a limit."""


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
    RENEWAL_UPCOMING = "renewal.upcoming"
    TRIAL_ENDING = "trial.ending"
    PAYMENT_RECEIPT = "payment.receipt"
    ATTENTION_NEEDED = "attention.needed"


@dataclass(frozen=True, slots=True)
class Detail:
    """One field of `data` besides those of all types. Its value is None if it is not known."""

    name: str
    meaning: str
    kind: str = "text"  # text, integer, amount or instant
    sources: tuple[str, ...] = ()  # names in the history's data, first match wins; default: `name`

    def taken_from(self, data: Mapping[str, Any]) -> Any:
        found = (data.get(source) for source in self.sources or (self.name,))
        value = next((value for value in found if value is not None), None)
        if self.kind == "integer":
            return value if isinstance(value, int) else None
        return None if value is None else str(value)[:LONGEST_TEXT]


@dataclass(frozen=True, slots=True)
class Described:
    """What a type means, and its details besides the state."""

    meaning: str
    details: tuple[Detail, ...] = ()


_WHY = Detail("why", "the reason that was given with the decision")
_UNTIL = Detail("until", "until when the worker waits for the customer", "instant")

_OF_CHARGE = (
    Detail("period", "number of the period that is charged", "integer"),
    Detail("charge", "reference that its invoice has, or will have"),
    Detail("amount", "what will be charged", "amount"),
    Detail("currency", "its currency"),
    Detail("charge_at", "when it is charged at the earliest", "instant"),
    Detail("edition", "1 for the first notice of this charge; a higher one replaces it", "integer"),
)
_FOR_THE_CUSTOMER = (
    Detail("text", "the merchant's description of what is paid"),
    Detail("how_to_cancel", "the text of `BILLING_HOW_TO_CANCEL`"),
)

CATALOGUE: Final[Mapping[PublicType, Described]] = {
    PublicType.SUBSCRIPTION_CREATED: Described("A subscription was added."),
    PublicType.SUBSCRIPTION_CHANGED: Described(
        "The terms or dates have changed, or whether this worker bills it.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_PAUSED: Described(
        "No period becomes due and no invoice is charged.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_RESUMED: Described("A pause has ended.", (_WHY,)),
    PublicType.SUBSCRIPTION_PAST_DUE: Described(
        "An invoice is unpaid. Further periods still become due.", (_WHY,)
    ),
    PublicType.SUBSCRIPTION_SUSPENDED: Described(
        "Recovery has ended without a payment. No period becomes due before a payment.",
        (Detail("rule", "the rule that ended the recovery"),),
    ),
    PublicType.SUBSCRIPTION_RECOVERED: Described("Nothing is owed any more.", (_WHY,)),
    PublicType.SUBSCRIPTION_CANCELLED: Described("The subscription was cancelled.", (_WHY,)),
    PublicType.SUBSCRIPTION_ENDED: Described(
        "No further period becomes due. Open invoices are still owed.", (_WHY,)
    ),
    PublicType.INVOICE_OPENED: Described("A period became due, or a one-off charge was ordered."),
    PublicType.INVOICE_REOPENED: Described(
        "The invoice is owed again: a retry was ordered, or a person withdrew that it was paid.",
        (_WHY,),
    ),
    PublicType.INVOICE_PAID: Described("The invoice was paid."),
    PublicType.INVOICE_FAILED: Described(
        "An attempt was declined.",
        (
            Detail("attempt", "number of this step of the retry schedule", "integer"),
            Detail("of", "number of steps of the schedule", "integer"),
            Detail("resolution", "the gateway's code for the reason"),
            Detail("because", "the reason in words"),
            Detail(
                "follows",
                "the next step: `retry`, `card_needed`, `customer_step_needed`, `person` or `end`",
            ),
            Detail("next_attempt_at", "when the next attempt follows", "instant"),
            Detail("waits_until", "until when the worker waits for the customer", "instant"),
            Detail("consequence", "what happens to the subscription when recovery ends"),
        ),
    ),
    PublicType.INVOICE_UNCOLLECTIBLE: Described(
        "Recovery has ended. A late payment still pays the invoice.",
        (Detail("rule", "the rule that ended the recovery"),),
    ),
    PublicType.INVOICE_VOID: Described(
        "The invoice is no longer owed, or its period is not charged.",
        (Detail("why", "the reason", sources=("why", "reason", "rule")),),
    ),
    PublicType.INVOICE_UNKNOWN: Described(
        "The outcome of an attempt has been unknown for a day: the card may have been charged. "
        "No other attempt is made.",
        (
            Detail("since", "when the attempt began", "instant"),
            Detail("why", "what is known", sources=("reason", "found")),
        ),
    ),
    PublicType.PAYMENT_SURPLUS: Described(
        "A payment arrived that is not owed. It has to be refunded.",
        (Detail("gateway_status", "the gateway's status of the payment"),),
    ),
    PublicType.PAYMENT_REFUNDED: Described(
        "A payment was refunded, or is being refunded.",
        (Detail("gateway_status", "the gateway's status of the payment", sources=("status",)),),
    ),
    PublicType.PAYMENT_DISPUTED: Described(
        "A payment was charged back.",
        (Detail("gateway_status", "the gateway's status of the payment", sources=("status",)),),
    ),
    PublicType.CARD_ADDED: Described(
        "A card was stored.",
        (
            Detail("role", "`default`, `backup`, or `stored` for a card from a page"),
            Detail("last4", "its last four digits", sources=("mask",)),
        ),
    ),
    PublicType.CARD_NEEDED: Described(
        "No charge follows before the customer gives another card.",
        (Detail("why", "the reason", sources=("reason",)), _UNTIL),
    ),
    PublicType.CARD_EXPIRING: Described(
        "The card of a subscription expires soon.",
        (
            Detail("last4", "its last four digits", sources=("mask",)),
            Detail("expires", "its last month, as YYYY-MM"),
            Detail("days", "days ahead of the expiry for which this warning is", "integer"),
        ),
    ),
    PublicType.CARD_UNUSABLE: Described(
        "A card was refused for good. It is never charged again.",
        (Detail("why", "the reason", sources=("reason",)),),
    ),
    PublicType.CUSTOMER_STEP_NEEDED: Described(
        "The customer has to take part. `billing.start_checkout` opens a page for the payment.",
        (Detail("why", "the reason", sources=("reason",)), _UNTIL),
    ),
    PublicType.RENEWAL_UPCOMING: Described(
        "A charge comes soon, or its amount or date has changed. Tell the customer.",
        (*_OF_CHARGE, *_FOR_THE_CUSTOMER),
    ),
    PublicType.TRIAL_ENDING: Described(
        "A trial ends soon, and the first charge follows. Tell the customer.",
        (*_OF_CHARGE, *_FOR_THE_CUSTOMER),
    ),
    PublicType.PAYMENT_RECEIPT: Described(
        "The invoice was paid. Send the customer a receipt.",
        (
            Detail("amount", "what was paid", "amount"),
            Detail("currency", "its currency"),
            Detail("paid_at", "when it was paid", "instant"),
            *_FOR_THE_CUSTOMER,
        ),
    ),
    PublicType.ATTENTION_NEEDED: Described(
        "A person at the merchant has to act.",
        (
            Detail("about", "the subject, for people to read: its words may change"),
            Detail("why", "the reason", sources=("reason", "evidence", "why", "found", "status")),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Told:
    """A public event that has no number yet."""

    type: PublicType
    at: datetime
    details: Mapping[str, Any] = field(default_factory=dict)


def told_by(event: Event) -> list[Told]:
    """Return the public events that follow from one line of history: often none."""
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
    # A page without an invoice belongs to a customer but to no subscription.
    customer = event.data.get("customer")
    return Told(kind, event.at, details | ({"customer": customer} if customer else {}))


_T = PublicType

_ALWAYS: Final[Mapping[EventKind, PublicType]] = {
    EventKind.SUBSCRIBED: _T.SUBSCRIPTION_CREATED,
    EventKind.SUBSCRIPTION_CHANGED: _T.SUBSCRIPTION_CHANGED,
    EventKind.SUBSCRIPTION_REPRICED: _T.SUBSCRIPTION_CHANGED,
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
    EventKind.PAYMENT_FAILED: _T.INVOICE_FAILED,
    EventKind.ATTEMPT_UNDECIDED: _T.INVOICE_UNKNOWN,
    EventKind.ATTEMPT_SURPLUS: _T.PAYMENT_SURPLUS,
    EventKind.CARD_ADDED: _T.CARD_ADDED,
    EventKind.CARD_STORED: _T.CARD_ADDED,
    EventKind.CARD_NEEDED: _T.CARD_NEEDED,
    EventKind.CARD_EXPIRING: _T.CARD_EXPIRING,
    EventKind.CARD_UNUSABLE: _T.CARD_UNUSABLE,
    EventKind.CUSTOMER_STEP_NEEDED: _T.CUSTOMER_STEP_NEEDED,
    EventKind.RENEWAL_UPCOMING: _T.RENEWAL_UPCOMING,
    EventKind.TRIAL_ENDING: _T.TRIAL_ENDING,
}

_BY_STATUS: Final[Mapping[str, PublicType]] = {
    "active": _T.SUBSCRIPTION_RECOVERED,
    "past_due": _T.SUBSCRIPTION_PAST_DUE,
    "cancelled": _T.SUBSCRIPTION_CANCELLED,
    "ended": _T.SUBSCRIPTION_ENDED,
}
"""`suspended` is missing because it has its own event."""


def _moved(data: Mapping[str, Any]) -> Iterator[PublicType]:
    if data.get("after") in _BY_STATUS:
        yield _BY_STATUS[data["after"]]


def _opened(data: Mapping[str, Any]) -> Iterator[PublicType]:
    yield _T.INVOICE_OPENED
    if data.get("last_period"):
        yield _T.SUBSCRIPTION_ENDED


def _paid(_: Mapping[str, Any]) -> Iterator[PublicType]:
    yield _T.INVOICE_PAID
    yield _T.PAYMENT_RECEIPT


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
    EventKind.SUBSCRIPTION_FORGIVEN: _moved,
    EventKind.INVOICE_OPENED: _opened,
    EventKind.INVOICE_PAID: _paid,
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
    """A public event with its position in the feed and within its subscription."""

    id: str
    told: Told
    number: int  # in the feed; a reader of this number has missed no smaller one
    sequence: int  # 1, 2, 3 … per subscription; events without one have a count of their own


def body(
    event: Numbered, state: Mapping[str, Any], how_to_cancel: str | None = None
) -> dict[str, Any]:
    """Return the whole event as it is sent. `state`: {customer, subscription, invoice} as of now.
    `how_to_cancel`: what the merchant tells customers about it.

    Shape: {type, timestamp, id, data: {version, number, sequence, customer, subscription, invoice,
    state: {subscription, invoice}, …details}}; the references are texts or None.
    """
    details = dict(event.told.details)
    of_page = details.pop("customer", None)
    if "how_to_cancel" in details:
        details |= _for_the_customer(state) | {"how_to_cancel": how_to_cancel}
    if event.told.type is PublicType.PAYMENT_RECEIPT:
        paid = state["invoice"] or {}
        details |= {name: paid.get(name) for name in ("amount", "currency", "paid_at")}
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


def _for_the_customer(state: Mapping[str, Any]) -> dict[str, Any]:
    described = (state["invoice"] or {}).get("description")
    return {"text": described or (state["subscription"] or {}).get("description")}


def _reference(state: Mapping[str, Any] | None) -> str | None:
    return None if state is None else str(state["reference_id"])


def refuse_large(text: str) -> str:
    """Return `text` unchanged. Raises InvariantBroken if it is too large to be sent."""
    size = len(text.encode())
    if size >= LARGEST_EVENT:
        raise InvariantBroken(f"the event has {size} bytes, {LARGEST_EVENT} are too many")
    return text
