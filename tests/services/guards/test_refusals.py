"""A process in another mode, with a wrong clock or a weak standby, sells nothing and says so once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select

from billing_worker.clock import ClockWatch, SystemClock
from billing_worker.domain.errors import NotPayable
from billing_worker.persistence.book import identity as books
from billing_worker.persistence.schema.tables import events
from billing_worker.persistence.store import Store
from billing_worker.services.attempts.claim import claim
from billing_worker.services.charging.charge import charge
from billing_worker.services.guards import lost_memory
from billing_worker.services.hosted_pages.start import start_checkout, start_tokenisation
from billing_worker.services.invoicing.renew import renew_due
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
