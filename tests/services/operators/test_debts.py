"""A named person voids a debt, or marks it as paid elsewhere: then no sale for it is sent."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.exc import OperationalError

from billing_worker.domain.errors import InvalidInput
from billing_worker.services.charging import charge
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.operators.debts import IfCharged, mark_paid, void_invoice
from billing_worker.services.operators.resolve import resolve_unknown
from billing_worker.services.subscriptions.lifecycle import cancel, end
from tests.support.recovery import banks_change_their_mind, events, retry, subscription

INVOICE, FIRST = "sub-1-p0", "sub-1-p0-a1"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LADDER = 5  # attempts, with the first one


def void(world, reference=INVOICE, **how):
    return void_invoice(
        world.store, world.clock, reference=reference, by="operator:ann", why="a mistake", **how
    )


def paid(world, reference=INVOICE, **how):
    return mark_paid(
        world.store, world.clock, reference=reference, evidence="cash, receipt 12",
        by="operator:ann", why="paid at the desk", **how,
    )  # fmt: skip


DECISIONS = pytest.mark.parametrize("decide", [void, paid])


def alerts(world, reference=INVOICE):
    return [e["kind"] for e in world.explain(reference)["history"] if e["alert"]]


@pytest.fixture
def declined(world):
    world.subscribe("decline_insufficient_funds", interval="year")
    world.tick()
    return world


@pytest.fixture
def unknown(world):
    world.sandbox.behaviour = replace(
        world.sandbox.behaviour, lifetime_seconds=10_000_000, later_seconds=5 * 86400.0
    )
    world.subscribe("approved_later", interval="year")
    world.run_for(HOUR, step=timedelta(minutes=20))
    assert world.fate() == "unknown"
    return world


# --- nothing is in flight -----------------------------------------------------------------------


@DECISIONS
def test_a_declined_debt_is_ended_and_never_debited_on_a_later_step(declined, decide):
    assert decide(declined)["outcome"] == "changed"
    banks_change_their_mind(declined, "approved.later")
    declined.run_for(40 * DAY, step=6 * HOUR)
    assert declined.debits() == {}
    assert subscription(declined).status == "active"
    with pytest.raises(InvalidInput, match=r"the invoice is (void|paid)"):
        retry(declined)


def test_a_void_says_who_and_why(declined):
    done = void(declined)
    assert (done["status"], done["reason"], done["withdrawn"]) == ("void", "voided: a mistake", [])
    [event] = [e for e in declined.explain()["history"] if e["kind"] == "invoice.voided"]
    assert (event["by"], event["data"]["why"]) == ("operator:ann", "a mistake")
    assert "voided: a mistake" in declined.explain()["why"]


def test_what_was_paid_elsewhere_says_who_how_and_why(declined):
    assert paid(declined)["status"] == "paid"
    [event] = [e for e in declined.explain()["history"] if e["kind"] == "invoice.marked_paid"]
    assert event["by"] == "operator:ann"
    assert event["data"] == {"evidence": "cash, receipt 12", "why": "paid at the desk"}
    assert "A person has marked it as paid elsewhere: cash" in declined.explain()["why"]


@DECISIONS
def test_the_same_decision_again_changes_nothing(declined, decide):
    decide(declined)
    told = declined.explain()
    assert decide(declined)["outcome"] == "unchanged"
    assert declined.explain() == told


@DECISIONS
def test_what_is_paid_is_not_a_debt(world, decide):
    world.subscribe()
    world.tick()
    with pytest.raises(InvalidInput, match="sub-1-p0 is paid"):
        decide(world)


def test_what_is_void_cannot_be_marked_as_paid(declined):
    void(declined)
    with pytest.raises(InvalidInput, match="sub-1-p0 is void"):
        paid(declined)


def test_a_payment_elsewhere_brings_a_suspended_subscription_back_and_a_void_does_not(world):
    for reference in ("sub-1", "sub-2"):
        world.subscribe("decline_insufficient_funds", reference, interval="year")
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.fate() == "uncollectible"
    assert void(world)["status"] == "void"
    assert paid(world, "sub-2-p0")["status"] == "paid"
    assert subscription(world).status == "suspended"
    assert subscription(world, "sub-2").status == "active"


def test_the_next_invoice_no_longer_waits_for_the_one_that_was_voided(world):
    world.subscribe("decline_insufficient_funds", interval="day")
    world.tick()
    banks_change_their_mind(world, "approved.later")
    world.run_for(1 * DAY, step=HOUR)
    assert world.explain("sub-1-p1")["reason"] == "an older invoice comes first"
    void(world)
    world.tick()
    assert world.fate("sub-1-p1") == "paid"


# --- something is prepared, or in flight ----------------------------------------------------------


@DECISIONS
def test_what_is_prepared_is_withdrawn(world, decide):
    world.subscribe()
    world.transport.unreachable = True
    world.tick()
    assert decide(world)["withdrawn"] == [FIRST]
    world.transport.unreachable = False
    world.run_for(2 * DAY, step=HOUR)
    assert (world.attempts(), world.debits()) == (["not_charged"], {})


@DECISIONS
@pytest.mark.parametrize("last", ["payment-invoices", "sale"])
def test_a_decision_during_a_charge_holds_if_it_was_taken(world, decide, last):
    """Between the create and the commit it stops the sale; after that commit it is refused."""
    taken = []

    def decided_meanwhile(request):
        if request.method == "POST" and request.url.endswith(last) and not taken:
            try:
                taken.append(decide(world)["outcome"])
            except InvalidInput as error:
                taken.append(error.reason)

    world.subscribe()
    world.transport.before_send = decided_meanwhile
    world.run_for(HOUR)
    if last == "sale":
        assert "may be charged already: the gateway has not decided about" in taken[0]
        assert (world.fate(), world.debits()) == ("paid", {INVOICE: 1})
    else:
        assert taken == ["changed"]
        assert (world.sales(FIRST), world.debits()) == (0, {})


@DECISIONS
def test_what_may_be_charged_is_refused_and_all_the_same_its_money_is_surplus(unknown, decide):
    with pytest.raises(InvalidInput, match="sub-1-p0 may be charged already"):
        decide(unknown)
    assert decide(unknown, if_charged=IfCharged.ALL_THE_SAME)["outcome"] == "changed"
    unknown.run_for(6 * DAY, step=6 * HOUR)
    assert unknown.attempts() == ["surplus"]
    assert "attempt.surplus" in alerts(unknown)


def test_a_page_on_which_the_customer_may_pay_is_in_flight_too(declined):
    start_checkout(declined.ports, {"invoice": INVOICE})
    with pytest.raises(InvalidInput, match="may be charged already"):
        void(declined)
    void(declined, if_charged=IfCharged.IF_UNPAID)
    banks_change_their_mind(declined, "approved.later")
    declined.run_for(5 * DAY, step=HOUR)
    assert (declined.fate(), declined.debits()) == ("void", {})


def test_void_if_unpaid_is_paid_by_what_is_in_flight(unknown):
    assert void(unknown, if_charged=IfCharged.IF_UNPAID)["status"] == "open"
    assert "void as soon as that has ended unpaid" in unknown.explain()["next"]
    assert void(unknown, if_charged=IfCharged.IF_UNPAID)["outcome"] == "unchanged"
    unknown.run_for(6 * DAY, step=6 * HOUR)
    assert unknown.fate() == "paid"


def test_void_if_unpaid_is_void_when_what_is_in_flight_ends_unpaid(unknown):
    void(unknown, if_charged=IfCharged.IF_UNPAID)
    resolve_unknown(
        unknown.ports, reference=INVOICE, paid=False, evidence="portal", by="ann", why="called"
    )
    assert unknown.explain()["reason"] == "voided: it ended unpaid"
    assert subscription(unknown).status == "active"


def void_as_the_next_sale_is_sent(world, meanwhile=lambda: None):
    def decided_meanwhile(request):
        if request.url.endswith("/payment/sale"):
            world.transport.before_send = lambda _: None
            void(world, if_charged=IfCharged.IF_UNPAID)
            meanwhile()

    world.transport.before_send = decided_meanwhile


def test_void_if_unpaid_holds_when_the_database_fails_during_the_charge(world, monkeypatch):
    world.subscribe("decline_insufficient_funds", ends_after_periods=1)
    void_as_the_next_sale_is_sent(world)

    def database_away(*_):
        monkeypatch.undo()
        raise OperationalError("x", {}, Exception("away"))

    send = world.transport.send

    def sent(request, **how):
        if request.url.endswith("/payment/sale"):
            monkeypatch.setattr(charge, "settle", database_away)
        return send(request, **how)

    world.transport.send = sent
    world.run_for(DAY, step=HOUR)
    assert world.explain(INVOICE)["status"] == "void"
    assert world.attempts() == ["declined"]


def test_void_if_unpaid_holds_when_an_earlier_attempt_is_undecided_again(declined):
    first = declined.sandbox._books.with_reference(FIRST)[0]

    def reopen_the_first():
        first.status = "process_pending"
        declined.run("poll", (1,))
        first.status = "process_failed"

    declined.clock.advance(HOUR)
    retry(declined)
    void_as_the_next_sale_is_sent(declined, reopen_the_first)
    declined.run_for(DAY, step=HOUR)
    assert declined.explain(INVOICE)["status"] == "void"
    assert declined.attempts() == ["declined", "declined"]


def test_void_if_unpaid_is_void_too_when_the_last_step_of_the_ladder_ends_unpaid(declined):
    while len(declined.attempts()) < LADDER - 1:
        declined.run_for(DAY, step=6 * HOUR)
    void_as_the_next_sale_is_sent(declined)
    declined.run_for(10 * DAY, step=6 * HOUR)
    assert len(declined.attempts()) == LADDER
    assert declined.explain(INVOICE)["reason"] == "voided: it ended unpaid"
    assert subscription(declined).status == "active"


def test_an_earlier_attempt_that_is_undecided_again_may_be_charged_too(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=10_000_000)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    [invoice] = world.sandbox._books.with_reference(FIRST)
    invoice.status = "process_pending"
    world.run_for(2 * HOUR, step=timedelta(minutes=5))
    for how in (IfCharged.REFUSE, IfCharged.IF_UNPAID):
        with pytest.raises(InvalidInput, match="has not decided about sub-1-p0-a1"):
            void(world, if_charged=how)
    assert void(world, if_charged=IfCharged.ALL_THE_SAME)["status"] == "void"


def test_no_sale_is_sent_for_what_was_voided_however_they_race(world):
    references = [f"sub-{number}-p0" for number in range(12)]
    for number in range(12):
        world.subscribe("approved", f"sub-{number}")
    outcomes = {}

    def decide_all():
        for reference in references:
            try:
                outcomes[reference] = void(world, reference)["status"]
            except InvalidInput as error:
                outcomes[reference] = error.reason

    operator = threading.Thread(target=decide_all)
    world.sweep()
    operator.start()
    world.deliver()
    operator.join()
    world.run_for(HOUR)
    for reference, outcome in outcomes.items():
        assert world.debits()[reference] == (outcome != "void"), (reference, outcome)


@pytest.mark.parametrize(("decide", "field"), [(void, "reference"), (paid, "reference")])
def test_an_invoice_that_does_not_exist_is_named(world, decide, field):
    with pytest.raises(InvalidInput, match="there is no invoice 'sub-9-p0'") as refused:
        decide(world, "sub-9-p0")
    assert refused.value.field == field


def test_a_card_number_in_the_evidence_is_not_kept(declined):
    mark_paid(
        declined.store, declined.clock, reference=INVOICE, by="ann", why="paid",
        evidence="terminal, 4111111111111111",
    )  # fmt: skip
    assert events(declined, "invoice.marked_paid")[0]["evidence"] == "terminal, ***"


# --- cancel and end, with what is still owed ------------------------------------------------------


@pytest.fixture
def last_instalment(world):
    """The only period of a subscription was declined: it is over, and owes."""
    world.subscribe("decline_insufficient_funds", ends_after_periods=1)
    world.tick()
    assert subscription(world).status == "ended"
    banks_change_their_mind(world, "approved.later")
    return world


def cancelled(world, **how):
    options = {"at_period_end": False, "by": "ann", "why": "goodwill"} | how
    return cancel(world.store, world.clock, "sub-1", **options)


def test_cancelling_what_has_ended_says_what_stays_owed_and_how_it_is_voided(last_instalment):
    for at_period_end in (False, True):
        with pytest.raises(InvalidInput) as refused:
            cancelled(last_instalment, at_period_end=at_period_end)
        assert refused.value.field == "status"
        assert refused.value.reason == (
            "is ended, and 1 invoice stays owed and collected: sub-1-p0. "
            "To void them, cancel with void_open (--and-void)"
        )
    assert subscription(last_instalment).status == "ended"


@pytest.mark.parametrize("at_period_end", [False, True])
def test_what_has_ended_is_cancelled_with_what_it_owes(last_instalment, at_period_end):
    done = cancelled(last_instalment, at_period_end=at_period_end, void_open=True)
    assert (done.outcome, done.status) == ("changed", "cancelled")
    assert (done.details["voided"], done.details["in_flight"]) == (1, [])
    assert last_instalment.explain()["reason"] == "voided: goodwill"
    last_instalment.run_for(40 * DAY, step=6 * HOUR)
    assert last_instalment.debits() == {}
    assert cancelled(last_instalment, void_open=True).outcome == "unchanged"


def test_a_subscription_is_ended_without_what_it_owes(declined):
    done = end(declined.store, declined.clock, "sub-1", by="ann", void_open=True)
    assert (done.status, done.details["voided"]) == ("ended", 1)
    banks_change_their_mind(declined, "approved.later")
    declined.run_for(40 * DAY, step=6 * HOUR)
    assert declined.debits() == {}
    again = end(declined.store, declined.clock, "sub-1", by="ann", void_open=True)
    assert again.outcome == "unchanged"


def test_what_was_ended_is_voided_by_saying_so_again(declined):
    end(declined.store, declined.clock, "sub-1", by="ann")
    done = end(declined.store, declined.clock, "sub-1", by="ann", void_open=True)
    assert (done.outcome, done.details["voided"]) == ("changed", 1)


@pytest.mark.parametrize("final", ["processed", "expired"])
def test_what_is_in_flight_at_the_end_is_paid_or_void(unknown, final):
    done = end(unknown.store, unknown.clock, "sub-1", by="ann", void_open=True)
    assert done.details == {"voided": 0, "in_flight": [INVOICE]}
    if final == "expired":
        [invoice] = unknown.sandbox._books.with_reference(FIRST)
        invoice.status = "expired"
    unknown.run_for(DAY if final == "expired" else 6 * DAY, step=HOUR)
    assert unknown.fate() == ("paid" if final == "processed" else "void")


def test_a_cancellation_at_the_period_s_end_can_void_what_is_open_now(declined):
    done = cancelled(declined, at_period_end=True, void_open=True)
    assert done.cancels_at is not None
    assert done.details["voided"] == 1
    assert declined.fate() == "void"
    assert cancelled(declined, at_period_end=True, void_open=True).outcome == "unchanged"
