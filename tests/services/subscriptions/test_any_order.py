"""Decisions in any order leave what a plain model of them says."""

from __future__ import annotations

import itertools
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update

from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.invoice import SUSPENDED
from billing_worker.domain.subscription import BILLABLE
from billing_worker.persistence.schema import tables
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.renew import renew_due
from tests.support.lifecycle import DAY, do, give_card, invoices, row
from tests.support.recovery import retry
from tests.support.world import START


class Model:
    """The rules once more, in plain Python: days are 24 h, and only one thing is owed at a time."""

    def __init__(self, start, days, cents):
        self.state = "runs"
        self.next_start, self.next_number = start, 0
        self.days, self.cents = days, cents
        self.leaves_at = self.paused_at = None
        self.owed = {}  # number -> (start, cents), collected sooner or later
        self.waived = {}  # never collected, for sure

    def catch_up_to(self, now):
        due = {}
        while self.state == "runs" and self.next_start <= now:
            if self.leaves_at == self.next_start:
                self.over("cancelled")
                self.next_start = None
                break
            due[self.next_number] = (self.next_start, self.cents)
            self.next_number += 1
            self.next_start += self.days * DAY
        for number in sorted(due):
            latest = number == max(due)
            (self.owed if latest else self.waived)[number] = due[number]

    def over(self, state):
        self.state, self.leaves_at, self.paused_at = state, None, None

    @property
    def is_over(self):
        return self.state in {"cancelled", "ended"}


class Walk(RuleBasedStateMachine):
    """Subclassed with the world that it walks in."""

    world = None
    names = itertools.count()

    def __init__(self):
        super().__init__()
        self.world.clock._now = START
        self.walked = []
        self.subscribe()

    def subscribe(self):
        self.reference = f"walk-{next(self.names)}"
        start = self.world.clock.now() + DAY
        self.world.subscribe("approved", self.reference, interval="day", interval_count=3,
                        anchor_at=start.isoformat())  # fmt: skip
        self.model = Model(start, 3, 999)
        self.walked.append((self.reference, self.model))

    @precondition(lambda self: self.model.is_over)
    @rule()
    def begin_again(self):
        self.subscribe()

    def ask(self, what, allowed, **options):
        self.model.catch_up_to(self.world.clock.now())
        if allowed():
            do(self.world, what, self.reference, **options)
            return True
        with pytest.raises(InvalidInput):
            do(self.world, what, self.reference, **options)
        # Nothing was written, not even the periods that a decision would have opened first.
        self.world.tick()
        return False

    @rule(hours=st.integers(1, 200))
    def time_passes(self, hours):
        self.world.clock.advance(timedelta(hours=hours))

    @rule()
    def workers_run(self):
        debits = self.debits()
        self.model.catch_up_to(self.world.clock.now())
        self.world.tick()
        if self.model.state in {"paused", "cancelled"}:
            assert self.debits() == debits

    def debits(self):
        return {
            name: n
            for name, n in self.world.debits().items()
            if name.startswith(f"{self.reference}-")
        }

    @rule(cents=st.integers(1, 9999))
    def change_amount(self, cents):
        model = self.model
        if self.ask("change", lambda: not model.is_over, amount=f"{cents / 100:.2f}"):
            model.cents = cents

    @rule(days=st.integers(1, 9))
    def change_interval(self, days):
        model = self.model
        if self.ask("change", lambda: not model.is_over, interval_count=days):
            if model.state == "paused" and days != model.days:
                # What the pause has passed over is skipped by its old length, and it counts anew.
                now = self.world.clock.now()
                while model.next_start < now:
                    model.next_start += model.days * DAY
                    model.next_number += 1
                model.paused_at = now
            model.days = days

    @precondition(lambda self: self.model.state == "runs")
    @rule()
    def pause(self):
        model = self.model
        if self.ask("pause", lambda: not model.is_over and model.leaves_at is None):
            model.state, model.paused_at = "paused", self.world.clock.now()

    @precondition(lambda self: self.model.state == "paused")
    @rule(hours=st.integers(0, 300), shift=st.booleans())
    def resume(self, hours, shift):
        self.world.clock.advance(timedelta(hours=hours))
        model, now = self.model, self.world.clock.now()
        if self.ask("resume", lambda: True, shift_anchor=shift):
            if shift:
                model.next_start += now - model.paused_at
            while model.next_start < now:
                model.next_start += model.days * DAY
                model.next_number += 1
            model.state, model.paused_at = "runs", None

    @precondition(lambda self: self.model.owed)
    @rule(at_period_end=st.booleans())
    def cancel(self, at_period_end):
        model = self.model
        if self.ask("cancel", lambda: model.state != "ended", at_period_end=at_period_end):
            if at_period_end and model.state == "runs":
                model.leaves_at = model.next_start
            elif not model.is_over:
                model.over("cancelled")

    @precondition(lambda self: self.model.leaves_at is not None)
    @rule()
    def uncancel(self):
        model = self.model
        if self.ask("uncancel", lambda: not model.is_over):
            model.leaves_at = None

    @rule(what=st.sampled_from(["pause", "resume", "uncancel"]))
    def ask_what_may_make_no_sense(self, what):
        model = self.model
        senseless = {"pause": {"paused"}, "resume": {"runs"}, "uncancel": {"paused", "runs"}}
        if model.state in senseless[what] and model.leaves_at is None:
            options = {"shift_anchor": True} if what == "resume" else {}
            before = row(self.world, self.reference).status
            if self.ask(what, lambda: not model.is_over, **options):
                assert row(self.world, self.reference).status in {before, "past_due", "active"}

    @precondition(lambda self: self.model.owed)
    @rule()
    def end(self):
        model = self.model
        if self.ask("end", lambda: model.state != "cancelled"):
            model.over("ended")

    @invariant()
    def the_terms_agree(self):
        kept, model = row(self.world, self.reference), self.model
        state = {"active": "runs", "past_due": "runs"}.get(kept.status, kept.status)
        assert (state, kept.amount_minor) == (model.state, model.cents)
        assert kept.next_period == model.next_number
        assert kept.cancels_at == model.leaves_at
        assert kept.next_billing_at == (model.next_start if model.state == "runs" else None)

    @invariant()
    def every_period_is_where_the_model_has_it(self):
        kept = {i.period_number: i for i in invoices(self.world, self.reference)}
        for number, invoice in kept.items():
            expected = self.model.waived.get(number) or self.model.owed[number]
            assert (invoice.period_start, invoice.amount_minor) == expected
            if number in self.model.waived:
                assert invoice.status == "void"
            elif self.model.state != "cancelled" and not self.was_overtaken(invoice, kept):
                assert invoice.status in {"open", "paid"}

    def was_overtaken(self, invoice, kept):
        """Nobody ran in time to charge it, and when somebody did a later one was there."""
        reason = invoice.reason or ""
        if not reason.startswith("waived by catch_up.collect_latest"):
            return False
        assert invoice.period_number < max(kept)
        assert self.world.explain(invoice.reference_id)["attempts"] == []
        return True

    def teardown(self):
        if self.ask("end", lambda: self.model.state != "cancelled"):
            self.model.over("ended")
        for _ in range(12):
            self.world.tick()
            self.world.clock.advance(DAY)
        for reference, model in self.walked:
            found = {i.period_number: i for i in invoices(self.world, reference)}
            kept = {
                number: "overtaken" if self.was_overtaken(invoice, found) else invoice.status
                for number, invoice in found.items()
            }
            settled = {"paid"} if model.state == "ended" else {"paid", "void"}
            assert set(kept) == {*model.owed, *model.waived}
            assert {kept[number] for number in model.owed} <= settled | {"overtaken"}


