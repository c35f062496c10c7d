"""Workers, subscriptions and invoices that share a card share its limits and its death."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
from sqlalchemy import event, insert, select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.domain.outcome import Stated
from billing_worker.persistence import cards, customers
from billing_worker.persistence.attempts import LockedCases, keys_of
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.services.attempts.claim import claim
from billing_worker.services.attempts.commit import _commit
from billing_worker.services.attempts.retry_limits import Budget
from billing_worker.services.attempts.settle import Settle
from billing_worker.services.attempts.submit import Submit
from billing_worker.services.cards.expiry import warn_expiring
from billing_worker.services.charging.charge import _created, _order
from billing_worker.services.charging.session import ChargeSession
from billing_worker.services.invoicing.renew import renew_due
from tests.support.cards import ANN, HOUR, card_ids, declines_from_now_on, expiring_card, sold
from tests.support.recovery import (
    decline_stands,
    replace,
    retry,
)
from tests.support.world import World


def test_two_workers_cannot_both_make_the_last_attempt_that_a_network_allows(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    for reference in ("sub-1", "sub-2"):
        world.subscribe(
            "decline_insufficient_funds.1", reference, customer=ANN, ends_after_periods=1
        )
    world.tick()
    for _ in range(7):
        retry(world)
        decline_stands(world)
    first, second = stored_twice(world)  # one fingerprint, and one try left
    price, now = Money.parse("9.99", "USD"), world.clock.now()
    refused = []

    def other_worker():
        with store.transaction() as connection:
            refused.append(Budget(connection, [second], now).spend(second, price, 0))

    with store.transaction() as connection:
        assert Budget(connection, [first], now).spend(first, price, 0) is None
        other = threading.Thread(target=other_worker)
        other.start()
        other.join(0.5)
        assert refused == []  # it waits for the one that came first
        connection.execute(a_sale_on(connection, first, now))
    other.join(10)
    store.close()
    assert [one.rule for one in refused] == ["mastercard.10_declines_in_24_hours"]


def stored_twice(world):
    """As older versions kept a token that came in twice."""
    with world.store.transaction() as connection:
        row = dict(connection.execute(select(tables.cards)).one()._mapping)
        connection.execute(insert(tables.cards).values(row | {"id": row["id"] + 1}))
    return card_ids(world)


def test_an_attempt_that_is_being_armed_without_a_lock_counts_for_all_that_come_after(
    postgres_url,
):
    store = Store(postgres_url)
    world = World(store)
    [first] = claimed(world, ["sub-0"])
    price, now = first.attempt.money, world.clock.now()
    with store.transaction() as connection:
        LockedCases(connection, [first.key])
        first_card = first.attempt.card_id
        assert Budget(connection, [first_card], now).spend(first_card, price, 0) is None
        others = claimed(world, [f"sub-{n}" for n in range(1, 11)])
        with store.transaction() as other:
            LockedCases(other, [one.key for one in others])
            ids = [one.attempt.card_id for one in others]
            budget = Budget(other, ids, now)
            answers = [budget.spend(card_id, price, 0) for card_id in ids]
    store.close()
    assert [answer is None for answer in answers] == [True] * 9 + [False]


def test_an_ordinary_charge_asks_once_and_waits_for_nobody(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    [one] = claimed(world, ["sub-1"])
    asked = []
    event.listen(store.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    with store.transaction() as holder, store.transaction() as connection:
        cards.lock_budgets(holder, [one.attempt.card_id])
        asked.clear()
        Budget(connection, [one.attempt.card_id], world.clock.now())
        assert len(asked) == 1
    store.close()


def claimed(world, references, token="approved.1"):
    """Prepared first attempts of new subscriptions of one customer, all with one card."""
    for reference in references:
        world.subscribe(token, reference, customer=ANN, ends_after_periods=1)
    renew_due(world.ports)
    return claim(world.ports, [row_id(world, tables.invoices, f"{one}-p0") for one in references])


def row_id(world, table, reference):
    with world.store.reading() as connection:
        query = select(table.c.id).where(table.c.reference_id == reference)
        return connection.execute(query).scalar_one()


def test_many_invoices_of_one_card_that_are_due_at_once_stay_within_its_limit(world):
    for number in range(15):
        world.subscribe("pending_forever.1", f"sub-{number}", customer=ANN, ends_after_periods=1)
    world.tick()
    assert len(sold(world)) == 10
    declines_from_now_on(world)
    world.run_for(3 * HOUR, step=10 * timedelta(minutes=1))
    assert [sale.status for sale in sold(world)] == ["declined"] * 10


def test_a_dozen_invoices_of_one_card_that_are_open_for_minutes_are_all_paid_on_that_day(world):
    for number in range(12):
        world.subscribe("approved_later.1", f"sub-{number}", customer=ANN, ends_after_periods=1)
    world.run_for(3 * HOUR, step=10 * timedelta(minutes=1))
    assert [world.fate(f"sub-{number}-p0") for number in range(12)] == ["paid"] * 12


def test_attempts_on_one_card_that_are_armed_together_stay_within_its_limit(world):
    both = claimed(world, [f"sub-{number}" for number in range(12)])
    with world.store.transaction() as connection:
        one_row = both[0].attempt.card_id
        connection.execute(update(tables.attempts).values(card_id=one_row))
        budget = Budget(connection, [one_row], world.clock.now())
        answers = [budget.spend(one_row, one.attempt.money, 0) for one in both]
    assert [answer is None for answer in answers] == [True] * 10 + [False] * 2


def test_a_token_that_is_stored_while_its_card_dies_is_refused(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    world.subscribe("approved.1", "sub-1", customer=ANN)
    world.subscribe(None, "sub-2", customer=ANN)
    refused = []

    def enter_again():
        try:
            replace(world, "approved.1", "sub-2")
        except InvalidInput as error:
            refused.append((error.field, error.reason))

    with store.transaction() as connection:
        decline(connection, card_ids(world), "stolen", world.clock.now())
        entering = threading.Thread(target=enter_again)
        entering.start()
        entering.join(0.5)
        assert entering.is_alive()  # it waits for what becomes of the card
    entering.join(10)
    assert len(card_ids(world)) == 1
    store.close()
    assert refused == [("card.token", "this card cannot be charged (card_unusable: stolen)")]


def test_a_card_that_dies_while_its_token_is_given_once_more_is_dead_for_that_too(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    world.subscribe("approved.1", "sub-1", customer=ANN)
    known = card_ids(world)

    def dies():
        with store.transaction() as connection:
            decline(connection, known, "stolen", world.clock.now())

    with store.transaction() as connection:
        row = dict(connection.execute(select(tables.cards)).one()._mapping)
        del row["id"]
        customers.add_cards(connection, [row])
        dying = threading.Thread(target=dies)
        dying.start()
        dying.join(0.5)
        assert dying.is_alive()
    dying.join(10)
    with store.reading() as connection:
        reasons = list(connection.execute(select(tables.cards.c.unusable_reason)).scalars())
    store.close()
    assert reasons == ["stolen"]


def decline(connection, ids, reason, now):
    cards.lock_budgets(connection, ids)
    cards.remember_declines(connection, [(card_id, reason) for card_id in ids], now)


@pytest.mark.parametrize("arming", [False, True])
def test_batches_that_meet_on_two_cards_never_wait_for_each_other_in_a_circle(postgres_url, arming):
    store = Store(postgres_url)
    world = World(store)
    bob = {"reference_id": "bob"}
    for name, customer in (("a1", ANN), ("b1", bob)):
        world.subscribe(f"pending_forever.{name[0]}", name, customer=customer)
    world.tick()
    for name, customer in (("a2", ANN), ("b2", bob)):
        world.subscribe(f"pending_forever.{name[0]}", name, customer=customer)
    if arming:
        renew_due(world.ports)
        arms = {name: to_submit(world, name) for name in ("a2", "b2")}
    else:
        world.tick()
        arms = {name: to_decline(world, name) for name in ("a2", "b2")}
    batches = (
        [to_decline(world, "a1"), arms["b2"]],
        [to_decline(world, "b1"), arms["a2"]],
    )
    both_hold_one = threading.Barrier(2)
    seen = threading.local()

    def after(_connection, _cursor, statement, *_):
        """Whoever has its first lock of a card waits until the other one has its own."""
        locks = "FROM cards" in statement and "FOR NO KEY UPDATE" in statement
        if locks and not getattr(seen, "once", False):
            seen.once = True
            with suppress(threading.BrokenBarrierError):
                both_hold_one.wait(1)

    event.listen(store.engine, "after_cursor_execute", after)
    done = []

    def commit_it(batch):
        done.append(len(_commit(world.ports, batch)))

    workers = [threading.Thread(target=commit_it, args=(batch,)) for batch in batches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    store.close()
    assert done == [2, 2]


def to_decline(world, name):
    """The news that the live attempt of a subscription's first invoice was refused."""
    attempt_id = row_id(world, tables.attempts, f"{name}-p0-a1")
    with world.store.reading() as connection:
        [(key, gateway_id)] = keys_of(connection, [attempt_id])
    said = world.ports.gateway.poll(gateway_id, [])
    no_money = {"status": "process_failed", "resolution": "insufficient_funds"}
    return Settle(key, Stated(dataclasses.replace(said, **no_money)), "test")


