"""What each card token does, held against expectations that are written out a second time here."""

import json
from decimal import Decimal
from typing import NamedTuple

import pytest

from billing_worker.sandbox.card_outcomes import OUTCOMES, RESOLUTIONS, outcome_of, token_table
from billing_worker.sandbox.gateway import Delivery

FULL = Decimal("9.99")
ANSWERED, HUNG_UP, SILENT = Delivery.ANSWER, Delivery.HANG_UP, Delivery.NEVER


class Story(NamedTuple):
    """The sale's HTTP status and delivery; then status and debits right away and in the end."""

    http: int
    delivery: Delivery
    at_first: str
    debits_at_first: list
    in_the_end: str
    debits_in_the_end: list


PAID = ("processed", [FULL], "processed", [FULL])
UNPAID = ("process_pending", [], "expired", [])

STORIES = {
    "approved": Story(200, ANSWERED, *PAID),
    "approved_later": Story(200, ANSWERED, "process_pending", [], "processed", [FULL]),
    "pending_forever": Story(200, ANSWERED, *UNPAID),
    "needs_3ds": Story(201, ANSWERED, *UNPAID),
    "never_answers_before": Story(0, SILENT, *UNPAID),
    "never_answers_after": Story(0, SILENT, *PAID),
    "answer_lost_before": Story(0, HUNG_UP, *UNPAID),
    "answer_lost_after": Story(0, HUNG_UP, *PAID),
    "error_500_before": Story(500, ANSWERED, *UNPAID),
    "error_500_after": Story(500, ANSWERED, *PAID),
    "html_502_after": Story(502, ANSWERED, *PAID),
    "wrong_amount": Story(
        200, ANSWERED, "processed", [Decimal("10.99")], "processed", [Decimal("10.99")]
    ),
    "wrong_currency": Story(200, ANSWERED, *PAID),
    "wrong_payment_amount": Story(
        200, ANSWERED, "processed", [Decimal("10.99")], "processed", [Decimal("10.99")]
    ),
    "wrong_test_mode": Story(200, ANSWERED, *PAID),
    "wrong_reference": Story(200, ANSWERED, *PAID),
    "partially_processed": Story(
        200,
        ANSWERED,
        "partially_processed",
        [Decimal("4.99")],
        "partially_processed",
        [Decimal("4.99")],
    ),
    "flips_to_processed": Story(200, ANSWERED, "process_failed", [], "processed", [FULL]),
    "late_after_expiry": Story(200, ANSWERED, "process_pending", [], "processed", [FULL]),
    "late_6h_after_expiry": Story(200, ANSWERED, *UNPAID),
    "late_16h_after_expiry": Story(200, ANSWERED, *UNPAID),
    "late_80h_after_expiry": Story(200, ANSWERED, *UNPAID),
    "flips_after_5m": Story(200, ANSWERED, "process_failed", [], "processed", [FULL]),
    "flips_after_2h": Story(200, ANSWERED, "process_failed", [], "processed", [FULL]),
    "expires_insufficient_funds": Story(200, ANSWERED, *UNPAID),
    "expires_card_is_stolen": Story(200, ANSWERED, *UNPAID),
    "expires_auth_3ds_required": Story(200, ANSWERED, *UNPAID),
    "moderation": Story(200, ANSWERED, *UNPAID),
    "slow": Story(200, ANSWERED, *PAID),
    **{
        f"decline_{resolution}": Story(200, ANSWERED, "process_failed", [], "process_failed", [])
        for resolution in (*RESOLUTIONS, "never_documented")
    },
}
CREATE_FAILS = {"create_answer_lost", "create_error_500", "rejects_token"}


@pytest.mark.parametrize("token", STORIES)
def test_a_token_plays_its_story(merchant, clock, token):
    story = STORIES[token]
    invoice = merchant.create(token)

    reply = merchant.sell(invoice)

    assert (reply.status, reply.delivery) == (story.http, story.delivery)
    assert (merchant.status(invoice), merchant.debits()) == (story.at_first, story.debits_at_first)
    clock.move(7200)
    assert (merchant.status(invoice), merchant.debits()) == (
        story.in_the_end,
        story.debits_in_the_end,
    )


def test_every_token_in_the_table_has_its_story_told_here():
    assert STORIES.keys() | CREATE_FAILS == OUTCOMES.keys()


@pytest.mark.parametrize("token", STORIES)
def test_an_unsold_invoice_expires_uncharged_whatever_its_token(merchant, clock, token):
    invoice = merchant.create(token)

    clock.move(7200)

    attributes = merchant.look(invoice)
    assert (attributes["status"], attributes["resolution"]) == ("expired", "ok")
    assert merchant.debits() == []


def test_the_table_names_every_outcome_once_and_says_what_it_means():
    rows = list(token_table())

    assert [token for token, _ in rows] == list(OUTCOMES)
    assert all(meaning for _, meaning in rows)


