"""What each ladder recovers from the same declines: 1,000 subscriptions over 365 days.

    python -m tests.benchmarks.recovery_table [SEED]

The banks and customers are made up, the rules are not: every decision is `after_decline` and
`network_rules.refusal` of the shipped domain. Each card's year is drawn beforehand, day by day, so
that an attempt on a given day ends the same way whichever ladder makes it. The figures compare
ladders; they predict nobody's recovery rate.

Assumed, and easy to argue with (shares of subscriptions or of days):

- 24 % live from payday to payday (7, 14 or 30 days) and every second time have no money at its end;
  43 % have a spell of 1 to 40 days without money, or two.
- Banks refuse without a reason on 1.4 % of days, in spells of 1 to 10; are away or fail for a
  technical cause on 0.5 %, for a day; want the customer on 0.3 %.
- 7 % of cards are lost, stolen or closed in a year, and 6 % of customers leave without a word: the
  account stays empty or the bank refuses for good. Of the customers who are asked for a card or a
  step 60 % answer, after 1 to 12 days.
- Half of the acquirers pass their codes on: Mastercard's advice to wait with a lack of money, a
  code of Visa's category 1 with a dead card.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import mean, median

from billing_worker.domain.attempt import Origin
from billing_worker.domain.calendar import Schedule, Unit
from billing_worker.domain.dunning import (
    POLICIES,
    Declined,
    End,
    NextStep,
    Policy,
    Turn,
    after_decline,
)
from billing_worker.domain.money import Money
from billing_worker.domain.network_rules import Try, never_again, refusal
from billing_worker.services.attempts.retry_limits import CARD_RULE

SUBSCRIPTIONS = 1_000
DAYS = 365
LENGTH = DAYS + 60  # ladders that begin in December end in February
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
PRICE = Money.parse("9.99", "USD")
ZONES = ("UTC", "America/New_York", "Europe/Berlin", "Asia/Tokyo", "America/Sao_Paulo")


def _peer(name: str, delays: Sequence[int], *, source: str) -> Policy:
    """The same hour, patience and end for all: only the ladders are compared."""
    return Policy(name, tuple(delays), source, 9, 100, timedelta(days=45), End.LEAVE_OPEN)


# Days from the previous attempt, copied from data/retry_schedules.json of the design papers.
LADDERS = (
    _peer("no retry", (), source="the zero of the scale"),
    _peer("Kill Bill", (8, 8, 8), source="PaymentConfig.java:31-38"),
    _peer("Meteroid", (3, 5, 7), source="payment_transaction_failed.rs:24,130-155"),
    _peer("Flowglad, Stripe (older)", (3, 5, 5), source="billingRunHelpers.ts:1146-1179"),
    _peer("Polar = our standard", POLICIES["standard"].delays_days, source="config.py:587-592"),
    _peer("Open Collective", (2, 2, 5, 5, 5), source="recurring-contributions.js:146-149"),
    _peer("Sesamy", (3, 3, 3), source="support.sesamy.com 10057561"),
    _peer("Subsail", (1, 2, 2), source="subsail.com/docs/dunning (offsets 1, 3, 5)"),
    _peer("Chargify (daily, 14 days)", (1,) * 14, source="help.chargify.com"),
    _peer("Solidus (daily, no end)", (1,) * 60, source="configuration.rb (reprocessing_interval)"),
)


# --- a year that has happened before anybody asks ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What the bank says to an attempt on some day. `resolution` None: paid."""

    resolution: str | None
    code: str | None = None


PAID = Answer(None)


@dataclass(frozen=True, slots=True)
class Customer:
    schedule: Schedule
    brand: str
    days: tuple[Answer, ...]
    dies_on: int | None  # the day on which the card is lost or closed
    answers_after: tuple[int | None, ...]  # days, one for each month; None: never

    def ask(self, at: datetime, *, new_card_since: datetime | None) -> Answer:
        """A new card has money and a willing bank, as far as this year goes."""
        if new_card_since is not None:
            return PAID
        day = (at - START).days
        if self.dies_on is not None and day >= self.dies_on:
            return Answer("lost_or_stolen_card", "41" if self.schedule.anchor.day % 2 else None)
        return self.days[min(day, len(self.days) - 1)]


def customers(seed: int) -> list[Customer]:
    draw = random.Random(seed)
    return [_customer(draw) for _ in range(SUBSCRIPTIONS)]


def _customer(draw: random.Random) -> Customer:
    anchor = START + timedelta(days=draw.randrange(28), hours=draw.randrange(24))
    brand = draw.choice(["visa", "visa", "mastercard"])
    return Customer(
        Schedule(anchor, Unit.MONTH, 1, draw.choice(ZONES)),
        brand,
        _year(draw, brand),
        draw.randrange(DAYS) if draw.random() < 0.07 else None,
        tuple(draw.randint(1, 12) if draw.random() < 0.6 else None for _ in range(14)),
    )


def _year(draw: random.Random, brand: str) -> tuple[Answer, ...]:
    codes = brand == "mastercard" and draw.random() < 0.5
    year = _money(draw, codes=codes)
    for day in range(LENGTH):
        chance = draw.random()
        if chance < 0.0025:
            spell = draw.randint(1, 10)
            year[day : day + spell] = [Answer(draw.choice(["issuer_decline", "declined"]))] * spell
        elif chance < 0.0075:
            technical = ["issuer_unavailable", "general_fatal_error", "fatal_timeout"]
            year[day] = Answer(draw.choice(technical))
        elif chance < 0.0105:
            year[day] = Answer("auth_3ds_required")
    if draw.random() < 0.06:
        left_on = draw.randrange(DAYS)
        year[left_on:] = [Answer(draw.choice(["insufficient_funds", "issuer_decline"]))] * LENGTH
    return tuple(year[:LENGTH])


