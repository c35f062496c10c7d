"""Commands from other services: carried out once, answered, and written down whatever they are."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, OperationalError

from billing_worker.domain.errors import InvariantBroken
from billing_worker.persistence import subscriptions
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store, Within
from billing_worker.services.commands import execute as service
from billing_worker.services.commands.execute import Message, NotKept, carry_out
from billing_worker.services.commands.records import TASKS
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.entrypoints.cli.test_commands import RECORD
from tests.support.recovery import banks_change_their_mind

TOKEN = "approved.4c9jHUgeL1SD7g5byDYn9Gc0RC60"
ORDER = {
    "reference_id": "order-1",
    "customer": {"reference_id": "cust-9", "name": "Ann"},
    "card": {"token": TOKEN},
    "amount": "5.00",
    "currency": "USD",
}
PAUSE = {"reference_id": "pause-1", "subscription": "sub-1", "by": "ann", "why": "holiday"}


@pytest.fixture
def send(world):
    def send(task, arguments, message_id=None):
        return carry_out(world.ports, Message(f"billing.{task}", arguments, message_id)).as_json()

    return send


def kept(world):
    """Every row of the table of commands, oldest first."""
    with world.store.reading() as connection:
        return connection.execute(select(tables.commands).order_by(tables.commands.c.id)).all()


def rows_of(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table)).all()


def fields_of(answer):
    return {error["field"] for error in answer["errors"]}


# --- subscribing again --------------------------------------------------------------------------


def cancel(send, number, **how):
    asked = {"reference_id": f"cancel-{number}", "subscription": "sub-1"}
    return send("cancel", asked | {"at_period_end": False} | how)


def test_a_subscribe_answer_tells_whether_and_when_anything_becomes_due(send):
    record = RECORD | {"anchor_at": "2026-02-28T00:00:00Z"}
    for outcome in ("added", "unchanged"):
        told = send("subscribe", record)["subscription"]
        assert told == {
            "reference_id": "sub-1", "outcome": outcome, "status": "active", "held": False,
            "next_billing_at": "2026-02-28T00:00:00+00:00", "cancels_at": None,
        }  # fmt: skip
    cancel(send, 1, at_period_end=True)
    again = send("subscribe", record)
    assert again["status"] == "unchanged"
    assert again["subscription"]["cancels_at"] == "2026-02-28T00:00:00+00:00"


@pytest.mark.parametrize("other", [{}, {"amount": "12.00"}, {"anchor_at": "2026-03-31T00:00:00Z"}])
@pytest.mark.parametrize("by_import", [False, True])
def test_subscribing_again_to_what_is_over_is_refused_and_asks_for_a_new_reference(
    world, send, by_import, other
):
    record = RECORD | {"anchor_at": "2026-02-28T00:00:00Z"}
    if by_import:
        subscribe(world.store, world.vault, world.clock, [parse_record(record)], by="import")
    else:
        send("subscribe", record)
    cancel(send, 1)
    for _ in range(2):
        again = send("subscribe", record | other)
        assert again["status"] == "refused"
        assert fields_of(again) == {"reference_id"}
        assert "is cancelled" in again["errors"][0]["reason"]
    assert send("subscribe", record | {"reference_id": "sub-2"})["status"] == "done"


def test_a_message_that_comes_twice_is_answered_as_it_was_although_it_is_over_by_now(send):
    first = send("subscribe", RECORD, "message-1")
    cancel(send, 1)
    assert send("subscribe", RECORD, "message-1") == first


def test_subscribing_to_a_held_import_says_that_it_is_held(world, send):
    record = parse_record(RECORD)
    subscribe(world.store, world.vault, world.clock, [record], by="import", held=True)
    told = send("subscribe", RECORD)["subscription"]
    assert (told["outcome"], told["held"], told["next_billing_at"]) == ("unchanged", True, None)


def test_a_subscribe_command_adds_the_subscription_and_is_recorded_as_done(world, send):
    assert send("subscribe", RECORD)["status"] == "done"
    [subscription] = rows_of(world, tables.subscriptions)
    assert subscription.reference_id == "sub-1"
    [command] = kept(world)
    assert (command.task, command.reference_id, command.outcome) == (
        "billing.subscribe", "sub-1", "done",
    )  # fmt: skip


def test_the_same_command_again_is_answered_unchanged_and_does_nothing(world, send):
    world.subscribe()
    assert send("pause", PAUSE)["status"] == "done"
    assert send("resume", {"reference_id": "r-1", "subscription": "sub-1",
                           "shift_anchor": False})["status"] == "done"  # fmt: skip
    assert send("pause", PAUSE)["status"] == "unchanged"
    [subscription] = rows_of(world, tables.subscriptions)
    assert subscription.status != "paused"


def test_the_same_message_delivered_again_gets_its_first_answer_and_no_second_row(world, send):
    first = send("subscribe", RECORD, "message-1")
    assert send("subscribe", RECORD, "message-1") == first
    refused = send("pause", {"subscription": "sub-1"}, "message-2")
    assert send("pause", {"subscription": "sub-1"}, "message-2") == refused
    assert len(kept(world)) == 2


def test_another_command_under_a_used_reference_is_a_conflict_that_shows_both(world, send):
    send("subscribe", RECORD)
    answer = send("subscribe", RECORD | {"amount": "10.99"})
    assert answer["status"] == "refused"
    reasons = {error["field"]: error["reason"] for error in answer["errors"]}
    assert set(reasons) == {"reference_id", "amount"}
    assert "9.99" in reasons["amount"]
    assert "10.99" in reasons["amount"]
    [subscription] = rows_of(world, tables.subscriptions)
    assert subscription.amount_minor == 999


def test_a_conflict_over_the_card_alone_is_told_without_either_token(send):
    send("subscribe", RECORD)
    answer = send("subscribe", RECORD | {"card": RECORD["card"] | {"token": "another-one-17"}})
    assert fields_of(answer) == {"reference_id", "card.token"}
    assert "another-one-17" not in json.dumps(answer)


def test_a_subscription_that_was_imported_differently_is_a_conflict(world, send):
    world.subscribe(reference="sub-1")
    answer = send("subscribe", RECORD)
    assert answer["status"] == "refused"
    assert {"reference_id", "customer.reference_id"} <= fields_of(answer)


def test_a_refused_command_may_be_mended_under_its_own_reference(send):
    assert send("subscribe", RECORD | {"amount": "9.999"})["status"] == "refused"
    assert send("subscribe", RECORD)["status"] == "done"


@pytest.mark.parametrize(
    ("task", "arguments", "field"),
    [
        ("subscribe", RECORD | {"amount": 9.99}, "amount"),
        ("subscribe", RECORD | {"currency": "XYZ"}, "currency"),
        ("subscribe", RECORD | {"version": 2}, "version"),
        ("subscribe", RECORD | {"proration": "none"}, "proration"),
        ("subscribe", RECORD | {"description": "a\0b"}, "description"),
        ("subscribe", RECORD | {"metadata": {"a": [float("nan")]}}, "metadata"),
        ("subscribe", RECORD | {"ends_after_periods": 2**40}, "ends_after_periods"),
        ("subscribe", RECORD | {"paid_through": "9999-12-31T00:00:00Z"}, "period"),
        ("subscribe", RECORD | {"reference_id": "sub-1\n"}, "reference_id"),
        ("subscribe", None, ""),
        ("subscribe", [RECORD], ""),
        ("subscribe", {"metadata": {"x": "y" * 70_000}}, ""),
        ("pause", {"subscription": "sub-1"}, "reference_id"),
        ("pause", PAUSE | {"subscription": "nobody"}, "subscription"),
        ("resume", PAUSE, "shift_anchor"),
        ("resume", PAUSE | {"shift_anchor": "yes"}, "shift_anchor"),
        ("cancel", PAUSE, "at_period_end"),
        ("change_subscription", PAUSE, ""),
        ("change_subscription", PAUSE | {"currency": "EUR"}, "amount"),
        ("change_subscription", PAUSE | {"amount": "1.5", "currency": "JPY"}, "amount"),
        ("charge_once", ORDER | {"amount": "-1"}, "amount"),
        ("charge_once", ORDER | {"card": None}, "card"),
        ("charge_once", ORDER | {"reference_id": "sub-1"}, "reference_id"),
        ("replace_card", PAUSE | {"card": {"token": ""}}, "card.token"),
        ("replace_card", PAUSE | {"card": {"token": "t"}, "subscription": "x"}, "subscription"),
        ("start_tokenisation", {"reference_id": "t-1"}, "customer"),
        ("start_checkout", {"invoice": "sub-1-p0"}, "reference_id"),
        ("start_checkout", {"reference_id": "c-1", "invoice": "nobody-p0"}, "invoice"),
        ("refund", {"reference_id": "r-1"}, "task"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_field_kept_and_changes_nothing(
    world, send, task, arguments, field
):
    world.subscribe()
    before = [rows_of(world, table) for table in (tables.subscriptions, tables.invoices)]
    answer = send(task, arguments)
    assert answer["status"] == "refused"
    assert field in fields_of(answer)
    assert all(error["reason"] for error in answer["errors"])
    assert before == [rows_of(world, table) for table in (tables.subscriptions, tables.invoices)]
    [command] = kept(world)
    assert (command.outcome, command.errors) == ("refused", answer["errors"])


@pytest.mark.parametrize(
    "arguments",
    [
        RECORD | {"card": {"token": TOKEN}},
        RECORD | {"card": TOKEN},
        RECORD | {"card": [{"token": TOKEN}]},
        RECORD | {"tokn": TOKEN},
        RECORD | {"card": {"tokken": TOKEN}},
        RECORD | {"metadata": TOKEN},
        RECORD | {"amount": {"token": TOKEN}},
        RECORD | {"metadata": {"card_token": TOKEN}},
        {"x": {"y": [TOKEN]}},
        [TOKEN],
        TOKEN,
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["subscribe", "no_such_task"])
def test_no_card_token_is_written_down_wherever_it_stands(world, send, task, arguments):
    send(task, arguments)
    [row] = kept(world)
    assert TOKEN not in str(row)


@pytest.mark.parametrize("deep", [40, 900])
def test_arguments_nested_too_deeply_are_refused_and_kept(world, send, deep):
    nested = {}
    for _ in range(deep):
        nested = {"a": nested}
    assert send("subscribe", RECORD | {"metadata": nested})["status"] == "refused"
    assert len(kept(world)) == 1


def test_every_documented_task_is_known():
    assert set(TASKS) == {
        f"billing.{name}"
        for name in (
            "subscribe", "change_subscription", "pause", "resume", "cancel", "charge_once",
            "replace_card", "use_card", "start_tokenisation", "start_checkout",
            "cancel_charge", "uncancel", "end", "retry", "describe", "reschedule", "forgive",
            "remove_card", "update_customer", "notice_sent",
        )
    }  # fmt: skip


def test_the_lifecycle_of_a_subscription_by_commands(world, send):
    world.subscribe()
    world.tick()
    change = {"reference_id": "c-1", "subscription": "sub-1", "amount": "12.00"}
    assert send("change_subscription", change)["status"] == "done"
    assert send("pause", PAUSE)["subscription"]["status"] == "paused"
    resume = {"reference_id": "r-1", "subscription": "sub-1", "shift_anchor": True}
    assert send("resume", resume)["subscription"]["status"] == "active"
    cancel = {"reference_id": "x-1", "subscription": "sub-1", "at_period_end": False}
    assert send("cancel", cancel)["subscription"]["status"] == "cancelled"
    history = [event.by for event in rows_of(world, tables.events) if event.data.get("why")]
    assert history == ["command:ann"]


def test_a_card_is_replaced_by_command_and_pays_what_waits(world, send):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    replace = {"reference_id": "n-1", "subscription": "sub-1", "card": {"token": "approved.new"}}
    assert send("replace_card", replace)["tried"] == ["sub-1-p0"]
    world.run_for(timedelta(minutes=10))
    assert world.fate() == "paid"


# --- one-off charges -----------------------------------------------------------------------------

TAKE_BACK = {"reference_id": "back-1", "charge": "order-1", "by": "ann", "why": "wrong customer"}


def reasons(answer):
    return [(error["field"], error["reason"]) for error in answer["errors"]]


def test_a_one_off_charge_is_taken_back_before_it_is_made(world, send):
    send("charge_once", ORDER)
    answer = send("cancel_charge", TAKE_BACK)
    void = {"reference_id": "order-1-p0", "status": "void"}
    assert (answer["status"], answer["invoice"]) == ("done", void | {"outcome": "changed"})
    assert send("cancel_charge", TAKE_BACK)["status"] == "unchanged"
    again = send("cancel_charge", TAKE_BACK | {"reference_id": "back-2"})
    assert again["invoice"] == void | {"outcome": "unchanged"}
    world.run_for(timedelta(days=3), step=timedelta(hours=6))
    assert world.debits() == {}
    [event] = [e for e in world.explain("order-1-p0")["history"] if e["kind"] == "invoice.voided"]
    assert (event["by"], event["data"]["why"]) == ("command:ann", "wrong customer")


def test_a_declined_one_off_charge_is_taken_back_from_its_ladder(world, send):
    send("charge_once", ORDER | {"card": {"token": "decline_insufficient_funds.o"}})
    world.tick()
    assert send("cancel_charge", TAKE_BACK)["invoice"]["status"] == "void"
    banks_change_their_mind(world, "approved.later")
    world.run_for(timedelta(days=30), step=timedelta(hours=12))
    assert world.debits() == {}


def test_a_one_off_charge_that_was_made_or_may_have_been_is_not_taken_back(world, send):
    send("charge_once", ORDER)
    send("charge_once", ORDER | {"reference_id": "order-2", "card": {"token": "pending_forever.2"}})
    world.run_for(timedelta(minutes=2))
    assert reasons(send("cancel_charge", TAKE_BACK)) == [("charge", "order-1-p0 is paid")]
    [(field, reason)] = reasons(send("cancel_charge", TAKE_BACK | {"charge": "order-2"}))
    assert field == "charge"
    assert reason.startswith("order-2-p0 may be charged already")


def test_a_cancel_command_says_what_stays_owed_and_voids_it_where_that_is_said(world, send):
    send("charge_once", ORDER | {"card": {"token": "decline_insufficient_funds.o"}})
    world.tick()
    cancel = {"reference_id": "x-1", "subscription": "order-1", "at_period_end": False}
    [(field, reason)] = reasons(send("cancel", cancel))
    assert (field, reason[:44]) == ("status", "is ended, and 1 invoice stays owed and colle")
    assert "order-1-p0" in reason
    assert send("cancel", cancel | {"void_open": True})["subscription"]["status"] == "cancelled"
    assert world.fate("order-1-p0") == "void"


def test_only_a_one_off_charge_is_taken_back_by_that_command(world, send):
    world.subscribe()
    no_charge = send("cancel_charge", TAKE_BACK)
    assert reasons(no_charge) == [("charge", "there is no one-off charge 'order-1'")]
    a_subscription = send("cancel_charge", TAKE_BACK | {"charge": "sub-1"})
    assert reasons(a_subscription) == [("charge", "is a subscription")]


def test_a_one_off_charge_is_collected_once_through_the_whole_protocol(world, send):
    assert send("charge_once", ORDER)["invoice"] == {"reference_id": "order-1-p0"}
    assert send("charge_once", ORDER)["status"] == "unchanged"
    world.run_for(timedelta(days=3), step=timedelta(hours=6))
    assert world.fate("order-1-p0") == "paid"
    assert world.debits() == {"order-1-p0": 1}
    assert world.events("order-1-p0")[1:] == [
        "attempt.prepared", "attempt.submitted", "attempt.succeeded", "invoice.paid",
    ]  # fmt: skip


def test_a_one_off_charge_is_rung_for_at_once_and_not_left_to_the_sweep(world, send):
    send("charge_once", ORDER)
    world.deliver()
    assert world.fate("order-1-p0") == "paid"


def test_a_one_off_charge_whose_answer_is_lost_is_unknown_until_the_gateway_speaks(world, send):
    send("charge_once", ORDER | {"card": {"token": "answer_lost_after"}})
    world.deliver()
    assert world.fate("order-1-p0") == "unknown"
    world.run_for(timedelta(minutes=2), step=timedelta(seconds=10))
    assert world.fate("order-1-p0") == "paid"
    assert world.sales("order-1-p0-a1") == 1


def test_a_declined_one_off_charge_goes_up_the_ladder_and_ends_without_a_subscription(world, send):
    send("charge_once", ORDER | {"card": {"token": "decline_insufficient_funds"}})
    world.run_for(timedelta(days=60), step=timedelta(hours=12))
    explained = world.explain("order-1-p0")
    assert set(world.attempts("order-1-p0")) == {"declined"}
    assert explained["status"] == "uncollectible" or explained["reason"]
    assert rows_of(world, tables.subscriptions)[0].status == "ended"


def test_without_a_card_the_customers_newest_one_is_charged(world, send):
    send("charge_once", ORDER | {"card": {"token": "decline_card_expired.old"}})
    send("charge_once", ORDER | {"reference_id": "order-2", "card": {"token": "approved.new"}})
    world.deliver()
    send("charge_once", ORDER | {"reference_id": "order-3", "card": None})
    world.deliver()
    assert world.fate("order-3-p0") == "paid"


def test_a_one_off_charge_is_nobodys_subscription(world, send):
    assert send("charge_once", ORDER)["status"] == "done"
    with world.store.reading() as connection:
        assert subscriptions.listed(connection, 0, 10) == []
        assert subscriptions.whole_page(connection, 0, 10) == []
        assert subscriptions.count_by_status(connection) == {}
    world.deliver()


def test_a_subscription_under_the_reference_of_a_charge_is_a_conflict(world, send):
    send("charge_once", ORDER)
    answer = send("subscribe", RECORD | {"reference_id": "order-1"})
    assert (answer["status"], answer["errors"][0]["field"]) == ("refused", "reference_id")
    world.deliver()


# --- pages ---------------------------------------------------------------------------------------


def test_a_page_is_handed_out_again_to_who_asks_again_and_is_not_written_down(world, send):
    asked = {"reference_id": "tok-1", "customer": {"reference_id": "cust-1"},
             "amount": "1.00", "currency": "USD"}  # fmt: skip
    first = send("start_tokenisation", asked)
    again = send("start_tokenisation", asked)
    assert (first["status"], again["status"]) == ("done", "unchanged")
    assert first["action"] == again["action"]
    assert first["action"] not in str([row.answer for row in kept(world)])
    assert send("start_tokenisation", asked | {"amount": "2.00"})["status"] == "refused"


def test_a_gateway_that_cannot_be_reached_fails_the_command_which_may_be_sent_again(world, send):
    asked = {"reference_id": "tok-1", "customer": {"reference_id": "cust-1"},
             "amount": "1.00", "currency": "USD"}  # fmt: skip
    world.transport.unreachable = True
    assert send("start_tokenisation", asked, "m-1")["status"] == "failed"
    world.transport.unreachable = False
    assert send("start_tokenisation", asked, "m-1")["status"] == "done"


# --- what goes wrong -----------------------------------------------------------------------------


def test_an_error_of_ours_is_recorded_once_as_failed_and_leaves_nothing_half_done(
    world, send, monkeypatch
):
    def half_done(ports, order):
        service.charge_once(ports.store, ports.vault, ports.clock, ports.timings, order)
        raise InvariantBroken("a bug")

    monkeypatch.setitem(service._EFFECTS, "billing.charge_once", half_done)
    answer = send("charge_once", ORDER)
    assert answer["status"] == "failed"
    assert rows_of(world, tables.invoices) == []
    assert [command.outcome for command in kept(world)] == ["failed"]


def test_a_command_that_failed_through_our_fault_may_be_sent_again(world, send, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setitem(service._EFFECTS, "billing.charge_once", lambda *_: 1 / 0)
        send("charge_once", ORDER, "message-1")
    assert send("charge_once", ORDER, "message-1")["status"] == "done"
    world.deliver()


def test_a_database_that_is_away_is_no_answer(world, monkeypatch):
    def away(*_):
        raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))

    monkeypatch.setattr(Store, "transaction", away)
    with pytest.raises(NotKept):
        carry_out(world.ports, Message("billing.charge_once", ORDER))
    with pytest.raises(NotKept):
        carry_out(world.ports, Message("billing.charge_once", {}))


def test_the_record_of_a_command_and_its_effect_are_one_commit(world, monkeypatch):
    """Killed before the commit there is neither: simulated by a conclusion that never comes."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(service.rows, "conclude", killed)
    with pytest.raises(KeyboardInterrupt):
        carry_out(world.ports, Message("billing.charge_once", ORDER))
    assert kept(world) == []
    assert rows_of(world, tables.invoices) == []
    assert world.bell.messages == []


