"""A pause that ends at a date, whoever looks, and whenever the sweep comes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.domain.errors import InvalidInput
from billing_worker.persistence import subscriptions as stored
from billing_worker.services import kill_switch
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.forecast.preview import preview
from billing_worker.services.import_records.export import record_from
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.subscriptions import lifecycle
from tests.support.recovery import banks_change_their_mind, events, subscription

DAY = timedelta(days=1)


def pause(world, days, **how):
    until = None if days is None else (world.clock.now() + days * DAY).isoformat()
    return lifecycle.pause(world.store, world.clock, "sub-1", until=until, by="ann", **how)


def foreseen(world, days):
    now = world.clock.now()
    return [one.at for one in preview(world.store, now, now + days * DAY) if one.reason is None]


@pytest.fixture
def paid(world):
    """Paid for 31 Jan; next on 28 Feb."""
    world.subscribe("approved")
    world.tick()
    return world


@pytest.mark.parametrize(
    ("shift", "first"), [(False, "2026-03-31T12:00:00"), (True, "2026-04-09T12:00:00")]
)
def test_a_pause_ends_at_its_date_and_the_preview_knows_what_is_charged_after_it(
    paid, shift, first
):
    pause(paid, 40, shift_anchor=shift)
    [at, *_] = promised = foreseen(paid, 75)
    assert at.isoformat().startswith(first)
    paid.run_for(75 * DAY, step=DAY / 2)
    assert subscription(paid).status == "active"
    debits = [debit.at for debit in paid.sandbox.ledger][1:]
    assert debits == promised


def test_a_sweep_that_comes_late_prolongs_no_pause(paid):
    pause(paid, 10, shift_anchor=True)
    paid.clock.advance(20 * DAY)
    paid.tick()
    assert f"{subscription(paid).next_billing_at:%d %b}" == "10 Mar"
    [told] = events(paid, "subscription.resumed")
    assert told["resumed_at"].startswith("2026-02-10")


def test_a_debt_waits_until_the_pause_ends(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    pause(world, 5)
    banks_change_their_mind(world, "approved")
    world.run_for(4 * DAY, step=DAY)
    assert world.fate() == "open, paused"
    assert "pause ends" in world.explain()["next"]
    world.run_for(2 * DAY, step=DAY)
    assert world.fate() == "paid"


def test_a_date_is_set_moved_and_taken_away_while_it_is_paused(paid):
    pause(paid, None)
    assert subscription(paid).resumes_at is None
    assert pause(paid, 10).outcome == "changed"
    assert pause(paid, 10).outcome == "unchanged"
    lifecycle.pause(paid.store, paid.clock, "sub-1", until="", by="ann")
    paid.run_for(20 * DAY, step=DAY)
    assert subscription(paid).status == "paused"


def test_who_resumes_before_the_date_has_no_date_left(paid):
    pause(paid, 40)
    lifecycle.resume(paid.store, paid.clock, "sub-1", shift_anchor=False, by="ann")
    assert subscription(paid).resumes_at is None


def test_a_date_in_the_past_is_refused(paid):
    with pytest.raises(InvalidInput, match="in the future"):
        pause(paid, -1)
    assert subscription(paid).status == "active"


def test_a_command_may_say_until_when(paid):
    asked = {"reference_id": "p-1", "subscription": "sub-1", "until": "2026-02-10T00:00:00Z"}
    assert carry_out(paid.ports, Message("billing.pause", asked)).status == "done"
    paid.run_for(12 * DAY, step=DAY)
    assert subscription(paid).status == "active"


def test_a_pause_that_ends_moves_with_the_book(paid):
    pause(paid, 40, shift_anchor=True)
    with paid.store.reading() as connection:
        record = record_from(stored.whole(connection, ["sub-1"])[0], paid.vault)
    there = parse_record(record.as_json(with_token=True))
    assert there.state == record.state
    assert (there.state.resumes_at - paid.clock.now(), there.state.resumes_shifted) == (
        40 * DAY,
        True,
    )


@pytest.fixture
def late(paid):
    """The pause has ended on 27 Feb and a period was due on 28 Feb, but no sweep has come until 1 Mar."""
    pause(paid, 27)
    paid.clock.advance(29 * DAY)
    return paid


@pytest.mark.parametrize(
    "decision",
    [
        ("resume", {"shift_anchor": False}),
        ("change", {"amount": "99.00"}),
        ("change", {"interval": "year"}),
        ("cancel", {"at_period_end": True}),
        ("reschedule", {"days": 3}),
        ("pause", {}),
    ],
    ids=str,
)
def test_a_decision_before_the_late_sweep_finds_the_pause_over_and_the_period_on_old_terms(
    late, decision
):
    name, how = decision
    getattr(lifecycle, name)(late.store, late.clock, "sub-1", by="ann", **how)
    opened = late.explain("sub-1-p1")
    assert (opened["amount"], opened["period"]["start"][:10]) == ("9.99", "2026-02-28")
    [told] = events(late, "subscription.resumed")
    assert told["resumed_at"].startswith("2026-02-27")
    assert subscription(late).status == ("paused" if name == "pause" else "active")


def test_a_decision_made_after_the_pause_and_told_after_the_sweep_is_taken(late):
    made_at = late.clock.now()
    late.clock.advance(DAY)
    late.tick()
    told = lifecycle.change(
        late.store, late.clock, "sub-1", amount="5.00", by="ann", decided_at=made_at
    )
    assert told.outcome == "changed"


def test_in_restored_books_a_pause_that_is_over_is_not_decided_about_without_a_date(late):
    kill_switch.switch(
        late.store, on=False, service=None, by="ann", reason="backup", now=late.clock.now(),
        restored=True,
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="say those first"):
        lifecycle.change(late.store, late.clock, "sub-1", amount="5.00", by="ann")
    assert subscription(late).status == "paused"


@pytest.mark.parametrize("shift", [False, True])
def test_a_pause_that_is_told_of_when_it_is_over_counts_as_if_told_in_time(paid, shift):
    made_at = paid.clock.now()
    until = (made_at + 40 * DAY).isoformat()
    paid.clock.advance(45 * DAY)
    lifecycle.pause(
        paid.store, paid.clock, "sub-1", until=until, shift_anchor=shift, by="ann",
        decided_at=made_at,
    )  # fmt: skip
    paid.run_for(26 * DAY, step=DAY)
    # Without the shift the period of 28 Feb fell into the pause; with it, it begins on 9 Apr.
    assert subscription(paid).status == "active"
    assert paid.debits() == {"sub-1-p0": 1, "sub-1-p1" if shift else "sub-1-p2": 1}


@pytest.mark.parametrize(
    ("decision", "ends_as"),
    [
        (("cancel", {"at_period_end": False}), "cancelled"),
        (("cancel", {"at_period_end": True}), "cancelled"),
        (("end", {}), "ended"),
    ],
    ids=str,
)
def test_an_end_that_was_decided_in_a_pause_is_taken_although_the_pause_has_ended_since(
    paid, decision, ends_as
):
    pause(paid, 27)
    made_at = paid.clock.now() + 9 * DAY
    paid.transport.unreachable = True
    paid.run_for(29 * DAY, step=DAY)  # the pause is over, and the period of 28 Feb is open
    name, how = decision
    told = getattr(lifecycle, name)(
        paid.store, paid.clock, "sub-1", by="ann", decided_at=made_at, **how
    )
    assert told.status == ends_as
    paid.transport.unreachable = False
    paid.run_for(40 * DAY, step=DAY)
    assert paid.debits() == {"sub-1-p0": 1}
    assert paid.fate("sub-1-p1") == "void"


def test_other_terms_that_were_decided_in_a_pause_are_refused_once_it_has_ended(paid):
    pause(paid, 27)
    made_at = paid.clock.now() + 9 * DAY
    paid.run_for(29 * DAY, step=DAY)
    with pytest.raises(InvalidInput, match="tell of them in their order"):
        lifecycle.change(
            paid.store, paid.clock, "sub-1", amount="5.00", by="ann", decided_at=made_at
        )
