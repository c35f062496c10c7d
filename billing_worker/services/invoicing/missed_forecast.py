"""First charges that were missed, and what `overdue.decide_again` will make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_worker.domain import catch_up
from billing_worker.domain.attempt import AttemptStatus, Origin
from billing_worker.domain.catch_up import Action, Diary, Planned
from billing_worker.domain.invoice import Invoice
from billing_worker.domain.subscription import COLLECTABLE, DuePeriod, Subscription
from billing_worker.persistence.claims import AFTER_OLDER, DueInvoice
from billing_worker.persistence.rows import trouble_of
from billing_worker.services.invoicing.missed_charges import TROUBLE


@dataclass(frozen=True, slots=True)
class Missed:
    """First charges of one subscription that are to be decided about again."""

    at: datetime  # when
    items: Sequence[DueInvoice]  # oldest first


def missed_of(
    items: Sequence[DueInvoice], now: datetime, unknown_blocks: timedelta
) -> Missed | None:
    """Those of one subscription's open invoices, given the oldest first. They are decided about
    together, as soon as one of them is rung for; while an older one is recovered, none is.
    """
    rung = [max(item.invoice.enqueue_at or now, now) for item in items]
    claimed = [
        at
        for item, at in zip(items, rung, strict=True)
        if not item.comes_after_older(at, unknown_blocks) and _is_missed(item, at)
    ]
    if not claimed:
        return None
    at = min(claimed)
    return Missed(at, [item for item in items if _is_missed(item, at)])


def _is_missed(item: DueInvoice, now: datetime) -> bool:
    """Missed, and nobody drives it, and no page for it is in front of the customer."""
    live = item.live
    free = live is None or (
        live.status is AttemptStatus.PREPARED
        and live.origin is not Origin.LINK
        and (live.lease_until is None or live.lease_until <= now)
    )
    return free and catch_up.was_missed(item.invoice, item.attempts, now)


def decided_again(
    missed: Mapping[int, Missed],
    newest: Mapping[int, int],
    agreed: Mapping[int, Subscription],
    diary: Diary,
) -> dict[int, Planned]:
    """By invoice: what becomes of one customer's.

    `missed` and `newest`, the number of the newest period, are by subscription; `agreed` are all
    subscriptions of the customer, once their due periods are opened.
    """
    dated = [s for s in agreed.values() if s.next_billing_at is not None]
    diary = replace(diary, calendars=tuple(sorted(dated, key=lambda s: s.id)))
    found: dict[int, Planned] = {}
    for id_ in sorted(missed, key=lambda id_: (missed[id_].at, id_)):
        if agreed[id_].status in COLLECTABLE:
            planned, diary = _planned_again(missed[id_], newest[id_], agreed[id_], diary)
            found |= planned
    return found


def _planned_again(
    missed: Missed, newest: int, subscription: Subscription, diary: Diary
) -> tuple[dict[int, Planned], Diary]:
    """By invoice, in the groups and the order in which `overdue.decide_again` has them."""
    found: dict[int, Planned] = {}
    before = diary
    try:
        for waited in (True, False):
            group = [i for i in missed.items if (i.invoice.reason == AFTER_OLDER) is waited]
            if group:
                planned, diary = catch_up.plan_missed(
                    [_period_of(item.invoice) for item in group],
                    newest, subscription, missed.at, diary, waited_for_older=waited,
                )  # fmt: skip
                found |= {i.invoice.id: one for i, one in zip(group, planned, strict=True)}
    except Exception as error:  # noqa: BLE001 - shown, and the sweep raises the alert
        reason = f"{TROUBLE}: {trouble_of(error)}"
        held = {
            item.invoice.id: Planned(_period_of(item.invoice), Action.HOLD, TROUBLE, reason)
            for item in missed.items
        }
        return held, before
    return found, diary


def _period_of(invoice: Invoice) -> DuePeriod:
    return DuePeriod(invoice.period_number, invoice.period_start, invoice.period_end)
