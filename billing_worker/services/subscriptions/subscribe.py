"""Creates subscriptions from records, in batches, each reference once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from billing_worker.clock import Clock
from billing_worker.domain.card import fingerprint
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.subscription import (
    ONE_OFF,
    SubscriptionStatus,
    refuse_again,
    refuse_forgotten_start,
    refuse_near_miss,
)
from billing_worker.persistence import cards, customers, history, subscriptions, switches
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.book.identity import Other
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store
from billing_worker.services.cards.keep import card_row
from billing_worker.services.customers import known_as
from billing_worker.services.import_records.export import Difference, differences, record_from
from billing_worker.services.import_records.subscription import State, SubscriptionRecord
from billing_worker.services.ports import Vault

TRIES = 3
"""Another process may add the same reference between the look-up and the insert, hardly
ever twice.
"""


FOREIGN = "foreign_token"
"""The outcome of a record whose card belongs to another customer. Nothing of it is stored."""

REFUSED = "refused"
"""The outcome of a valid record that cannot begin here today."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The outcome of each record of a batch, in order: added, unchanged, conflict, FOREIGN or
    REFUSED.
    """

    outcomes: tuple[str, ...]
    conflicts: Mapping[int, tuple[Difference, ...]] = field(default_factory=dict)
    """By position: how the record differs from the known one with its reference."""

    refused: Mapping[int, InvalidInput] = field(default_factory=dict)
    """By position: field and reason."""

    standing: Mapping[int, Standing] = field(default_factory=dict)
    """By position: the state of a subscription that was known before."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of a subscription, for callers that want it billed."""

    status: SubscriptionStatus
    held: bool  # a held import: not billed before its activation
    next_billing_at: datetime | None
    cancels_at: datetime | None

    @classmethod
    def of(cls, row: Row[Any]) -> Standing:
        status = SubscriptionStatus(row.status)
        return cls(status, row.held, row.next_billing_at, row.cancels_at)

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": str(self.status),
            "held": self.held,
            "next_billing_at": self.next_billing_at and self.next_billing_at.isoformat(),
            "cancels_at": self.cancels_at and self.cancels_at.isoformat(),
        }


