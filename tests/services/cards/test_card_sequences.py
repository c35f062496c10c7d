"""No sequence of events breaks the invoice slot, the limits or the peace of a dead card."""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise

import pytest
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence.schema import tables
from billing_worker.services.commands.execute import Message, carry_out
from tests.support.cards import ANN, DAY, HOUR, sold
from tests.support.recovery import (
    add_backup,
    banks_change_their_mind,
    replace,
    retry,
)

OUTCOMES = (
    *["decline_insufficient_funds"] * 6,
    *["decline_limit_violation"] * 3,
    "decline_issuer_decline",
    "decline_card_is_stolen",
    "decline_auth_3ds_required",
    "decline_fatal_error",
    "decline_unknown",
    "answer_lost_before",
    "answer_lost_after",
    "approved_later",
    "rejects_token",
    "approved",
)


ANNS = ("sub-1", "sub-2", "sub-3", "sub-4")
BOBS = ("sub-5",)


class Chaos:
    """Draws what customers, operators, banks, the broker and the clock do, from one seed."""

    def __init__(self, world, seed):
        self.world = world
        self.draw = random.Random(seed)
        self.bought = []

    def act(self):
        self.draw.choice(
            [self.retry, self.retry, self.retry, self.new_card, self.backup, self.storm,
             self.banks, self.later, self.later, self.doubled, self.shared_card, self.purchases]
        )()  # fmt: skip

    def reference(self):
        return self.draw.choice(ANNS + BOBS)

    def token(self, reference):
        # Few suffixes: the same card comes back under another subscription of its customer.
        owner = "bob" if reference in BOBS else "ann"
        if self.draw.random() < 0.1:
            owner = "bob" if owner == "ann" else "ann"  # somebody else's: refused once it is known
        return f"{self.draw.choice(OUTCOMES)}.{owner}{self.draw.randint(1, 2)}"

    def shared_card(self):
        """One card for all her subscriptions, and purchases that use the very row."""
        token = self.token("sub-1")
        for reference in ANNS:
            self.try_to(replace, token, reference)
        self.purchases()

    def purchases(self):
        for _ in range(self.draw.randint(1, 12)):
            reference = f"buy-{len(self.bought)}"
            order = {"reference_id": reference, "customer": ANN, "amount": "9.99",
                     "currency": "USD"}  # fmt: skip
            if carry_out(self.world.ports, Message("billing.charge_once", order)).status == "done":
                self.bought.append(reference)
        self.world.deliver()

    def retry(self):
        """An impatient operator: a dozen clicks within the hour."""
        for _ in range(self.draw.randint(1, 12)):
            reference = self.draw.choice([*ANNS, *BOBS, *self.bought[-3:]])
            self.try_to(retry, f"{reference}-p{self.draw.randint(0, 1)}")
            self.world.tick()
            self.world.clock.advance(self.draw.randint(0, 300))

    def new_card(self):
        reference = self.reference()
        self.try_to(replace, self.token(reference), reference)

    def backup(self):
        reference = self.reference()
        self.try_to(add_backup, self.token(reference), reference)

    def try_to(self, act, *arguments):
        with suppress(InvalidInput):  # no such invoice yet, no card, an attempt under way, a rule
            act(self.world, *arguments)

    def storm(self):
        """Callbacks ring for looks at everything, again and again."""
        with self.world.store.transaction() as connection:
            ids = tuple(connection.execute(select(tables.attempts.c.id)).scalars())
            now = self.world.clock.now()
            connection.execute(
                update(tables.attempts)
                .where(tables.attempts.c.next_poll_at.is_not(None))
                .values(next_poll_at=now)
            )
        for _ in range(3):
            self.world.run("look", ids)

    def banks(self):
        banks_change_their_mind(self.world, self.draw.choice(OUTCOMES))

    def later(self):
        self.world.run_for(timedelta(hours=self.draw.choice([1, 12, 72])), step=12 * HOUR)

    def doubled(self):
        self.world.sweep()
        self.world.bell.messages *= 3
        self.world.deliver()


def deaths(world):
    """By fingerprint: the id of the attempt by which a card died."""
    e, a, c = tables.events, tables.attempts, tables.cards
    query = (
        select(c.c.fingerprint, e.c.attempt_id)
        .join(a, a.c.id == e.c.attempt_id)
        .join(c, c.c.id == a.c.card_id)
        .where(e.c.kind == "card.unusable")
        .order_by(e.c.id.desc())
    )
    with world.store.reading() as connection:
        return {row.fingerprint: row.attempt_id for row in connection.execute(query)}


@pytest.mark.parametrize("seed", range(2))
def test_no_sequence_of_events_breaks_the_slot_the_budget_or_the_peace_of_a_dead_card(world, seed):
    for reference in ANNS:
        world.subscribe("decline_insufficient_funds.ann1", reference, customer=ANN)
    world.subscribe("decline_insufficient_funds.bob1", *BOBS, customer={"reference_id": "bob"})
    world.tick()
    chaos = Chaos(world, seed)
    for _ in range(10):
        chaos.act()
    sales = sold(world)
    assert_one_at_a_time(world)
    assert_within_the_limits(sales)
    dead = deaths(world)
    at = {sale.id: sale.submitted_at for sale in sales}
    for sale in sales:
        killer = dead.get(sale.fingerprint)
        assert killer is None or sale.submitted_at <= at[killer], f"{sale.id} on a dead card"
    assert_nobody_has_the_card_of_another(world)


def assert_nobody_has_the_card_of_another(world):
    c = tables.cards
    with world.store.reading() as connection:
        pairs = set(connection.execute(select(c.c.fingerprint, c.c.customer_id)).all())
    assert len(pairs) == len({fingerprint for fingerprint, _ in pairs})


def assert_one_at_a_time(world):
    """The sales of an invoice never overlap: each is settled before the next is submitted."""
    by_invoice = defaultdict(list)
    a = tables.attempts
    with world.store.reading() as connection:
        for row in connection.execute(
            select(a).where(a.c.submitted_at.is_not(None)).order_by(a.c.number)
        ):
            by_invoice[row.invoice_id].append(row)
    for tries in by_invoice.values():
        for before, after in pairwise(tries):
            assert before.settled_at is not None
            assert before.settled_at <= after.submitted_at


def assert_within_the_limits(sales):
    """10 declines in 24 hours, 35 of one amount in 30 days: the sale that follows is too many."""
    by_card = defaultdict(list)
    for sale in sales:
        if sale.status in {"declined", "submitted"}:
            by_card[sale.fingerprint].append(sale)
    for tries in by_card.values():
        for n, sale in enumerate(tries):
            recent = [t for t in tries[:n] if t.submitted_at > sale.submitted_at - DAY]
            month = [
                t for t in tries[:n]
                if t.submitted_at > sale.submitted_at - 30 * DAY
                and t.amount_minor == sale.amount_minor
            ]  # fmt: skip
            assert len(recent) < 10
            assert len(month) < 35