def test_a_token_may_carry_anything_after_its_outcome():
    assert outcome_of("approved.17") is outcome_of("approved") is outcome_of("approved.a.b")
    assert outcome_of("decline_insufficient_funds.x").resolution == "insufficient_funds"
    assert outcome_of("approved17") is None


def test_every_resolution_can_be_scripted_exactly_once():
    assert len(RESOLUTIONS) == len(set(RESOLUTIONS)) == 51
    assert all(outcome_of(f"decline_{name}").resolution == name for name in RESOLUTIONS)


@pytest.mark.parametrize("resolution", ["insufficient_funds", "ok", "never_documented"])
def test_a_decline_tells_its_resolution_everywhere(merchant, resolution):
    invoice = merchant.create(f"decline_{resolution}.4")

    answer = json.loads(merchant.sell(invoice).body)

    assert answer == {"status": "process_failed", "resolution": resolution}
    attributes = merchant.look(invoice)
    assert attributes["resolution"] == resolution
    assert attributes["original_data"]["original_resolution"] == resolution
    assert attributes["failed"] == int(merchant.clock.now().timestamp())
    assert attributes["processed"] is None


def test_a_paid_invoice_says_when_and_how_much(merchant, clock):
    invoice = merchant.create()
    clock.move(17)
    merchant.sell(invoice)

    attributes = merchant.look(invoice)

    assert attributes["processed"] == attributes["updated"] == attributes["created"] + 17
    assert attributes["processed_amount"] == attributes["processed_deposit"] == 9.99
    assert attributes["processed_fee"] == 0
    assert attributes["payload"]["token"] is None


def test_a_fee_shows_in_every_amount_it_touches(merchant):
    attributes = merchant.look(merchant.sold("wrong_payment_amount"))

    assert (attributes["amount"], attributes["payment_amount"]) == (9.99, 10.99)
    assert (attributes["fee"], attributes["deposit"]) == (1, 9.99)
    assert (attributes["processed_amount"], attributes["processed_fee"]) == (10.99, 1)
    assert attributes["processed_deposit"] == 9.99


def test_a_partial_payment_says_how_much_was_taken(merchant):
    attributes = merchant.look(merchant.sold("partially_processed"))

    assert (attributes["payment_amount"], attributes["processed_amount"]) == (9.99, 4.99)


@pytest.mark.parametrize(
    ("token", "attribute", "stated"),
    [
        ("wrong_amount", "amount", 10.99),
        ("wrong_currency", "currency", "EUR"),
        ("wrong_payment_amount", "payment_amount", 10.99),
        ("wrong_test_mode", "test_mode", False),
        ("wrong_reference", "reference_id", "order-1-other"),
    ],
)
def test_an_answer_that_does_not_fit_the_order_is_the_same_on_create_and_look(
    merchant, token, attribute, stated
):
    ordered = merchant.create("approved").attributes
    invoice = merchant.create(token)

    assert invoice.attributes[attribute] == merchant.look(invoice)[attribute] == stated
    related = {"amount", "payment_amount", "currency", "test_mode", "reference_id"} - {attribute}
    same = {name for name in related if invoice.attributes[name] == ordered[name]}
    assert same == related - ({"payment_amount"} if attribute == "amount" else set())


def test_a_wrong_currency_is_wrong_for_an_order_in_euro_too(merchant):
    invoice = merchant.create("wrong_currency", currency="EUR", service="payment_card_eur_hpp")

    assert invoice.attributes["currency"] == "USD"


def test_an_invoice_with_a_wrong_reference_is_found_by_the_one_that_was_ordered(merchant):
    invoice = merchant.create("wrong_reference")

    reply = merchant.request("GET", "/payment-invoices?filter[reference_id]=order-1")

    assert [row["id"] for row in json.loads(reply.body)["data"]] == [invoice.gateway_id]


def test_a_3ds_answer_sends_the_customer_away_and_leaves_the_invoice_waiting(merchant, documented):
    invoice = merchant.create("needs_3ds")

    answer = json.loads(merchant.sell(invoice).body)

    assert answer.keys() - {"resolution"} == documented("91").keys()
    assert answer["auth_mode"] == "3ds"
    assert answer["auth_payload"].keys() == documented("91")["auth_payload"].keys()
    assert merchant.look(invoice)["resolution"] == "auth_3ds_required"


def test_the_flat_answers_have_the_shape_that_clients_read(merchant, documented):
    approved = json.loads(merchant.sell(merchant.create("approved")).body)
    declined = json.loads(merchant.sell(merchant.create("decline_insufficient_funds")).body)

    assert approved == {**documented("90"), "resolution": "ok"}
    assert declined == documented("92")


def test_moderation_is_announced_before_any_sale(merchant):
    assert merchant.create("moderation").attributes["moderation_required"] is True
    assert merchant.create("approved").attributes["moderation_required"] is False


def test_a_proxy_error_is_no_json(merchant):
    reply = merchant.sell(merchant.create("html_502_after"))

    assert reply.headers["Content-Type"].startswith("text/html")
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(reply.body)


