"""A customer's new card: which subscriptions it pays from now on, and what it collects now.

    lock the subscriptions ─▶ make it their default ─▶ domain/new_card.py dates their debts

It takes the one slot that every attempt takes: what is in flight is left to the gateway's word, and
only its decline brings the new card.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection

from billing_worker.clock import Clock
from billing_worker.domain import new_card as rules
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.new_card import Debt
from billing_worker.domain.outcome import withdrawn
from billing_worker.domain.subscription import Subscription
from billing_worker.persistence import attempts, cards, claims, history, subscriptions
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.cards.keep import keep, require_chargeable
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.invoicing.decided_at import CLOCKS_DIFFER, last_said, not_in_the_future
from billing_worker.services.ports import Vault


class Scope(StrEnum):
    """What a new card pays from now on."""

    SUBSCRIPTION = "subscription"  # the one that it is given for
    CUSTOMER = "customer"  # and all that the card which it replaces has paid


@dataclass(frozen=True, slots=True)
class Given:
    """A stored card that a customer, or somebody for them, gives for subscriptions."""

    card_id: int
    by: str
    why: str | None
    scope: Scope
    now: datetime
    decided_at: datetime | None = None

    def event(self, kind: EventKind, *, alert: bool = False, **more: Any) -> Event:
        said: dict[str, Any] = {"by": self.by, "why": self.why, "card_id": self.card_id}
        if self.decided_at is not None:
            said["decided_at"] = self.decided_at.isoformat()
        return Event(kind, self.now, self.by, said | more, alert)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a given card means. `as_dict` is what the command line and callers get."""

    card_id: int
    subscriptions: tuple[str, ...]  # paid with it from now on
    on_the_old_card: tuple[str, ...]  # others that the replaced card goes on to pay
    tried: tuple[str, ...]  # invoices that are charged at once
    later: tuple[tuple[str, datetime], ...]  # invoices that are charged on another day
    for_a_person: tuple[str, ...]  # debts that are not collected by themselves
    in_flight: tuple[str, ...]  # invoices whose present attempt comes first

    def as_dict(self) -> dict[str, Any]:
        return {
            "card_id": self.card_id,
            "subscriptions": list(self.subscriptions),
            "on_the_old_card": list(self.on_the_old_card),
            "tried": list(self.tried),
            "later": [{"invoice": name, "at": at.isoformat()} for name, at in self.later],
            "for_a_person": list(self.for_a_person),
            "in_flight": list(self.in_flight),
        }


def replace_card(
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    subscription_reference: str,
    card: CardRecord,
    by: str,
    why: str | None,
    scope: Scope = Scope.SUBSCRIPTION,
    decided_at: datetime | None = None,
) -> dict[str, Any]:
    """Store a card, and let it pay the subscription from now on.

    With the scope `customer` it also pays what the replaced card paid, and is the customer's default
    card. What it collects now is decided in `domain/new_card.py`. Returns {subscription} and what
    `Accepted.as_dict` has. Raises InvalidInput on `reference_id`, on the field of a card that cannot
    be charged or is another customer's, or on `decided_at` when a newer decision has already named a
    card.
    """
    now = clock.now()
    with store.transaction() as connection:
        asked = _lock(connection, subscription_reference, scope)
        _require_newest(connection, asked.named, decided_at, now)
        card_id = keep(connection, vault, card, asked.named.customer_id, now)
        done = _give(connection, asked, Given(card_id, by, why, scope, now, decided_at))
    return {"subscription": subscription_reference, **done.as_dict()}


def use_card(
    store: Store,
    clock: Clock,
    *,
    subscription_reference: str,
    card_id: int,
    by: str,
    why: str | None,
    scope: Scope = Scope.SUBSCRIPTION,
    decided_at: datetime | None = None,
) -> dict[str, Any]:
    """As `replace_card`, with a card that the customer has stored already.

    Raises InvalidInput on `card_id` too, when the customer has no such card.
    """
    now = clock.now()
    with store.transaction() as connection:
        asked = _lock(connection, subscription_reference, scope)
        _require_newest(connection, asked.named, decided_at, now)
        owned = cards.of_customers(connection, [asked.named.customer_id])
        if card_id not in {card.id for card in owned[asked.named.customer_id]}:
            raise InvalidInput("card_id", f"the customer has no card {card_id}")
        require_chargeable(connection, card_id, now)
        done = _give(connection, asked, Given(card_id, by, why, scope, now, decided_at))
    return {"subscription": subscription_reference, **done.as_dict()}