def at_once(count, act):
    """What `act` returns to each of so many threads, by their number: they begin together."""
    gate = threading.Barrier(count)

    def act_behind_the_gate(number):
        gate.wait()
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(act_behind_the_gate, range(count)))


def test_twins_at_the_same_time_are_carried_out_once(world):
    twin = Message("billing.charge_once", ORDER)
    answers = at_once(8, lambda _: carry_out(world.ports, twin).status)
    assert sorted(answers) == ["done", *["unchanged"] * 7]
    assert len(rows_of(world, tables.invoices)) == 1
    world.deliver()


def test_commands_that_bring_the_same_new_customer_at_once_are_all_carried_out(world):
    def order(number):
        order = ORDER | {"reference_id": f"order-{number}"}
        return carry_out(world.ports, Message("billing.charge_once", order)).status

    assert at_once(6, order) == ["done"] * 6
    assert len(rows_of(world, tables.customers)) == 1
    world.deliver()


@pytest.mark.parametrize("name", ["na\0me", "na\ud800me"])
def test_a_field_name_that_no_database_takes_is_refused_by_name_and_kept(world, send, name):
    for arguments in (RECORD | {name: 1}, RECORD | {"customer": {"reference_id": "c", name: 1}}):
        answer = send("subscribe", arguments)
        assert answer["status"] == "refused"
        [error] = answer["errors"]
        assert "na" in error["field"]
        assert name not in error["field"]
        assert kept(world)[-1].errors == [error]