@pytest.mark.parametrize("token", ["answer_lost_after", "never_answers_after"])
def test_a_lost_answer_cannot_be_peeked_at(merchant, token):
    reply = merchant.sell(merchant.create(token))

    assert (reply.status, reply.body) == (0, b"")


@pytest.mark.parametrize(
    "token", ["answer_lost_before", "never_answers_before", "error_500_before"]
)
def test_a_sale_that_was_not_received_does_not_count_as_one(merchant, token):
    invoice = merchant.create(token)

    replies = [merchant.sell(invoice) for _ in range(2)]

    assert replies[0] == replies[1]  # A second sale of a sold invoice would be refused.
    assert merchant.debits() == []


def test_only_the_first_create_of_a_reference_is_lost(merchant):
    lost = merchant.post(merchant.order("create_answer_lost"))
    found = merchant.request("GET", "/payment-invoices?filter[reference_id]=order-1")
    again = merchant.post(merchant.order("create_answer_lost"))
    other = merchant.post(merchant.order("create_answer_lost", reference_id="order-2"))

    assert lost.delivery is other.delivery is Delivery.HANG_UP
    assert len(json.loads(found.body)["data"]) == 1
    assert again.status == 201
    merchant.sell(merchant.invoice(again))
    assert merchant.debits() == [FULL]


def test_the_first_create_that_fails_makes_nothing(merchant):
    failed = merchant.post(merchant.order("create_error_500"))
    found = merchant.request("GET", "/payment-invoices?filter[reference_id]=order-1")
    again = merchant.post(merchant.order("create_error_500"))

    assert (failed.status, json.loads(found.body)) == (500, {"data": []})
    assert again.status == 201
    merchant.sell(merchant.invoice(again))
    assert merchant.debits() == [FULL]


def test_a_slow_sale_takes_effect_at_once_and_is_answered_late(merchant_of):
    merchant = merchant_of(slow_seconds=3, latency_seconds=0.5)

    reply = merchant.sell(merchant.create("slow"))

    assert reply.delay_seconds == 3.5
    assert merchant.debits() == [FULL]


def test_late_money_comes_at_its_second_and_not_before(merchant_of, clock):
    merchant = merchant_of(later_seconds=60)
    later = merchant.sold("approved_later", reference_id="later")
    flips = merchant.sold("flips_to_processed", reference_id="flips")

    clock.move(59)
    assert [merchant.status(invoice) for invoice in (later, flips)] == [
        "process_pending",
        "process_failed",
    ]
    clock.move(1)
    assert [merchant.status(invoice) for invoice in (later, flips)] == ["processed"] * 2
    assert merchant.debits("later") == merchant.debits("flips") == [FULL]
    assert merchant.look(flips)["resolution"] == "ok"


def test_money_after_expiry_finds_the_invoice_expired(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=100, later_seconds=60)
    invoice = merchant.sold("late_after_expiry")

    history = []
    for seconds in (99, 1, 59, 1):
        clock.move(seconds)
        history.append((merchant.status(invoice), len(merchant.debits())))

    assert history == [("process_pending", 0), ("expired", 0), ("expired", 0), ("processed", 1)]


@pytest.mark.parametrize("hours", [6, 16, 80])
def test_a_late_approval_comes_at_its_hour_whatever_later_means(merchant_of, clock, hours):
    merchant = merchant_of(lifetime_seconds=100, later_seconds=60)
    invoice = merchant.sold(f"late_{hours}h_after_expiry")

    clock.move(100 + hours * 3600 - 1)
    assert (merchant.status(invoice), merchant.debits()) == ("expired", [])
    clock.move(1)
    assert (merchant.status(invoice), merchant.debits()) == ("processed", [FULL])


def test_a_refusal_may_be_told_by_the_resolution_of_an_expired_invoice(merchant, clock):
    invoice = merchant.sold("expires_insufficient_funds")

    assert merchant.look(invoice)["resolution"] == "ok"
    clock.move(7200)
    attributes = merchant.look(invoice)
    assert (attributes["status"], attributes["resolution"]) == ("expired", "insufficient_funds")


def test_a_decision_that_comes_after_the_lifetime_finds_the_invoice_expired(merchant_of, clock):
    merchant = merchant_of(lifetime_seconds=10, later_seconds=20)
    invoice = merchant.sold("approved_later")

    clock.move(10)
    assert merchant.status(invoice) == "expired"
    clock.move(10)
    assert merchant.status(invoice) == "processed"


def test_what_time_brings_is_dated_when_it_was_due_and_not_when_somebody_looked(merchant, clock):
    invoice = merchant.sold("approved_later")
    sold_at = clock.now()

    clock.move(86_400)

    [debit] = merchant.gateway.ledger.debits_for("order-1")
    assert (debit.at - sold_at).total_seconds() == 10
    assert merchant.look(invoice)["processed"] == int(sold_at.timestamp()) + 10