def add_backup_card(
    store: Store,
    vault: Vault,
    clock: Clock,
    *,
    subscription_reference: str,
    card: CardRecord,
    consent: str,
    by: str,
) -> dict[str, Any]:
    """Keep a card that the customer allows to be charged when the default card is dead.

    `consent` says where the permission is recorded; without one there is no backup. Returns
    {subscription, card_id}. Raises InvalidInput as `replace_card` does, and on `consent`.
    """
    if not consent.strip():
        raise InvalidInput("consent", "must say where the customer's consent is recorded")
    now = clock.now()
    with store.transaction() as connection:
        subscription = _lock(connection, subscription_reference, Scope.SUBSCRIPTION).named
        card_id = keep(connection, vault, card, subscription.customer_id, now)
        cards.allow_backup(connection, card_id, now, f"{by}: {consent}")
        data = {"card_id": card_id, "role": "backup", "consent": consent}
        event = Event(EventKind.CARD_ADDED, now, by, data)
        history.write(connection, [Entry(event, subscription.id)])
    return {"subscription": subscription_reference, "card_id": card_id}


# --- which subscriptions ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    named: Subscription  # the one that the card is given for
    others: tuple[Subscription, ...]  # within the scope
    on_the_old_card: tuple[str, ...]  # outside of it


def _lock(connection: Connection, reference: str, scope: Scope) -> _Asked:
    """All in the order of their ids, as everybody locks several."""
    row = subscriptions.find(connection, reference)
    if row is None:
        raise InvalidInput("reference_id", f"there is no subscription {reference!r}")
    alike = [one for one in cards.paid_with(connection, row.customer_id, row.card_id)
             if one.id != row.id]  # fmt: skip
    wanted = {one.id for one in alike} if scope is Scope.CUSTOMER else set()
    locked, unreadable = subscriptions.lock_these(connection, {row.id} | wanted)
    for one in unreadable:
        if one.id == row.id:
            raise InvalidInput("reference_id", f"{reference!r} cannot be read: {one.reason}")
    [named] = [one for one in locked if one.id == row.id]
    others = tuple(one for one in locked if one.id != row.id)
    left = tuple(one.reference_id for one in alike if one.id not in wanted)
    return _Asked(named, others, left)


def _require_newest(
    connection: Connection, subscription: Subscription, decided_at: datetime | None, now: datetime
) -> None:
    """An older card must not take the place of a newer one because it is told of later."""
    if decided_at is None:
        return
    at = not_in_the_future(decided_at, now)
    last = _last_given(connection, subscription)
    if last is not None and at < last - CLOCKS_DIFFER:
        reason = f"is before the last decision about its card, which is of {last.isoformat()}"
        raise InvalidInput("decided_at", reason)


def _last_given(connection: Connection, subscription: Subscription) -> datetime | None:
    return last_said(connection, subscription.id, frozenset({EventKind.CARD_ADDED}))


def _older_than(connection: Connection, subscription: Subscription, given: Given) -> bool:
    """Whether a newer decision has named its card: one within the scope then keeps it."""
    last = _last_given(connection, subscription) if given.decided_at else None
    return last is not None and given.decided_at is not None and given.decided_at < last


# --- what it pays and collects ----------------------------------------------------------------


def _give(connection: Connection, asked: _Asked, given: Given) -> Accepted:
    others = [one for one in asked.others if not _older_than(connection, one, given)]
    given_to = sorted((asked.named, *others), key=lambda one: one.id)
    return give(
        connection, given_to, given, given_for={asked.named.id},
        on_the_old_card=asked.on_the_old_card if given.card_id != asked.named.card_id else (),
    )  # fmt: skip