def test_any_order_of_decisions_leaves_what_the_plain_model_says(world):
    examples = 25 if world.store.is_sqlite else 8
    run_state_machine_as_test(
        type("WalkHere", (Walk,), {"world": world}),
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),  # a walk is short enough to be read; shrinking takes minutes
        ),
    )  # fmt: skip
    assert all(count == 1 for count in world.debits().values())


class RoughWalk(RuleBasedStateMachine):
    """Cards that refuse, outages, months, ends: no model could say what happens, but a few things
    must be true whatever does. Subclassed with the world that it walks in.
    """

    world = None
    names = itertools.count()
    visited: ClassVar[set[str]] = set()

    def __init__(self):
        super().__init__()
        self.world.transport.unreachable = False
        self.reference = f"rough-{next(self.names)}"

    @initialize(
        begins=st.sampled_from(["active", "past_due", "suspended"]),
        interval=st.sampled_from(["week", "month", "quarter"]),
        ends_after=st.sampled_from([None, None, 1, 4]),
    )
    def subscribe(self, begins, interval, ends_after):
        token = "approved" if begins == "active" else "decline_insufficient_funds"
        self.world.subscribe(token, self.reference, interval=interval,
                             ends_after_periods=ends_after)  # fmt: skip
        self.sweep()
        if begins == "suspended":
            self.nobody_answers_until_the_ladder_ends()

    @rule(days=st.sampled_from([1, 4, 20, 30]))
    def days_pass(self, days, steps=3):
        for _ in range(steps):
            self.world.clock.advance(days * DAY / steps)
            self.sweep()

    @precondition(lambda self: row(self.world, self.reference).status == "past_due")
    @rule()
    def nobody_answers_until_the_ladder_ends(self):
        self.days_pass(32, 8)

    @rule(days=st.sampled_from([1, 4, 30, 100]))
    def everything_is_down(self, days):
        self.world.clock.advance(days * DAY)

    @rule()
    def the_gateway_comes_and_goes(self):
        self.world.transport.unreachable = not self.world.transport.unreachable

    @rule()
    def sweep(self):
        before = row(self.world, self.reference).status
        known = len(self.world.sandbox.ledger)
        self.world.tick()
        new = [debit.reference_id for debit in list(self.world.sandbox.ledger)[known:]]
        made = [attempt for attempt in new if attempt.startswith(f"{self.reference}-")]
        if before in {"paused", "cancelled"}:
            assert made == []
        with self.world.store.reading() as connection:
            query = select(tables.attempts.c.origin).where(tables.attempts.c.reference_id.in_(made))
            origins = list(connection.execute(query).scalars())
        assert origins.count("scheduled") <= 1, "two first charges in one sweep"

    @rule(approved=st.booleans())
    def give_a_card(self, approved):
        give_card(self.world, "approved" if approved else "decline_insufficient_funds",
                  self.reference)  # fmt: skip

    @rule(
        what=st.sampled_from(
            [
                ("pause", {}),
                ("pause", {}),
                ("resume", {"shift_anchor": True}),
                ("resume", {"shift_anchor": False}),
                ("cancel", {"at_period_end": True}),
                ("cancel", {"at_period_end": True}),
                ("uncancel", {}),
                ("change", {"interval": "week"}),
                ("change", {"interval": "month"}),
                ("change", {"ends_at": "2027-01-31T00:00:00Z"}),
            ]
        )
    )
    def somebody_asks(self, what):
        name, options = what
        with suppress(InvalidInput):  # refused, and then nothing has changed
            do(self.world, name, self.reference, **options)

    @invariant()
    def what_may_be_billed_is_found_by_the_sweep(self):
        kept = row(self.world, self.reference)
        if kept is not None:
            self.visited.add(kept.status)
            assert (kept.next_billing_at is not None) == (kept.status in set(BILLABLE))

    @invariant()
    def periods_follow_each_other(self):
        kept = invoices(self.world, self.reference)
        assert all(one.period_end <= other.period_start for one, other in itertools.pairwise(kept))

    @invariant()
    def nothing_of_what_is_over_or_waits_is_due(self):
        kept = row(self.world, self.reference)
        for invoice in invoices(self.world, self.reference):
            if invoice.status == "open":
                assert invoice.reason or invoice.next_attempt_at or invoice.enqueue_at is None
                assert kept.status != "cancelled"
                if kept.status in {"paused", "suspended"} and invoice.next_attempt_at:
                    assert invoice.next_origin == "new_card"

    def teardown(self):
        """Whatever happened: with a good card and time, nothing is left that nobody decides."""
        self.world.transport.unreachable = False
        if row(self.world, self.reference).status == "paused":
            do(self.world, "resume", self.reference, shift_anchor=False)
        given = give_card(self.world, "approved", self.reference)
        for invoice in given["for_a_person"]:  # too old for a new card to collect by itself
            retry(self.world, invoice)
        for _ in range(10):
            self.sweep()
            self.world.clock.advance(1.5 * DAY)
        self.what_may_be_billed_is_found_by_the_sweep()
        assert row(self.world, self.reference).status not in {"past_due", "suspended", "paused"}
        waiting = [i.reason for i in invoices(self.world, self.reference) if i.status == "open"]
        assert all(reason and reason.startswith("catch_up.") for reason in waiting)
        with suppress(InvalidInput):  # over
            do(self.world, "cancel", self.reference, at_period_end=False)


def test_cards_that_refuse_outages_and_decisions_in_any_order_lose_and_double_nothing(world):
    examples = 10 if world.store.is_sqlite else 4
    walk = type("RoughWalkHere", (RoughWalk,), {"world": world, "visited": set()})
    run_state_machine_as_test(
        walk,
        settings=settings(
            max_examples=examples, stateful_step_count=15, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
        ),
    )  # fmt: skip
    assert all(count == 1 for count in world.debits().values())
    assert walk.visited >= {"active", "past_due", "suspended"}


def test_a_backup_step_of_a_suspended_subscription_waits_for_the_way_back(world):
    """Found by reading: it was left due, refused when armed, and held for a person."""
    world.subscribe("approved")
    renew_due(world.ports)
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_origin="backup"))
        subscription_id = connection.execute(select(tables.subscriptions.c.id)).scalar_one()
        pause_collection.put_aside(
            connection,
            subscription_id,
            pause_collection.Moment(world.clock.now(), "test"),
            SUSPENDED,
        )
        kept = connection.execute(select(tables.invoices)).one()
    assert (kept.next_attempt_at, kept.reason) == (None, SUSPENDED)
    assert kept.paused_attempt_at is not None
