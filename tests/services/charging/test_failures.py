"""Trouble that meets every charge is no row's fault; a row that crashes alone waits for a person."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from billing_worker.domain.errors import ConcurrentChange
from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema.tables import attempts, invoices
from billing_worker.persistence.vault import FernetVault
from billing_worker.services.attempts.claim import MAX_CLAIMS, claim
from billing_worker.services.attempts.commit import submit
from billing_worker.services.attempts.submit import Submit
from billing_worker.services.charging.charge import _order, charge_batch
from billing_worker.services.charging.vault_keys import try_at_start
from billing_worker.services.commands.execute import Message, NotKept, carry_out
from billing_worker.services.dunning import retry_invoice
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.reports import status
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.stored_tokens import put_token

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SOON = 6 * MINUTE


class Died(BaseException):
    """The process is gone: nothing catches it, nothing is written."""


def subscribed(world, count, **fields):
    references = [f"{fields.get('currency', 'sub')}-{n}" for n in range(count)]
    record = {"amount": "9.99", "currency": "USD", "interval": "month"}
    record |= {"anchor_at": world.clock.now().isoformat()} | fields
    records = [
        parse_record(record | {
            "reference_id": reference,
            "customer": {"reference_id": f"customer-of-{reference}"},
            "card": {"token": f"approved.{reference}"},
        })
        for reference in references
    ]  # fmt: skip
    subscribe(world.store, world.vault, world.clock, records, by="test")
    return [f"{reference}-p0" for reference in references]


def fates(world):
    with world.store.reading() as connection:
        lines = status.status(connection, world.clock.now())["invoices"]
    counts = {}
    for line in lines:
        counts[line["fate"]] = counts.get(line["fate"], 0) + line["count"]
    return counts


def alerts(world):
    with world.store.reading() as connection:
        return [a["kind"] for a in status.status(connection, world.clock.now())["alerts"]]


def logged(logs):
    return [line["kind"] for line in logs if line["event"] == "billing.alert"]


def wrong_keys():
    return FernetVault(Secret(Fernet.generate_key().decode()))


def crashing(world, *references, error=lambda: KeyError("a bug")):
    """A worker whose charges of these invoices, or of all, raise."""
    gateway = world.gateway()
    create = gateway.create

    def broken(order, calls):
        if not references or order.reference_id.rpartition("-a")[0] in references:
            raise error()
        return create(order, calls)

    gateway.create = broken
    return world.ports_of_a_worker(gateway=gateway)


def timed_out():
    return OperationalError("SELECT 1", {}, Exception("canceling statement due to timeout"))


def dying(world, *references):
    return crashing(world, *references, error=Died)


def run_with_deaths(world, ports, span):
    """As a supervisor would: a worker that dies is started again."""
    end, mended = world.clock.now() + span, world.ports
    while world.clock.now() < end:
        world.sweep()
        while world.bell.messages:
            try:
                world.run(*world.bell.messages.pop(0), ports=ports)
            except Died:
                ports = world.ports_of_a_worker(gateway=ports.gateway)
        world.clock.advance(5 * MINUTE)
    world.ports = mended


# --- trouble that meets everybody ---


@pytest.mark.parametrize("processes", [1, 3])
def test_wrong_keys_for_an_hour_strand_nothing_and_are_one_alert_of_each_process(world, processes):
    paid = subscribed(world, 40)
    wrong = [world.ports_of_a_worker(vault=wrong_keys()) for _ in range(processes)]
    mended = world.ports
    with capture_logs() as logs:
        for minute in range(65):
            world.ports = wrong[minute % processes]
            world.tick()
            world.clock.advance(MINUTE)
    assert logged(logs) == ["charging.stopped"] * processes
    assert alerts(world) == ["charging.stopped"]
    assert world.transport.sent == []
    assert fates(world).keys() <= {"open, being charged", "open, next attempt dated"}
    assert any("BILLING_VAULT_KEYS" in world.explain(one)["why"] for one in paid)
    world.ports = mended
    world.run_for(SOON)
    assert fates(world) == {"paid": 40}
    assert world.debits() == dict.fromkeys(paid, 1)


def test_while_charging_is_stopped_one_charge_is_tried_now_and_then(world):
    subscribed(world, 60)
    world.ports = world.ports_of_a_worker(vault=wrong_keys())
    with capture_logs() as logs:
        world.run_for(30 * MINUTE)
    tried = [line for line in logs if line["event"] == "charge.crashed"]
    assert 5 <= len(tried) <= 60


def test_a_bug_that_meets_every_row_strands_nothing(world):
    paid = subscribed(world, 12)
    mended, world.ports = world.ports, crashing(world)
    with capture_logs() as logs:
        world.run_for(3 * HOUR, step=5 * MINUTE)
    assert logged(logs) == ["charge.crashed", "charging.stopped"]
    assert "open, waiting for a person" not in fates(world)
    world.ports = mended
    world.run_for(SOON)
    assert world.debits() == dict.fromkeys(paid, 1)


def test_what_is_mended_from_outside_goes_on_within_seconds_and_by_itself(world):
    paid = subscribed(world, 60)
    broken = [True]

    def fail(_request):
        if broken[0]:
            raise KeyError("a table is gone")

    world.transport.before_send = fail
    world.run_for(10 * MINUTE)
    assert world.ports.breaker.is_open
    broken[0] = False
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert not world.ports.breaker.is_open
    assert fates(world)["paid"] >= 40
    world.run_for(SOON)
    assert world.debits() == dict.fromkeys(paid, 1)


def test_a_bug_of_one_currency_stops_no_other_and_strands_nothing(world):
    """They come first in every page, and are many."""
    ill = subscribed(world, 45, currency="EUR")
    well = subscribed(world, 25)
    mended, world.ports = world.ports, crashing(world, *ill)
    world.run_for(10 * MINUTE, step=timedelta(seconds=15))
    assert world.debits() == dict.fromkeys(well, 1)
    world.run_for(2 * HOUR, step=5 * MINUTE)
    assert "open, waiting for a person" not in fates(world)
    world.ports = mended
    world.run_for(SOON)
    assert fates(world) == {"paid": 70}


def test_a_database_that_is_away_in_the_middle_of_charges_is_no_rows_fault(world):
    paid = subscribed(world, 3)
    mended, world.ports = world.ports, crashing(world, error=timed_out)
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert "open, waiting for a person" not in fates(world)
    world.ports = mended
    world.run_for(SOON)
    assert world.debits() == dict.fromkeys(paid, 1)


def test_a_machine_on_which_every_worker_dies_strands_nothing(world):
    paid = subscribed(world, 7)
    run_with_deaths(world, dying(world), 3 * HOUR)
    assert "open, waiting for a person" not in fates(world)
    world.run_for(SOON)
    assert world.debits() == dict.fromkeys(paid, 1)


# --- the keys, before anything is charged ---


def test_a_worker_whose_keys_open_nothing_says_so_once_and_neither_charges_nor_encrypts(world):
    paid = subscribed(world, 10)
    mended, world.ports = world.ports, world.ports_of_a_worker(vault=wrong_keys())
    with capture_logs() as logs:
        assert try_at_start(world.ports)
        world.run_for(HOUR)
    assert [line["reason"] for line in logs if line["event"] == "billing.alert"] == [
        "BILLING_VAULT_KEYS open none of the 10 card tokens that were tried"
    ]
    assert world.transport.sent == []
    with pytest.raises(NotKept, match="BILLING_VAULT_KEYS"):
        carry_out(world.ports, Message("billing.subscribe", new_subscription(world)))
    world.ports = mended
    carry_out(world.ports, Message("billing.subscribe", new_subscription(world)))
    world.run_for(SOON)
    assert world.debits() == dict.fromkeys([*paid, "new-p0"], 1)


def new_subscription(world):
    return {
        "reference_id": "new",
        "customer": {"reference_id": "new"},
        "card": {"token": "approved.new"},
        "amount": "9.99",
        "currency": "USD",
        "interval": "month",
        "anchor_at": world.clock.now().isoformat(),
    }


def test_keys_of_which_one_was_taken_away_are_an_alert_and_the_others_are_charged(world):
    old = wrong_keys()
    subscribed(world, 10)
    store_under(old, world, *range(1, 7))
    with capture_logs() as logs:
        assert try_at_start(world.ports)
    (alert,) = [line for line in logs if line["event"] == "billing.alert"]
    assert alert["kind"] == "vault_keys.incomplete"
    assert "open only 4 of the 10 card tokens" in alert["reason"]
    world.run_for(3 * HOUR, step=5 * MINUTE)
    assert fates(world)["paid"] == 4
    assert "open, waiting for a person" not in fates(world)
    store_under(world.vault, world, *range(1, 7))
    world.run_for(SOON)
    assert fates(world) == {"paid": 10}


def store_under(vault, world, *card_ids):
    for card_id in card_ids:
        put_token(world, f"approved.{card_id}", card_id, vault=vault)


def test_a_database_that_does_not_answer_at_the_start_is_asked_again(world):
    class Away:
        def reading(self):
            raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    assert not try_at_start(world.ports_of_a_worker(store=Away(), vault=wrong_keys()))


def test_nothing_is_wrong_with_keys_while_no_card_is_stored(world):
    with capture_logs() as logs:
        assert try_at_start(world.ports_of_a_worker(vault=wrong_keys()))
    assert logged(logs) == []


# --- one row ---


@pytest.mark.parametrize("poison", [0, 49])
def test_one_row_that_crashes_among_fifty_waits_for_a_person_and_is_retried(world, poison):
    all_of_them = subscribed(world, 50)
    ill = all_of_them[poison]
    mended, world.ports = world.ports, crashing(world, ill)
    with capture_logs() as logs:
        world.run_for(SOON)
        assert fates(world)["paid"] == 49
        world.run_for(2 * HOUR, step=5 * MINUTE)
    assert logged(logs) == ["charge.crashed", "invoice.waiting"]
    told = world.explain(ill)
    assert told["fate"] == "open, waiting for a person"
    assert f"its worker died {MAX_CLAIMS} times" in told["why"]
    assert [a["status"] for a in told["attempts"]] == ["not_charged"]
    world.ports = mended
    retry_invoice(world.store, world.clock, reference=ill, by="operator:ann", why="mended")
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert world.debits() == dict.fromkeys(all_of_them, 1)


@pytest.mark.parametrize("poison", [0, 25])
def test_a_row_that_kills_its_worker_takes_no_innocent_row_with_it(world, poison):
    all_of_them = subscribed(world, 50)
    ill = all_of_them[poison]
    run_with_deaths(world, dying(world, ill), 30 * MINUTE)
    assert fates(world)["paid"] == 49
    run_with_deaths(world, dying(world, ill), 2 * HOUR)
    assert world.fate(ill) == "open, waiting for a person"
    assert alerts(world) == ["invoice.waiting"]
    start_checkout(world.ports, {"invoice": ill})
    assert world.fate(ill) == "open, pay link out, customer has not paid"


def test_three_bad_rows_stop_no_healthy_ones_and_wait_for_a_person(world):
    all_of_them = subscribed(world, 50)
    ill = [all_of_them[n] for n in (0, 1, 30)]
    world.ports = crashing(world, *ill)
    world.run_for(2 * HOUR, step=5 * MINUTE)
    assert not world.ports.breaker.is_open
    assert fates(world) == {"paid": 47, "open, waiting for a person": 3}


def test_a_card_whose_key_was_taken_away_waits_for_a_person_and_the_others_are_charged(world):
    all_of_them = subscribed(world, 10)
    store_under(wrong_keys(), world, 4)
    with capture_logs() as logs:
        world.run_for(2 * HOUR, step=5 * MINUTE)
    assert fates(world) == {"paid": 9, "open, waiting for a person": 1}
    assert logged(logs) == ["charge.crashed", "invoice.waiting"]
    ill = all_of_them[3]
    store_under(world.vault, world, 4)
    retry_invoice(world.store, world.clock, reference=ill, by="operator:ann", why="key is back")
    world.run_for(SOON)
    assert world.fate(ill) == "paid"


def test_a_row_that_crashes_says_why_while_it_is_tried_again(world):
    world.subscribe("approved")
    world.ports = crashing(world)
    world.run_for(10 * MINUTE)
    why = world.explain()["why"]
    assert "its charge crashed: KeyError at services/charging/charge.py" in why
    assert "a bug" not in why


# --- the fence ---


def left_to_a_person(world):
    """(the slow claims that came before, the invoice's reference)"""
    world.subscribe("approved", "sub-1")
    world.sweep()
    ((_, ids),) = world.bell.messages
    world.bell.messages.clear()
    old = []
    for _ in range(MAX_CLAIMS):
        old += claim(world.ports, ids)
        world.clock.advance(world.ports.timings.stuck_after)
    assert len(old) == MAX_CLAIMS
    assert claim(world.ports, ids) == []
    assert world.attempts() == ["not_charged"]
    return old, "sub-1-p0"


@pytest.mark.parametrize("retried", [False, True])
def test_a_slow_worker_sells_nothing_after_its_row_was_left_to_a_person(world, retried):
    old, reference = left_to_a_person(world)
    if retried:
        retry_invoice(world.store, world.clock, reference=reference, by="operator:ann", why="w")
        world.run_for(2 * HOUR)
    statement = world.gateway().create(_order(world.ports, old[-1]), [])
    for claimed in old:
        with pytest.raises(ConcurrentChange):
            submit(world.ports, Submit(claimed, statement, ()))
    assert world.sales("sub-1-p0-a1") == 0
    assert world.debits()[reference] == int(retried)


@pytest.mark.parametrize("way_out", ["retry", "link"])
def test_what_an_older_version_has_stranded_gets_out(world, way_out):
    """It kept the attempt prepared, for ever, and no command helped."""
    world.subscribe("approved")
    world.sweep()
    ((_, ids),) = world.bell.messages
    world.bell.messages.clear()
    [slow] = claim(world.ports, ids)
    with world.store.transaction() as connection:
        stranded = {"next_attempt_at": None, "enqueue_at": None, "reason": "keeps_crashing"}
        connection.execute(update(invoices).values(stranded))
        connection.execute(update(attempts).values(claims=MAX_CLAIMS))
    world.clock.advance(DAY)
    assert world.fate() == "open, waiting for a person"
    assert "a person" in world.explain()["why"]
    if way_out == "retry":
        retry_invoice(world.store, world.clock, reference="sub-1-p0", by="operator:ann", why="w")
        world.run_for(2 * HOUR)
        assert world.fate() == "paid"
    else:
        start_checkout(world.ports, {"invoice": "sub-1-p0"})
        assert world.fate() == "open, pay link out, customer has not paid"
    assert charge_batch(world.ports, [slow.attempt.invoice_id]) == {}
