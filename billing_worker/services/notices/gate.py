"""Holds back a charge until its customer was told of it early enough.

Every charge without the customer passes the claim, and so this gate: on time, late, a retry, and an
attempt that a person has ordered. Only a page on which the customer pays does not.

    no notice, or none accepted ─▶ told now; asked again after the days of the policy
    accepted too late           ─▶ charged when the days are over

The invoice always keeps a date that has not come, so it is never taken for a missed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog
from sqlalchemy import Connection

from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.outgoing import notice as rules
from billing_worker.domain.outgoing.notice import Needed, Notice, NoticePolicy
from billing_worker.persistence import claims, history
from billing_worker.persistence.claims import DueInvoice
from billing_worker.persistence.history import Entry
from billing_worker.persistence.outbox import notices
from billing_worker.services.notices.announce import Charge, tell

BY: Final = "charge"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HeldBack:
    """A charge that waits for its notice."""

    item: DueInvoice
    needed: Needed
    notice: Notice | None  # the one that names its date and amount
    until: datetime

    @property
    def alerts(self) -> bool:
        return rules.was_slow(self.notice)

    def event(self, now: datetime) -> Event:
        data = {
            "reason": rules.why_it_waits(self.notice),
            "rule": rules.RULE,
            "days_ahead": self.needed.ahead.days,
            "next_attempt_at": self.until,
        }
        return Event(EventKind.INVOICE_WAITING, now, BY, data, alert=self.alerts)


def hold_back(
    connection: Connection, items: Sequence[DueInvoice], default: NoticePolicy, now: datetime
) -> list[HeldBack]:
    """Date those of the locked invoices that may not be charged yet, and return them.

    Asks the database only if one of them requires a notice.
    """
    asked = [(item, need) for item in items if (need := _required(item, default)) is not None]
    if not asked:
        return []
    keys = [(i.invoice.subscription_id, i.invoice.period_number) for i, _ in asked]
    known = notices.of_periods(connection, keys)
    held = [
        HeldBack(item, need, notice, until)
        for (item, need), key in zip(asked, keys, strict=True)
        for notice in [_of(item, known.get(key))]
        if (until := rules.earliest(need, notice, now)) > now
    ]
    tell(connection, [(one.needed, _charge(one)) for one in held], now)
    claims.date(
        connection,
        [(one.item.invoice.id, rules.why_it_waits(one.notice), one.until) for one in held],
    )
    history.write(connection, [Entry.of_invoice(one.item.invoice, one.event(now)) for one in held])
    return held


def decide_again(connection: Connection, items: Sequence[DueInvoice], now: datetime) -> None:
    """Date those of the locked invoices that wait for a notice to now: their policy has changed, and
    the next claim decides anew.
    """
    waits = {rules.NOT_ACCEPTED, rules.ACCEPTED_LATE}
    claims.date(
        connection,
        [
            (invoice.id, invoice.reason or "", now)
            for invoice in (item.invoice for item in items)
            if invoice.reason in waits and invoice.next_attempt_at is not None
        ],
    )


def log_alerts(held: Sequence[HeldBack]) -> None:
    for one in held:
        if one.alerts:
            log.error("billing.alert", kind=rules.RULE, invoice=one.item.invoice.reference_id,
                      details={"until": one.until.isoformat()})  # fmt: skip


def _required(item: DueInvoice, default: NoticePolicy) -> Needed | None:
    need = rules.needed(item.agreement, item.invoice.period_number, default)
    return need if need is not None and need.is_required else None


def _of(item: DueInvoice, notice: Notice | None) -> Notice | None:
    fits = notice is not None and notice.is_of(item.invoice.period_start, item.invoice.money)
    return notice if fits else None


def _charge(held: HeldBack) -> Charge:
    invoice = held.item.invoice
    return Charge(
        invoice.subscription_id, held.item.subscription, invoice.period_number,
        invoice.period_start, invoice.money, held.until, invoice.id,
    )  # fmt: skip
