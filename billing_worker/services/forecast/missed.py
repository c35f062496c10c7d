"""What the sweep will decide about missed charges, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_worker.domain.catch_up import Diary, Planned
from billing_worker.domain.subscription import COLLECTABLE, Subscription
from billing_worker.persistence.claims import DueInvoice
from billing_worker.services.invoicing.missed_charges import decide, is_missed


@dataclass(frozen=True, slots=True)
class Missed:
    """Missed charges of one subscription, and when the sweep will decide about them."""

    at: datetime
    items: Sequence[DueInvoice]  # oldest first


def missed_of(
    items: Sequence[DueInvoice], now: datetime, unknown_blocks: timedelta
) -> Missed | None:
    """Return the missed charges among one subscription's open invoices, given the oldest first.

    The sweep decides about all of them when the first one is claimed. None is claimed while an older
    invoice is in recovery.
    """
    claimed = [
        at
        for item in items
        if not item.comes_after_older(
            at := max(item.invoice.enqueue_at or now, now), unknown_blocks
        )
        and is_missed(item, at)
    ]
    if not claimed:
        return None
    at = min(claimed)
    return Missed(at, [item for item in items if is_missed(item, at)])


def decided_again(
    missed: Mapping[int, Missed],
    newest: Mapping[int, int],
    agreed: Mapping[int, Subscription],
    diary: Diary,
) -> dict[int, Planned]:
    """Return what becomes of one customer's missed charges, by invoice.

    `missed` and `newest`, the number of the newest period, are by subscription; `agreed` are all
    subscriptions of the customer, once their due periods are opened.
    """
    dated = [s for s in agreed.values() if s.next_billing_at is not None]
    diary = replace(diary, calendars=tuple(sorted(dated, key=lambda s: s.id)))
    found: dict[int, Planned] = {}
    for id_ in sorted(missed, key=lambda id_: (missed[id_].at, id_)):
        if agreed[id_].status in COLLECTABLE:
            one = missed[id_]
            decided = decide(one.items, newest[id_], agreed[id_], one.at, diary)
            diary = decided.diary
            found |= {item.invoice.id: planned for item, planned in decided.planned}
    return found
