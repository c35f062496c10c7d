"""Decisions that are told of later than they were made: after a restore, and out of a full queue."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.persistence.schema import tables
from billing_worker.services import kill_switch
from billing_worker.services.cards.new_card import replace_card
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy, give_up_overdue
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.invoicing import catch_up
from billing_worker.services.invoicing.catch_up import Answer, Caps
from billing_worker.services.reports import status as report
from billing_worker.services.subscriptions import lifecycle
from tests.support.backup import backup, restore
from tests.support.recovery import banks_change_their_mind
from tests.support.world import World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ANN = "operator:ann"


def decide(world, what, reference="sub-1", **options):
    return getattr(lifecycle, what)(world.store, world.clock, reference, **({"by": ANN} | options))


def restored(world, kept, *, waits=True):
    """The first step of the recipe: the backup is back, and nothing becomes due."""
    restore(world.store, kept)
    world.bell.messages.clear()
    _switch(world, on=False, restored=waits)
    world.run_for(2 * HOUR, step=HOUR)


def start_again(world):
    _switch(world, on=True)


def _switch(world, *, on, restored=True, service=None):
    kill_switch.switch(world.store, on=on, service=service, by=ANN, reason="backup",
                 now=world.clock.now(), restored=restored)  # fmt: skip


def of_all(world, table, *columns):
    with world.store.reading() as connection:
        return connection.execute(select(*(columns or [table])).order_by(table.c.id)).all()


def invoices(world):
    columns = [tables.invoices.c[n] for n in ("reference_id", "status", "amount_minor")]
    return [tuple(row) for row in of_all(world, tables.invoices, *columns)]


def status_of(world, reference="sub-1"):
    with world.store.reading() as connection:
        return report.show(connection, reference)["status"]


def everything(world):
    names = ("subscriptions", "invoices", "attempts", "events")
    return [of_all(world, getattr(tables, name)) for name in names]


# --- the recipe of a restore ------------------------------------------------------------------


def test_a_cancellation_at_the_periods_end_that_is_said_again_ends_where_it_ended(world):
    world.subscribe("approved")
    world.tick()
    kept = backup(world.store)
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    decide(world, "cancel", at_period_end=True)
    world.run_for(40 * DAY, step=6 * HOUR)
    restored(world, kept)
    decide(world, "cancel", at_period_end=True, decided_at=decided_at)
    start_again(world)
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    assert status_of(world) == "cancelled"


def test_a_pause_that_is_said_again_covers_the_weeks_since_it_was_decided(world):
    world.subscribe("approved", interval="week", catch_up="collect_all:1")
    world.tick()
    kept = backup(world.store)
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    decide(world, "pause")
    world.run_for(38 * DAY, step=6 * HOUR)
    restored(world, kept)
    decide(world, "pause", decided_at=decided_at)
    start_again(world)
    world.run_for(DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    decide(world, "resume", shift_anchor=False)
    world.run_for(2 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p6": 1}


def test_a_new_amount_that_is_said_again_is_charged_from_the_period_it_was_meant_for(world):
    world.subscribe("approved", interval="week", catch_up="collect_all:1")
    world.tick()
    kept = backup(world.store)
    world.clock.advance(8 * DAY)
    world.tick()
    decided_at = world.clock.now()
    decide(world, "change", amount="19.99")
    world.clock.advance(8 * DAY)
    world.tick()
    restored(world, kept)
    world.clock.advance(7 * DAY)
    decide(world, "change", amount="19.99", decided_at=decided_at)
    start_again(world)
    world.run_for(4 * DAY, step=6 * HOUR)
    assert invoices(world) == [
        ("sub-1-p0", "paid", 999),
        ("sub-1-p1", "paid", 999),
        ("sub-1-p2", "paid", 1999),
        ("sub-1-p3", "paid", 1999),
    ]
    assert set(world.debits().values()) == {1}


def test_a_pause_and_its_resumption_that_are_said_again_give_the_next_period_its_own_date(world):
    world.subscribe("approved")
    world.tick()
    kept = backup(world.store)
    said = []
    for days, what, options in ((3, "pause", {}), (10, "resume", {"shift_anchor": True})):
        world.clock.advance(days * DAY)
        said.append((what, options | {"decided_at": world.clock.now()}))
        decide(world, what, **options)
    with world.store.reading() as connection:
        due_at = report.show(connection, "sub-1")["next_billing_at"]
    world.run_for(50 * DAY, step=6 * HOUR)
    restored(world, kept)
    for what, options in said:
        outcome = decide(world, what, **options)
    assert outcome.as_dict()["next_billing_at"] == due_at
    start_again(world)
    world.run_for(2 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}
    assert world.sales("sub-1-p1-a1") == 1


def test_a_withdrawn_cancellation_is_withdrawn_again_although_its_date_has_passed(world):
    world.subscribe("approved")
    world.tick()
    decide(world, "cancel", at_period_end=True)
    kept = backup(world.store)
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    decide(world, "uncancel")
    world.run_for(30 * DAY, step=6 * HOUR)
    restored(world, kept)
    decide(world, "uncancel", decided_at=decided_at)
    start_again(world)
    world.run_for(2 * DAY, step=6 * HOUR)
    assert status_of(world) == "active"
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}


def test_while_the_book_waits_nothing_becomes_due_and_no_customer_is_given_up(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(12 * DAY, step=6 * HOUR)
    kept = backup(world.store)
    restored(world, kept)
    world.clock.advance(40 * DAY)
    before = everything(world)
    world.run_for(2 * DAY, step=6 * HOUR)
    assert give_up_overdue(world.store, world.clock) == 0
    with pytest.raises(InvalidInput, match="restored"):
        catch_up.apply(world.store, world.clock, Answer(), Caps(), by=ANN)
    after = everything(world)
    assert after[0] == before[0]
    assert [row.reference_id for row in after[1]] == ["sub-1-p0"]


def test_a_book_that_waits_says_so_and_is_started_by_nobody_who_does_not_know_it(world):
    restored(world, backup(world.store))
    with pytest.raises(InvalidInput, match="restored"):
        _switch(world, on=True, restored=False)
    with world.store.reading() as connection:
        said = report.status(connection, world.clock.now())
    assert said["waits_for_decisions_since"] is not None
    assert not said["sales_on"]
    start_again(world)
    with world.store.reading() as connection:
        said = report.status(connection, world.clock.now())
    assert said["waits_for_decisions_since"] is None
    assert said["sales_on"]
    assert said["restored_at"] is not None


def test_a_decision_without_its_time_is_refused_where_it_would_open_what_another_prevents(world):
    world.subscribe("approved", interval="week")
    world.tick()
    restored(world, backup(world.store))
    assert decide(world, "change", amount="5.00").outcome == "changed", "nothing is due"
    world.clock.advance(8 * DAY)
    with pytest.raises(InvalidInput, match="decided_at"):
        decide(world, "pause")
    decide(world, "pause", decided_at=world.clock.now())
    assert [status for _, status, _ in invoices(world)] == ["paid", "open"]


# --- told of later, in a book that has forgotten nothing -----------------------------------------


def opened_and_not_charged(world, **terms):
    """Its second period is due, and the gateway cannot be reached. Returns when it was not due."""
    world.subscribe("approved", **terms)
    world.tick()
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    world.clock.advance(31 * DAY)
    world.transport.unreachable = True
    world.tick()
    world.transport.unreachable = False
    return decided_at


def test_a_cancellation_told_of_after_its_boundary_voids_what_was_not_charged(world):
    decided_at = opened_and_not_charged(world)
    assert invoices(world)[1] == ("sub-1-p1", "open", 999)
    decide(world, "cancel", at_period_end=True, decided_at=decided_at)
    world.run_for(2 * DAY, step=HOUR)
    assert status_of(world) == "cancelled"
    assert invoices(world) == [("sub-1-p0", "paid", 999), ("sub-1-p1", "void", 999)]
    assert "taken back" in world.explain("sub-1-p1")["reason"]
    assert world.debits() == {"sub-1-p0": 1}


def test_a_pause_told_of_late_gives_an_uncharged_period_its_shifted_date_under_its_number(world):
    decided_at = opened_and_not_charged(world)
    decide(world, "pause", decided_at=decided_at)
    decide(world, "resume", shift_anchor=True)
    world.run_for(40 * DAY, step=6 * HOUR)
    [_, second] = of_all(world, tables.invoices)
    assert second.period_start - decided_at > 31 * DAY
    assert (second.reference_id, second.status) == ("sub-1-p1", "paid")
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}


def test_a_change_told_of_late_is_charged_at_its_amount_and_a_waived_period_comes_back(world):
    world.subscribe("approved", interval="week")
    world.tick()
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    world.clock.advance(16 * DAY)
    world.sweep()
    assert [status for _, status, _ in invoices(world)] == ["paid", "void", "open"]
    decide(world, "change", amount="5.00", catch_up="collect_all:1", decided_at=decided_at)
    world.run_for(3 * DAY, step=6 * HOUR)
    assert invoices(world)[1:] == [("sub-1-p1", "paid", 500), ("sub-1-p2", "paid", 500)]
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1, "sub-1-p2": 1}


def test_what_was_charged_since_stays_paid_and_is_told_with_an_alert(world):
    world.subscribe("approved")
    world.tick()
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    world.run_for(31 * DAY, step=6 * HOUR)
    outcome = decide(world, "cancel", at_period_end=True, decided_at=decided_at)
    world.run_for(40 * DAY, step=6 * HOUR)
    assert outcome.details["charged_since"] == ["sub-1-p1"]
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}
    assert world.fate("sub-1-p1") == "paid"
    with world.store.reading() as connection:
        alerts = report.status(connection, world.clock.now())["alerts"]
    assert alerts[-1]["data"]["charged_since"] == ["sub-1-p1"]


def test_a_charge_in_flight_is_left_to_the_gateway_and_named(world):
    world.subscribe("approved")
    world.tick()
    world.clock.advance(DAY)
    decided_at = world.clock.now()
    world.clock.advance(30 * DAY)
    replace_card(world.store, world.vault, world.clock, subscription_reference="sub-1",
                 card=CardRecord(Secret("approved_later.x"), None, None, None, None), by=ANN,
                 why=None)  # fmt: skip
    world.tick()
    outcome = decide(world, "pause", decided_at=decided_at)
    assert outcome.details["charged_since"] == ["sub-1-p1"]
    world.run_for(2 * HOUR)
    assert world.fate("sub-1-p1") == "paid"


def test_a_last_period_that_began_since_does_not_keep_an_earlier_pause_out(world):
    decided_at = opened_and_not_charged(world, ends_after_periods=2)
    assert status_of(world) == "ended"
    decide(world, "pause", decided_at=decided_at)
    world.run_for(3 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}
    decide(world, "resume", shift_anchor=True)
    world.run_for(35 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1, "sub-1-p1": 1}
    assert status_of(world) == "ended"


def test_a_decision_that_changes_nothing_takes_nothing_back(world):
    decided_at = opened_and_not_charged(world)
    before = everything(world)
    assert decide(world, "resume", shift_anchor=True, decided_at=decided_at).outcome == "unchanged"
    assert everything(world) == before


@pytest.mark.parametrize("what", ["pause", "cancel", "change", "end"])
def test_decisions_are_told_of_in_their_order_and_not_before_they_are_made(world, what):
    options = {"cancel": {"at_period_end": False}, "change": {"amount": "5.00"}}.get(what, {})
    world.subscribe("approved")
    world.clock.advance(2 * DAY)
    choose_policy(world.store, world.clock, subscription_reference="sub-1", policy="slow", by=ANN,
                  why="asked")  # fmt: skip
    decide(world, "change", description="new")
    now = world.clock.now()
    for at in (now - 2 * timedelta(minutes=1), now + 2 * timedelta(minutes=1), now - 400 * DAY):
        with pytest.raises(InvalidInput, match="decided_at"):
            decide(world, what, decided_at=at, **options)
    seconds = timedelta(seconds=30)
    outcome = decide(world, what, decided_at=now - seconds, **options)
    assert (outcome.outcome, outcome.decided_at) == ("changed", now), "clocks differ a little"


def test_a_decision_of_before_a_suspension_that_was_paid_off_is_told_of_as_of_now(world):
    decided_at = world.clock.now()
    tomorrow = (decided_at + DAY).isoformat()
    world.subscribe("decline_insufficient_funds", anchor_at=tomorrow)
    world.run_for(45 * DAY, step=6 * HOUR)
    assert status_of(world) == "suspended"
    replace_card(world.store, world.vault, world.clock, subscription_reference="sub-1",
                 card=CardRecord(Secret("approved.x"), None, None, None, None), by=ANN,
                 why=None)  # fmt: skip
    world.run_for(10 * DAY, step=6 * HOUR)
    assert status_of(world) == "active"
    before = everything(world)
    with pytest.raises(InvalidInput, match="as of now"):
        decide(world, "pause", decided_at=decided_at)
    assert everything(world) == before


# --- commands ---------------------------------------------------------------------------------


def send(world, task, **arguments):
    return carry_out(world.ports, Message(f"billing.{task}", arguments)).as_json()


def test_a_command_that_the_backup_knows_stays_done_whatever_time_it_is_sent_again_with(world):
    world.subscribe("approved", interval="week")
    world.tick()
    asked = {"reference_id": "cancel-1", "subscription": "sub-1", "at_period_end": True}
    assert send(world, "cancel", **asked)["status"] == "done"
    decide(world, "uncancel")
    restored(world, backup(world.store))
    again = send(world, "cancel", **asked, decided_at=world.clock.now().isoformat())
    assert again["status"] == "unchanged"
    start_again(world)
    assert status_of(world) == "active"


def test_a_cancellation_is_repeated_by_command_with_the_time_that_its_answer_had(world):
    world.subscribe("approved")
    world.tick()
    kept = backup(world.store)
    asked = {"reference_id": "cancel-1", "subscription": "sub-1", "at_period_end": True}
    decided_at = send(world, "cancel", **asked)["subscription"]["decided_at"]
    world.run_for(40 * DAY, step=6 * HOUR)
    restored(world, kept)
    refused = send(world, "cancel", **asked)
    assert [error["field"] for error in refused["errors"]] == ["decided_at"]
    assert send(world, "cancel", **asked, decided_at=decided_at)["status"] == "done"
    start_again(world)
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.debits() == {"sub-1-p0": 1}


@pytest.mark.parametrize("at", ["2026-01-31T12:00:00", "yesterday", 5])
def test_a_time_that_cannot_be_read_is_refused_by_name(world, at):
    asked = {"reference_id": "pause-1", "subscription": "sub-1", "decided_at": at}
    answer = send(world, "pause", **asked)
    assert [error["field"] for error in answer["errors"]] == ["decided_at"]


ORDER = {
    "reference_id": "extra-1", "customer": {"reference_id": "jo"}, "amount": "5.00",
    "currency": "USD", "card": {"token": "approved.jo"},
}  # fmt: skip


def test_a_one_off_charge_is_polled_for_however_late_it_is_said_again(world):
    kept = backup(world.store)
    decided_at = world.clock.now().isoformat()
    send(world, "charge_once", **ORDER)
    world.run_for(HOUR)
    restored(world, kept)
    start_again(world)
    world.clock.advance(90 * DAY)
    assert send(world, "charge_once", **ORDER, decided_at=decided_at)["status"] == "done"
    world.run_for(HOUR)
    assert world.fate("extra-1-p0") == "paid"
    assert world.debits() == {"extra-1-p0": 1}


def test_an_older_card_that_is_told_of_later_does_not_take_the_place_of_a_newer_one(world):
    world.subscribe("approved")
    asked = {"subscription": "sub-1", "card": {"token": "approved.new"}}
    old = world.clock.now().isoformat()
    world.clock.advance(HOUR)
    assert send(world, "replace_card", reference_id="card-2", **asked)["status"] == "done"
    asked["card"] = {"token": "approved.old"}
    answer = send(world, "replace_card", reference_id="card-1", decided_at=old, **asked)
    assert [error["field"] for error in answer["errors"]] == ["decided_at"]


# --- the same, at random ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_restore_with_everything_said_again_charges_what_would_have_been_charged(store, seed):
    empty = backup(store)
    straight = _Story(seed, World(store)).lived(restores=False)
    restore(store, empty)
    assert _Story(seed, World(store)).lived(restores=True) == straight
    assert set(straight.values()) == {1}


class _Story:
    """Random decisions about a few subscriptions; with or without a backup in between."""

    SUBSCRIPTIONS = 6

    def __init__(self, seed, world):
        self.rng = random.Random(seed)
        self.world = world
        self.begins = world.clock.now()
        self.backup_at, self.restored_at = sorted(self._some_time() for _ in range(2))
        self.ends = self.begins + 80 * DAY
        self.decisions = sorted(self._decisions(), key=lambda one: one[0])

    def _some_time(self):
        return self.begins + timedelta(minutes=self.rng.randrange(60 * 24 * 60))

    def _decisions(self):
        for number in range(self.SUBSCRIPTIONS):
            for _ in range(self.rng.randrange(5)):
                what, options = self.rng.choice([
                    ("pause", {}),
                    ("pause", {}),
                    ("resume", {"shift_anchor": True}),
                    ("resume", {"shift_anchor": False}),
                    ("change", {"amount": f"{self.rng.randrange(1, 50)}.00"}),
                    ("change", {"interval": self.rng.choice(["week", "month"])}),
                    ("cancel", {"at_period_end": True}),
                    ("uncancel", {}),
                    ("cancel", {"at_period_end": False}),
                ])  # fmt: skip
                yield self._some_time(), f"sub-{number}", what, options

    def lived(self, *, restores):
        world = self.world
        for number in range(self.SUBSCRIPTIONS):
            world.subscribe(
                "approved",
                f"sub-{number}",
                interval=self.rng.choice(["week", "month"]),
                catch_up=self.rng.choice(["collect_latest", "collect_all:1", "hold"]),
                ends_after_periods=self.rng.choice([None, None, 4]),
            )
        said = list(self.decisions)
        self._until(self.backup_at, said)
        kept, before = backup(world.store), len(said)
        self._until(self.restored_at, said)
        if restores:
            # Where nobody told the book to wait, everything is due before it is said again.
            restored(world, kept, waits=self.rng.random() < 0.5)
            forgotten = self.decisions[len(self.decisions) - before : -len(said) or None]
            for at, reference, what, options in forgotten:
                self._decide(reference, what, decided_at=at, **options)
            start_again(world)
        self._until(self.ends, said)
        return world.debits()

    def _until(self, moment, said):
        while True:
            at = min([moment, *(one[0] for one in said[:1])])
            self._run_until(at)
            if at == moment:
                return
            _, reference, what, options = said.pop(0)
            self._decide(reference, what, **options)

    def _decide(self, reference, what, **options):
        try:
            decide(self.world, what, reference, **options)
        except InvalidInput as error:
            if error.field != "status":
                raise

    def _run_until(self, moment):
        """Every sweep at the very moment when it finds something."""
        world = self.world
        while True:
            world.tick()
            following = max(min(self._next(), moment), world.clock.now() + timedelta(seconds=1))
            if following > moment:
                return
            world.clock.advance(following - world.clock.now())
            if following == moment:
                return

    def _next(self):
        columns = (tables.subscriptions.c.next_billing_at, tables.invoices.c.enqueue_at,
                   tables.attempts.c.next_poll_at)  # fmt: skip
        with self.world.store.reading() as connection:
            found = [connection.execute(select(func.min(column))).scalar() for column in columns]
        return min((at for at in found if at), default=self.ends)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (("cancel", {"at_period_end": False}), ["sub-1-p0"]),
        (("cancel", {"at_period_end": False, "void_open": True}), ["sub-1-p0"]),
        (("cancel", {"at_period_end": True}), None),
        (("cancel", {"at_period_end": True, "void_open": True}), ["sub-1-p0"]),
        (("end", {}), None),
        (("end", {"void_open": True}), ["sub-1-p0"]),
    ],
    ids=str,
)
def test_a_debt_that_a_decision_would_have_made_void_and_that_was_paid_since_is_to_be_given_back(
    world, how, named
):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.clock.advance(HOUR)
    decided_at = world.clock.now()
    banks_change_their_mind(world, "approved")
    world.run_for(4 * DAY, step=6 * HOUR)
    assert world.fate() == "paid"
    what, options = how
    told = decide(world, what, decided_at=decided_at, **options)
    assert told.details.get("charged_since") == named
    assert any("sub-1-p0" in one for one in world.alerts()) is (named is not None)
