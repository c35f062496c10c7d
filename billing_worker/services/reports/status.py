"""Reports for operators: the state of the whole book, and the story of one invoice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from billing_worker.domain.attempt import Origin
from billing_worker.domain.card_setup import CardSetup
from billing_worker.domain.dunning import comes_too_late, policy_named
from billing_worker.domain.events import EventKind
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import not_before
from billing_worker.domain.timings import Timings
from billing_worker.persistence import card_setups, history, invoices, subscriptions, switches
from billing_worker.persistence.rows import attempt_from, invoice_from
from billing_worker.services.outbox.states import new_amount
from billing_worker.services.reports import wording
from billing_worker.services.reports.wording import ChargedNotBefore, fate_of

SHOWN_SURPLUS = 20

OF_A_SALE = "sale"
"""How the reason begins of a sale that brought no usable answer: no poll is expected to."""


def status(connection: Connection, now: datetime) -> dict[str, Any]:
    """Return counts and sums by fate.

    Shape: {subscriptions, held_imports, invoices: [{fate, currency, count, amount}], unknown: {what
    is known: count}, oldest_unknown_seconds, surplus: {totals: [{currency, count, amount}], attempts: the
    oldest few}, card_pages: [{fate, currency, count, amount}] of pages without an invoice,
    next_due_at, sales_on, paused_services, restored_at, waits_for_decisions_since, handed_over:
    {since, subscriptions, open_invoices}, alerts}.
    """
    unknown_since = invoices.oldest_unknown(connection)
    due = subscriptions.earliest_due(connection)
    summary = invoices.summary(connection)
    switched = switches.read(connection)
    handed_over, still_open = subscriptions.count_handed_over(connection)
    return {
        "subscriptions": subscriptions.count_by_status(connection),
        "held_imports": subscriptions.count_held(connection),
        "invoices": _by_fate(summary),
        "unknown": _by_knowledge(summary),
        "oldest_unknown_seconds": (now - unknown_since).total_seconds() if unknown_since else None,
        "surplus": _surplus(invoices.surplus(connection)),
        "card_pages": [_card_pages(row) for row in card_setups.summary(connection)],
        "next_due_at": due.isoformat() if due else None,
        "sales_on": switched.sales_on,
        "paused_services": switched.paused,
        "restored_at": _iso(switched.restored_at),
        "waits_for_decisions_since": _iso(switched.waits_since),
        "handed_over": {
            "since": _iso(switches.handed_over_at(connection)),
            "subscriptions": handed_over,
            "open_invoices": still_open,
        },
        "alerts": [_alert(row) for row in history.alerts(connection, limit=10)],
    }


def _fate(row: Row[Any]) -> wording.Fate:
    return fate_of(
        row.status,
        row.attempt_status,
        known=row.known,
        waits=bool(row.waits),
        reason=row.reason,
        patient=bool(row.patient),
    )


def _by_fate(rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        key = (_fate(row), row.currency)
        count, minor = sums.get(key, (0, 0))
        sums[key] = (count + row.invoices, minor + int(row.minor))
    return [
        {"fate": fate, **_total(currency, count, minor)}
        for (fate, currency), (count, minor) in sorted(sums.items())
    ]


def _total(currency: str, count: int, minor: int) -> dict[str, Any]:
    amount = str(Money.from_minor(minor, currency).amount)
    return {"currency": currency, "count": count, "amount": amount}


def _by_knowledge(rows: Sequence[Row[Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        if _fate(row) == wording.Fate.UNKNOWN:
            words = wording.KNOWN_IN_WORDS[row.known]
            counts[words] = counts.get(words, 0) + row.invoices
    return counts


def _surplus(rows: Sequence[Row[Any]]) -> dict[str, Any]:
    sums: dict[str, tuple[int, int]] = {}
    for row in rows:
        count, minor = sums.get(row.currency, (0, 0))
        sums[row.currency] = (count + 1, minor + row.amount_minor)
    return {
        "totals": [_total(currency, *total) for currency, total in sorted(sums.items())],
        "attempts": [
            {
                "attempt": row.reference_id,
                "invoice": row.invoice_reference,
                "gateway_id": row.gateway_id,
                "amount": str(Money.from_minor(row.amount_minor, row.currency).amount),
                "currency": row.currency,
                "at": _iso(row.settled_at),
            }
            for row in rows[:SHOWN_SURPLUS]
        ],
    }


def _card_pages(row: Row[Any]) -> dict[str, Any]:
    fate = wording.FATE_OF_PAGE[row.status]
    return {"fate": fate, **_total(row.currency, row.payments, int(row.minor))}


def _alert(row: Row[Any]) -> dict[str, Any]:
    return {
        "at": row.at.isoformat(),
        "kind": row.kind,
        "invoice": row.invoice_reference,
        "data": {key: value for key, value in row.data.items() if key != "calls"},
    }


@dataclass(frozen=True, slots=True)
class ChargeSettings:
    """The worker's settings that date a charge."""

    timings: Timings
    service: Callable[[str], str]  # the gateway's code of the service for a currency