def test_a_bell_that_is_broken_does_not_deny_what_is_committed(world, send, monkeypatch):
    def broken(_ids):
        raise ConnectionError("no broker")

    with monkeypatch.context() as patch:
        patch.setattr(world.bell, "charge", broken)
        assert send("charge_once", ORDER)["status"] == "done"
    assert [row.outcome for row in kept(world)] == ["done"]
    assert send("charge_once", ORDER)["status"] == "unchanged"
    world.clock.advance(timedelta(minutes=10))
    world.tick()
    assert world.debits() == {"order-1-p0": 1}


def test_an_agreed_end_is_given_and_taken_away_by_command(world, send):
    def ends_at():
        [row] = rows_of(world, tables.subscriptions)
        return row.ends_at and row.ends_at.isoformat()

    def change(key, value):
        asked = {"reference_id": key, "subscription": "sub-1", "ends_at": value}
        return send("change_subscription", asked)

    assert send("subscribe", RECORD | {"ends_at": "2027-01-31T00:00:00Z"})["status"] == "done"
    assert ends_at() == "2027-01-31T00:00:00+00:00"
    assert change("c-1", "2027-06-30T00:00:00Z")["status"] == "done"
    assert ends_at() == "2027-06-30T00:00:00+00:00"
    assert change("c-2", "")["status"] == "done"
    assert ends_at() is None
    assert fields_of(change("c-3", "tomorrow")) == {"ends_at"}
    assert fields_of(change("c-4", "2020-01-01T00:00:00Z")) == {"ends_at"}


