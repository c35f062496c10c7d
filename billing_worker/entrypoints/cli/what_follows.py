"""What really happens next to an invoice that a command was about, and when."""

from __future__ import annotations

from billing_worker.config import Settings
from billing_worker.domain.invoice import InvoiceStatus
from billing_worker.persistence import invoices, subscriptions
from billing_worker.persistence.store import Store
from billing_worker.services.reports import status
from billing_worker.services.reports.status import ChargeSettings


def charge_settings(settings: Settings) -> ChargeSettings:
    template = settings.gateway_service
    return ChargeSettings(
        settings.timings, lambda currency: template.replace("{currency}", currency.lower())
    )


def what_follows(store: Store, settings: Settings, invoice: str) -> str:
    """Return the sentence that `explain` has for it: it knows switches, waits and people."""
    with store.reading() as connection:
        told = status.explain(connection, invoice, charge_settings(settings))
    return "" if told is None else str(told["next"])


def what_follows_of(store: Store, settings: Settings, subscription: str) -> dict[str, str]:
    """Return the same for the open invoices of a subscription, oldest first."""
    with store.reading() as connection:
        found = subscriptions.find(connection, subscription)
        rows = invoices.of_subscription(connection, found.id) if found is not None else ()
    owed = [row.reference_id for row in rows if row.status == InvoiceStatus.OPEN]
    return {reference: what_follows(store, settings, reference) for reference in owed}
