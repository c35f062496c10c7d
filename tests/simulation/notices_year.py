"""A year of subscriptions whose shop fails half of the time: who was told of which charge, and when.

The judge is the shop's own list of what it has taken. It asks neither the table of notices nor the gate.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from billing_worker.domain.attempt import Origin
from billing_worker.domain.events import Event, EventKind
from billing_worker.domain.outgoing.notice import NoticePolicy
from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.domain.public_events import told_by
from billing_worker.domain.timings import Timings
from billing_worker.persistence.outbox import feed
from billing_worker.persistence.schema import tables
from billing_worker.receivers.post import Answer
from billing_worker.services.import_records.subscription import SubscriptionRecord, parse_record
from billing_worker.services.notices.announce import announce
from billing_worker.services.outbox.deliver import Outbound
from billing_worker.services.outbox.publish import publish
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.simulation.year import calm_world
from tests.support.cohort import Cohort
from tests.support.receivers import SHOP, add, send
from tests.support.world import World

DAY = timedelta(days=1)
DEFAULT = NoticePolicy.parse("require")
INTERVALS = (("month", 1), ("month", 1), ("month", 6), ("quarter", 1), ("week", 1), ("year", 1))
POLICIES = (None, None, "tell", "require:14", "require:3:3")
DAYS_AHEAD = {None: 7, "tell": 7, "require:14": 14, "require:3:3": 3}
DEAD_FROM, DEAD_FOR = 100, 14
"""On which day the shop dies, and for how many days it answers 500."""


@dataclass
class Shop:
    """Fails half of the time, dies for two weeks, and keeps what it took and when."""

    world: World
    chance: random.Random
    born: datetime
    taken: list[tuple[datetime, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, _url: str, _headers: Any, body: bytes) -> Answer:
        now = self.world.clock.now()
        is_dead = DEAD_FROM <= (now - self.born).days < DEAD_FROM + DEAD_FOR
        if is_dead or self.chance.random() < 0.5:
            return Answer(500)
        self.taken.append((now, json.loads(body)))
        return Answer(200)


def simulate(template: bytes, count: int, seed: int, sweeps_a_day: int) -> Year:
    world = calm_world(template)
    world.ports = world.ports_of_a_worker(
        Timings(notices=DEFAULT), pool=(cohort := Cohort()), commit_group=cohort
    )
    rng = random.Random(seed)
    shop = Shop(world, rng, world.clock.now())
    add(world, SHOP)
    out = Outbound(world.store, world.clock, world.vault, shop, USUAL_WAITS)
    policies = _subscribed(world, rng, count)
    step = DAY / sweeps_a_day
    for number in range(365 * sweeps_a_day):
        announce(world.store, world.clock, DEFAULT)
        world.tick()
        send(out)
        if number % sweeps_a_day == 0:
            _somebody_decides(world, rng, policies)
        world.clock.advance(step)
    for _ in range(100):  # the shop is told of the last day as well
        send(out)
        world.clock.advance(timedelta(hours=1))
    return Year(world, shop, policies)


def _subscribed(world: World, rng: random.Random, count: int) -> dict[str, str | None]:
    records = [_record(world, rng, number) for number in range(count)]
    for first in range(0, count, 500):
        subscribe(world.store, world.vault, world.clock, records[first : first + 500], by="test")
    return {record.reference_id: record.state.notices for record in records}


def _record(world: World, rng: random.Random, number: int) -> SubscriptionRecord:
    unit, periods = rng.choice(INTERVALS)
    anchor = world.clock.now() + rng.randrange(1, 31) * DAY
    token = rng.choices(("approved", "decline_insufficient_funds", "approved_later"), (90, 5, 5))[0]
    return parse_record(
        {
            "reference_id": f"sub-{number}",
            "customer": {"reference_id": f"customer-{number}"},
            "card": {"token": f"{token}.{number}"},
            "amount": "9.99",
            "currency": "USD",
            "interval": unit,
            "interval_count": periods,
            "anchor_at": anchor.isoformat(),
            "trial_end": anchor.isoformat() if rng.random() < 0.3 else None,
            "notices": rng.choice(POLICIES),
        }
    )


def _somebody_decides(world: World, rng: random.Random, policies: dict[str, Any]) -> None:
    """Another price, a pause, or goodwill days, for one in forty each day."""
    for reference in rng.sample(sorted(policies), max(1, len(policies) // 40)):
        what = rng.choice(("price", "pause", "later"))
        ask = (world.store, world.clock, reference)
        with world.store.reading() as connection:
            c = tables.subscriptions.c
            query = select(c.status).where(c.reference_id == reference)
            status = connection.execute(query).scalar_one()
        if status not in {"active", "past_due", "trialing"}:
            continue
        if what == "price":
            lifecycle.change(*ask, amount=f"{rng.randrange(500, 2000) / 100:.2f}", by="test")
        elif what == "pause":
            until = (world.clock.now() + rng.randrange(1, 20) * DAY).isoformat()
            lifecycle.pause(*ask, until=until, shift_anchor=rng.random() < 0.5, by="test")
        else:
            lifecycle.reschedule(*ask, days=rng.randrange(1, 5), by="test")


def _is_of_webhooks(event: dict[str, Any]) -> bool:
    """An alert about a receiver is no line of the history."""
    return str(event["data"].get("about")).startswith("webhook.")


@dataclass
class Year:
    world: World
    shop: Shop
    policies: dict[str, str | None]

    def sales(self) -> list[Any]:
        """Return every sale but those on a customer's page."""
        a, i, s = tables.attempts.c, tables.invoices.c, tables.subscriptions.c
        query = (
            select(
                a.submitted_at, a.amount_minor, i.period_number, i.period_start, i.created_at, i.reference_id.label("invoice"),
                s.reference_id.label("subscription"), s.trial_end,
            )
            .join(tables.invoices, i.id == a.invoice_id)
            .join(tables.subscriptions, s.id == i.subscription_id)
            .where(a.submitted_at.is_not(None), a.origin != Origin.LINK)
        )  # fmt: skip
        with self.world.store.reading() as connection:
            return list(connection.execute(query))

    def told_too_late(self) -> tuple[list[str], int]:
        """Return the sales before which the shop had not taken a notice of the amount early enough,
        and how many needed one.
        """
        told: dict[tuple[str, int], list[datetime]] = defaultdict(list)
        for at, event in self.shop.taken:
            if event["type"] in {"renewal.upcoming", "trial.ending"}:
                minor = int(event["data"]["amount"].replace(".", ""))
                told[event["data"]["charge"], minor].append(at)
        late, needed = [], 0
        for sale in self.sales():
            policy = self.policies[sale.subscription]
            is_first = sale.period_number == 0
            if policy == "tell" or (is_first and sale.trial_end is None):
                continue
            needed += 1
            days = 7 if is_first and policy != "require:3:3" else DAYS_AHEAD[policy]
            before = sale.submitted_at - days * DAY
            if not any(at <= before for at in told[sale.invoice, sale.amount_minor]):
                late.append(f"{sale.invoice} of {sale.submitted_at}")
        return late, needed

    def untold(self) -> list[str]:
        """Return the sales under `tell` of whose amount no notice had been written before, where a
        sweep had the time to: nobody had decided about the subscription in the day before.
        """
        written, decided = defaultdict(list), self._decisions()
        for data in self.events():
            if data["type"] in {"renewal.upcoming", "trial.ending"}:
                written[data["data"]["charge"], data["data"]["amount"]].append(data["timestamp"])
        found = []
        for sale in self.sales():
            is_first = sale.period_number == 0 and sale.trial_end is None
            if self.policies[sale.subscription] != "tell" or is_first:
                continue
            asked = (sale.period_start - DAY, sale.created_at)
            if any(asked[0] <= at <= asked[1] for at in decided[sale.subscription]):
                continue
            amount = f"{sale.amount_minor / 100:.2f}"
            at = sale.submitted_at.isoformat()
            if not any(one <= at for one in written[sale.invoice, amount]):
                found.append(sale.invoice)
        return found

    def _decisions(self) -> dict[str, list[datetime]]:
        e, s = tables.events.c, tables.subscriptions.c
        kinds = (EventKind.SUBSCRIPTION_CHANGED, EventKind.SUBSCRIPTION_RESUMED)
        query = select(s.reference_id, e.at).join(tables.events, e.subscription_id == s.id)
        found = defaultdict(list)
        with self.world.store.reading() as connection:
            for row in connection.execute(query.where(e.kind.in_(kinds))):
                found[row.reference_id].append(row.at)
        return found

    def events(self) -> list[dict[str, Any]]:
        """Return the whole feed, read from its beginning."""
        publish(self.world.store, self.world.clock)
        found: list[dict[str, Any]] = []
        with self.world.store.reading() as connection:
            while page := feed.after(connection, len(found), 1_000):
                found += [json.loads(row.body) for row in page]
        return found

    def misled(self, events: list[dict[str, Any]]) -> list[str]:
        """Return where an empty receiver that takes these events comes to know another state than
        the books.
        """
        known: dict[str, tuple[int, dict[str, Any]]] = {}
        for event in events:
            for state in filter(None, event["data"]["state"].values()):
                name, sequence = state["reference_id"], event["data"]["sequence"]
                if name not in known or known[name][0] < sequence:
                    known[name] = (sequence, state)
        found = []
        with self.world.store.reading() as connection:
            for table in (tables.subscriptions, tables.invoices):
                query = select(table.c.reference_id, table.c.status, table.c.amount_minor)
                for row in connection.execute(query):
                    _, state = known.get(row.reference_id, (0, {}))
                    said = (state.get("status"), state.get("amount"))
                    if said != (row.status, f"{row.amount_minor / 100:.2f}"):
                        found.append(f"{row.reference_id} is {row.status}, told as {said}")
        return found

    def unmatched(self, events: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
        """Return (type, subscription) of facts without an event, and of events without a fact."""
        names, facts = {None: None}, Counter[tuple[str, str | None]]()
        e, s = tables.events.c, tables.subscriptions.c
        with self.world.store.reading() as connection:
            names |= dict(connection.execute(select(s.id, s.reference_id)).all())
            query = select(e.kind, e.at, e.by, e.data, e.alert, e.subscription_id).order_by(e.id)
            for row in connection.execute(query):
                fact = Event(EventKind(row.kind), row.at, row.by, row.data, alert=bool(row.alert))
                facts.update((str(one.type), names[row.subscription_id]) for one in told_by(fact))
        about_us = [one for one in events if not _is_of_webhooks(one)]
        told = Counter((one["type"], one["data"]["subscription"]) for one in about_us)
        return sorted(((facts - told) + (told - facts)).elements())

    def out_of_order(self) -> list[str]:
        """Return subscriptions whose events the shop did not take as 1, 2, 3 …"""
        seen: dict[str, list[int]] = defaultdict(list)
        for _, event in self.shop.taken:
            seen[event["data"]["subscription"]].append(event["data"]["sequence"])
        return [name for name, them in seen.items() if them != list(range(1, len(them) + 1))]
