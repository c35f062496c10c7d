"""Claims a batch of due invoices: at most one live attempt each, under a lease and a fence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import structlog
from sqlalchemy import Connection

from billing_worker.domain import card as card_rules
from billing_worker.domain import invoice as invoices
from billing_worker.domain.attempt import Attempt, AttemptStatus, Origin
from billing_worker.domain.card import Card
from billing_worker.domain.catch_up import was_missed
from billing_worker.domain.dunning import (
    LADDER_ORIGINS,
    End,
    NextStep,
    comes_too_late,
    policy_named,
)
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.invoice import KEEPS_CRASHING
from billing_worker.domain.outcome import not_before
from billing_worker.domain.timings import Timings
from billing_worker.persistence import cards, claims, history, switches
from billing_worker.persistence.attempts import CaseKey
from billing_worker.persistence.book.identity import Book
from billing_worker.persistence.book.outside import Record
from billing_worker.persistence.claims import DueInvoice, Payer, UnreadableInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import AWAY
from billing_worker.persistence.switches import Switches
from billing_worker.services.guards import lost_memory
from billing_worker.services.guards.lost_memory import Doubt
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.missed_charges import decide_again
from billing_worker.services.invoicing.pause_collection import Moment
from billing_worker.services.notices.gate import hold_back, log_alerts
from billing_worker.services.ports import Ports

log = structlog.get_logger()

BY = "charge"

PUT_OFF = timedelta(minutes=15)
"""Delay for an invoice that is blocked by a paused service or by an older unpaid invoice. Resuming
the service, or closing that invoice, re-queues it at once.
"""

READ_AGAIN = timedelta(hours=1)

MAX_CLAIMS = 10
"""After so many crashes in a row, while other rows did not crash, a row waits for a person."""

SUSPECT_AFTER = 2
"""After so many crashes a row is claimed alone, so that other rows do not suffer."""

MANY, LATELY = 4, 5
"""If at least MANY other rows crashed as well, and no charge had progressed for LATELY leases
before the last claim, the machine is the cause and not the row.
"""


@dataclass(slots=True)
class Lease:
    """How long a claim lasts unless its own worker renews it."""

    until: datetime
    length: timedelta


@dataclass(frozen=True, slots=True)
class Claimed:
    """An attempt that only this worker may continue, until another claim raises its fence."""

    key: CaseKey
    attempt: Attempt
    payer: Payer
    earlier: tuple[Attempt, ...]  # of the same invoice; to be proven unpaid
    lease: Lease
    may_be_forgotten: bool = False
    """These books cannot know whether it was charged: in a time that they have lost, or by the
    former book of the subscription.
    """
    remembers: bool = False
    """It is proven that the books have lost no sale since the period of the invoice began."""
    restored_at: datetime | None = None  # as read by the claim
    book: Book | None = None

    @property
    def create_may_have_been_sent(self) -> bool:
        return self.attempt.fence > 1 or self.may_be_forgotten

    @property
    def is_proven_unsold(self) -> bool:
        """Return whether our row, still `prepared`, proves that an invoice found at the gateway was
        not sold.
        """
        return self.remembers and not self.may_be_forgotten


@dataclass(frozen=True, slots=True)
class ClaimedPage:
    claimed: list[Claimed]
    suspects: list[int]
    """Ids of invoices that were not claimed because each must be claimed alone, those with fewer
    crashes first.
    """


def claim(ports: Ports, invoice_ids: Sequence[int]) -> list[Claimed]:
    """Claim the due ones of these invoices. The others are claimed elsewhere or done."""
    return claim_page(ports, invoice_ids).claimed


def claim_page(ports: Ports, invoice_ids: Sequence[int]) -> ClaimedPage:
    """Claim a batch. Claims nothing while it is unknown whether the books have lost data."""
    for _ in range(lost_memory.RESOLVED_AT_ONCE):
        page = _claim_page(ports, invoice_ids)
        if not isinstance(page, Doubt):
            return page
        if not lost_memory.resolve(ports, page):
            break
    return ClaimedPage([], [])


def _claim_page(ports: Ports, invoice_ids: Sequence[int]) -> ClaimedPage | Doubt:
    records = lost_memory.read_outside(ports)
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        switched = switches.read(connection)
        doubt = lost_memory.doubt(ports, connection, switched, records)
        if doubt is not None:
            return doubt
        due, unreadable = claims.lock_due(connection, invoice_ids, now)
        free = [item for item in due if item.live is None or _lease_is_over(item, now)]
        lapsed = [item for item in free if item.live is not None and not _is_overtaken(item, now)]
        fresh = [item for item in free if item.live is None or _is_overtaken(item, now)]
        ready = _readiness(ports, connection, fresh, switched, now)
        if not switched.sales_on:
            ready.later.extend((item, switches.SALES_OFF) for item in lapsed)
            lapsed = []
        poison = [item for item in lapsed if _is_poison(connection, ports.timings, item, now)]
        others = [item for item in lapsed if item not in poison]
        suspects = [item for item in others if len(invoice_ids) > 1 and _is_suspect(item)]
        retaken = [item for item in others if item not in suspects]

        held_back = hold_back(connection, [*ready.chargeable, *retaken], ports.timings.notices, now)
        early = {one.item.invoice.id for one in held_back}
        chargeable = [item for item in ready.chargeable if item.invoice.id not in early]
        retaken = [item for item in retaken if item.invoice.id not in early]

        prepared = _prepare(connection, ports, chargeable, now)
        beside_unknown = _tell_what_goes_on(connection, chargeable, now)
        taken_over = _take_over(connection, ports.timings, retaken, now)
        _leave_to_a_person(connection, poison, now)
        _end_recovery(connection, ready.too_late, now)
        _await_cards(connection, ready.without_card, now)
        _put_off(connection, ready.later, now)
        _await_late_money(connection, ready.early, now)
        _set_aside(connection, unreadable, now)
        claimed = _claimed(
            connection, [*prepared, *taken_over], due, _Memory(switched, records), now
        )
    lost_memory.begin_missing(ports, switched)
    log_alerts(held_back)
    for item in poison:
        _log_poison(item)
    for item, over in ready.too_late:
        log.error("billing.alert", kind=str(EventKind.RECOVERY_ENDED),
                  invoice=item.invoice.reference_id, details={"reason": over.reason})  # fmt: skip
    for item in beside_unknown:
        log.error("billing.alert", kind=str(EventKind.INVOICE_GOES_ON),
                  invoice=item.invoice.reference_id)  # fmt: skip
    if ready.missed:  # Alone: subscriptions are locked before invoices.
        _decide_again_safely(ports, {item.invoice.subscription_id for item in ready.missed})
    suspects.sort(key=_deaths)
    return ClaimedPage(claimed, [item.invoice.id for item in suspects])


def _decide_again_safely(ports: Ports, subscription_ids: set[int]) -> None:
    """Decide again about missed charges. An error must not lose the claims of the batch; the sweep
    finds the missed ones again.
    """
    try:
        decide_again(ports, subscription_ids)
    except AWAY as error:
        log.warning("overdue.postponed", reason=type(error).__name__)
    except Exception:
        log.exception("billing.alert", kind="overdue.crashed")


def _was_missed(item: DueInvoice, now: datetime) -> bool:
    return was_missed(item.invoice, item.attempts, now)


def _too_late(item: DueInvoice, now: datetime) -> NextStep | None:
    policy = policy_named(item.dunning_policy)
    return comes_too_late(policy, item.invoice, item.attempts, now)


def _is_overtaken(item: DueInvoice, now: datetime) -> bool:
    """Return whether too much time has passed: a prepared attempt is then decided again instead of
    continued.
    """
    return _was_missed(item, now) or _too_late(item, now) is not None


@dataclass(frozen=True, slots=True)
class _Readiness:
    """Due invoices without a worker, sorted by what can be done about them now."""

    chargeable: list[DueInvoice]  # with the card to charge
    without_card: list[tuple[DueInvoice, str]]  # (…, why no card can be charged)
    later: list[tuple[DueInvoice, str]]  # (…, what comes first)
    early: list[tuple[DueInvoice, datetime]]  # (…, until when an earlier attempt may be paid)
    missed: list[DueInvoice]  # so late that the catch-up rules decide again
    too_late: list[tuple[DueInvoice, NextStep]]  # their recovery ended before its next step


def _readiness(
    ports: Ports,
    connection: Connection,
    items: Sequence[DueInvoice],
    switched: Switches,
    now: datetime,
) -> _Readiness:
    ready = _Readiness([], [], [], [], [], [])
    default = cards.by_ids(connection, {item.card_id for item in items if item.card_id})
    for item in items:
        first = _what_comes_first(ports, item, switched, now)
        if first is not None:
            ready.later.append((item, first))
            continue
        if _was_missed(item, now):
            ready.missed.append(item)
            continue
        if (over := _too_late(item, now)) is not None:
            ready.too_late.append((item, over))
            continue
        earliest = not_before(item.invoice.next_origin, item.attempts, ports.timings)
        if earliest is not None and earliest > now:
            ready.early.append((item, earliest))
            continue
        owned = partial(cards.of_subscription, connection, item.invoice.subscription_id)
        chosen = card_rules.payer(default.get(item.card_id or 0), owned, now)
        if isinstance(chosen, Card):
            ready.chargeable.append(replace(item, card_id=chosen.id))
        else:
            ready.without_card.append((item, chosen))
    return ready


def _tell_what_goes_on(
    connection: Connection, chargeable: Sequence[DueInvoice], now: datetime
) -> list[DueInvoice]:
    """Write events about first charges that an older unknown invoice no longer blocks."""
    found = [item for item in chargeable if item.older_since is not None and not item.attempts]
    found = [item for item in found if item.invoice.next_origin in LADDER_ORIGINS]
    history.write(
        connection,
        (
            Entry.of_invoice(
                item.invoice,
                Event(EventKind.INVOICE_GOES_ON, now, BY, _unknown_since(item), alert=True),
            )
            for item in found
        ),
    )
    return found


def _unknown_since(item: DueInvoice) -> dict[str, object]:
    return {"reason": "an older invoice is unknown for long", "unknown_since": item.older_since}


def _what_comes_first(
    ports: Ports, item: DueInvoice, switched: Switches, now: datetime
) -> str | None:
    """Return what blocks the invoice.

    One unpaid invoice is collected at a time: two retry schedules on one card ask it twice as
    often. An unknown outcome may stay for ever, so after some time it blocks only its own period.
    """
    after_older = item.comes_after_older(now, ports.timings.unknown_blocks)
    if after_older and item.invoice.next_origin in LADDER_ORIGINS:
        return claims.AFTER_OLDER
    return switched.obstacle(ports.gateway.service(item.invoice.money.currency))


def _await_cards(
    connection: Connection, waiting: Sequence[tuple[DueInvoice, str]], now: datetime
) -> None:
    """Let invoices wait for a card of the customer, as long as the policy says."""
    claims.hold(connection, [(item.invoice.id, reason) for item, reason in waiting])
    entries: list[Entry] = []
    for item, reason in waiting:
        since = item.invoice.first_declined_at or now
        until = since + policy_named(item.dunning_policy).max_age
        claims.await_card(connection, item.invoice.id, until)
        data = {"reason": reason, "until": until}
        entries += [
            Entry.of_invoice(item.invoice, Event(kind, now, BY, data))
            for kind in (EventKind.INVOICE_WAITING, EventKind.CARD_NEEDED)
        ]
    history.write(connection, entries)


def _put_off(
    connection: Connection, later: Sequence[tuple[DueInvoice, str]], now: datetime
) -> None:
    claims.wait(connection, [(item.invoice.id, why) for item, why in later], now + PUT_OFF)
    history.write(
        connection,
        (
            Entry.of_invoice(
                item.invoice, Event(EventKind.INVOICE_WAITING, now, BY, {"reason": why})
            )
            for item, why in later
            if item.invoice.reason != why  # told once, not at every wake-up
        ),
    )


def _await_late_money(
    connection: Connection, early: Sequence[tuple[DueInvoice, datetime]], now: datetime
) -> None:
    """Let an invoice wait for late money. Its next attempt was dated without that knowledge."""
    reason = invoices.LATE_MONEY
    claims.date(connection, [(item.invoice.id, reason, until) for item, until in early])
    rule = invoices.LATE_MONEY_WAITS
    entries = [
        Entry.of_invoice(
            item.invoice,
            Event(
                EventKind.INVOICE_WAITING,
                now,
                BY,
                {"reason": reason, "rule": rule, "next_attempt_at": until},
            ),
        )
        for item, until in early
    ]
    history.write(connection, entries)


def _set_aside(
    connection: Connection, unreadable: Sequence[UnreadableInvoice], now: datetime
) -> None:
    """Set an unreadable invoice aside. It is tried again, because a person or a later version may
    mend it.
    """
    waiting = [(row, f"cannot be read: {row.reason}") for row in unreadable]
    claims.wait(connection, [(row.id, why) for row, why in waiting], now + READ_AGAIN)
    untold = [(row, why) for row, why in waiting if row.told != why]
    for row, why in untold:
        log.error("billing.alert", kind=str(EventKind.INVOICE_WAITING),
                  invoice=row.reference_id, details={"reason": why})  # fmt: skip
    history.write(
        connection,
        (
            Entry(
                Event(EventKind.INVOICE_WAITING, now, BY, {"reason": why}, alert=True),
                row.subscription_id,
                row.id,
            )
            for row, why in untold
        ),
    )


def _lease_is_over(item: DueInvoice, now: datetime) -> bool:
    live = item.live
    return (
        live is not None
        and live.status is AttemptStatus.PREPARED
        and live.origin is not Origin.LINK  # never sold here: the poll sweep releases it
        and (live.lease_until is None or live.lease_until <= now)
    )


def _deaths(item: DueInvoice) -> int:
    """Return how many claims of its live attempt ended without a result."""
    return item.live.claims if item.live is not None else 0


def _is_suspect(item: DueInvoice) -> bool:
    return _deaths(item) >= SUSPECT_AFTER


def _is_poison(connection: Connection, timings: Timings, item: DueInvoice, now: datetime) -> bool:
    if item.live is None or _deaths(item) < MAX_CLAIMS:
        return False
    its_last_claim = (item.live.lease_until or now) - lease(timings, item.live.fence)
    return not claims.workers_died_of_all(
        connection,
        item.live,
        since=its_last_claim - LATELY * timings.stuck_after,
        until=its_last_claim,
        deaths=SUSPECT_AFTER,
        others=MANY,
    )


def lease(timings: Timings, fence: int) -> timedelta:
    """Return the lease of a claim. It doubles with each claim that was replaced, so that a lease
    too short for one call grows beyond it.
    """
    doubled = timings.stuck_after * (1 << min(fence, MAX_CLAIMS))
    return min(doubled, max(timings.stuck_after, timings.longest_charge))


def _prepare(
    connection: Connection, ports: Ports, items: Sequence[DueInvoice], now: datetime
) -> list[Attempt]:
    until = now + lease(ports.timings, 0)
    prepared = claims.prepare(
        connection,
        [(item, item.invoice.next_origin) for item in items],
        test_mode=ports.test_mode,
        now=now,
        lease_until=until,
    )
    claims.ring_later(connection, [attempt.invoice_id for attempt in prepared], until)
    history.write(
        connection,
        (_entry(item, attempt, EventKind.ATTEMPT_PREPARED, now)
         for item, attempt in zip(items, prepared, strict=True)),
    )  # fmt: skip
    return prepared


def _take_over(
    connection: Connection, timings: Timings, items: Sequence[DueInvoice], now: datetime
) -> list[Attempt]:
    lapsed = [(live, now + lease(timings, live.fence)) for item in items if (live := item.live)]
    taken = claims.take_over(connection, lapsed)
    for attempt, until in lapsed:
        claims.ring_later(connection, [attempt.invoice_id], until)
    history.write(
        connection,
        (_entry(item, attempt, EventKind.ATTEMPT_CLAIMED, now, **_silence(before))
         for item, (before, _), attempt in zip(items, lapsed, taken, strict=True)
         if before.claims > 0),  # otherwise the last claim returned it, with an event
    )  # fmt: skip
    return taken


def _silence(before: Attempt) -> dict[str, object]:
    """Return the event that explains a gap in the history: claims that ended without a result."""
    return {"claims_without_a_word": before.claims, "the_last_until": before.lease_until}


def _entry(
    item: DueInvoice, attempt: Attempt, kind: EventKind, now: datetime, **more: object
) -> Entry:
    data = {"reference_id": attempt.reference_id, "fence": attempt.fence, "origin": attempt.origin}
    event = Event(kind, now, BY, data | more)
    return Entry(event, item.invoice.subscription_id, attempt.invoice_id, attempt.id)


def _leave_to_a_person(connection: Connection, poison: Sequence[DueInvoice], now: datetime) -> None:
    """End a prepared attempt, so that a person can order another one or a pay page.

    Nothing was sold and nothing will be: the invoice is locked here as in a submit, which then
    finds no prepared attempt, however slow its worker is.
    """
    for item in poison:
        reason = _poison_reason(item)
        pause_collection.end_prepared(connection, [item], reason, Moment(now, BY))
        claims.hold(connection, [(item.invoice.id, reason)])
        waits = Event(EventKind.INVOICE_WAITING, now, BY, {"reason": reason}, alert=True)
        entry = Entry.of_invoice(item.invoice, waits)
        history.write(connection, [entry])


def _end_recovery(
    connection: Connection, late: Sequence[tuple[DueInvoice, NextStep]], now: datetime
) -> None:
    """End the recovery. The debt stays owed, and a person decides. Invoices behind it continue."""
    pause_collection.end_prepared(
        connection, [item for item, _ in late], "recovery ended", Moment(now, BY)
    )
    claims.hold(connection, [(item.invoice.id, step.reason) for item, step in late])
    claims.stop_waiting(connection, [item.invoice.subscription_id for item, _ in late], now)
    for item, step in late:
        data = {"reason": step.reason, "rule": step.rule, "end": End.LEAVE_OPEN,
                "policy": policy_named(item.dunning_policy).name}  # fmt: skip
        said = Event(EventKind.RECOVERY_ENDED, now, BY, data, alert=True)
        entry = Entry.of_invoice(item.invoice, said)
        history.write(connection, [entry])


def _poison_reason(item: DueInvoice) -> str:
    return f"{KEEPS_CRASHING}: its worker died {_deaths(item)} times"


def _log_poison(item: DueInvoice) -> None:
    log.error(
        "billing.alert",
        kind=str(EventKind.INVOICE_WAITING),
        invoice=item.invoice.reference_id,
        details={"reason": _poison_reason(item)},
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    switched: Switches
    records: Sequence[Record]


def _claimed(
    connection: Connection,
    attempts: Sequence[Attempt],
    due: Sequence[DueInvoice],
    memory: _Memory,
    now: datetime,
) -> list[Claimed]:
    if not attempts:
        return []
    payers = claims.payers(connection, [attempt.id for attempt in attempts])
    by_invoice = {item.invoice.id: item for item in due}
    switched = memory.switched
    return [
        Claimed(
            payers[attempt.id].key,
            attempt,
            payers[attempt.id],
            by_invoice[attempt.invoice_id].besides(attempt),
            _lease_of(attempt, now),
            switched.may_be_forgotten(by_invoice[attempt.invoice_id].invoice)
            or by_invoice[attempt.invoice_id].may_be_charged_elsewhere,
            lost_memory.has_forgotten_nothing_since(
                attempt, by_invoice[attempt.invoice_id].invoice, switched, memory.records
            ),
            switched.restored_at,
            switched.book,
        )
        for attempt in attempts
    ]


def _lease_of(attempt: Attempt, now: datetime) -> Lease:
    until = attempt.lease_until or now
    return Lease(until, until - now)