def give(
    connection: Connection,
    given_to: Sequence[Subscription],
    given: Given,
    *,
    given_for: Collection[int],
    first_at: datetime | None = None,
    on_the_old_card: tuple[str, ...] = (),
) -> Accepted:
    """Make a stored card the default of locked subscriptions, and date what it collects.

    `given_for`: ids of those that the customer had in mind. `first_at`: when the first debt is tried;
    None: now. Invoices are locked after the card: whoever holds one of them without its subscription
    waits for no card.
    """
    ids = [subscription.id for subscription in given_to]
    cards.make_default(connection, ids, given.card_id)
    if given.scope is Scope.CUSTOMER:
        cards.make_customers_default(connection, given.card_id, given.now)
    items = claims.lock_open(connection, *ids) if ids else []
    flying = [item.invoice for item in items if _is_in_flight(item.live)]
    debts = _debts(connection, items, given_to, given_for)
    collected = rules.collect(debts, given.now, first_at=first_at or given.now)
    _withdraw_old_card(connection, items, given)
    attempts.save_open(connection, [], collected.changes)
    _tell(connection, given_to, collected, given)
    dated = [(i.reference_id, i.next_attempt_at or i.paused_attempt_at or given.now)
             for _, i in collected.dated]  # fmt: skip
    return Accepted(
        given.card_id,
        tuple(subscription.reference_id for subscription in given_to),
        on_the_old_card,
        tried=tuple(name for name, at in dated if at <= given.now),
        later=tuple((name, at) for name, at in dated if at > given.now),
        for_a_person=tuple(invoice.reference_id for _, invoice in collected.held),
        in_flight=tuple(invoice.reference_id for invoice in flying),
    )


def _debts(
    connection: Connection,
    items: Sequence[DueInvoice],
    given_to: Sequence[Subscription],
    given_for: Collection[int],
) -> list[Debt]:
    status_of = {subscription.id: subscription.status for subscription in given_to}
    unpaid = [item.invoice for item in items if not _is_in_flight(item.live)]
    for subscription_id in sorted(given_for):
        unpaid += [item.invoice for item in claims.lock_given_up(connection, subscription_id)]
    return [
        Debt(invoice, status_of[invoice.subscription_id], invoice.subscription_id in given_for)
        for invoice in unpaid
        if rules.is_payable_by_another(invoice, status_of[invoice.subscription_id])
    ]


def _is_in_flight(live: Attempt | None) -> bool:
    """Sold, or on a page in front of the customer: its end comes first."""
    return live is not None and (
        live.status is AttemptStatus.SUBMITTED or live.origin is Origin.LINK
    )


def _withdraw_old_card(connection: Connection, items: Sequence[DueInvoice], given: Given) -> None:
    """Prepared attempts carry the old card. Nothing was sent: whoever arms one takes the lock of
    the subscription, which the caller holds. The next claim prepares another, with the new card.
    """
    reason = "card replaced"
    prepared = [live for item in items if (live := item.live) and not _is_in_flight(live)]
    attempts.save_open(connection, [(a, withdrawn(a, reason, given.now)) for a in prepared], [])
    claims.ring_later(connection, [a.invoice_id for a in prepared], given.now)
    event = Event(EventKind.ATTEMPT_NOT_CHARGED, given.now, given.by, {"reason": reason})
    subscription_of = {item.invoice.id: item.invoice.subscription_id for item in items}
    history.write(
        connection,
        (Entry(event, subscription_of[a.invoice_id], a.invoice_id, a.id) for a in prepared),
    )


def _tell(
    connection: Connection,
    given_to: Sequence[Subscription],
    collected: rules.Collected,
    given: Given,
) -> None:
    held = [after for _, after in collected.held]
    entries = [
        Entry(_added(subscription, collected, given), subscription.id) for subscription in given_to
    ]
    entries += [
        _about(after, given.event(EventKind.RETRY_ORDERED, origin=Origin.NEW_CARD, at=_date(after)))
        for before, after in collected.dated
        if before != after
    ]
    entries += [
        _about(after, given.event(EventKind.INVOICE_WAITING, reason=after.reason)) for after in held
    ]
    history.write(connection, entries)


def _added(subscription: Subscription, collected: rules.Collected, given: Given) -> Event:
    """An alert if a debt waits for a person that has waited for a card so far."""
    held = [pair for pair in collected.held if pair[1].subscription_id == subscription.id]
    return given.event(
        EventKind.CARD_ADDED,
        role="default",
        scope=str(given.scope),
        for_a_person=[after.reference_id for _, after in held],
        alert=any(before != after for before, after in held),
    )


def _about(invoice: Invoice, event: Event) -> Entry:
    return Entry(event, invoice.subscription_id, invoice.id)


def _date(invoice: Invoice) -> str | None:
    at = invoice.next_attempt_at or invoice.paused_attempt_at
    return at.isoformat() if at else None
