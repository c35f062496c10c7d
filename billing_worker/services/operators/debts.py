"""What a named person decides about a debt: it is not owed, or it was paid elsewhere.

The subscription and the invoice are locked as for submitting a charge, in the same order. So once
a decision is committed no sale for the invoice can be sent, except one that was submitted before:

    prepared    the attempt is withdrawn: these books have sent nothing, for sure
    submitted   refused, because the card may have been charged, unless the caller says what
                is to become of that; so is a prepared one that restored books (or moved ones)
                have found at the gateway
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, AttemptStatus
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice, InvoiceStatus
from billing_worker.domain.outcome import Context, current_again, owes_no_longer
from billing_worker.domain.subscription import ONE_OFF, Subscription
from billing_worker.domain.timings import Timings
from billing_worker.persistence import attempts, claims, history, subscriptions
from billing_worker.persistence import invoices as stored_invoices
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.operators.words import required

MAY_BE_CHARGED = "may be charged already"

_S = InvoiceStatus


class IfCharged(Enum):
    """What to do with a debt for which the card may already have been charged."""

    REFUSE = auto()
    IF_UNPAID = auto()  # decided when the charge in flight ends: paid or void
    ALL_THE_SAME = auto()  # decided now: later money is surplus


@dataclass(frozen=True, slots=True)
class _Locked:
    """An invoice with its subscription, locked until the end of the transaction."""

    connection: Connection
    subscription: Subscription
    item: DueInvoice
    context: Context

    @property
    def invoice(self) -> Invoice:
        return self.item.invoice

    @property
    def moment(self) -> Moment:
        return Moment(self.context.now, self.context.by)


def void_invoice(
    store: Store, clock: Clock, *, reference: str, by: str, why: str,
    if_charged: IfCharged = IfCharged.REFUSE,
) -> dict[str, Any]:  # fmt: skip
    """Void an invoice. Already void: `unchanged`.

    Returns {invoice, outcome, status, reason, withdrawn: [attempts]}. Raises InvalidInput on
    `reference` if there is none, if it is paid, or may have been.
    """
    why = required("why", why)
    with store.transaction() as connection:
        locked = _lock(connection, clock, reference, by)
        return _void(locked, why, if_charged)


def mark_paid(
    store: Store, clock: Clock, *, reference: str, evidence: str, by: str, why: str,
    if_charged: IfCharged = IfCharged.REFUSE,
) -> dict[str, Any]:  # fmt: skip
    """Record that an invoice was paid elsewhere, in cash or by bank transfer. As any payment, it
    reactivates a suspended subscription. Already recorded: `unchanged`.

    Returns and raises as `void_invoice` does.
    """
    why, evidence = required("why", why), required("evidence", evidence)
    with store.transaction() as connection:
        locked = _lock(connection, clock, reference, by)
        if invoices.is_paid_elsewhere(locked.invoice.reason):
            return _told(locked.invoice, "unchanged", ())
        _require_owed(locked)
        if (attempt := _may_be_charged(locked.item)) and if_charged is IfCharged.REFUSE:
            raise InvalidInput("reference", _refusal(locked, attempt))
        paid = invoices.paid_elsewhere(locked.invoice, evidence, locked.context.now)
        withdrawn = _withdraw(locked, "paid elsewhere")
        _write(
            locked, paid, current_again,
            locked.context.event(EventKind.INVOICE_MARKED_PAID, evidence=evidence, why=why),
            locked.context.event(EventKind.INVOICE_PAID, amount=str(paid.money)),
        )  # fmt: skip
        return _told(paid, "changed", withdrawn)


def cancel_charge(
    store: Store, clock: Clock, *, charge: str, by: str, why: str | None
) -> dict[str, Any]:
    """Withdraw a one-off charge that has not been made. `charge`: its reference.

    Returns {reference_id, outcome, status} of its invoice. Raises InvalidInput on `charge` if there
    is none, if it was made, or may have been.
    """
    with store.transaction() as connection:
        found = subscriptions.find(connection, charge)
        if found is None or found.kind != ONE_OFF:
            what = "is a subscription" if found else f"there is no one-off charge {charge!r}"
            raise InvalidInput("charge", what)
        [opened] = stored_invoices.of_subscription(connection, found.id)
        try:
            locked = _lock(connection, clock, opened.reference_id, by)
            done = _void(locked, why or "taken back by the service that asked", IfCharged.REFUSE)
        except InvalidInput as error:
            raise InvalidInput("charge", error.reason) from error
    return {
        "reference_id": done["invoice"], "outcome": done["outcome"], "status": done["status"],
    }  # fmt: skip


def _void(locked: _Locked, why: str, if_charged: IfCharged) -> dict[str, Any]:
    if locked.invoice.status is _S.VOID:
        return _told(locked.invoice, "unchanged", ())
    _require_owed(locked)
    attempt = _may_be_charged(locked.item)
    if attempt is not None and if_charged is IfCharged.REFUSE:
        raise InvalidInput("reference", _refusal(locked, attempt))
    if attempt is not None and if_charged is IfCharged.IF_UNPAID:
        return _void_if_unpaid(locked, attempt, why)
    withdrawn = _withdraw(locked, "voided")
    void = invoices.voided(locked.invoice, f"{invoices.VOIDED}{why}")
    charged = attempt.reference_id if attempt else None
    said = locked.context.event(EventKind.INVOICE_VOIDED, why=why, may_be_charged=charged)
    _write(locked, void, owes_no_longer, said)
    return _told(void, "changed", withdrawn)


def _void_if_unpaid(locked: _Locked, attempt: Attempt, why: str) -> dict[str, Any]:
    if attempt.status is not AttemptStatus.SUBMITTED:
        raise InvalidInput("reference", _refusal(locked, attempt))
    if locked.invoice.void_if_unpaid:
        return _told(locked.invoice, "unchanged", ())
    marked = invoices.given_up_if_unpaid(locked.invoice)
    said = locked.context.event(EventKind.INVOICE_WAITING, reason=marked.reason, why=why)
    _save(locked, marked, said)
    return _told(marked, "changed", ())


# --- under the locks --------------------------------------------------------------------------


def _lock(connection: Connection, clock: Clock, reference: str, by: str) -> _Locked:
    row = stored_invoices.find(connection, reference)
    if row is None:
        raise InvalidInput("reference", f"there is no invoice {reference!r}")
    subscription = subscriptions.lock(connection, row.subscription_reference)
    item = claims.lock_one(connection, row.id)
    if subscription is None or item is None:
        raise InvalidInput("reference", "is gone")
    # The time is read only now: the locks may have been waited for.
    return _Locked(connection, subscription, item, Context(clock.now(), by, Timings()))


def _require_owed(locked: _Locked) -> None:
    if locked.invoice.status not in {_S.OPEN, _S.UNCOLLECTIBLE}:
        invoice = locked.invoice
        raise InvalidInput("reference", f"{invoice.reference_id} is {invoice.status}")


def _may_be_charged(item: DueInvoice) -> Attempt | None:
    for attempt in item.attempts:
        if attempt.status is AttemptStatus.SUBMITTED or attempt.undecided_since is not None:
            return attempt
        if attempt.status is AttemptStatus.PREPARED and attempt.maybe_sold:
            return attempt
    return None


def _refusal(locked: _Locked, attempt: Attempt) -> str:
    return (
        f"{locked.invoice.reference_id} {MAY_BE_CHARGED}: the gateway has not decided about "
        f"{attempt.reference_id}"
    )


def _withdraw(locked: _Locked, reason: str) -> tuple[str, ...]:
    """End prepared attempts. Their workers find the invoice closed and send nothing."""
    live = locked.item.live
    if live is None or live.status is not AttemptStatus.PREPARED:
        return ()
    pause_collection.end_prepared(locked.connection, [locked.item], reason, locked.moment)
    return (live.reference_id,)


def _write(
    locked: _Locked,
    after: Invoice,
    follow: Callable[..., tuple[Subscription, tuple[Event, ...]]],
    *said: Event,
) -> None:
    """Close the invoice, and apply the consequences to its subscription and to its other
    invoices.
    """
    before = locked.subscription
    more = attempts.owes_besides(locked.connection, before.id, after.id)
    moved_to, moved = follow(before, locked.context, owes_more=more)
    _save(locked, after, *said, *moved)
    if moved_to != before:
        subscriptions.save(locked.connection, before, moved_to)
        pause_collection.follow(locked.connection, before, moved_to, locked.moment)
    claims.stop_waiting(locked.connection, [before.id], locked.context.now)


def _save(locked: _Locked, after: Invoice, *said: Event) -> None:
    attempts.save_open(locked.connection, [], [(locked.invoice, after)])
    entries = [Entry(event, locked.subscription.id, after.id) for event in said]
    history.write(locked.connection, entries)


def _told(invoice: Invoice, outcome: str, withdrawn: tuple[str, ...]) -> dict[str, Any]:
    return {
        "invoice": invoice.reference_id,
        "outcome": outcome,
        "status": str(invoice.status),
        "reason": invoice.reason,
        "withdrawn": list(withdrawn),
    }