def subscribe(
    store: Store,
    vault: Vault,
    clock: Clock,
    records: Sequence[SubscriptionRecord],
    *,
    by: str,
    dry_run: bool = False,
    held: bool = False,
) -> Subscribed:
    """Add the subscriptions that are new; `held` ones are not billed until they are armed.

    Idempotent by reference id: the same record again is `unchanged`, another one under a known
    reference is a `conflict` and changes nothing. The same is what made the subscription, or what
    `stored_records` says it is now. Any record whose subscription is over is REFUSED, unless the record
    says so itself: nothing would be billed for it.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return _subscribe(store, vault, clock.now(), records, by=by, dry_run=dry_run, held=held)
        except IntegrityError:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def _subscribe(
    store: Store,
    vault: Vault,
    now: datetime,
    records: Sequence[SubscriptionRecord],
    *,
    by: str,
    dry_run: bool,
    held: bool,
) -> Subscribed:
    with store.transaction() as connection:
        references = [record.reference_id for record in records]
        known = subscriptions.known(connection, references)
        outcomes, new = _sorted_out(records, known)
        conflicts = _conflicts(connection, vault, records, outcomes)
        foreign = _with_foreign_tokens(connection, new)
        over = _over(records, known)
        refused = _refused(new, now) | over
        if new and (fault := moved_away(connection)) is not None:
            refused |= {record.reference_id: fault for record in new}
        if not dry_run:
            bad = foreign | refused.keys()
            own = [record for record in new if record.reference_id not in bad]
            began = books.may_have_begun_in(connection, now) if own else None
            _add(connection, vault, own, by, now, held=held, began=began)
        standing = {reference: Standing.of(row) for reference, row in known.items()}
    settled = [
        "unchanged" if outcome == "conflict" and not conflicts[position] else outcome
        for position, outcome in enumerate(outcomes)
    ]
    settled = [
        FOREIGN if record.reference_id in foreign and outcome != "conflict" else outcome
        for record, outcome in zip(records, settled, strict=True)
    ]
    settled = [
        REFUSED
        if record.reference_id in over or (record.reference_id in refused and outcome != "conflict")
        else outcome
        for record, outcome in zip(records, settled, strict=True)
    ]
    return Subscribed(
        tuple(settled),
        {n: found for n, found in conflicts.items() if found and settled[n] == "conflict"},
        {n: refused[records[n].reference_id] for n, o in enumerate(settled) if o == REFUSED},
        {n: standing[r.reference_id] for n, r in enumerate(records) if r.reference_id in standing},
    )


def standing_again(connection: Connection, record: SubscriptionRecord) -> Standing | None:
    """Return the state of the subscription that this record has created before, or None if it is
    not in this book.

    Raises InvalidInput on `reference_id` if it is over.
    """
    row = subscriptions.known(connection, [record.reference_id]).get(record.reference_id)
    if row is None:
        return None
    standing = Standing.of(row)
    if not record.is_over:
        refuse_again(standing.status)
    return standing


def _over(
    records: Sequence[SubscriptionRecord], known: Mapping[str, Row[Any]]
) -> dict[str, InvalidInput]:
    """Return by reference the subscriptions that are over and cannot be subscribed to again."""
    refused: dict[str, InvalidInput] = {}
    for record in records:
        row = known.get(record.reference_id)
        if row is None or record.is_over:
            continue
        try:
            refuse_again(SubscriptionStatus(row.status))
        except InvalidInput as error:
            refused[record.reference_id] = error
    return refused


def moved_away(connection: Connection) -> InvalidInput | None:
    """Return why nothing new begins in this book, or None: another book continues it."""
    since = switches.handed_over_at(connection)
    if since is None:
        return None
    reason = f"this book was handed over to another one at {since.isoformat()}: send it there"
    return InvalidInput("reference_id", reason)


def _refused(new: Sequence[SubscriptionRecord], now: datetime) -> dict[str, InvalidInput]:
    """Return by reference the faults that only matter for a record that begins here today."""
    refused: dict[str, InvalidInput] = {}
    for record in new:
        try:
            _refuse(record, now)
        except InvalidInput as error:
            refused[record.reference_id] = error
    return refused


def _refuse(record: SubscriptionRecord, now: datetime) -> None:
    if record.is_over:
        return
    if record.paid_through is not None:
        refuse_near_miss(record.schedule, record.paid_through)
    if record.state.paused_at is None and record.starts_at < now:
        refuse_forgotten_start(record.schedule, record.first_from_anchor, now)


def _sorted_out(
    records: Sequence[SubscriptionRecord], known: Mapping[str, Row[Any]]
) -> tuple[list[str], list[SubscriptionRecord]]:
    outcomes: list[str] = []
    new: list[SubscriptionRecord] = []
    seen = {reference: row.record_digest for reference, row in known.items()}
    for record in records:
        if record.reference_id not in seen:
            seen[record.reference_id] = record.digest
            new.append(record)
            outcomes.append("added")
        elif seen[record.reference_id] == record.digest:
            outcomes.append("unchanged")
        else:
            outcomes.append("conflict")
    return outcomes, new


def _with_foreign_tokens(connection: Connection, records: Sequence[SubscriptionRecord]) -> set[str]:
    """Return references of new records whose card belongs to another customer, or to an earlier
    record's.
    """
    with_card = [(record, fingerprint(record.card.token)) for record in records if record.card]
    owners = cards.owners(connection, {name for _, name in with_card})
    found: set[str] = set()
    for record, name in with_card:
        customer = record.customer.reference_id
        if owners[name] - {customer}:
            found.add(record.reference_id)
        else:
            owners[name].add(customer)
    return found


def _conflicts(
    connection: Connection,
    vault: Vault,
    records: Sequence[SubscriptionRecord],
    outcomes: Sequence[str],
) -> dict[int, tuple[Difference, ...]]:
    """Return by position how a record differs from the stored one, or from an earlier one of the
    batch.
    """
    positions = [n for n, outcome in enumerate(outcomes) if outcome == "conflict"]
    if not positions:
        return {}
    references = [records[n].reference_id for n in positions]
    first = {
        record.reference_id: record
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome == "added"
    }
    stored = {row.reference_id: row for row in subscriptions.whole(connection, references)}
    return {
        n: _differences(stored.get(reference) or first[reference], records[n], vault)
        for n, reference in zip(positions, references, strict=True)
    }


def _differences(
    known: Row[Any] | SubscriptionRecord, given: SubscriptionRecord, vault: Vault
) -> tuple[Difference, ...]:
    if isinstance(known, SubscriptionRecord):
        return differences(known, given)
    if known.kind == ONE_OFF:
        return (Difference("reference_id", "a one-off charge", "a subscription"),)
    return differences(record_from(known, vault), given)


def _add(
    connection: Connection,
    vault: Vault,
    records: Sequence[SubscriptionRecord],
    by: str,
    now: datetime,
    *,
    held: bool,
    began: Other | None,
) -> None:
    """Insert the records. `began`: the book that may have billed records which name no
    former book.
    """
    if not records:
        return
    customer_ids = known_as(connection, [record.customer for record in records], by, now)
    with_card = [(record, record.card) for record in records if record.card is not None]
    card_ids = customers.add_cards(
        connection,
        [
            card_row(vault, card, customer_ids[record.customer.reference_id], now)
            for record, card in with_card
        ],
    )
    card_of = {
        record.reference_id: card_id
        for (record, _), card_id in zip(with_card, card_ids, strict=True)
    }
    without = {
        customer_ids[record.customer.reference_id] for record in records if record.card is None
    }
    default_of = cards.defaults_of(connection, without, now) if without else {}
    rows = []
    for record in records:
        customer_id = customer_ids[record.customer.reference_id]
        default = default_of.get(customer_id)
        card_id = card_of.get(record.reference_id, default.id if default else None)
        row = _row(record, customer_id, card_id, now, held=held)
        rows.append(row | _comes_from(record.state, began))
    ids = subscriptions.add(connection, rows)
    history.write(
        connection,
        (
            Entry(Event(EventKind.SUBSCRIBED, now, by, _said(row)), subscription_id)
            for row, subscription_id in zip(rows, ids, strict=True)
        ),
    )


def _row(
    record: SubscriptionRecord,
    customer_id: int,
    card_id: int | None,
    now: datetime,
    *,
    held: bool,
) -> dict[str, Any]:
    schedule, state, ended = record.schedule, record.state, record.is_over
    status = SubscriptionStatus.ACTIVE
    if ended:
        status = SubscriptionStatus.ENDED
    elif record.trial_end is not None and (state.paused_at or now) < record.trial_end:
        status = SubscriptionStatus.TRIALING
    paused = state.paused_at is not None and not ended
    held = (held or state.held) and not ended and not paused
    return {
        "reference_id": record.reference_id,
        "customer_id": customer_id,
        "card_id": card_id,
        "status": SubscriptionStatus.PAUSED if paused else status,
        "amount_minor": record.money.minor,
        "currency": record.money.currency,
        "interval": schedule.unit,
        "interval_count": schedule.count,
        "anchor_at": schedule.anchor,
        "timezone": schedule.tz,
        "billing_day": schedule.day,
        "ends_after_periods": record.ends_after_periods,
        "series_start": state.first_number,
        "next_period": record.first_period,
        "next_billing_at": None if ended or held or paused else record.starts_at,
        "description": record.description,
        "metadata": record.metadata,
        "record_digest": record.digest,
        "created_at": now,
        "held": held,
        "trial_end": record.trial_end,
        "paid_through": record.paid_through,
        "catch_up": record.catch_up.rule,
        "catch_up_days": record.catch_up.days,
        "dunning_policy": state.dunning,
        "notices": state.notices,
        "paused_at": state.paused_at if paused else None,
        "paused_from": status if paused else None,
        "resumes_at": state.resumes_at if paused else None,
        "resumes_shifted": state.resumes_shifted and paused,
        "cancels_at": None if ended else state.cancels_at,
        "ends_at": record.ends_at,
        "new_amount_minor": state.new_amount and state.new_amount.minor,
        "new_amount_from": state.new_amount_from,
    }


def _comes_from(state: State, began: Other | None) -> dict[str, Any]:
    if began is None or state.from_book is not None:
        return {"from_book": state.from_book, "from_prefix": state.from_prefix}
    return {"from_book": began.identity, "from_prefix": began.prefix}


def _said(row: dict[str, Any]) -> dict[str, Any]:
    next_at = row["next_billing_at"]
    return {
        "status": row["status"],
        "held": row["held"],
        "first_period": row["next_period"],
        "next_billing_at": next_at.isoformat() if next_at else None,
    }
