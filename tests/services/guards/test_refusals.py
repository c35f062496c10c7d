"""A process in another mode, with a wrong clock or a weak standby, sells nothing and says so once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.clock import ClockWatch, SystemClock
from billing_worker.domain.errors import NotPayable
from billing_worker.persistence import card_setups
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.callbacks import poll_now
from billing_worker.persistence.schema import tables
from billing_worker.persistence.schema.tables import attempts, events, invoices
from billing_worker.persistence.store import Store
from billing_worker.services.attempts.claim import claim
from billing_worker.services.charging.charge import charge
from billing_worker.services.commands.execute import Message, NotKept, carry_out
from billing_worker.services.guards import lost_memory
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.hosted_pages.poll import poll
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.kill_switch import switch
from tests.support.world import VirtualClock, World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def refusals(world):
    with world.store.reading() as connection:
        query = select(events.c.data).where(events.c.kind == "book.refused", events.c.alert)
        return [data["reason"] for data in connection.execute(query).scalars()]


def mode(world):
    with world.store.reading() as connection:
        return books.read(connection).test_mode


# --- one mode -----------------------------------------------------------------------------------


def test_a_book_has_the_mode_of_its_first_charge(world):
    world.subscribe("create_answer_lost")
    assert mode(world) is None
    world.run_for(10 * MINUTE)
    assert mode(world) is True


def live(world):
    with world.store.transaction() as connection:
        books.set_mode(connection, test_mode=False)


def test_a_worker_in_test_mode_sells_nothing_of_a_live_book(world):
    live(world)
    world.subscribe("approved")
    world.run_for(5 * HOUR, step=HOUR)
    assert world.attempts() == []
    assert world.transport.sent == []
    (said,) = refusals(world)
    assert "charges in live mode, and BILLING_TEST_MODE=true says test" in said


def test_a_charge_that_was_claimed_before_the_first_live_one_is_not_submitted(world):
    world.subscribe("approved")
    world.sweep()
    (_, ids), *_ = world.bell.messages
    (claimed,) = claim(world.ports, ids)
    live(world)
    assert charge(world.ports, claimed) == "prepared"
    assert world.debits() == {}
    assert "live mode" in world.explain()["reason"]


@pytest.mark.by_hand
def test_no_page_opens_in_another_mode(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    with world.store.transaction() as connection:
        connection.execute(books.book.update().values(test_mode=False))
    with pytest.raises(NotPayable, match="live mode"):
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
    with pytest.raises(NotPayable, match="live mode"):
        start_tokenisation(world.ports, {
            "reference_id": "card-1", "customer": {"reference_id": "jo"},
            "amount": "1.00", "currency": "USD",
        })  # fmt: skip


# --- the clock ----------------------------------------------------------------------------------


class SetClock(SystemClock):
    """A machine's clock that somebody sets. The monotonic one is left alone, as it then is."""

    off = timedelta(0)

    def now(self):
        return super().now() + self.off


@pytest.fixture(params=["sqlite", "postgres"])
def by_the_clock(request):
    with Store(request.getfixturevalue(f"{request.param}_url")) as store:
        world = World(store)
        world.clock = SetClock()
        world.sandbox._now = world.clock.now
        world.ports = world.ports_of_a_worker(timekeeper=ClockWatch(world.clock))
        yield world


def test_a_clock_days_ahead_sells_nothing_and_goes_on_when_it_is_mended(by_the_clock):
    world = by_the_clock
    world.subscribe("approved")
    world.clock.off = 39 * DAY
    assert lost_memory.clock_is_wrong(world.ports)
    assert renew_due(world.ports) == 0
    assert claim(world.ports, [1]) == []
    assert len(refusals(world)) == 1
    assert "39 days, 0:00:00 ahead" in refusals(world)[0]
    world.clock.off = timedelta(0)
    assert not lost_memory.clock_is_wrong(world.ports)
    world.sweep()
    world.deliver()
    assert world.fate() == "paid"
    world.clock.off = -2 * MINUTE
    assert lost_memory.clock_is_wrong(world.ports)
    assert len(refusals(world)) == 1, "told once a day"


def test_a_clock_that_is_set_ahead_after_the_claim_submits_nothing(by_the_clock):
    world = by_the_clock
    world.subscribe("approved")
    world.sweep()
    (_, ids), *_ = world.bell.messages
    (claimed,) = claim(world.ports, ids)
    world.clock.off = 2 * MINUTE
    assert charge(world.ports, claimed) == "prepared"
    assert world.debits() == {}


def set_ahead_after(world, ending):
    """Somebody sets the clock right after such a request, and mends it after the charge."""
    send = world.transport.send

    def sent(request, **how):
        answer = send(request, **how)
        if request.url.endswith(ending):
            world.clock.off = 400 * DAY
        return answer

    world.transport.send = sent
    world.sweep()
    world.deliver()
    assert world.clock.off, "nothing was sent"
    world.clock.off = timedelta(0)


def invoice(world):
    with world.store.reading() as connection:
        return connection.execute(select(invoices)).one()


