"""What the sweep will decide about missed charges, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    missed: Missed, newest: int, subscription: Subscription, diary: Diary
) -> dict[int, Planned]:
    """Return what becomes of the missed charges of one subscription, by invoice.

    `newest` is the number of its newest period, `subscription` how it stands once its due periods
    are opened.
    """
    if subscription.status not in COLLECTABLE:
        return {}
    decided = decide(missed.items, newest, subscription, missed.at, diary)
    return {item.invoice.id: planned for item, planned in decided.planned}