def explain(
    connection: Connection,
    reference: str,
    settings: ChargeSettings | None = None,
    now: datetime | None = None,
) -> dict[str, Any] | None:
    """Return one invoice with its states, times, decisions and every gateway call (redacted).

    `reference` is the invoice's, an attempt's or the gateway's id. For a card page without an
    invoice the answer has "card_page" in place of "invoice". None: the reference is unknown.
    `settings`: without them neither the wait for late money nor a paused service is told of. `now`:
    without it a step of recovery is taken for one that is made at its date.
    """
    invoice = invoices.find(connection, reference)
    if invoice is not None:
        return _explained_invoice(connection, invoice, settings, now)
    page = card_setups.find_by_any(connection, reference)
    return _explained_page(connection, page) if page is not None else None


def _not_before(
    connection: Connection,
    invoice: Row[Any],
    tries: Sequence[Row[Any]],
    settings: ChargeSettings | None,
    now: datetime | None,
) -> ChargedNotBefore:
    """Say what a worker that claims the invoice will find, before any does."""
    switched = switches.read(connection)
    off = None if switched.sales_on else "sales are started again"
    too_late = _too_late(invoice, tries, now)
    if settings is None:
        return ChargedNotBefore(off, too_late=too_late)
    service = settings.service(invoice.currency)
    if off is None and service in switched.paused:
        off = f"`sales start --service {service}`"
    attempts = [attempt_from(row) for row in tries]
    late = not_before(Origin(invoice.next_origin), attempts, settings.timings)
    return ChargedNotBefore(off, late, too_late)


def _too_late(invoice: Row[Any], tries: Sequence[Row[Any]], now: datetime | None) -> str | None:
    """Return why the next step of recovery is not made, whose date has come too late, or None."""
    at = invoice.enqueue_at
    if at is None or invoice.next_attempt_at is None:
        return None
    attempts = [attempt_from(row) for row in tries]
    policy = policy_named(invoice.dunning_policy)
    over = comes_too_late(policy, invoice_from(invoice), attempts, max(at, now or at))
    return None if over is None else over.reason


def _explained_invoice(
    connection: Connection,
    invoice: Row[Any],
    settings: ChargeSettings | None,
    now: datetime | None,
) -> dict[str, Any]:
    tries = invoices.attempts_of(connection, invoice.id)
    newest = tries[-1] if tries else None
    known = None
    if newest is not None and newest.status == "submitted":
        known = invoices.known_of_submitted(connection, newest.id)
    elif reopened := [row for row in tries if row.undecided_since is not None]:
        newest, known = reopened[-1], invoices.REOPENED
    fate = fate_of(
        invoice.status,
        tries[-1].status if tries else None,
        known=known,
        waits=invoice.next_attempt_at is None,
        reason=invoice.reason,
        patient=invoice.give_up_at is not None,
    )
    until = _not_before(connection, invoice, tries, settings, now)
    payer = next((row for row in tries if row.status == "succeeded"), None)
    events = history.of_invoice(connection, invoice.id)
    told = wording.about_invoice(
        invoice, newest, fate, known, payer=payer, until=until,
        unusable=_unusable(events, newest),
    )  # fmt: skip
    return {
        "invoice": invoice.reference_id,
        "subscription": invoice.subscription_reference,
        "handed_over_at": _iso(invoice.handed_over_at),
        "period": {
            "number": invoice.period_number,
            "start": invoice.period_start.isoformat(),
            "end": invoice.period_end.isoformat(),
            "timezone": invoice.timezone,
        },
        "amount": str(Money.from_minor(invoice.amount_minor, invoice.currency).amount),
        "currency": invoice.currency,
        "status": invoice.status,
        "fate": fate,
        "known": wording.KNOWN_IN_WORDS.get(known or ""),
        "reason": invoice.reason,
        "why": told.why,
        "next": told.next,
        "surplus": [row.reference_id for row in tries if row.status == "surplus"],
        "next_attempt_at": _iso(invoice.next_attempt_at),
        "paid_at": _iso(invoice.paid_at),
        "attempts": [_attempt(row) for row in tries],
        "history": [_event(row) for row in events],
    }


