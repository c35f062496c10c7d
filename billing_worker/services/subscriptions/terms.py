"""The terms of a subscription as callers write them: read, and compared for the history."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from billing_worker.domain import lifecycle as rules
from billing_worker.domain.calendar import Interval, Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money, exponent
from billing_worker.domain.subscription import Subscription

MAX_DESCRIPTION = 500


def money(before: Money, amount: str | None, currency: str | None) -> Money:
    if amount is not None:
        return Money.parse(amount, before.currency if currency is None else currency)
    if currency is None or currency == before.currency:
        return before
    exponent(currency)  # An unknown currency is reported first.
    raise InvalidInput("amount", "is needed with a new currency: prices do not convert themselves")


def repriced(
    before: Subscription, amount: str | None, money: Money, since: str, now: datetime
) -> Subscription:
    """Return the subscription with `money` from `since` on; empty text: with its amount of now."""
    date = instant("amount_from", since)
    if date is None:
        if amount is not None:
            raise InvalidInput("amount_from", "is empty, which takes back a new amount: give none")
        return rules.at_its_price(before)
    if amount is None:
        raise InvalidInput("amount", "is needed with a date from which it counts")
    return rules.repriced(before, money, date, now)


def interval(before: Interval, unit: str | None, count: int | None) -> Interval:
    """Return the interval. A new unit counts 1 unless a count is given: 3 months become 1 year, not
    3.
    """
    if unit is None:
        return before if count is None else Interval(before.unit, count)
    if count is None:
        count = before.count if unit == before.unit else 1
    return Interval(cast("Unit", unit), count)  # It checks the unit itself.


def instant(field: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(field, "must be an ISO 8601 date and time") from error
    if moment.tzinfo is None:
        raise InvalidInput(field, "needs a UTC offset, such as a final Z")
    return moment.astimezone(UTC)


def description(before: str | None, description: str | None) -> str | None:
    if description is None:
        return before
    if len(description) > MAX_DESCRIPTION:
        raise InvalidInput("description", f"must have at most {MAX_DESCRIPTION} characters")
    return description or None


def differences(before: Subscription, after: Subscription) -> dict[str, Any]:
    """Return {term: [before, after]} of the changes, and the period from which they count."""
    was, is_ = _terms(before), _terms(after)
    first = after.next_period
    if after.new_amount_from is not None and was["new_amount"] != is_["new_amount"]:
        first = max(first, after.first_number_from(after.new_amount_from))
    return {
        "changes": {name: [was[name], is_[name]] for name in was if was[name] != is_[name]},
        "from_period": first,
        "from": after.start_of(first).isoformat(),
        "new_series": after.schedule.interval != before.schedule.interval
        or after.money.currency != before.money.currency,
    }


def _terms(subscription: Subscription) -> dict[str, Any]:
    schedule = subscription.schedule
    return {
        "amount": str(subscription.money),
        "new_amount": _new_amount(subscription),
        "every": f"{schedule.count} {schedule.unit}",
        "anchor_at": schedule.anchor.isoformat(),
        "description": subscription.description,
        "catch_up": str(subscription.catch_up),
        "notices": str(subscription.notices) if subscription.notices else None,
        "ends_at": subscription.ends_at.isoformat() if subscription.ends_at else None,
    }


def _new_amount(subscription: Subscription) -> str | None:
    since = subscription.new_amount_from
    return f"{subscription.price_at(since)} from {since.isoformat()}" if since else None