def test_policies_may_be_given_with_a_subscribe_command(world, send):
    asked = RECORD | {"catch_up": "forgive_older_than:7", "dunning": "slow", "notices": "require"}
    assert send("subscribe", asked)["status"] == "done"
    [row] = rows_of(world, tables.subscriptions)
    assert (row.catch_up, row.catch_up_days, row.dunning_policy, row.notices) == (
        "forgive_older_than", 7, "slow", "require",
    )  # fmt: skip
    assert send("subscribe", asked)["status"] == "unchanged"
    assert fields_of(send("subscribe", asked | {"dunning": None})) == {"reference_id", "dunning"}


def test_importers_at_the_same_time_add_a_subscription_once(world):
    def run(_):
        by = subscribe(world.store, world.vault, world.clock, [parse_record(RECORD)], by="import")
        return by.outcomes

    assert sorted(at_once(4, run)) == [("added",), *[("unchanged",)] * 3]


def test_a_refused_part_of_a_transaction_takes_only_itself_back(store):
    switch = tables.switches.insert()
    with store.transaction() as connection:
        with pytest.raises(IntegrityError), Within(connection).transaction() as inner:
            inner.execute(switch, [{"name": "inner", "is_on": True}] * 2)
        connection.execute(switch, {"name": "outer", "is_on": True})
    with store.reading() as connection:
        names = set(connection.execute(select(tables.switches.c.name)).scalars())
    assert "outer" in names
    assert "inner" not in names