def test_a_clock_that_is_set_ahead_during_a_charge_does_not_postpone_it_for_a_year(by_the_clock):
    world = by_the_clock
    world.subscribe("approved")
    set_ahead_after(world, "/payment-invoices")
    assert world.attempts() == ["prepared"]
    assert invoice(world).enqueue_at < world.clock.now() + DAY


def test_a_decline_is_dated_right_by_a_clock_that_is_set_ahead_after_the_sale(by_the_clock):
    world = by_the_clock
    world.subscribe("decline_insufficient_funds")
    set_ahead_after(world, "/payment/sale")
    assert world.attempts() == ["declined"]
    assert invoice(world).first_declined_at < world.clock.now()
    assert invoice(world).next_attempt_at < world.clock.now() + 30 * DAY


def test_a_process_that_starts_after_the_clock_went_back_sells_nothing(by_the_clock):
    """On SQLite, which has no clock, the newest entry of the history tells it."""
    world = by_the_clock
    world.subscribe("approved")
    world.clock.off = -10 * MINUTE
    world.ports = world.ports_of_a_worker(timekeeper=ClockWatch(world.clock))
    assert lost_memory.clock_is_wrong(world.ports)
    assert claim(world.ports, [1]) == []
    assert "behind the" in refusals(world)[0]
    world.clock.off = timedelta(0)
    world.ports = world.ports_of_a_worker(timekeeper=ClockWatch(world.clock))
    assert not lost_memory.clock_is_wrong(world.ports)


def test_a_person_says_that_the_history_was_written_by_a_clock_that_was_ahead(sqlite_url):
    with Store(sqlite_url) as store:
        world = World(store)
        world.clock = SetClock()
        world.clock.off = DAY
        world.subscribe("approved")
        world.clock.off = timedelta(0)
        world.ports = world.ports_of_a_worker(timekeeper=ClockWatch(world.clock))
        assert lost_memory.clock_is_wrong(world.ports)
        switch(store, on=True, service=None, by="operator:ann", reason="the clock is right now",
               now=world.clock.now())  # fmt: skip
        assert not lost_memory.clock_is_wrong(world.ports)


def test_a_page_that_was_paid_is_dated_right_by_a_clock_that_is_set_ahead(by_the_clock):
    world = by_the_clock
    page = start_tokenisation(world.ports, {
        "reference_id": "card-1", "customer": {"reference_id": "c"}, "amount": "1.00",
        "currency": "USD",
    })  # fmt: skip
    world.sandbox.pay_on_page(page["gateway_id"])
    world.clock.off = 400 * DAY
    with world.store.reading() as connection:
        [row] = connection.execute(select(tables.card_setups)).all()
        payment, _ = card_setups.find(connection, "card-1")
    assert row.next_poll_at < SystemClock().now() + DAY
    poll(world.ports, payment)
    with world.store.reading() as connection:
        [row] = connection.execute(select(tables.card_setups)).all()
    assert row.status == "stored"
    assert row.settled_at < SystemClock().now() + DAY


def test_a_callback_of_a_clock_that_is_ahead_postpones_no_poll(by_the_clock):
    world = by_the_clock
    world.subscribe("pending_forever")
    world.sweep()
    world.deliver()
    with world.store.transaction() as connection:
        [before] = connection.execute(select(attempts)).all()
        poll_now(connection, before.gateway_id, world.clock.now() + 400 * DAY)
        [after] = connection.execute(select(attempts)).all()
    assert after.next_poll_at == before.next_poll_at


def test_a_command_waits_while_the_clock_is_wrong(by_the_clock):
    world = by_the_clock
    world.subscribe("approved", interval="week")
    asked = {"reference_id": "c-1", "subscription": "sub-1", "amount": "19.99"}
    change = Message("billing.change_subscription", asked)
    world.clock.off = 60 * DAY
    with pytest.raises(NotKept, match="60 days, 0:00:00 ahead"):
        carry_out(world.ports, change)
    assert len(refusals(world)) == 1
    world.clock.off = timedelta(0)
    assert carry_out(world.ports, change).status == "done"
    assert invoice(world).status == "open", "the first period, and no missed one"


def test_a_machine_that_was_asleep_has_not_set_its_clock():
    clock, boot = VirtualClock(), iter([100.0, 100.0 + 3 * 86_400])
    watch = ClockWatch(clock, lambda: next(boot))
    clock.advance(3 * DAY)
    assert watch.ahead_by(None) == timedelta(0)


# --- the standby --------------------------------------------------------------------------------


def test_nothing_is_sold_while_a_fail_over_could_lose_commits_and_that_is_asked_for(postgres_url):
    with Store(postgres_url) as store:
        world = World(store)
        world.subscribe("approved")
        easy = world.ports
        world.ports = replace(easy, needs_synchronous_standby=True)
        world.tick()
        assert world.attempts() == []
        assert "synchronous_standby_names is empty" in refusals(world)[0]
        world.ports = easy
        world.clock.advance(HOUR)
        world.tick()
        assert world.fate() == "paid"
