"""Lived-in books are previewed, a month passes, and every difference has to have its reason.

By seed: people act at odds, cards decline and expire, workers and the gateway are away for days.
More of it: `pytest -m benchmark tests/services/forecast/test_variance.py`.
"""

from __future__ import annotations

import json
import random
from contextlib import suppress
from datetime import datetime, timedelta

import pytest

from billing_worker.domain.catch_up_policy import Policy
from billing_worker.services import kill_switch
from billing_worker.services.dunning import give_up_overdue
from billing_worker.services.forecast.preview import preview
from billing_worker.services.forecast.variance import Comparison, compare
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.invoicing import catch_up
from billing_worker.services.subscriptions import activate_imports
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.simulation import people
from tests.simulation.people import ANSWERS, People, customer_pays
from tests.simulation.simulator import TOKENS
from tests.support.world import START

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MONTH = 31 * DAY
POLICIES = ("collect_latest", "collect_latest", "collect_all:2", "forgive_older_than:5", "hold")
LADDERS = ("standard", "short", "classic", "slow")


class Staff(People):
    """Turns the sales with their event, as the command does."""

    def _turn_sales(self, _):
        on = self._rng.random() < 0.6
        return lambda p: kill_switch.switch(
            p.store, on=on, service=None, by="operator:ann", reason="audit", now=p.clock.now()
        )


class CalmStaff(Staff):
    """Asks for no page: whether it is paid is the customer's."""

    def next_act(self):
        while True:
            name, act = super().next_act()
            if "page" not in name:
                return name, act


class Life:
    def __init__(self, world, seed, *, tokens, staff, intervals):
        self._world = world
        self._rng = random.Random(seed)
        self._intervals = intervals
        references = [self._subscribe(number, tokens) for number in range(12)]
        self._staff = staff(self._rng, references, random.Random(~seed))

    def _subscribe(self, number, tokens):
        rng = self._rng
        token = None if rng.random() < 0.07 else rng.choice(tokens)
        # Several agreements of one customer keep their distance; a card belongs to one alone.
        customer = f"shared-{number % 3}" if token == "approved" else f"own-{number}"
        card = {"token": f"{token}.{customer}"}
        if rng.random() < 0.15:
            card = {"token": f"{token}.{customer}.{number}", "expiry_month": 2,
                    "expiry_year": 2026}  # fmt: skip
        record = {
            "reference_id": f"sub-{number}",
            "customer": {"reference_id": customer},
            "card": card if token else None,
            "amount": "9.99",
            "currency": rng.choice(["USD", "EUR"]),
            "interval": rng.choice(self._intervals),
            "anchor_at": (START + rng.randrange(-20 * 24, 10 * 24) * HOUR).isoformat(),
            "catch_up": rng.choice(POLICIES),
            "dunning": rng.choice(LADDERS),
        }
        if rng.random() < 0.2:
            record["ends_after_periods"] = rng.randrange(1, 6)
        w, parsed, held = self._world, parse_record(record), rng.random() < 0.1
        taken = subscribe(w.store, w.vault, w.clock, [parsed], by="test", held=held)
        assert taken.outcomes == ("added",)
        return record["reference_id"]

    def goes_on(self, span):
        world, rng = self._world, self._rng
        end, away_until = world.clock.now() + span, world.clock.now()
        while world.clock.now() < end:
            self._somebody_acts()
            if world.clock.now() >= away_until:
                world.transport.unreachable = False
                if rng.random() < 0.04:
                    away_until = world.clock.now() + rng.choice([2, 10, 40, 100]) * HOUR
                    world.transport.unreachable = rng.random() < 0.5
            if world.clock.now() >= away_until or world.transport.unreachable:
                self._tick()
            world.clock.advance(rng.choice([20, 60, 180, 360]) * 60)
        world.transport.unreachable = False

    def _somebody_acts(self):
        world, rng = self._world, self._rng
        if rng.random() < 0.35:
            _, act = self._staff.next_act()
            with suppress(*ANSWERS):
                act(world.ports)
        if rng.random() < 0.05 and (page := self._staff.page_to_pay()) and page.get("pay_path"):
            customer_pays(world.ports, page, world.sandbox.pay_on_page)
        if rng.random() < 0.02:
            activate_imports.activate_all(world.store, world.clock, by="operator:ann")
        if rng.random() < 0.02:
            answer = catch_up.Answer(Policy.parse("collect_all:1"))
            catch_up.apply(world.store, world.clock, answer, catch_up.Caps(),
                           by="operator:ann", why="outage")  # fmt: skip

    def nobody_charges(self):
        """Dead workers, while the beat opens what becomes due."""
        for _ in range(self._rng.randrange(30)):
            self._world.sweep()
            self._world.bell.messages.clear()
            self._world.clock.advance(self._rng.choice([3, 9]) * HOUR)

    def nobody_acts(self, moments):
        for moment in sorted(moments):
            self._world.clock.advance(max(moment - self._world.clock.now(), timedelta(0)))
            self._tick()

    def _tick(self):
        self._world.tick()
        give_up_overdue(self._world.store, self._world.clock)


def previewed(world):
    now = world.clock.now()
    lines = [line.as_dict() for line in preview(world.store, now, now + MONTH)]
    assert len({line["invoice"] for line in lines}) == len(lines)
    return now, json.loads(json.dumps(lines))


def compared(world, made_at, lines):
    comparison = Comparison()
    found = list(
        compare(world.store, world.clock.now(), made_at, made_at, made_at + MONTH, lines,
                comparison)
    )  # fmt: skip
    return found, comparison


SEEDS = [100, *(pytest.param(seed, marks=pytest.mark.benchmark) for seed in range(101, 120))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_deviation_of_a_month_full_of_trouble_is_explained(world, seed):
    life = Life(
        world,
        seed,
        tokens=(*TOKENS, *["approved"] * len(TOKENS)),
        staff=Staff,
        intervals=("day", "week", "month", "month"),
    )
    life.goes_on(15 * DAY)
    made_at, lines = previewed(world)
    life.goes_on(MONTH)
    found, comparison = compared(world, made_at, lines)
    assert [deviation for deviation in found if deviation.because is None] == []
    assert comparison.unexplained == 0
    assert found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_lived_in_book_is_foreseen_without_a_deviation_when_nothing_happens(
    world, seed, monkeypatch
):
    monkeypatch.setattr(people, "NEW_CARDS", ("approved",))
    # Not daily: a customer with more than a page of missed charges (20) may have them decided about
    # in the order of the pages. That is told of as explained deviations.
    life = Life(
        world, seed, tokens=("approved",), staff=CalmStaff, intervals=("week", "week", "month")
    )
    life.goes_on(15 * DAY)
    life.nobody_charges()
    kill_switch.switch(world.store, on=True, service=None, by="operator:ann", reason="calm",
                 now=world.clock.now())  # fmt: skip
    world.clock.advance(60)  # the switch is before the preview
    made_at, lines = previewed(world)
    dates = {datetime.fromisoformat(line["at"]) for line in lines if line["charged"]}
    life.nobody_acts(dates | {made_at + n * 6 * HOUR for n in range(31 * 4 + 1)})
    found, comparison = compared(world, made_at, lines)
    assert found == []
    assert comparison.counts["as_planned"] > 10
