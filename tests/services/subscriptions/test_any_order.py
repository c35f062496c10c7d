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
from billing_worker.domain.subscription import BILLABLE, OVER
from billing_worker.persistence.schema import tables
from billing_worker.services.cards.new_card import Scope
from billing_worker.services.invoicing import pause_collection
from billing_worker.services.invoicing.renew import renew_due
from tests.support.lifecycle import DAY, do, give_card, invoices, row
from tests.support.recovery import retry
from tests.support.world import START


class Model:
    """The rules once more, in plain Python: days are 24 h, and only one thing is owed at a time."""

    def __init__(self, start, days, cents, instalments=None):
        self.state = "runs"
        self.next_start, self.next_number = start, 0
        self.days, self.cents, self.instalments = days, cents, instalments
        self.leaves_at = self.paused_at = self.later = None
        self.resumes = None  # (when, whether it shifts), of a pause that ends by itself
        self.owed = {}  # number -> (start, cents), collected sooner or later
        self.waived = {}  # never collected, for sure

    def catch_up_to(self, now):
        if self.resumes and self.resumes[0] <= now:
            self.resume(*self.resumes)
        due = {}
        while self.state == "runs" and self.next_start <= now:
            if self.leaves_at == self.next_start:
                self.over("cancelled")
                break
            if self.later and self.next_start >= self.later[1]:
                self.cents, self.later = self.later[0], None
            due[self.next_number] = (self.next_start, self.cents)
            self.next_number += 1
            self.next_start += self.days * DAY
            if self.next_number == self.instalments:
                self.over("ended")
        for number in sorted(due):
            owed = self.instalments or number == max(due)
            (self.owed if owed else self.waived)[number] = due[number]

    def resume(self, at, shift):
        if shift:
            self.next_start += at - self.paused_at
        self.pass_over(at)
        self.state, self.paused_at, self.resumes = "runs", None, None

    def pass_over(self, now):
        """Dates before now bring nothing: periods are skipped, instalments come later."""
        while self.next_start < now:
            self.next_start += self.days * DAY
            self.next_number += 0 if self.instalments else 1

    def over(self, state):
        self.state, self.leaves_at, self.paused_at, self.resumes = state, None, None, None

    def has_a_period_from(self, at):
        behind = max(timedelta(0), at - self.next_start)
        number = self.next_number - (-behind // (self.days * DAY))
        return self.instalments is None or number < self.instalments

    @property
    def is_over(self):
        return self.state in {"cancelled", "ended"}

    @property
    def may_move(self):
        return self.state == "runs" and self.leaves_at is None


MOST_DAYS_AFTERWARDS = 90
"""Late instalments follow each other a week apart."""


class Walk(RuleBasedStateMachine):
    """One customer with several subscriptions, and now one, now another of them. Subclassed with the
    world that it walks in.
    """

    world = None
    names = itertools.count()
    visited: ClassVar[set[str]] = set()

    def __init__(self):
        super().__init__()
        self.world.clock._now = START
        self.customer = {"reference_id": f"walker-{next(self.names)}"}
        self.walked = []
        self.subscribe(None)

    def subscribe(self, instalments):
        self.reference = f"walk-{next(self.names)}"
        start = self.world.clock.now() + DAY
        self.record = {
            "interval": "day", "interval_count": 3, "anchor_at": start.isoformat(),
            "ends_after_periods": instalments, "customer": self.customer,
        }  # fmt: skip
        self.world.subscribe("approved", self.reference, **self.record)
        self.model = Model(start, 3, 999, instalments)
        self.walked.append((self.reference, self.model, self.record))

    @precondition(lambda self: self.model.is_over)
    @rule(instalments=st.sampled_from([None, None, 2, 4]))
    def begin_again(self, instalments):
        self.subscribe(instalments)
        self.visited.add("subscribed again after the end")

    @precondition(lambda self: len(self.walked) < 3)
    @rule(instalments=st.sampled_from([None, 3]))
    def begin_another(self, instalments):
        self.subscribe(instalments)

    @precondition(lambda self: len(self.walked) > 1)
    @rule(which=st.integers(0, 9))
    def turn_to_another(self, which):
        self.reference, self.model, self.record = self.walked[which % len(self.walked)]
        self.visited.add("another of the same customer")

    @rule()
    def ask_for_the_same_again(self):
        """Nothing begins twice, and nothing that is over begins again under its reference."""
        self.world.tick()
        self.all_catch_up()
        [told] = self.world.subscribe("approved", self.reference, **self.record).outcomes
        assert told == ("refused" if self.model.is_over else "unchanged")
        self.visited.add(f"the same again: {told}")

    def all_catch_up(self):
        for _, model, _ in self.walked:
            model.catch_up_to(self.world.clock.now())

    def ask(self, what, allowed, **options):
        self.model.catch_up_to(self.world.clock.now())
        if allowed():
            do(self.world, what, self.reference, **options)
            self.visited.add(what)
            return True
        with pytest.raises(InvalidInput):
            do(self.world, what, self.reference, **options)
        # Nothing was written, not even the periods that a decision would have opened first.
        self.world.tick()
        self.all_catch_up()
        return False

    @rule(hours=st.integers(1, 200))
    def time_passes(self, hours):
        self.world.clock.advance(timedelta(hours=hours))

    @rule()
    def workers_run(self):
        debits = self.debits()
        self.all_catch_up()
        self.world.tick()
        if self.model.state in {"paused", "cancelled"}:
            assert self.debits() == debits

    def debits(self):
        return {
            name: n
            for name, n in self.world.debits().items()
            if name.startswith(f"{self.reference}-")
        }

    @rule()
    def give_a_card(self):
        give_card(self.world, "approved", self.reference)

    @rule(cents=st.integers(1, 9999))
    def change_amount(self, cents):
        model = self.model
        if self.ask("change", lambda: not model.is_over, amount=f"{cents / 100:.2f}"):
            model.cents, model.later = cents, None

    @rule(cents=st.integers(1, 9999), hours=st.integers(-9, 300))
    def change_amount_later(self, cents, hours):
        model, at = self.model, self.world.clock.now() + timedelta(hours=hours)
        asked = {"amount": f"{cents / 100:.2f}", "amount_from": at.isoformat()}
        allowed = lambda: not model.is_over and hours > 0 and model.has_a_period_from(at)  # noqa: E731
        if self.ask("change", allowed, **asked):
            model.later = None if cents == model.cents else (cents, at)
            self.visited.add("an amount for later")

    @rule(days=st.integers(1, 9))
    def change_interval(self, days):
        model = self.model
        if self.ask("change", lambda: not model.is_over, interval_count=days):
            if days != model.days:
                model.later = None
                if model.state == "paused":
                    # What the pause has passed over goes by the old length, and it counts anew.
                    model.pass_over(self.world.clock.now())
                    model.paused_at = self.world.clock.now()
            model.days = days

    @rule(days=st.integers(0, 20))
    def postpone(self, days):
        model = self.model
        if self.ask("reschedule", lambda: days > 0 and model.may_move, days=days):
            model.next_start += days * DAY

    @rule(periods=st.integers(1, 3))
    def give_free_periods(self, periods):
        model = self.model
        allowed = lambda: model.may_move and model.instalments is None  # noqa: E731
        if self.ask("reschedule", allowed, free_periods=periods):
            model.next_number += periods
            model.next_start += periods * model.days * DAY
            self.visited.add("free periods")

    @precondition(lambda self: self.model.state == "runs")
    @rule(hours=st.sampled_from([None, None, 5, 100, 300]), shift=st.booleans())
    def pause(self, hours, shift):
        model, now = self.model, self.world.clock.now()
        until = None if hours is None else now + timedelta(hours=hours)
        options = {"until": until.isoformat(), "shift_anchor": shift} if until else {}
        if self.ask("pause", lambda: model.may_move, **options):
            model.state, model.paused_at = "paused", now
            model.resumes = until and (until, shift)
            self.visited.add("a pause that ends by itself" if until else "a pause")

    @precondition(lambda self: self.model.state == "paused")
    @rule(hours=st.integers(0, 300), shift=st.booleans())
    def resume(self, hours, shift):
        self.world.clock.advance(timedelta(hours=hours))
        model, now = self.model, self.world.clock.now()
        asked = self.ask("resume", lambda: not model.is_over, shift_anchor=shift)
        if asked and model.state == "paused":
            model.resume(now, shift)

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
        self.workers_run()
        model = self.model
        senseless = {"pause": {"paused"}, "resume": {"runs"}, "uncancel": {"paused", "runs"}}
        if model.state in senseless[what] and model.leaves_at is None:
            options = {"shift_anchor": True} if what == "resume" else {}
            self.ask(what, lambda: not model.is_over, **options)

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
        assert (kept.new_amount_minor, kept.new_amount_from) == (model.later or (None, None))
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
        for self.reference, self.model, _ in self.walked:  # noqa: B020 - each is turned to
            if self.ask("end", lambda: self.model.state != "cancelled"):
                self.model.over("ended")
        for _ in range(MOST_DAYS_AFTERWARDS):
            self.world.tick()
            self.world.clock.advance(DAY)
            if not self.something_is_dated():
                break
        for reference, model, _ in self.walked:
            found = {i.period_number: i for i in invoices(self.world, reference)}
            kept = {number: self.fate(invoice, found) for number, invoice in found.items()}
            settled = {"paid"} if model.state == "ended" else {"paid", "void"}
            assert set(kept) == {*model.owed, *model.waived}
            too_old = {"left to a person"} if model.instalments else {"overtaken"}
            assert {kept[number] for number in model.owed} <= settled | too_old

    def something_is_dated(self):
        query = select(tables.invoices.c.id).where(tables.invoices.c.enqueue_at.is_not(None))
        with self.world.store.reading() as connection:
            return connection.execute(query.limit(1)).scalar() is not None

    def fate(self, invoice, found):
        if self.was_overtaken(invoice, found):
            return "overtaken"
        if (invoice.reason or "").startswith("catch_up.age_cap"):
            return "left to a person"
        return invoice.status


def test_any_order_of_decisions_leaves_what_the_plain_model_says(world):
    examples = 25 if world.store.is_sqlite else 8
    walk = type("WalkHere", (Walk,), {"world": world, "visited": set()})
    run_state_machine_as_test(
        walk,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),  # a walk is short enough to be read; shrinking takes minutes
        ),
    )  # fmt: skip
    assert all(count == 1 for count in world.debits().values())
    if world.store.is_sqlite:  # through PostgreSQL go fewer walks
        assert walk.visited >= COME_TO


