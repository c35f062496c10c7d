"""One decision about many subscriptions: new terms for all that have certain ones, another currency.

Each subscription is changed in its own transaction, or in a batch of them, and has its own event. A run
that was broken off is begun again: what was changed has the old terms no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

from sqlalchemy import Row

from billing_worker.clock import Clock
from billing_worker.domain.calendar import Unit
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.money import Money, redenominated
from billing_worker.persistence import history, subscriptions
from billing_worker.persistence.history import Entry
from billing_worker.persistence.store import Store, Within
from billing_worker.services.subscriptions import lifecycle

BULK_BATCH = 500
SHOWN_EXAMPLES = 20

WHERE = ("amount", "currency", "interval", "interval_count", "description")
"""Terms that `matching` knows. An amount needs its currency."""


@dataclass(slots=True)
class Report:
    changed: int = 0
    unchanged: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)  # of the first few: before, after
    refused: dict[str, str] = field(default_factory=dict)  # reference -> reason
    sums: Counter[str] = field(default_factory=Counter)  # minor units a period, by currency, after
    open_in_old: int = 0  # invoices that stay in the old currency

    def as_dict(self) -> dict[str, Any]:
        return {
            "changed": self.changed,
            "unchanged": self.unchanged,
            "examples": self.examples,
            "refused": self.refused,
            "totals": {
                currency: f"{Money.from_minor(minor, currency).amount:f}"
                for currency, minor in sorted(self.sums.items())
            },
            "open_in_old_currency": self.open_in_old,
        }

    def show(self, reference: str, before: str, after: str) -> None:
        if len(self.examples) < SHOWN_EXAMPLES:
            shown = {"subscription": reference, "before": before, "after": after}
            self.examples.append(shown)


class _OnlyLooked(Exception):
    """Rolls a dry run back."""


def redenominate(
    store: Store,
    clock: Clock,
    *,
    old: str,
    new: str,
    rate: str,
    by: str,
    why: str,
    dry_run: bool,
) -> Report:
    """Give every subscription that goes on in the currency `old` its price in `new`.

    `rate` is decimal text: so many units of `old` make one of `new`. Periods that begin from now on,
    and late ones that nobody has opened yet, are charged in `new`; open invoices stay as they are.
    Raises InvalidInput on `rate`, `currency` or `by`.
    """
    per_unit = _rate(rate)
    if not by:
        raise InvalidInput("by", "must name who decides")
    if old == new:
        raise InvalidInput("currency", "is the same")
    redenominated(Money.from_minor(1_000_000, old), new, per_unit)  # both are currencies
    report = Report()
    last_id: int | None = 0
    while last_id is not None:
        with suppress(_OnlyLooked), store.transaction() as connection:
            rows = subscriptions.lock_in_currency(connection, old, last_id, BULK_BATCH)
            last_id = rows[-1].id if len(rows) == BULK_BATCH else None
            prices = list(_prices(rows, old, new, per_unit, report))
            report.open_in_old = subscriptions.count_open_in(connection, old)
            if dry_run:
                raise _OnlyLooked
            subscriptions.set_prices(
                connection,
                new,
                [(id_, p.now.minor, p.later.minor if p.later else None) for id_, p in prices],
            )
            data = {"redenominated": [old, new], "rate": rate, "why": why}
            now = clock.now()
            history.write(
                connection,
                (
                    Entry(Event(EventKind.SUBSCRIPTION_CHANGED, now, by, data | price.told()), id_)
                    for id_, price in prices
                ),
            )
    return report


@dataclass(frozen=True, slots=True)
class _Price:
    """What a subscription costs in the other currency."""

    before: Money
    now: Money
    later: Money | None  # agreed for a later date

    def told(self) -> dict[str, Any]:
        return {"amount": str(self.now), "changes": {"amount": [str(self.before), str(self.now)]}}


def _prices(
    rows: Sequence[Row[Any]], old: str, new: str, rate: Decimal, report: Report
) -> Iterator[tuple[int, _Price]]:
    def converted(minor: int) -> Money:
        return redenominated(Money.from_minor(minor, old), new, rate)

    for row in rows:
        later = row.new_amount_minor
        try:
            price = _Price(
                Money.from_minor(row.amount_minor, old),
                converted(row.amount_minor),
                None if later is None else converted(later),
            )
        except InvalidInput as error:
            report.refused[row.reference_id] = error.reason
            continue
        report.changed += 1
        report.sums[new] += price.now.minor
        report.show(row.reference_id, str(price.before), str(price.now))
        yield row.id, price


def change_where(
    store: Store,
    clock: Clock,
    where: Mapping[str, str],
    *,
    by: str,
    why: str | None = None,
    dry_run: bool,
    **terms: Any,
) -> Report:
    """Change the terms of every subscription that goes on and has the terms `where`.

    `terms` are those of `lifecycle.change`. What cannot be changed is refused by reference, and stops
    no other. What another decision gives other terms meanwhile is left alone. Raises InvalidInput on
    `where`.
    """
    report = Report()
    sought = _terms(where)
    change = partial(lifecycle.change, by=by, why=why, **terms)
    for reference in _references(store, sought):
        try:
            outcome = _changed(store, clock, reference, sought, change, dry_run=dry_run)
        except InvalidInput as error:
            report.refused[reference] = f"{error.field}: {error.reason}"
            continue
        if outcome is None:
            continue
        if outcome.outcome == "unchanged":
            report.unchanged += 1
            continue
        report.changed += 1
        first = f"from {outcome.details['from']}"
        for term, (before, after) in outcome.details["changes"].items():
            dated = after if term == "new_amount" else f"{after or 'none'} {first}"
            report.show(reference, before or "none", dated or "none")
    return report


def _changed(
    store: Store,
    clock: Clock,
    reference: str,
    sought: Mapping[str, Any],
    change: Callable[..., lifecycle.Outcome],
    *,
    dry_run: bool,
) -> lifecycle.Outcome | None:
    """Return None for one that no longer has the terms `sought` when it is locked."""
    outcome: lifecycle.Outcome | None = None
    with suppress(_OnlyLooked), store.transaction() as connection:
        if subscriptions.lock_if_matching(connection, reference, sought):
            outcome = change(Within(connection), clock, reference)
        if dry_run:
            raise _OnlyLooked
    return outcome


def _references(store: Store, terms: Mapping[str, Any]) -> Iterator[str]:
    """Read ahead by batches. Each is looked at again when it is locked."""
    last_id = 0
    while True:
        with store.reading() as connection:
            rows = subscriptions.matching(connection, terms, last_id, BULK_BATCH)
        yield from (row.reference_id for row in rows)
        if len(rows) < BULK_BATCH:
            return
        last_id = rows[-1].id


def _terms(where: Mapping[str, str]) -> dict[str, Any]:
    """Columns and their values."""
    if not where or set(where) - set(WHERE):
        raise InvalidInput("where", f"must name one or more of {', '.join(WHERE)}, as amount=9.99")
    terms: dict[str, Any] = {name: text for name, text in where.items() if name != "amount"}
    if "amount" in where:
        if "currency" not in where:
            raise InvalidInput("where", "an amount needs its currency: currency=EUR")
        terms["amount_minor"] = Money.parse(where["amount"], where["currency"]).minor
    if "interval" in where and where["interval"] not in set(Unit):
        raise InvalidInput("where", f"interval must be one of {', '.join(Unit)}")
    if "interval_count" in where:
        if not where["interval_count"].isdecimal():
            raise InvalidInput("where", "interval_count must be a whole number")
        terms["interval_count"] = int(where["interval_count"])
    return terms


def _rate(text: str) -> Decimal:
    try:
        rate = Decimal(text)
    except ArithmeticError:
        rate = Decimal(0)
    if not rate.is_finite() or rate <= 0:
        raise InvalidInput("rate", "must be a positive decimal, such as 1.95583")
    return rate