def to_submit(world, name):
    [mine] = claim(world.ports, [row_id(world, tables.invoices, f"{name}-p0")])
    session = ChargeSession.of(world.ports, mine)
    return Submit(mine, _created(session, _order(world.ports, mine)), ())


def test_whoever_warns_of_expiring_cards_locks_them_in_the_order_of_all_others(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    for reference in ("sub-1", "sub-2"):
        world.subscribe(card=expiring_card(f"approved.{reference}", month=2), reference=reference)
    replace(world, "approved.3", "sub-1", expiry_month=2, expiry_year=2026)
    _, lower, higher = card_ids(world)  # of the second subscription, of the first
    warned = []
    with store.transaction() as connection:
        cards.lock_budgets(connection, [lower])
        warning = threading.Thread(target=lambda: warned.append(warn_expiring(store, world.clock)))
        warning.start()
        warning.join(0.5)
        assert warned == []
        other = select(tables.cards.c.id).where(tables.cards.c.id == higher)
        connection.execute(other.with_for_update(nowait=True))
    warning.join(10)
    store.close()
    assert warned == [2]


def a_sale_on(connection, card_id, now):
    row = dict(connection.execute(select(tables.attempts)).first()._mapping)
    row |= {"number": 99, "reference_id": "r", "gateway_id": "cpi_r", "card_id": card_id}
    return insert(tables.attempts).values(
        **{key: value for key, value in row.items() if key != "id"}
        | {"status": "submitted", "submitted_at": now}
    )
