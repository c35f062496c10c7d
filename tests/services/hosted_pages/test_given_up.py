"""A debt that was given up can be paid by its customer until it is void."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_worker.domain.errors import InvalidInput, NotPayable, SlotTaken
from billing_worker.persistence.invoices import PAGE, REOPENED, UNDECIDED
from billing_worker.services.commands.execute import Message, carry_out
from billing_worker.services.dunning import choose_policy
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.operators.debts import IfCharged, void_invoice
from billing_worker.services.reports.wording import fate_of
from billing_worker.services.subscriptions.lifecycle import forgive
from tests.support.recovery import replace, retry, subscription

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
INVOICE = "sub-1-p0"


def checkout(world):
    return start_checkout(world.ports, {"invoice": INVOICE})


def tokenise(world, reference="card-1"):
    customer = {"reference_id": "customer-of-sub-1"}
    record = {"reference_id": reference, "customer": customer, "invoice": INVOICE}
    return start_tokenisation(world.ports, record)


@pytest.fixture
def suspended(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=DAY)
    assert (world.fate(), subscription(world).status) == ("uncollectible", "suspended")
    return world


@pytest.mark.parametrize("page_of", [checkout, tokenise])
def test_a_suspended_customer_pays_on_a_page_and_is_back(suspended, page_of):
    page = page_of(suspended)
    assert suspended.sandbox.pay_on_page(page["gateway_id"]).status == 200
    suspended.run_for(HOUR, step=HOUR / 4)
    assert (suspended.fate(), subscription(suspended).status) == ("paid", "active")
    assert subscription(suspended).next_billing_at is not None
    assert suspended.debits() == {INVOICE: 1}
    assert suspended.discrepancies() == []


def test_a_command_gets_the_page_for_a_debt_that_was_given_up(suspended):
    asked = {"reference_id": "page-1", "invoice": INVOICE}
    answer = carry_out(suspended.ports, Message("billing.start_checkout", asked)).as_json()
    assert answer["status"] == "done"
    assert suspended.sandbox.pay_on_page(answer["gateway_id"]).status == 200
    suspended.run_for(HOUR, step=HOUR / 4)
    assert subscription(suspended).status == "active"


def test_an_unpaid_page_leaves_the_debt_given_up_and_the_next_page_opens_at_once(suspended):
    tokenise(suspended)
    assert "A page to pay on is out" in suspended.explain()["next"]
    with pytest.raises(SlotTaken):
        checkout(suspended)
    suspended.run_for(2 * DAY, step=HOUR)
    assert (suspended.fate(), subscription(suspended).status) == ("uncollectible", "suspended")
    assert "pay-link" in suspended.explain()["next"]
    assert checkout(suspended)["gateway_id"]


def test_a_retry_waits_for_the_end_of_the_page(suspended):
    checkout(suspended)
    with pytest.raises(InvalidInput, match="under way"):
        retry(suspended)


@pytest.mark.parametrize(
    ("known", "fate"), [(PAGE, "uncollectible"), (UNDECIDED, "unknown"), (REOPENED, "unknown")]
)
def test_a_debt_that_was_given_up_and_may_be_paid_by_now_is_unknown(known, fate):
    found = fate_of(
        "uncollectible", "submitted", known=known, waits=True, reason=None, patient=False
    )
    assert found == fate


def test_what_a_ladder_has_cancelled_can_be_paid_and_stays_cancelled(world):
    world.subscribe("decline_insufficient_funds")
    choose_policy(world.store, world.clock, subscription_reference="sub-1", policy="classic",
                  by="ann", why="contract")  # fmt: skip
    world.run_for(25 * DAY, step=DAY)
    assert (world.fate(), subscription(world).status) == ("uncollectible", "cancelled")
    page = checkout(world)
    assert world.sandbox.pay_on_page(page["gateway_id"]).status == 200
    world.run_for(HOUR, step=HOUR / 4)
    assert (world.fate(), subscription(world).status) == ("paid", "cancelled")


def test_nothing_can_be_paid_once_the_debt_is_void(suspended):
    void_invoice(suspended.store, suspended.clock, reference=INVOICE, by="ann", why="goodwill")
    for page_of in (checkout, tokenise):
        with pytest.raises(NotPayable, match="is void"):
            page_of(suspended)


def void_if_unpaid(world):
    void_invoice(
        world.store, world.clock, reference=INVOICE, by="ann", why="goodwill",
        if_charged=IfCharged.IF_UNPAID,
    )  # fmt: skip


def forgiven(world):
    forgive(world.store, world.clock, "sub-1", by="ann", why="goodwill")


@pytest.mark.parametrize("decide", [void_if_unpaid, forgiven])
@pytest.mark.parametrize("is_paid", [True, False])
def test_what_is_forgiven_while_its_customer_is_on_a_page_is_paid_or_else_void(
    suspended, decide, is_paid
):
    page = checkout(suspended)
    decide(suspended)
    assert suspended.fate() == "uncollectible"
    if is_paid:
        suspended.sandbox.pay_on_page(page["gateway_id"])
    suspended.run_for(5 * DAY, step=2 * HOUR)
    assert suspended.fate() == ("paid" if is_paid else "void")
    assert "attempt.surplus" not in suspended.events()
    assert suspended.discrepancies() == []


def test_a_new_card_does_not_pay_what_is_void_as_soon_as_its_page_ends(suspended):
    checkout(suspended)
    void_if_unpaid(suspended)
    assert replace(suspended, "approved.new")["tried"] == []
    suspended.run_for(5 * DAY, step=2 * HOUR)
    assert (suspended.fate(), suspended.debits()) == ("void", {})
