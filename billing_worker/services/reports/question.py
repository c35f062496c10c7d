"""One question for everything that has a reference: what is it, why, and what happens next?"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Row

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.outbox import states
from billing_worker.services.reports.describe import SHOWN_SUBSCRIPTIONS
from billing_worker.services.reports.status import ChargeSettings, explain
from billing_worker.services.reports.why_not import why_not


def explain_any(
    connection: Connection,
    reference: str,
    now: datetime,
    settings: ChargeSettings | None = None,
    *,
    at: str | None = None,
) -> dict[str, Any] | None:
    """Explain an invoice, attempt, card page or gateway id (see `explain`), or why a subscription or a
    customer's subscriptions were charged at `at`, or why not.

    `at`: a day in the subscription's time zone, or an instant with its offset; None: now. Shapes:
    that of `explain`, that of `why_not`, or {customer, subscriptions: [that of `why_not`]}. None: the
    reference is unknown. Raises InvalidInput on `at`.
    """
    found = explain(connection, reference, settings, now)
    if found is not None:
        if at is not None:
            raise InvalidInput(
                "at", f"is about subscriptions and customers: {reference} is neither"
            )
        return found
    subscription = states.subscription_named(connection, reference)
    if subscription is not None:
        return _at(connection, subscription, at, now)
    if not states.is_customer(connection, reference):
        return None
    theirs = states.subscriptions_of_customer(connection, reference, SHOWN_SUBSCRIPTIONS)
    return {
        "customer": reference,
        "subscriptions": [_at(connection, one, at, now) for one in theirs],
    }


def _at(
    connection: Connection, subscription: Row[Any], at: str | None, now: datetime
) -> dict[str, Any]:
    zone = ZoneInfo(subscription.timezone)
    moment = now if at is None else _moment(at, zone)
    day = moment.astimezone(zone).date()
    begins, ends = _midnight(day, zone), _midnight(day + timedelta(days=1), zone)
    if at is not None and _is_day(at):
        moment = ends - timedelta(seconds=1)
    if begins > now:
        raise InvalidInput("at", "is in the future: `billing-worker preview` lists what is charged")
    told = why_not(connection, subscription, (begins, ends), min(moment, now))
    return told | {"status": subscription.status, "customer": subscription.customer_reference}


def _moment(at: str, zone: ZoneInfo) -> datetime:
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise InvalidInput("at", "must be a day, or a date and time, in ISO 8601") from None
    if _is_day(at):
        return moment.replace(tzinfo=zone)
    if moment.tzinfo is None:
        raise InvalidInput("at", "needs a UTC offset, such as a final Z, or no time")
    return moment


def _is_day(at: str) -> bool:
    try:
        date.fromisoformat(at)
    except ValueError:
        return False
    return True


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), tzinfo=zone)
