"""A named person ends an unknown, and the gateway's later word still wins."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from billing_worker.domain.errors import InvalidInput
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.operators.resolve import resolve_unknown
from billing_worker.services.subscriptions.lifecycle import cancel
from tests.support.recovery import banks_change_their_mind, events, retry, subscription

INVOICE, FIRST, SECOND = "sub-1-p0", "sub-1-p0-a1", "sub-1-p0-a2"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
YEAR_SECONDS = 30_000_000.0


def resolve(world, *, paid, reference=INVOICE, evidence="portal, case 7"):
    return resolve_unknown(
        world.ports, reference=reference, paid=paid, evidence=evidence, by="operator:ann",
        why="customer called",
    )  # fmt: skip


def alerts(world, reference=INVOICE):
    return [e["kind"] for e in world.explain(reference)["history"] if e["alert"]]


def at_the_gateway(world, reference=FIRST):
    [invoice] = world.sandbox._books.with_reference(reference)
    return invoice


def unknown(world, token="pending_forever", **behaviour):
    lasts = {"lifetime_seconds": YEAR_SECONDS} | behaviour
    world.sandbox.behaviour = replace(world.sandbox.behaviour, **lasts)
    world.subscribe(token, interval="year")
    world.tick()
    world.run_for(2 * HOUR, step=20 * timedelta(minutes=1))
    assert world.fate() == "unknown"


# --- not paid ---------------------------------------------------------------------------------


def test_what_was_not_paid_waits_for_the_person_s_next_order(world):
    unknown(world)
    done = resolve(world, paid=False)
    assert done["outcome"] == "changed"
    assert (done["attempt_status"], done["invoice_status"]) == ("not_charged", "open")
    [said] = events(world, "attempt.resolved")
    assert (said["paid"], said["evidence"], said["why"]) == (
        False, "portal, case 7", "customer called",
    )  # fmt: skip
    assert said["gateway_said"] == "process_pending"
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.attempts() == ["not_charged"]
    assert world.fate() == "open, waiting for a person"
    assert "a person states" in world.explain()["why"]
    assert "attempt.contradicted" not in alerts(world)


def test_the_next_attempt_asks_the_gateway_right_before_and_goes_by_the_person_s_word(world):
    unknown(world)
    resolve(world, paid=False)
    banks_change_their_mind(world, "approved.later")
    retry(world)
    world.transport.sent.clear()
    world.tick()
    assert world.attempts() == ["not_charged", "succeeded"]
    asked = [r.method for r in world.transport.sent if at_the_gateway(world).gateway_id in r.url]
    assert asked[0] == "GET"
    assert world.debits() == {INVOICE: 1}


def test_late_money_pays_what_was_called_not_paid_and_a_person_is_told(world):
    unknown(world, "approved_later", later_seconds=5 * 86400.0)
    resolve(world, paid=False)
    world.run_for(5 * DAY, step=6 * HOUR)
    assert (world.attempts(), world.fate()) == (["succeeded"], "paid")
    assert "attempt.succeeded" in alerts(world)


def test_money_that_comes_after_the_next_attempt_was_paid_is_surplus(world):
    unknown(world, "approved_later", later_seconds=5 * 86400.0)
    resolve(world, paid=False)
    banks_change_their_mind(world, "approved.other")
    retry(world)
    world.tick()
    assert world.fate() == "paid"
    world.run_for(6 * DAY, step=6 * HOUR)
    assert world.attempts() == ["surplus", "succeeded"]
    assert "attempt.surplus" in alerts(world)


def test_paid_by_the_gateway_right_before_the_next_attempt_stops_it(world):
    unknown(world, "approved_later", later_seconds=5 * 86400.0)
    resolve(world, paid=False)
    world.run_for(timedelta(minutes=30), step=timedelta(minutes=10))
    world.clock.advance(6 * DAY)
    retry(world)
    world.run_for(timedelta(minutes=1))
    assert world.debits() == {INVOICE: 1}
    assert world.fate() == "paid"


def test_another_contradiction_than_the_one_the_person_knew_stops_the_next_attempt_again(world):
    unknown(world)
    resolve(world, paid=False)
    at_the_gateway(world).status = "partially_processed"
    banks_change_their_mind(world, "approved.later")
    retry(world)
    world.tick()
    assert world.debits() == {}
    assert "attempt.contradicted" in alerts(world)
    assert world.fate() == "unknown"
    resolve(world, paid=False)
    retry(world)
    world.run_for(timedelta(minutes=10))
    assert world.debits() == {INVOICE: 1}


def test_an_answer_that_does_not_fit_the_order_is_resolved_too(world):
    unknown(world, "partially_processed")
    resolve(world, paid=False)
    assert events(world, "attempt.resolved")[0]["gateway_said"].startswith("status partially")
    told = len(alerts(world))
    world.run_for(3 * DAY, step=HOUR)
    assert len(alerts(world)) == told
    assert world.fate() == "open, waiting for a person"


def test_a_decline_that_the_gateway_took_back_is_resolved_too(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=YEAR_SECONDS)
    world.subscribe("decline_insufficient_funds")
    world.tick()
    at_the_gateway(world).status = "process_pending"
    world.run_for(2 * HOUR, step=timedelta(minutes=5))
    assert world.fate() == "unknown"
    resolve(world, paid=False)
    assert world.fate() == "open, waiting for a person"
    banks_change_their_mind(world, "approved.later")
    retry(world)
    world.tick()
    assert world.attempts() == ["declined", "succeeded"]


def test_a_decline_that_may_have_been_paid_lets_a_page_open_once_a_person_has_polled(world):
    world.subscribe("decline_unable_to_reconcile")
    world.tick()
    resolve(world, paid=False)
    assert world.attempts() == ["declined"]
    assert start_checkout(world.ports, {"invoice": INVOICE})["invoice"] == INVOICE


def test_what_was_cancelled_meanwhile_is_void(world):
    unknown(world)
    cancel(world.store, world.clock, "sub-1", at_period_end=False, by="ann")
    assert resolve(world, paid=False)["invoice_status"] == "void"


# --- paid -------------------------------------------------------------------------------------


def test_what_a_person_calls_paid_is_paid_and_the_gateway_s_confirmation_is_quiet(world):
    unknown(world, "approved_later", later_seconds=5 * 86400.0)
    done = resolve(world, paid=True)
    assert (done["attempt_status"], done["invoice_status"]) == ("succeeded", "paid")
    assert "A person stated" in world.explain()["why"]
    told = alerts(world)
    world.run_for(6 * DAY, step=6 * HOUR)
    assert (world.fate(), alerts(world)) == ("paid", told)
    assert "The gateway states" in world.explain()["why"]
    assert resolve(world, paid=True)["outcome"] == "unchanged"
    with pytest.raises(InvalidInput, match="not unknown: it is succeeded"):
        resolve(world, paid=False)


def test_a_no_of_the_gateway_after_paid_alerts_and_debits_nobody(world):
    unknown(world)
    resolve(world, paid=True)
    gateway = at_the_gateway(world)
    gateway.status, gateway.resolution = "process_failed", "insufficient_funds"
    world.run_for(40 * DAY, step=6 * HOUR)
    assert alerts(world).count("attempt.contradicted") == 1
    assert (world.fate(), world.attempts()) == ("paid", ["succeeded"])
    assert subscription(world).status == "active"


def test_whoever_said_paid_may_take_it_back_until_the_gateway_says_so_too(world):
    unknown(world)
    resolve(world, paid=True)
    done = resolve(world, paid=False, evidence="the portal shows another customer's payment")
    assert (done["attempt_status"], done["invoice_status"]) == ("not_charged", "open")
    assert world.fate() == "open, waiting for a person"
    assert subscription(world).status == "past_due"
    assert resolve(world, paid=True)["invoice_status"] == "paid"
    assert subscription(world).status == "active"


@pytest.mark.parametrize("status", ["processed", "refunded"])
def test_surplus_money_pays_what_is_owed_again_unless_it_was_given_back(world, status):
    world.subscribe("pending_forever", ends_after_periods=1)
    world.run_for(2 * HOUR + timedelta(minutes=10), step=timedelta(minutes=5))
    world.run_for(3 * DAY, step=HOUR)
    assert world.attempts() == ["not_charged", "submitted"]
    resolve(world, paid=True, reference=SECOND)
    first = at_the_gateway(world)
    world.sandbox._books.acquirer.charge(first, world.clock.now())
    world.run("poll", (1,))
    assert world.attempts() == ["surplus", "succeeded"]
    first.status = status
    resolve(world, paid=False, reference=SECOND)
    world.run_for(DAY, step=HOUR)
    paid = ("paid", "succeeded") if status == "processed" else ("open", "surplus")
    assert (world.explain()["status"], world.attempts()[0]) == paid
    assert len(world.attempts()) == 2
    first.status = "processed"


# --- what is not for a person to say ------------------------------------------------------------


def test_the_same_word_again_changes_nothing(world):
    unknown(world)
    resolve(world, paid=False)
    assert resolve(world, paid=False)["outcome"] == "unchanged"
    assert len(events(world, "attempt.resolved")) == 1


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("approved", "is not unknown: it is succeeded"),
        ("decline_insufficient_funds", r"is not unknown: it is declined \(insufficient_funds\)"),
    ],
)
def test_what_is_known_is_not_for_a_person_to_say(world, token, said):
    world.subscribe(token)
    world.tick()
    for paid in (True, False):
        with pytest.raises(InvalidInput, match=said):
            resolve(world, paid=paid)


def test_what_is_only_prepared_is_voided_instead(world):
    world.subscribe()
    world.transport.unreachable = True
    world.tick()
    assert world.attempts() == ["prepared"]
    with pytest.raises(InvalidInput, match="these books have sold nothing, so `invoices void`"):
        resolve(world, paid=False)


def test_a_page_on_which_nobody_has_paid_is_not_unknown(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    start_checkout(world.ports, {"invoice": INVOICE})
    with pytest.raises(InvalidInput, match="a page on which nobody has paid"):
        resolve(world, paid=False, reference=SECOND)


def test_a_sale_that_its_process_may_still_be_sending_is_nobody_s_to_resolve(world):
    def resolved_meanwhile(request):
        if request.url.endswith("/sale"):
            with pytest.raises(InvalidInput, match="is being charged: ask again at 2026-01-31"):
                resolve(world, paid=False)

    world.subscribe()
    world.transport.before_send = resolved_meanwhile
    world.tick()
    assert world.fate() == "paid"


@pytest.mark.parametrize("missing", ["evidence", "why"])
def test_a_word_without_evidence_and_reason_is_refused(world, missing):
    unknown(world)
    said = {"evidence": "portal", "why": "called"} | {missing: "  "}
    with pytest.raises(InvalidInput, match=f"{missing}: must not be empty"):
        resolve_unknown(world.ports, reference=INVOICE, paid=True, by="ann", **said)


def test_a_card_number_in_the_evidence_is_not_kept(world):
    unknown(world)
    resolve(world, paid=False, evidence="card 4111 1111 1111 1111 not debited")
    assert events(world, "attempt.resolved")[0]["evidence"] == "card *** not debited"