def _unusable(events: Sequence[Row[Any]], attempt: Row[Any] | None) -> tuple[datetime, str] | None:
    """Return the newest poll of an attempt, if it brought no usable answer, with its time and why."""
    if attempt is None:
        return None
    polled = [
        e for e in events if e.kind == EventKind.ATTEMPT_POLLED and e.attempt_id == attempt.id
    ]
    if not polled or polled[-1].data.get("found") != "no answer":
        return None
    reason = str(polled[-1].data.get("reason"))
    return None if reason.startswith(OF_A_SALE) else (polled[-1].at, reason)


def _explained_page(connection: Connection, page: CardSetup) -> dict[str, Any]:
    told = wording.about_page(page)
    events = history.of_card_setup(connection, page.reference_id)
    return {
        "card_page": page.reference_id,
        "gateway_reference": page.gateway_reference,
        "gateway_id": page.gateway_id,
        "customer": page.customer_reference,
        "amount": str(page.money.amount),
        "currency": page.money.currency,
        "status": str(page.status),
        "fate": wording.FATE_OF_PAGE[page.status],
        "why": told.why,
        "next": told.next,
        "history": [_event(row) for row in events],
    }


def _attempt(row: Row[Any]) -> dict[str, Any]:
    return {
        "number": row.number,
        "reference_id": row.reference_id,
        "gateway_id": row.gateway_id,
        "status": row.status,
        "origin": row.origin,
        "outcome": row.outcome,
        "submitted_at": _iso(row.submitted_at),
        "settled_at": _iso(row.settled_at),
        "ask_again_at": _iso(row.next_poll_at),
        "resolved_at": _iso(row.resolved_at),
    }


def _event(row: Row[Any]) -> dict[str, Any]:
    return {
        "at": row.at.isoformat(),
        "kind": row.kind,
        "by": row.by,
        "alert": row.alert,
        "attempt": getattr(row, "attempt_number", None),
        "data": row.data,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def described(row: Row[Any]) -> dict[str, Any]:
    """Return a subscription in the shape of `list` and `show`."""
    return {
        "reference_id": row.reference_id,
        "status": row.status,
        "held": row.held,
        "handed_over_at": _iso(row.handed_over_at),
        "customer": row.customer_reference,
        "amount": str(Money.from_minor(row.amount_minor, row.currency).amount),
        "currency": row.currency,
        "new_amount": new_amount(row),
        "new_amount_from": _iso(row.new_amount_from),
        "every": f"{row.interval_count} {row.interval}",
        "anchor_at": row.anchor_at.isoformat(),
        "timezone": row.timezone,
        "next_period": row.next_period,
        "next_billing_at": _iso(row.next_billing_at),
        "cancels_at": _iso(row.cancels_at),
        "resumes_at": _iso(row.resumes_at),
        "notices": row.notices,
        "card": {"mask": row.card_mask, "brand": row.card_brand} if row.card_id else None,
        "description": row.description,
    }


def show(connection: Connection, reference_id: str) -> dict[str, Any] | None:
    """Return a subscription with its invoices and its own history, or None."""
    row = subscriptions.find(connection, reference_id)
    if row is None:
        return None
    return described(row) | {
        "invoices": [
            {
                "reference_id": invoice.reference_id,
                "period": invoice.period_number,
                "start": invoice.period_start.isoformat(),
                "status": invoice.status,
                "reason": invoice.reason,
                "next_attempt_at": _iso(invoice.next_attempt_at),
                "paid_at": _iso(invoice.paid_at),
            }
            for invoice in invoices.of_subscription(connection, row.id)
        ],
        "history": [
            {"at": e.at.isoformat(), "kind": e.kind, "by": e.by, "data": e.data}
            for e in history.of_subscription(connection, row.id)
        ],
    }
