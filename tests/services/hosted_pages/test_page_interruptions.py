"""Where the caller of a page may die, and where the gateway may be silent."""

from __future__ import annotations

import pytest

from billing_worker.domain.errors import (
    ConcurrentChange,
    GatewayError,
    NotPayable,
    OutcomeUnknown,
)
from billing_worker.persistence.store import CommitUnknown
from billing_worker.services.customers import update_customer
from billing_worker.services.hosted_pages import invoice_slot as slots
from billing_worker.services.hosted_pages import pay_link
from tests.support.pages import (
    DAY,
    INVOICE,
    MINUTE,
    Died,
    answering,
    checkout,
    dies_after,
    give_card,
    overtaken,
    pay,
    told,
)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_caller_that_dies_before_the_page_is_committed_leaves_a_slot_that_is_given_back(
    declined, calls
):
    before = declined.explain()["next_attempt_at"]
    dies_after(declined, calls)
    with pytest.raises(Died):
        checkout(declined)
    declined.transport.before_send = lambda _: None
    assert declined.attempts() == ["declined", "prepared"]
    declined.run_for(10 * MINUTE, step=MINUTE)
    assert declined.attempts() == ["declined", "not_charged"]
    assert declined.explain()["next_attempt_at"] == before


def test_a_prepared_link_that_was_left_behind_is_never_sold_although_its_invoice_is_due(declined):
    dies_after(declined, 0)
    with pytest.raises(Died):
        checkout(declined)
    declined.transport.before_send = lambda _: None
    declined.clock.advance(3 * DAY)
    declined.run("charge", (1,))
    assert declined.attempts() == ["declined", "prepared"]
    assert declined.sandbox.requests.for_reference("create", "sub-1-p0-a2") == 0
    declined.run_for(10 * MINUTE, step=MINUTE)
    assert declined.attempts()[:2] == ["declined", "not_charged"]


def test_a_newer_caller_takes_a_prepared_link_over_and_finds_what_was_created(
    declined, monkeypatch
):
    monkeypatch.setattr(slots, "open_page", _raise(Died))
    with pytest.raises(Died):
        checkout(declined)
    monkeypatch.undo()
    page = checkout(declined)
    assert declined.attempts() == ["declined", "submitted"]
    assert declined.sandbox.requests.for_reference("create", page["reference_id"]) == 1
    assert declined.sandbox.requests.for_reference("find", page["reference_id"]) == 1


def _raise(error):
    def stand_in(*_args, **_options):
        raise error

    return stand_in


def test_a_caller_that_was_overtaken_hands_no_page_out(declined, monkeypatch):
    page = overtaken(monkeypatch, pay_link, lambda: checkout(declined))
    assert declined.attempts() == ["declined", "submitted"]
    pay(declined, page)
    declined.run_for(5 * MINUTE)
    assert declined.debits() == {INVOICE: 1}


def test_a_slow_caller_whose_slot_was_given_back_hands_no_page_out(declined, monkeypatch):
    real = pay_link.obtained

    def slept(*args, **options):
        declined.run_for(10 * MINUTE, step=MINUTE)
        return real(*args, **options)

    monkeypatch.setattr(pay_link, "obtained", slept)
    with pytest.raises(ConcurrentChange):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]


def test_a_page_whose_commit_got_no_answer_is_found_open_by_the_next_caller(declined, monkeypatch):
    real = declined.store.transaction
    commits = []

    class Lossy:
        def __enter__(self):
            self.inner = real()
            return self.inner.__enter__()

        def __exit__(self, *error):
            self.inner.__exit__(*error)
            commits.append(error)
            if len(commits) == 3 and error[0] is None:  # claim, recheck, then the page
                raise CommitUnknown("lost")

    monkeypatch.setattr(declined.store, "transaction", Lossy)
    with pytest.raises(CommitUnknown):
        checkout(declined)
    monkeypatch.undo()
    assert declined.attempts() == ["declined", "submitted"]
    assert checkout(declined)["reference_id"] == "sub-1-p0-a2"
    assert declined.attempts() == ["declined", "submitted"]


@pytest.mark.parametrize("token", ["create_answer_lost", "create_error_500"])
def test_a_create_without_an_answer_is_polled_for_and_nothing_is_open_if_it_is_not_there(
    declined, token
):
    give_card(declined, token)
    if token == "create_answer_lost":
        pay(declined, checkout(declined))
        declined.run_for(5 * MINUTE)
        assert declined.fate() == "paid"
    else:
        with pytest.raises(OutcomeUnknown):
            checkout(declined)
        assert declined.attempts() == ["declined", "prepared"]
        declined.run_for(10 * MINUTE)
        assert declined.attempts() == ["declined", "not_charged"]


@pytest.mark.parametrize(
    "token",
    ["wrong_amount", "wrong_currency", "wrong_payment_amount", "wrong_test_mode",
     "wrong_reference"],
)  # fmt: skip
def test_a_page_for_anything_but_what_was_ordered_is_not_handed_out(declined, token):
    give_card(declined, token)
    with pytest.raises(NotPayable, match="expected"):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]
    assert told(declined, "attempt.not_charged")[-1].alert


def test_a_token_that_the_gateway_refuses_opens_nothing(declined):
    give_card(declined, "rejects_token")
    with pytest.raises(GatewayError, match="422"):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]


@pytest.mark.parametrize(
    "flow",
    [[], {"action": "javascript:alert(1)", "method": "GET"}, {"action": "/hpp/1", "method": "GET"},
     {"action": "https://x.test/a", "method": "PUT"},
     {"action": "https://x.test/a", "method": "POST", "params": {"a": {"b": 1}}},
     {"action": "https://x.test/ü\n", "method": "GET"}],
    ids=str,
)  # fmt: skip
def test_an_answer_without_a_page_that_a_browser_can_be_sent_to_opens_nothing(declined, flow):
    answering(declined, lambda attributes: attributes.update(flow_data=flow))
    with pytest.raises(NotPayable, match="names no page"):
        checkout(declined)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    "meanwhile",
    [{"email": "new@example.com"}, {"name": "Jo Doe"}, {"return_url": "https://b.test"}],
)
def test_a_link_for_another_card_whose_worker_died_is_given_whatever_has_changed_since(
    world, calls, meanwhile
):
    world.subscribe("decline_card_expired.17")
    world.tick()
    dies_after(world, calls)
    with pytest.raises(Died):
        checkout(world, return_url="https://a.test")
    world.transport.before_send = lambda _: None
    asked = {"return_url": meanwhile.get("return_url", "https://a.test")}
    if "return_url" not in meanwhile:
        person = {"name": None, "email": None} | meanwhile
        update_customer(
            world.store, world.clock, customer="customer-of-sub-1", by="ann", why=None, **person
        )
    page = checkout(world, **asked)
    assert checkout(world, **asked) == page
    pay(world, page)
    world.run_for(5 * MINUTE)
    assert world.fate() == "paid"