def _money(draw: random.Random, *, codes: bool) -> list[Answer]:
    year = [PAID] * LENGTH
    for first, last in _empty(draw):
        for day in range(first, min(last, LENGTH)):
            year[day] = Answer("insufficient_funds", _advice(last - day) if codes else None)
    return year


def _empty(draw: random.Random) -> Iterator[tuple[int, int]]:
    """(first day without money, the day on which it comes)."""
    if draw.random() < 0.24:
        span = draw.choice([7, 14, 30, 30])
        for payday in range(draw.randrange(span) - span, LENGTH, span):
            lasts = round(draw.uniform(0.3, 1.6) * span)
            if lasts < span:
                yield max(0, payday + lasts), payday + span
    for _ in range(draw.choice([0, 0, 0, 0, 1, 1, 2])):
        first = draw.randrange(LENGTH)
        yield first, first + draw.choice([1, 2, 3, 5, 8, 13, 21, 40])


def _advice(days_left: int) -> str:
    waits = {1: "25", 2: "26", 4: "27", 6: "28", 8: "29", 10: "30"}
    return f"MAC {waits[max(days for days in waits if days <= max(days_left, 1))]}"


# --- one ladder in that year ------------------------------------------------------------------


@dataclass(slots=True)
class Figures:
    name: str
    invoices: int = 0
    declined: int = 0  # invoices whose first charge was declined
    recovered: int = 0
    retries: int = 0
    attempts_of_recovered: list[int] = field(default_factory=list)
    days_of_recovered: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def simulate(policy: Policy, population: Sequence[Customer]) -> Figures:
    figures = Figures(policy.name)
    for customer in population:
        _Collection(policy, customer, figures).year()
    return figures


class _Collection:
    """One subscription's year: period after period, one collection at a time."""

    def __init__(self, policy: Policy, customer: Customer, figures: Figures) -> None:
        self._policy = policy
        self._customer = customer
        self._figures = figures
        self._tries: list[Try] = []
        self._new_card_since: datetime | None = None
        self._dead = False
        self._now = START

    def year(self) -> None:
        number = 0
        while (due := self._customer.schedule.boundary(number)) < START + DAYS * DAY:
            self._now = max(due, self._now)
            self._collect(number)
            number += 1

    def _collect(self, number: int) -> None:
        figures = self._figures
        figures.invoices += 1
        if self._dead:  # what the worker's claim does: no attempt, no call, the customer is asked
            figures.refused[CARD_RULE] += 1
            self._customer_answers(number)
            return
        declines: list[Declined] = []
        step: NextStep | None = NextStep(self._now, "", "", Turn.OURS, Origin.SCHEDULED)
        while step is not None and step.at is not None:
            self._now = max(self._now, step.at)
            if self._refused():
                continue
            figures.retries += bool(declines)
            answer = self._customer.ask(self._now, new_card_since=self._new_card_since)
            if answer.resolution is None:
                self._paid(declines)
                return
            figures.declined += not declines
            step = self._after(answer, declines, step.origin or Origin.SCHEDULED, number)

    def _refused(self) -> bool:
        """Wait as long as a network rule asks for, and count it."""
        refused = refusal(self._customer.brand, PRICE, self._tries, self._now)
        if refused is None:
            return False
        assert refused.until is not None  # a card that may never be tried again is not tried
        self._figures.refused[refused.rule] += 1
        self._now = refused.until
        return True

    def _paid(self, declines: list[Declined]) -> None:
        if declines:
            self._figures.recovered += 1
            self._figures.attempts_of_recovered.append(len(declines) + 1)
            self._figures.days_of_recovered.append((self._now - declines[0].at) / DAY)

    def _after(
        self, answer: Answer, declines: list[Declined], origin: Origin, number: int
    ) -> NextStep | None:
        """The rule's next step, or the customer's answer to it."""
        declines.append(Declined(origin, self._now, answer.resolution))
        self._tries.append(Try(self._now, PRICE, answer.code))
        never = never_again(self._customer.brand, answer.code, self._now)
        step = after_decline(
            self._policy,
            declines,
            self._customer.schedule.tz,
            never=never.rule if never else None,
        )
        self._dead = step.kills_card
        if step.turn not in {Turn.CARD, Turn.CUSTOMER}:
            return step
        return self._customer_answers(number)

    def _customer_answers(self, number: int) -> NextStep | None:
        days = self._customer.answers_after[number]
        if days is None:
            return None
        self._now += days * DAY
        self._new_card_since = self._new_card_since or self._now
        self._dead, self._tries = False, []
        return NextStep(self._now, "", "", Turn.OURS, Origin.NEW_CARD)


# --- the table --------------------------------------------------------------------------------


def table(results: Sequence[Figures]) -> str:
    rules = sorted({rule for figures in results for rule in figures.refused})
    head = f"{'ladder':26} {'declined':>8} {'recovered':>9} {'rate':>6} {'attempts/rec.':>13}"
    lines = [f"{head} {'retries':>7} {'median days':>11}  refused by rule"]
    for one in results:
        refused = ", ".join(f"{one.refused[rule]} {rule}" for rule in rules if one.refused[rule])
        lines.append(
            f"{one.name:26} {one.declined:8} {one.recovered:9}"
            f" {one.recovered / one.declined:6.1%} {mean(one.attempts_of_recovered):13.2f}"
            f" {one.retries:7} {median(one.days_of_recovered):11.1f}  {refused or '-'}"
        )
    return "\n".join(lines)


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    population = customers(seed)
    print(f"{SUBSCRIPTIONS} subscriptions, {DAYS} days, seed {seed}")
    print(table([simulate(policy, population) for policy in LADDERS]))


if __name__ == "__main__":
    main()
