"""Several cards, dead ones, expired ones, and everything at once; on both databases."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from sqlalchemy import insert, select, update

from billing_worker.domain.card import Card, warning_due
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.persistence import tables
from billing_worker.persistence.store import Store
from billing_worker.services.budget import Budget
from billing_worker.services.cards import list_cards, warn_expiring
from billing_worker.services.recover import give_up_overdue
from tests.support.recovery import (
    add_backup,
    banks_change_their_mind,
    events,
    origins,
    replace,
    retry,
    sold_at,
    subscription,
)
from tests.support.world import World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


# --- dead cards -----------------------------------------------------------------------------


def test_a_hard_decline_makes_the_card_unusable_and_asks_for_another(world):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    assert [one["reason"] for one in events(world, "card.unusable")] == [
        "declined_hard: card_is_stolen"
    ]
    assert len(events(world, "card.needed")) == 1
    world.run_for(40 * DAY, step=5 * DAY)
    assert len(sold_at(world)) == 1


def test_a_dead_card_is_dead_for_every_subscription_that_has_it_and_no_call_is_made(world):
    world.subscribe("decline_card_is_stolen", "sub-1")
    world.tick()
    calls = len(world.transport.sent)
    world.subscribe("decline_card_is_stolen", "sub-2")
    world.tick()
    assert world.explain("sub-2-p0")["attempts"] == []
    assert "card_unusable" in world.explain("sub-2-p0")["reason"]
    assert len(world.transport.sent) == calls


def test_a_card_that_dies_between_claim_and_sale_is_not_sold_and_the_invoice_asks_for_another(
    world,
):
    world.subscribe("approved")
    dies_at = iter([1])

    def dies(request):
        if request.url.endswith("/payment-invoices") and next(dies_at, None):
            with world.store.transaction() as connection:
                connection.execute(update(tables.cards).values(unusable_reason="stolen"))

    world.transport.before_send = dies
    world.tick()
    world.tick()
    assert sold_at(world) == []
    assert world.explain()["reason"] == "card_unusable: stolen"
    assert [one["rule"] for one in events(world, "attempt.forbidden")] == ["card.usable"]


def test_the_backup_card_is_charged_at_once_when_the_default_one_is_dead(world):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    world.tick()
    assert origins(world) == ["scheduled", "backup"]
    assert world.fate() == "paid"


def test_the_next_period_goes_straight_to_the_backup_card(world):
    world.subscribe("decline_card_is_stolen", ends_after_periods=2)
    add_backup(world, "approved.backup")
    world.run_for(30 * DAY, step=2 * DAY)
    assert origins(world, "sub-1-p1") == ["scheduled"]
    assert world.fate("sub-1-p1") == "paid"


@pytest.mark.parametrize("token", ["decline_insufficient_funds", "decline_auth_3ds_required"])
def test_the_backup_card_is_not_touched_while_the_default_one_may_still_pay(world, token):
    world.subscribe(token)
    add_backup(world, "approved.backup")
    world.run_for(5 * DAY, step=DAY)
    assert "backup" not in origins(world)
    assert world.debits() == {}


def test_a_card_without_recorded_consent_is_never_a_backup(world):
    world.subscribe("approved.other")
    replace(world, "decline_card_is_stolen")
    world.run_for(3 * DAY, step=DAY)
    assert world.debits() == {}
    with pytest.raises(InvalidInput, match="consent"):
        add_backup_without_consent(world)


def add_backup_without_consent(world):
    from billing_worker.services.cards import add_backup_card  # noqa: PLC0415
    from tests.support.recovery import card  # noqa: PLC0415

    add_backup_card(
        world.store, world.vault, world.clock, subscription_reference="sub-1",
        card=card("approved.backup"), consent=" ", by="test",
    )  # fmt: skip


# --- expired cards --------------------------------------------------------------------------


def expiring_card(token="approved", month=1, year=2026):
    return {"token": token, "expiry_month": month, "expiry_year": year}


def test_an_expired_card_is_not_charged_and_no_call_is_made(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    assert world.explain()["reason"] == "card_expired"
    assert world.explain()["attempts"] == []
    assert world.transport.sent == []
    assert len(events(world, "card.needed")) == 1


def test_a_card_is_charged_up_to_the_end_of_its_month(world):
    world.subscribe(card=expiring_card(month=1, year=2026))
    world.tick()
    assert world.fate() == "paid"


def test_an_invoice_that_nobody_gave_a_card_for_is_given_up_after_the_policys_patience(world):
    world.subscribe(card=expiring_card(month=12, year=2025))
    world.tick()
    world.clock.advance(31 * DAY)
    assert give_up_overdue(world.store, world.clock) == 1
    assert world.fate() == "uncollectible"


def test_a_warning_is_told_60_and_15_days_before_the_expiry_and_once_each(world):
    world.subscribe(card=expiring_card(month=4, year=2026))
    told = []
    while world.clock.now() < datetime(2026, 5, 10, tzinfo=UTC):
        if warn_expiring(world.store, world.clock):
            told.append(world.clock.now())
        world.clock.advance(DAY)
    expiry = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert [(expiry - moment).days for moment in told] == [60, 15]
    assert [one["days"] for one in events(world, "card.expiring")] == [60, 15]


def test_after_a_pause_of_the_sweep_only_the_nearer_warning_is_told():
    card = Card(1, "f", "visa", 4, 2026, None, None)
    now = datetime(2026, 4, 25, tzinfo=UTC)
    assert warning_due(card, None, now) == 15
    assert warning_due(card, 15, now) is None


def test_nobody_is_warned_about_a_card_that_pays_for_nothing_any_more(world):
    world.subscribe(card=expiring_card(month=2, year=2026))
    with world.store.transaction() as connection:
        connection.execute(
            update(tables.subscriptions).values(status="cancelled", next_billing_at=None)
        )
    assert warn_expiring(world.store, world.clock) == 0


# --- replacing ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["decline_card_is_stolen", "decline_insufficient_funds"])
def test_a_replaced_card_is_tried_at_once_on_what_waits(world, token):
    world.subscribe(token)
    world.tick()
    assert replace(world, "approved.new")["tried"] == ["sub-1-p0"]
    world.tick()
    assert origins(world) == ["scheduled", "new_card"]
    assert world.fate() == "paid"
    assert subscription(world).status == "active"


def test_a_replaced_card_is_tried_once_and_then_the_ladder_goes_on_where_it_was(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    planned = world.explain()["next_attempt_at"]
    replace(world, "decline_insufficient_funds.new")
    world.tick()
    assert origins(world) == ["scheduled", "new_card"]
    assert world.explain()["next_attempt_at"] == planned


def test_a_subscription_without_a_card_is_charged_when_it_gets_one(world):
    world.subscribe(None)
    world.tick()
    replace(world, "approved")
    world.tick()
    assert world.fate() == "paid"


def test_a_card_that_arrives_while_an_attempt_is_in_flight_waits_for_its_end(world):
    world.subscribe("approved_later")
    world.tick()
    answer = replace(world, "approved.new")
    assert (answer["tried"], answer["in_flight"]) == ([], ["sub-1-p0"])
    world.run_for(2 * HOUR, step=timedelta(minutes=5))
    assert world.debits() == {"sub-1-p0": 1}


def test_what_may_have_been_paid_is_not_tried_on_a_new_card(world):
    world.subscribe("decline_duplicated_transaction")
    world.tick()
    assert replace(world, "approved.new")["tried"] == []
    world.run_for(DAY, step=HOUR)
    assert world.attempts() == ["declined"]


def test_a_prepared_attempt_on_the_old_card_is_withdrawn_when_the_card_is_replaced(world):
    world.subscribe("decline_card_is_lost")
    world.transport.unreachable = True
    world.tick()
    assert world.attempts() == ["prepared"]
    world.transport.unreachable = False
    replace(world, "approved.new")
    world.run_for(HOUR, step=timedelta(minutes=5))
    assert world.attempts() == ["not_charged", "succeeded"]


@pytest.mark.parametrize(
    ("token", "changes", "field"),
    [
        ("decline_card_is_stolen", {}, "card.token"),
        ("approved.new", {"expiry_year": 2025}, "card.expiry_year"),
    ],
)
def test_a_card_that_cannot_be_charged_replaces_nothing(world, token, changes, field):
    world.subscribe("decline_card_is_stolen")
    world.tick()
    before = subscription(world).card_id
    with pytest.raises(InvalidInput) as refused:
        replace(world, token, **changes)
    assert refused.value.field == field
    assert subscription(world).card_id == before


def test_the_list_of_cards_tells_their_roles_and_no_token(world):
    world.subscribe("decline_card_is_stolen")
    add_backup(world, "approved.backup")
    world.tick()
    with world.store.reading() as connection:
        default, backup = list_cards(connection, "sub-1", world.clock.now())
    assert default["default_for"] == ["sub-1"]
    assert default["not_chargeable"] == "card_unusable: declined_hard: card_is_stolen"
    assert backup["backup"] == "test: ticked at checkout"
    assert not {"token", "fingerprint"} & (default.keys() | backup.keys())


# --- two workers, one budget ----------------------------------------------------------------


def test_two_workers_cannot_both_make_the_last_attempt_that_a_network_allows(postgres_url):
    store = Store(postgres_url)
    world = World(store)
    for reference in ("sub-1", "sub-2"):
        world.subscribe("decline_insufficient_funds", reference, ends_after_periods=1)
    world.tick()
    for _ in range(7):
        world.clock.advance(60)
        retry(world)
        world.tick()
    first, second = card_ids(world)  # two cards with one fingerprint, and one try left
    price, now = Money.parse("9.99", "USD"), world.clock.now()
    refused = []

    def other_worker():
        with store.transaction() as connection:
            refused.append(Budget(connection, [second], now).spend(second, price))

    with store.transaction() as connection:
        assert Budget(connection, [first], now).spend(first, price) is None
        other = threading.Thread(target=other_worker)
        other.start()
        other.join(0.5)
        assert refused == []  # it waits for the one that came first
        connection.execute(a_sale_on(connection, first, now))
    other.join(10)
    store.close()
    assert [one.rule for one in refused] == ["mastercard.10_declines_in_24_hours"]


def card_ids(world):
    with world.store.reading() as connection:
        return list(
            connection.execute(select(tables.cards.c.id).order_by(tables.cards.c.id)).scalars()
        )


def a_sale_on(connection, card_id, now):
    row = dict(connection.execute(select(tables.attempts)).first()._mapping)
    row |= {"number": 99, "reference_id": "r", "gateway_id": "cpi_r", "card_id": card_id}
    return insert(tables.attempts).values(
        **{key: value for key, value in row.items() if key != "id"}
        | {"status": "submitted", "submitted_at": now}
    )


# --- everything at once ---------------------------------------------------------------------

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


class Chaos:
    """Draws what customers, operators, banks, the broker and the clock do, from one seed."""

    def __init__(self, world, seed):
        self.world = world
        self.draw = random.Random(seed)

    def act(self):
        self.draw.choice(
            [self.retry, self.retry, self.retry, self.new_card, self.backup, self.storm,
             self.banks, self.later, self.later, self.doubled]
        )()  # fmt: skip

    def reference(self):
        return f"sub-{self.draw.randint(1, 3)}"

    def token(self):
        # Few suffixes: the same card comes back under another subscription.
        return f"{self.draw.choice(OUTCOMES)}.{self.draw.randint(1, 2)}"

    def retry(self):
        """An impatient operator: a dozen clicks within the hour."""
        for _ in range(self.draw.randint(1, 12)):
            self.try_to(retry, f"{self.reference()}-p{self.draw.randint(0, 1)}")
            self.world.tick()
            self.world.clock.advance(self.draw.randint(0, 300))

    def new_card(self):
        self.try_to(replace, self.token(), self.reference())

    def backup(self):
        self.try_to(add_backup, self.token(), self.reference())

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
                .where(tables.attempts.c.look_at.is_not(None))
                .values(look_at=now)
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


def sold(world):
    """(attempt id, invoice id, when, fingerprint, amount, status), in the order of the sales."""
    a, c = tables.attempts, tables.cards
    query = (
        select(a.c.id, a.c.invoice_id, a.c.submitted_at, c.c.fingerprint, a.c.amount_minor,
               a.c.status)
        .join(c, c.c.id == a.c.card_id)
        .where(a.c.submitted_at.is_not(None))
        .order_by(a.c.submitted_at, a.c.id)
    )  # fmt: skip
    with world.store.reading() as connection:
        return connection.execute(query).all()


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
    for number in range(1, 4):
        world.subscribe(f"decline_insufficient_funds.{number % 2}", f"sub-{number}")
    world.tick()
    chaos = Chaos(world, seed)
    for _ in range(16):
        chaos.act()
    sales = sold(world)
    assert_one_at_a_time(world)
    assert_within_the_limits(sales)
    dead = deaths(world)
    at = {sale.id: sale.submitted_at for sale in sales}
    for sale in sales:
        killer = dead.get(sale.fingerprint)
        assert killer is None or sale.submitted_at <= at[killer], f"{sale.id} on a dead card"


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
