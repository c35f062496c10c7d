"""What a subscription and its invoices were at a moment, read from the history alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Row

from billing_worker.domain.events import EventKind as K

_BECOMES: Final = {
    K.SUBSCRIPTION_PAUSED: "paused",
    K.SUBSCRIPTION_RESUMED: "active",
    K.SUBSCRIPTION_CANCELLED: "cancelled",
    K.SUBSCRIPTION_SUSPENDED: "suspended",
    K.SUBSCRIPTION_ENDED: "ended",
}


@dataclass(slots=True)
class Standing:
    """What it was, and the event that made it so. None: no such event yet."""

    status: str | None = None
    since: Row[Any] | None = None
    held: Row[Any] | None = None
    handed_over: Row[Any] | None = None


def standing(events: Iterable[Row[Any]]) -> Standing:
    """Return what the subscription was after these events."""
    was = Standing()
    for event in events:
        after = _after(event)
        if after is not None and after != was.status:
            was.status, was.since = after, event
        match event.kind:
            case K.SUBSCRIBED:
                was.held = event if event.data.get("held") else None
            case K.SUBSCRIPTION_ARMED:
                was.held = None
            case K.SUBSCRIPTION_HANDED_OVER:
                was.handed_over = event
            case K.SUBSCRIPTION_TAKEN_BACK:
                was.handed_over = None
    return was


def _after(event: Row[Any]) -> str | None:
    if event.kind == K.SUBSCRIBED:
        return str(event.data.get("status", "active"))
    if event.kind == K.INVOICE_OPENED:
        return "ended" if event.data.get("last_period") else None
    if not event.kind.startswith("subscription."):
        return None
    after: str | None = event.data.get("after") or _BECOMES.get(event.kind)
    return after


_DECIDES: Final = frozenset(
    {
        K.INVOICE_OPENED,
        K.INVOICE_WAITING,
        K.INVOICE_GOES_ON,
        K.RECOVERY_ENDED,
        K.RETRY_ORDERED,
        K.ATTEMPT_PREPARED,
        K.ATTEMPT_POSTPONED,
        K.ATTEMPT_SUBMITTED,
        K.ATTEMPT_DECLINED,
        K.ATTEMPT_NOT_CHARGED,
        K.ATTEMPT_FORBIDDEN,
    }
)
_ENDS: Final = {
    K.INVOICE_PAID: "paid",
    K.INVOICE_MARKED_PAID: "paid",
    K.INVOICE_VOIDED: "void",
}


@dataclass(slots=True)
class InvoiceThen:
    """One invoice at a moment."""

    reference: str
    state: str
    last: Row[Any]
    """The event that has decided about its next step, or has ended it."""
    events: list[Row[Any]] = field(default_factory=list)


def invoices_then(events: Sequence[Row[Any]]) -> list[InvoiceThen]:
    """Return the invoices that had become due by the last of these events, oldest first."""
    found: dict[int, InvoiceThen] = {}
    for event in events:
        if event.invoice_id is None:
            continue
        invoice = found.get(event.invoice_id)
        if invoice is None:
            invoice = InvoiceThen(event.invoice_reference, "open", event)
            found[event.invoice_id] = invoice
        invoice.events.append(event)
        if event.kind in _ENDS:
            invoice.state, invoice.last = _ENDS[event.kind], event
        elif event.kind in _DECIDES:
            invoice.state, invoice.last = _state_after(event), event
    return list(found.values())


def _state_after(event: Row[Any]) -> str:
    return (
        str(event.data.get("invoice", "uncollectible"))
        if event.kind == K.RECOVERY_ENDED
        else "open"
    )
