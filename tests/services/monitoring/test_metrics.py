from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.services.kill_switch import switch
from billing_worker.services.monitoring.metrics import samples
from billing_worker.services.monitoring.silence import allowed_ages, record_run
from billing_worker.services.outbox.deliver import Outbound
from tests.support.receivers import Receivers, add, send

AGES = allowed_ages({"billing.renew": 15, "billing.warn_expiring": 3_600}, timedelta(minutes=10))


@pytest.fixture
def figures(world):
    """The value of each metric; of one with a label, by the label."""

    def figures():
        with world.store.reading() as connection:
            found = list(samples(connection, world.clock.now(), AGES))
        values = {s.metric.name: s.value for s in found if s.label is None}
        for sample in found:
            if sample.label is not None:
                values.setdefault(sample.metric.name, {})[sample.label] = sample.value
        return {name.removeprefix("billing_"): value for name, value in values.items()}

    return figures


def test_an_empty_book_has_nothing_due_and_no_money_at_risk(figures):
    found = figures()
    assert (found["due_count"], found["due_oldest_age_seconds"]) == (0, 0)
    assert (found["unknown_count"], found["unknown_oldest_age_seconds"]) == (0, 0)
    assert "unknown_amount_minor" not in found


def test_a_charge_that_got_no_answer_is_money_at_risk_until_it_is_decided(world, figures):
    world.subscribe("never_answers_after")
    world.tick()
    world.clock.advance(timedelta(hours=1))
    found = figures()
    assert found["unknown_count"] == 1
    assert found["unknown_amount_minor"] == {"USD": 999}
    assert found["unknown_oldest_age_seconds"] == pytest.approx(3600, abs=60)
    world.run_for(timedelta(minutes=5))
    assert figures()["unknown_count"] == 0


def test_a_page_that_nobody_has_paid_on_is_no_money_at_risk(world, figures):
    world.subscribe("decline_card_expired")
    world.tick()
    assert figures()["unknown_count"] == 0


def test_what_is_due_counts_until_it_is_charged(world, figures):
    world.subscribe()
    world.clock.advance(120)
    assert (figures()["due_count"], figures()["due_oldest_age_seconds"]) == (1, 120)
    world.tick()
    assert figures()["due_count"] == 0


def test_a_due_invoice_counts_although_a_message_for_it_is_on_its_way(world, figures):
    world.subscribe()
    world.sweep()
    world.clock.advance(60)
    assert (figures()["due_count"], figures()["due_oldest_age_seconds"]) == (1, 60)


def test_the_forecast_is_what_becomes_due_within_a_day(world, figures):
    world.subscribe(anchor_at=(world.clock.now() + timedelta(hours=23)).isoformat())
    world.subscribe(
        reference="sub-2", anchor_at=(world.clock.now() + timedelta(hours=25)).isoformat()
    )
    assert figures()["forecast_minor"] == {"USD": 999}


def test_the_kill_switch_shows(world, figures):
    assert figures()["sales_enabled"] == 1
    now = world.clock.now()
    switch(world.store, on=False, service=None, by="ann", reason="test", now=now)
    assert figures()["sales_enabled"] == 0


def test_each_sweep_shows_when_it_last_finished_or_since_when_it_never_has(world, figures):
    record_run(world.ports, "billing.renew")
    assert figures()["sweep_last_success_timestamp_seconds"] == {
        "billing.renew": world.clock.now().timestamp(),
        "billing.warn_expiring": world.book.made_at.timestamp(),
    }
    ages = figures()["sweep_allowed_age_seconds"]
    assert ages == {"billing.renew": 600, "billing.warn_expiring": 10_800}


def test_what_waits_for_an_endpoint_is_counted_and_what_is_parked_of_it(world, figures):
    receivers = Receivers()
    receivers.say(500)
    add(world)
    world.subscribe()
    out = Outbound(world.store, world.clock, world.vault, receivers, waits=())
    send(out)
    found = figures()
    assert (found["webhooks_waiting"], found["webhooks_parked"]) == ({"1": 1}, {"1": 1})
    receivers.say(200)
    world.clock.advance(timedelta(days=1))
    send(out)
    send(out)  # that the endpoint was dead
    found = figures()
    assert (found["webhooks_waiting"], found["webhooks_parked"]) == ({"1": 0}, {"1": 0})
