"""What became of it: a subscription, a charge, an invoice or a customer, in words and data.

For other systems, by command and over HTTP. Reads only: it waits for no lock and takes none.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, Row

from billing_worker.domain.subscription import ONE_OFF
from billing_worker.persistence.outbox import states
from billing_worker.services.outbox.states import invoice_state, subscription_state
from billing_worker.services.reports.status import ChargeSettings, explain

SHOWN_INVOICES: Final = 24
SHOWN_SUBSCRIPTIONS: Final = 100


class Kind(StrEnum):
    SUBSCRIPTION = "subscription"
    CHARGE = "charge"
    INVOICE = "invoice"
    CUSTOMER = "customer"


def describe(
    connection: Connection, kind: Kind, reference: str, settings: ChargeSettings | None = None
) -> dict[str, Any] | None:
    """None: there is no such thing. Shapes, each with `kind`, `reference_id` and `words`:

    subscription  customer, state, invoices: the newest states, newest first
    charge        customer, state, invoice, fate
    invoice       customer, subscription, state, fate
    customer      subscriptions: their states
    """
    match kind:
        case Kind.SUBSCRIPTION | Kind.CHARGE:
            return _billed(connection, kind, reference, settings)
        case Kind.INVOICE:
            return _invoice(connection, reference, settings)
        case Kind.CUSTOMER:
            return _customer(connection, reference)


def _billed(
    connection: Connection, kind: Kind, reference: str, settings: ChargeSettings | None
) -> dict[str, Any] | None:
    row = states.subscription_named(connection, reference)
    if row is None or (row.kind == ONE_OFF) is not (kind is Kind.CHARGE):
        return None
    newest = states.newest_invoices(connection, row.id, SHOWN_INVOICES)
    told = {"kind": str(kind), "reference_id": reference, "customer": row.customer_reference}
    if kind is Kind.SUBSCRIPTION:
        return told | {
            "words": _in_words(row),
            "state": subscription_state(row),
            "invoices": [invoice_state(invoice) for invoice in newest],
        }
    return (
        told
        | _fate(connection, newest[0].reference_id, settings)
        | {
            "state": subscription_state(row),
            "invoice": invoice_state(newest[0]),
        }
    )


def _in_words(row: Row[Any]) -> str:
    state = subscription_state(row)
    terms = f"{state['amount']} {state['currency']} every {row.interval_count} {row.interval}"
    if state["new_amount"]:
        terms += f", {state['new_amount']} for periods from {state['new_amount_from']} on"
    following = state["next_billing_at"]
    next_period = f"the next period begins {following}" if following else "no period is to come"
    held = "held since its import, " if row.held else ""
    return f"It is {row.status}: {held}{terms}; {next_period}."


def _invoice(
    connection: Connection, reference: str, settings: ChargeSettings | None
) -> dict[str, Any] | None:
    invoice = states.invoice_named(connection, reference)
    if invoice is None:
        return None
    [subscription] = states.of_subscriptions(connection, [invoice.subscription_id]).values()
    return {
        "kind": str(Kind.INVOICE),
        "reference_id": reference,
        "customer": subscription.customer_reference,
        "subscription": subscription.reference_id,
        **_fate(connection, reference, settings),
        "state": invoice_state(invoice),
    }


def _fate(
    connection: Connection, reference: str, settings: ChargeSettings | None
) -> dict[str, Any]:
    explained = explain(connection, reference, settings)
    assert explained is not None  # noqa: S101 - the invoice has just been read
    words = f"{explained['why']} {explained['next']}"
    return {"words": words, "fate": str(explained["fate"])}


def _customer(connection: Connection, reference: str) -> dict[str, Any] | None:
    if not states.is_customer(connection, reference):
        return None
    rows = states.subscriptions_of_customer(connection, reference, SHOWN_SUBSCRIPTIONS)
    return {
        "kind": str(Kind.CUSTOMER),
        "reference_id": reference,
        "words": f"{len(rows)} subscription(s) and one-off charges, the newest first.",
        "subscriptions": [subscription_state(row) for row in rows],
    }