COME_TO = {
    "an amount for later", "free periods", "reschedule", "a pause that ends by itself", "a pause",
    "resume", "cancel", "uncancel", "end", "subscribed again after the end",
    "another of the same customer", "the same again: refused", "the same again: unchanged",
}  # fmt: skip


ROUGHLY_COME_TO = {"a card for both", "subscribed again", "paused until a date"}


class RoughWalk(RuleBasedStateMachine):
    """Cards that refuse, outages, months, ends: no model could say what happens, but a few things
    must be true whatever does. The customer pays another subscription with the same card. Subclassed
    with the world that it walks in.
    """

    world = None
    names = itertools.count()
    visited: ClassVar[set[str]] = set()

    def __init__(self):
        super().__init__()
        self.world.transport.unreachable = False
        self.name = next(self.names)
        self.customer = {"reference_id": f"rough-customer-{self.name}"}
        self.reference, self.other = f"rough-{self.name}", f"beside-{self.name}"

    @initialize(
        begins=st.sampled_from(["active", "past_due", "suspended"]),
        interval=st.sampled_from(["week", "month", "quarter"]),
        ends_after=st.sampled_from([None, None, 1, 4]),
    )
    def subscribe(self, begins, interval, ends_after):
        token = "approved" if begins == "active" else "decline_insufficient_funds"
        for reference in (self.reference, self.other):
            self.world.subscribe(token, reference, interval=interval, customer=self.customer,
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
        before = row(self.world, self.reference)
        goes_on = before.resumes_at is not None and before.resumes_at <= self.world.clock.now()
        known = len(self.world.sandbox.ledger)
        self.world.tick()
        new = [debit.reference_id for debit in list(self.world.sandbox.ledger)[known:]]
        made = [attempt for attempt in new if attempt.startswith(f"{self.reference}-")]
        if before.status in {"paused", "cancelled"} and not goes_on:
            assert made == []
        with self.world.store.reading() as connection:
            query = select(tables.attempts.c.origin).where(tables.attempts.c.reference_id.in_(made))
            origins = list(connection.execute(query).scalars())
        assert origins.count("scheduled") <= 1, "two first charges in one sweep"

    @rule(approved=st.booleans(), scope=st.sampled_from(list(Scope)))
    def give_a_card(self, approved, scope):
        token = "approved" if approved else "decline_insufficient_funds"
        given = give_card(self.world, token, self.reference, scope=scope)
        if self.other in given["subscriptions"]:
            self.visited.add("a card for both")

    @precondition(lambda self: row(self.world, self.reference).status in OVER)
    @rule()
    def subscribe_again(self):
        assert self.subscribed_again() in {"refused", "conflict"}
        self.reference = f"{self.reference}-again"
        assert self.subscribed_again() == "added"
        self.visited.add("subscribed again")

    def subscribed_again(self):
        told = self.world.subscribe(None, self.reference, interval="month", customer=self.customer)
        return told.outcomes[0]

    @rule(days=st.sampled_from([3, 40]), shift=st.booleans())
    def pause_until(self, days, shift):
        until = (self.world.clock.now() + days * DAY).isoformat()
        with suppress(InvalidInput):
            do(self.world, "pause", self.reference, until=until, shift_anchor=shift)
            self.visited.add("paused until a date")

    @rule(days=st.sampled_from([3, 40]))
    def agree_on_a_price(self, days):
        since = (self.world.clock.now() + days * DAY).isoformat()
        with suppress(InvalidInput):
            do(self.world, "change", self.reference, amount="12.50", amount_from=since)

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
                ("reschedule", {"days": 9}),
                ("reschedule", {"billing_day": 31}),
                ("reschedule", {"free_periods": 1}),
                ("forgive", {}),
                ("end", {}),
            ]
        )
    )
    def somebody_asks(self, what):
        name, options = what
        with suppress(InvalidInput):  # refused, and then nothing has changed
            do(self.world, name, self.reference, **options)
            self.visited.add(name)

    @invariant()
    def what_may_be_billed_is_found_by_the_sweep(self):
        for reference in (self.reference, self.other):
            kept = row(self.world, reference)
            if kept is not None:
                self.visited.add(kept.status)
                assert (kept.next_billing_at is not None) == (kept.status in set(BILLABLE))

    @invariant()
    def periods_follow_each_other_and_each_costs_what_was_agreed(self):
        for reference in (self.reference, self.other):
            kept = invoices(self.world, reference)
            for one, other in itertools.pairwise(kept):
                assert one.period_end <= other.period_start
            if {one.amount_minor for one in kept} == {999, 1250}:
                self.visited.add("two prices")

    @invariant()
    def nothing_of_what_is_over_or_waits_is_due(self):
        for reference in (self.reference, self.other):
            kept = row(self.world, reference)
            for invoice in invoices(self.world, reference):
                if invoice.status == "open":
                    assert invoice.reason or invoice.next_attempt_at or invoice.enqueue_at is None
                    assert kept.status != "cancelled" or self.is_in_flight(invoice)
                    if kept.status in {"paused", "suspended"} and invoice.next_attempt_at:
                        assert invoice.next_origin == "new_card"

    def is_in_flight(self, invoice):
        return self.world.attempts(invoice.reference_id)[-1:] == ["submitted"]

    def teardown(self):
        """Whatever happened: with a good card and time, nothing is left that nobody decides."""
        self.world.transport.unreachable = False
        for reference in (self.reference, self.other):
            if row(self.world, reference).status == "paused":
                do(self.world, "resume", reference, shift_anchor=False)
            given = give_card(self.world, "approved", reference)
            for invoice in given["for_a_person"]:  # too old for a new card to collect by itself
                retry(self.world, invoice)
        for _ in range(10):
            self.sweep()
            self.world.clock.advance(1.5 * DAY)
        self.what_may_be_billed_is_found_by_the_sweep()
        for reference in (self.reference, self.other):
            assert row(self.world, reference).status not in {"past_due", "suspended", "paused"}
            waiting = [i.reason for i in invoices(self.world, reference) if i.status == "open"]
            assert all(reason and reason.startswith("catch_up.") for reason in waiting)
            with suppress(InvalidInput):  # over
                do(self.world, "cancel", reference, at_period_end=False)


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
    if world.store.is_sqlite:  # through PostgreSQL go fewer walks
        assert walk.visited >= {"active", "past_due", "suspended"} | ROUGHLY_COME_TO


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
