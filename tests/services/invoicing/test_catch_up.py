"""Outages, plans, and what the ledger says afterwards, on both databases."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from itertools import pairwise

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from billing_worker.domain.catch_up import Action
from billing_worker.domain.catch_up_policy import Policy
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.money import Money
from billing_worker.persistence import switches
from billing_worker.persistence.schema import tables
from billing_worker.services.attempts import claim as claim_module
from billing_worker.services.forecast.preview import preview
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer, Caps
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.subscriptions import lifecycle
from tests.support.world import START

DAY = timedelta(days=1)
OWN = Answer()


def agree(world, policy, reference="sub-1"):
    lifecycle.change(world.store, world.clock, reference, catch_up=policy, by="test")


def plan(world, answer=OWN):
    return list(catch_up.plan(world.store, world.clock.now(), answer))


def apply(world, answer=OWN, caps=None):
    return catch_up.apply(
        world.store, world.clock, answer, caps or Caps(), by="operator:ann", why="after the outage"
    )


def debited(world, lines):
    """{invoice: instant} of the debits at the gateway, of those in the plan."""
    planned = {line.invoice for line in lines}
    debits = [(d.reference_id.rpartition("-a")[0], d.at) for d in world.sandbox.ledger]
    return {invoice: at for invoice, at in debits if invoice in planned}


def dates(lines):
    return {line.invoice: line.planned.at for line in lines if line.planned.at}


def fates(world):
    with world.store.reading() as connection:
        query = select(tables.invoices.c.status, tables.invoices.c.next_attempt_at)
        return Counter(
            "held" if (status, at) == ("open", None) else status
            for status, at in connection.execute(query)
        )


def work_through(world, moments, together=1):
    """Beat and workers run again: at every agreed date, and at every one of the plan."""
    for moment in sorted(moments):
        world.clock.advance(max(moment - world.clock.now(), timedelta(0)))
        before = len(world.sandbox.ledger)
        world.tick()
        assert len(world.sandbox.ledger) - before <= together, "too many debits in one sweep"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
@pytest.mark.parametrize("days", [1, 3, 40, 400])
@pytest.mark.parametrize(
    "policy", ["collect_latest", "collect_all:3", "forgive_older_than:7", "hold"]
)
def test_after_an_outage_the_debits_are_those_that_the_plan_printed(world, policy, days):
    """A subscription by the day: the hardest case, because agreed dates come up all the time."""
    world.subscribe("approved", interval="day")
    agree(world, policy)
    world.tick()
    world.clock.advance(days * DAY + timedelta(hours=5))
    printed = plan(world)
    assert [line.period for line in printed] == list(range(1, days + 1))
    planned = dates(printed)
    agreed = [world.clock.now() + timedelta(hours=19) + n * DAY for n in range(70)]
    last = max([*planned.values(), world.clock.now()])
    work_through(world, {world.clock.now(), *planned.values(), *(a for a in agreed if a <= last)})
    assert debited(world, printed) == planned
    actions = Counter(line.planned.action for line in printed)
    found = fates(world)
    assert (found["held"], found["void"]) == (actions[Action.HOLD], actions[Action.WAIVE])


EXPECTED = {  # policy -> outage in days -> (collected, waived, held) of the late periods
    "collect_latest": {1: (1, 0, 0), 3: (1, 2, 0), 40: (1, 39, 0), 400: (1, 399, 0)},
    "collect_all:1": {1: (1, 0, 0), 3: (3, 0, 0), 40: (40, 0, 0), 400: (62, 0, 338)},
    "collect_all:3": {1: (1, 0, 0), 3: (3, 0, 0), 40: (21, 0, 19), 400: (21, 0, 379)},
    "forgive_older_than:7": {1: (1, 0, 0), 3: (3, 0, 0), 40: (7, 33, 0), 400: (7, 393, 0)},
    "hold": {1: (0, 0, 1), 3: (0, 0, 3), 40: (0, 0, 40), 400: (0, 0, 400)},
}


@pytest.mark.parametrize("policy", EXPECTED)
def test_how_many_late_periods_are_collected_waived_and_held(world, policy):
    now = START + 500 * DAY
    for days in EXPECTED[policy]:
        anchor = (now - (days - 1) * DAY - timedelta(hours=5)).isoformat()
        world.subscribe("approved", f"sub-{days}", interval="day", anchor_at=anchor)
        agree(world, policy, f"sub-{days}")
    world.clock.advance(500 * DAY)
    counted = Counter((line.subscription, line.planned.action) for line in plan(world))
    for days, (collected, waived, held) in EXPECTED[policy].items():
        assert counted[f"sub-{days}", Action.COLLECT] == collected
        assert counted[f"sub-{days}", Action.WAIVE] == waived
        assert counted[f"sub-{days}", Action.HOLD] == held


def test_a_plan_changes_nothing(world):
    world.subscribe("approved", interval="day")
    world.clock.advance(10 * DAY)
    first = plan(world)
    assert len(first) == 11
    assert plan(world) == first
    assert fates(world) == {}


RESELLER = {"customer": {"reference_id": "reseller"}}


def debited_at(world):
    return {one.reference_id.rpartition("-a")[0]: one.at for one in world.sandbox.ledger}


@pytest.mark.parametrize("down", ["the sweep", "the gateway"])
def test_what_is_charged_together_on_time_is_charged_together_after_an_outage(world, down):
    for number in range(80):
        world.subscribe("approved", f"sub-{number}", **RESELLER)
    if down == "the gateway":
        world.transport.unreachable = True
        world.tick()
        world.transport.unreachable = False
    world.clock.advance(timedelta(hours=2))
    now = world.clock.now()
    promised = [one for one in preview(world.store, now, now + DAY) if one.reason is None]
    world.tick()
    assert world.debits().total() == 80
    assert len(promised) == 80
    assert {one.at for one in promised} == {now}


def test_every_subscription_of_a_customer_makes_one_debit_after_a_long_outage(world):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", interval="week", **RESELLER)
    world.clock.advance(30 * DAY)
    assert set(dates(plan(world)).values()) == {world.clock.now()}
    world.tick()
    assert world.debits() == {f"sub-{number}-p4": 1 for number in range(3)}


def test_a_new_subscription_does_not_wait_because_its_customer_was_debited_for_another(world):
    world.subscribe("approved", "sub-1", **RESELLER)
    world.tick()
    midnight = world.clock.now().replace(hour=0).isoformat()
    world.clock.advance(timedelta(hours=2))
    world.subscribe("approved", "sub-2", anchor_at=midnight, **RESELLER)
    world.tick()
    assert world.fate("sub-2-p0") == "paid"


def test_periods_of_one_subscription_keep_their_distance_whatever_its_customer_pays_besides(world):
    for number in range(2):
        terms = {"interval": "day", "ends_after_periods": 4, "catch_up": "collect_all:2"}
        world.subscribe("approved", f"sub-{number}", **RESELLER, **terms)
    world.clock.advance(3.5 * DAY)
    at = dates(plan(world))
    for number in range(2):
        late = [at[f"sub-{number}-p{period}"] for period in range(4)]
        assert all(after - before >= 2 * DAY for before, after in pairwise(late))
    assert at["sub-0-p0"] == at["sub-1-p0"] == world.clock.now()
    work_through(world, at.values(), together=2)
    assert debited(world, plan(world)) == {}
    assert {invoice: debited_at(world)[invoice] for invoice in at} == at


def test_instalments_that_an_outage_has_missed_are_all_collected_a_week_apart(world):
    world.subscribe("approved", ends_after_periods=3, amount="400.00")
    world.clock.advance(40 * DAY)
    at = dates(plan(world))
    assert at["sub-1-p1"] - at["sub-1-p0"] >= 7 * DAY
    work_through(world, at.values())
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}
    world.run_for(30 * DAY, step=DAY)
    assert world.debits() == {f"sub-1-p{number}": 1 for number in range(3)}


def test_instalments_go_by_another_policy_that_their_record_names(world):
    terms = {"ends_after_periods": 3, "catch_up": "collect_latest"}
    world.subscribe("approved", **terms)
    assert world.subscribe("approved", **terms | {"catch_up": "collect_all:7"}).conflicts
    world.clock.advance(40 * DAY)
    world.tick()
    assert [world.fate(f"sub-1-p{number}") for number in range(2)] == ["void", "paid"]


def test_subscriptions_on_time_are_charged_together_as_agreed(world):
    for number in range(3):
        world.subscribe("approved", f"sub-{number}", customer={"reference_id": "ann"})
    world.tick()
    assert world.debits().total() == 3


def test_a_waived_period_names_its_rule_and_who_applied_it(world):
    world.subscribe("approved", interval="day")
    world.clock.advance(3.5 * DAY)
    world.tick()
    told = world.explain("sub-1-p0")
    assert told["reason"].startswith("waived by catch_up.collect_latest")
    assert [(e["kind"], e["by"]) for e in told["history"]] == [("invoice.voided", "renew")]


def put_on_hold(world, outage):
    """The first day is paid; what became due in the outage is held."""
    world.subscribe("approved", interval="day")
    agree(world, "hold")
    world.tick()
    world.clock.advance(outage)
    world.tick()


def test_periods_on_hold_raise_one_alert_for_all(world):
    put_on_hold(world, 30 * DAY)
    with world.store.reading() as connection:
        alerts = connection.execute(select(tables.events).where(tables.events.c.alert)).all()
    assert [(a.kind, a.data["count"]) for a in alerts] == [("subscription.catch_up_held", 29)]


def test_a_person_answers_for_what_is_on_hold(world):
    put_on_hold(world, 3 * DAY + timedelta(hours=5))
    assert fates(world) == {"paid": 1, "held": 3}
    assert [line.planned.action for line in plan(world)] == [Action.HOLD] * 3
    answer = Answer(Policy.parse("collect_latest"))
    planned = dates(plan(world, answer))
    done = apply(world, answer)
    assert (done.complete, dates(done.lines)) == (True, planned)
    world.tick()
    assert debited(world, done.lines) == planned
    assert fates(world) == {"paid": 2, "void": 2}
    decided = world.explain("sub-1-p1")["history"][-1]
    assert (decided["by"], decided["data"]["why"]) == ("operator:ann", "after the outage")


def test_what_a_person_answered_is_not_answered_twice(world):
    put_on_hold(world, 3.5 * DAY)
    answer = Answer(Policy.parse("collect_all:1"))
    assert len(apply(world, answer).lines) == 3
    assert apply(world, answer).lines == []


def test_hold_is_no_answer():
    with pytest.raises(InvalidInput):
        Answer(Policy.parse("hold"))


@pytest.mark.parametrize(
    ("caps", "debits"),
    [
        ({}, 4),
        ({"max_count": 2}, 2),
        ({"max_count": 0}, 0),
        ({"max_amount": {"USD": Money.parse("29.98", "USD")}}, 3),
        ({"max_amount": {"EUR": Money.parse("1000.00", "EUR")}}, 0),
    ],
    ids=str,
)
def test_apply_stops_before_the_customer_who_would_pass_a_cap(world, caps, debits):
    for number in range(4):
        world.subscribe("approved", f"sub-{number}")
    world.clock.advance(5 * DAY)
    done = apply(world, caps=Caps(**caps))
    assert len(dates(done.lines)) == debits
    assert done.complete == (debits == 4)
    assert sum(fates(world).values()) == debits
    assert len(plan(world)) == 4 - debits


def test_a_person_may_choose_an_older_age_for_once(world):
    world.subscribe("approved", interval="year")
    world.clock.advance(180 * DAY)
    [line] = plan(world)
    assert line.planned.rule == "catch_up.age_cap"
    [line] = plan(world, Answer(Policy.parse("collect_latest"), 200 * DAY))
    assert line.planned.action is Action.COLLECT


def test_a_cancelled_subscription_leaves_nothing_to_answer_for(world):
    put_on_hold(world, 3.5 * DAY)
    lifecycle.cancel(world.store, world.clock, "sub-1", at_period_end=False, by="test")
    assert plan(world, Answer(Policy.parse("collect_all:1"))) == []
    assert fates(world) == {"paid": 1, "void": 3}


# --- charges that nobody made in time ----------------------------------------------------------


def debits_of_each_sweep(world, steps, step):
    """How many debits each of the next sweeps makes, the first one now."""
    made = []
    for _ in range(steps):
        before = len(world.sandbox.ledger)
        world.tick()
        made.append(len(world.sandbox.ledger) - before)
        world.clock.advance(step)
    return made


def switch(world, *, on):
    with world.store.transaction() as connection:
        switches.turn_sales(connection, on=on, by="ann", reason="incident", now=world.clock.now())


def alerts(world):
    with world.store.reading() as connection:
        query = select(tables.events).where(tables.events.c.alert).order_by(tables.events.c.id)
        return [(event.kind, event.data) for event in connection.execute(query)]


def test_sales_that_were_off_for_ten_days_bring_one_debit_when_they_are_on_again(world):
    world.subscribe("approved", interval="day")
    world.tick()
    switch(world, on=False)
    for _ in range(10):
        world.clock.advance(DAY)
        world.tick()
    switch(world, on=True)
    assert sum(debits_of_each_sweep(world, 6, timedelta(minutes=10))) == 1
    assert fates(world) == {"paid": 2, "void": 9}
    assert world.explain("sub-1-p9")["reason"].startswith("waived by catch_up.collect_latest")


def test_a_gateway_that_was_unreachable_for_ten_days_brings_one_debit_when_it_is_back(world):
    world.subscribe("approved", interval="day")
    world.tick()
    world.transport.unreachable = True
    for _ in range(10):
        world.clock.advance(DAY)
        world.tick()
    world.transport.unreachable = False
    assert sum(debits_of_each_sweep(world, 6, timedelta(minutes=10))) == 1
    assert fates(world) == {"paid": 2, "void": 9}


def test_charge_workers_that_were_dead_for_ten_days_make_one_debit_when_they_are_back(world):
    world.subscribe("approved", interval="day")
    world.tick()
    for _ in range(10):
        world.clock.advance(DAY)
        renew_due(world.ports)
        world.bell.messages.clear()
    assert sum(debits_of_each_sweep(world, 6, timedelta(minutes=10))) == 1
    assert fates(world) == {"paid": 2, "void": 9}


def test_dated_debits_that_a_second_outage_overtook_are_dated_again(world):
    world.subscribe("approved", interval="week")
    agree(world, "collect_all:3")
    world.tick()
    world.clock.advance(36 * DAY)
    world.tick()
    world.clock.advance(10 * DAY)
    made = debits_of_each_sweep(world, 40, DAY)
    assert max(made) == 1
    late = sorted(debit.at for debit in world.sandbox.ledger)[2:]
    assert all(after - before >= 3 * DAY for before, after in pairwise(late))
    assert fates(world)["held"] == 0


def test_a_pause_of_400_days_does_not_outlive_the_age_cap(world):
    world.subscribe("approved", interval="week")
    agree(world, "collect_all:3")
    world.tick()
    world.clock.advance(36 * DAY)
    world.tick()
    lifecycle.pause(world.store, world.clock, "sub-1", by="test")
    waiting = fates(world)["held"]
    world.clock.advance(400 * DAY)
    lifecycle.resume(world.store, world.clock, "sub-1", shift_anchor=True, by="test")
    assert sum(debits_of_each_sweep(world, 5, timedelta(minutes=10))) == 0
    assert fates(world)["held"] == waiting == 4
    assert alerts(world)[-1][1]["rules"] == ["catch_up.age_cap"]


def test_an_outage_of_less_than_an_hour_decides_nothing_again(world):
    world.subscribe("approved")
    agree(world, "hold")
    world.transport.unreachable = True
    world.tick()
    world.clock.advance(timedelta(minutes=50))
    world.transport.unreachable = False
    world.tick()
    assert world.fate() == "paid"


def test_what_was_missed_is_held_where_the_policy_says_so_and_a_person_answers(world):
    world.subscribe("approved")
    agree(world, "hold")
    world.transport.unreachable = True
    world.run_for(timedelta(hours=2), step=timedelta(minutes=10))
    world.transport.unreachable = False
    world.run_for(timedelta(hours=2), step=timedelta(minutes=10))
    assert fates(world) == {"held": 1}
    assert [data["rules"] for kind, data in alerts(world) if "held" in kind] == [["catch_up.hold"]]
    apply(world, Answer(Policy.parse("collect_latest")))
    world.tick()
    assert world.fate() == "paid"


def test_a_step_of_recovery_keeps_its_date_whatever_the_outage(world):
    world.subscribe("decline_insufficient_funds")
    agree(world, "hold")
    world.tick()
    world.clock.advance(10 * DAY)
    world.tick()
    assert len(world.attempts()) == 2


# --- one that cannot be planned ----------------------------------------------------------------


def spoil(world, reference, **values):
    with world.store.transaction() as connection:
        table = tables.subscriptions
        connection.execute(update(table).where(table.c.reference_id == reference).values(**values))


SPOILED = [{"currency": "QQQ"}, {"timezone": "Atlantis/Capital"}, {"interval": "fortnigh"}]


@pytest.mark.parametrize("values", SPOILED, ids=str)
def test_a_subscription_that_cannot_be_read_stops_nobody_else_and_is_told_of_once(world, values):
    world.subscribe("approved", "bad", interval="day")
    world.subscribe(
        "approved", "good", interval="day", customer={"reference_id": "customer-of-bad"}
    )
    spoil(world, "bad", **values)
    for _ in range(4):
        world.tick()
        world.clock.advance(DAY)
    assert world.debits() == {f"good-p{number}": 1 for number in range(4)}
    assert [kind for kind, _ in alerts(world)] == ["subscription.stuck"]


def test_a_subscription_that_cannot_be_planned_stops_nobody_else(world, monkeypatch):
    world.subscribe("approved", "bad")
    world.subscribe("approved", "good")
    real = catch_up.catch_up.plan

    def planned(subscription, *rest, **named):
        if subscription.reference_id == "bad":
            raise RecursionError("maximum recursion depth exceeded")
        return real(subscription, *rest, **named)

    monkeypatch.setattr(catch_up.catch_up, "plan", planned)
    world.clock.advance(2 * DAY)
    lines = {line.invoice: line.planned.reason for line in plan(world)}
    assert lines["bad-p0"] == "cannot be planned: RecursionError: maximum recursion depth exceeded"
    seen = preview(world.store, world.clock.now(), world.clock.now() + DAY)
    assert {line.invoice: line.reason for line in seen} == {"good-p0": None, **lines} | {
        "good-p0": None
    }
    world.tick()
    assert world.debits() == {"good-p0": 1}
    monkeypatch.undo()
    world.clock.advance(timedelta(hours=1))
    world.tick()
    assert world.debits() == {"good-p0": 1, "bad-p0": 1}, "it is tried again"


@pytest.mark.parametrize("values", SPOILED, ids=str)
def test_plan_and_preview_name_what_cannot_be_read_and_show_the_rest(world, values):
    world.subscribe("approved", "bad")
    world.subscribe("approved", "good")
    spoil(world, "bad", **values)
    world.clock.advance(2 * DAY)
    for lines in (
        {line.invoice: line.planned.reason for line in plan(world)},
        {
            line.invoice: line.reason
            for line in preview(world.store, world.clock.now(), world.clock.now() + DAY)
        },
    ):
        assert lines["good-p0"] is None
        assert lines["bad-p0"].startswith("cannot be planned: ")
    assert [line.as_dict()["amount"] for line in plan(world)].count(None) == 1


def test_a_missed_charge_of_a_subscription_that_cannot_be_read_waits_for_a_person(world):
    world.subscribe("approved", "bad")
    world.subscribe("approved", "good")
    world.transport.unreachable = True
    world.tick()
    spoil(world, "bad", timezone="Atlantis/Capital")
    world.clock.advance(2 * DAY)
    world.transport.unreachable = False
    renew_due(world.ports)
    world.run("charge", (1, 2))
    world.tick()
    assert world.debits() == {"good-p0": 1}
    with world.store.reading() as connection:
        reasons = set(connection.execute(select(tables.invoices.c.reason)).scalars())
    trouble = "InvalidInput: timezone: must be an IANA name such as Europe/Berlin"
    assert reasons == {None, f"catch_up.trouble: {trouble}"}


def test_metadata_too_deep_to_be_read_stops_no_sweep(world):
    world.subscribe("approved", "deep")
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    spoil(world, "deep", metadata=deep)
    world.clock.advance(2 * DAY)
    spent = [0]

    def on_a_deep_stack(level=0):  # as inside a worker's many frames
        if level < 150:
            on_a_deep_stack(level + 1)
        else:
            world.tick()
            spent[0] = world.debits().total()

    on_a_deep_stack()
    assert spent == [1]


def test_trouble_with_what_was_missed_does_not_cost_a_page_what_it_has_claimed(world, monkeypatch):
    world.subscribe("approved", "missed")
    renew_due(world.ports)
    world.clock.advance(timedelta(hours=3))
    world.subscribe("approved", "fresh")
    renew_due(world.ports)

    def breaks(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(claim_module, "decide_again", breaks)
    with world.store.reading() as connection:
        ids = list(connection.execute(select(tables.invoices.c.id)).scalars())
    with capture_logs() as logs:
        world.run("charge", tuple(ids))
    assert world.debits() == {"fresh-p0": 1}
    assert [line["kind"] for line in logs if line["event"] == "billing.alert"] == [
        "overdue.crashed"
    ]
