"""Pages on which the customer pays: one slot with automatic attempts, and cards that come of it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from itertools import permutations

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from structlog.testing import capture_logs

from billing_worker.domain.card_setup import HostedStatement
from billing_worker.domain.errors import (
    ConcurrentChange,
    GatewayError,
    InvalidInput,
    NotPayable,
    OutcomeUnknown,
    SlotTaken,
)
from billing_worker.domain.secret import Secret
from billing_worker.gateway.http import Response
from billing_worker.persistence import callbacks
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import CommitUnknown
from billing_worker.persistence.switches import turn_sales
from billing_worker.services.cards.new_card import use_card
from billing_worker.services.hosted_pages import invoice_slot as slots
from billing_worker.services.hosted_pages import poll, start
from billing_worker.services.hosted_pages.page_address import page_behind
from billing_worker.services.hosted_pages.records import parse_checkout, parse_tokenisation
from billing_worker.services.hosted_pages.start import start_checkout, start_tokenisation
from billing_worker.services.import_records.subscription import BadRecord
from billing_worker.services.subscriptions import lifecycle

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
INVOICE = "sub-1-p0"


@pytest.fixture
def declined(world):
    """An invoice that the automatic charge did not get, with its next step days away."""
    world.subscribe("decline_insufficient_funds.17")
    world.tick()
    assert world.attempts() == ["declined"]
    assert world.explain()["next_attempt_at"] is not None
    return world


def checkout(world, invoice=INVOICE, **fields):
    return start_checkout(world.ports, {"invoice": invoice, **fields})


def tokenise(world, reference="card-1", customer="customer-of-sub-1", **fields):
    amount = {} if "invoice" in fields else {"amount": "1.00", "currency": "USD"}
    record = {"reference_id": reference, "customer": {"reference_id": customer}, **amount, **fields}
    return start_tokenisation(world.ports, record)


def pay(world, page):
    """The customer opens the page and pays."""
    reply = world.sandbox.pay_hosted(page["gateway_id"])
    assert reply.status == 200, reply
    return reply


def rows(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table).order_by(table.c.id)).all()


def payment(world):
    return rows(world, tables.hosted_payments)[-1]


def told(world, kind):
    with world.store.reading() as connection:
        query = select(tables.events).where(tables.events.c.kind == kind)
        return connection.execute(query).all()


def sent(world, method="POST"):
    return [json.loads(r.body) for r in world.transport.sent if r.method == method]


# --- pay links: the happy path ---


def test_a_link_that_is_paid_settles_the_invoice_through_the_same_poll(declined):
    page = checkout(declined)
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]
    assert declined.debits() == {INVOICE: 1}
    assert declined.explain()["attempts"][1]["origin"] == "link"


def test_the_answer_is_the_form_that_the_gateway_named_and_our_own_path_to_it(declined):
    page = checkout(declined)
    assert page["action"].endswith("/hpp/cgi_sandbox000000002")
    assert (page["method"], page["params"]) == ("GET", {})
    assert (page["amount"], page["currency"], page["invoice"]) == ("9.99", "USD", INVOICE)
    name = page["pay_path"].removeprefix("/pay/")
    found = page_behind(declined.store, declined.vault, name)
    assert found.action == page["action"]


def test_the_order_of_a_link_is_the_one_of_the_seed(declined):
    checkout(declined)
    attributes = sent(declined)[-1]["data"]["attributes"]
    assert attributes["flow"] == "charge"
    assert attributes["token"] == "decline_insufficient_funds.17"
    assert attributes["customer"]["reference_id"] == "customer-of-sub-1"
    assert "gateway_options" not in attributes


def test_we_never_send_a_sale_for_a_link(declined):
    page = checkout(declined)
    declined.run_for(3 * HOUR, step=15 * MINUTE)
    assert declined.sales(page["reference_id"]) == 0


def test_the_page_is_kept_encrypted_and_only_while_it_is_open(declined):
    page = checkout(declined)
    (_, link) = rows(declined, tables.attempts)
    assert page["action"].encode() not in link.page
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    (_, link) = rows(declined, tables.attempts)
    assert link.page is None
    name = page["pay_path"].removeprefix("/pay/")
    assert page_behind(declined.store, declined.vault, name) is None


# --- one slot ---


def test_the_same_link_again_is_the_same_page_and_creates_nothing(declined):
    first = checkout(declined)
    again = checkout(declined)
    assert again["action"] == first["action"]
    assert again["gateway_id"] == first["gateway_id"]
    assert declined.sandbox.requests.for_reference("create", first["reference_id"]) == 1


def test_a_link_is_refused_while_an_automatic_attempt_may_still_move_money(world):
    world.subscribe("answer_lost_after")
    world.tick()
    with pytest.raises(SlotTaken, match="sub-1-p0-a1, of origin scheduled, is submitted"):
        checkout(world)
    assert world.attempts() == ["submitted"]


def test_no_automatic_attempt_starts_while_a_link_is_open_although_its_date_has_come(declined):
    declined.sandbox.behaviour = replace(declined.sandbox.behaviour, lifetime_seconds=30 * 86400.0)
    checkout(declined)
    declined.run_for(10 * DAY, step=6 * HOUR)
    assert declined.attempts() == ["declined", "submitted"]
    assert declined.debits() == {}


def test_a_second_live_attempt_is_refused_by_the_database_itself(declined):
    checkout(declined)
    rule = r"uq_attempts_one_live|failed: attempts\.invoice_id"  # as SQLite calls it
    with pytest.raises(IntegrityError, match=rule), declined.store.transaction() as connection:
        connection.execute(
            update(tables.attempts).where(tables.attempts.c.number == 1).values(status="submitted")
        )


@pytest.mark.parametrize("status", ["paid", "void"])
def test_there_is_no_link_for_an_invoice_that_is_not_open(world, status):
    world.subscribe("approved")
    world.tick()
    if status == "void":
        with world.store.transaction() as connection:
            connection.execute(update(tables.invoices).values(status="void", paid_at=None))
    with pytest.raises(NotPayable, match=f"{INVOICE} is {status}"):
        checkout(world)


def test_there_is_no_link_for_an_unknown_invoice(world):
    with pytest.raises(InvalidInput, match="there is no invoice"):
        checkout(world, "nobody-p0")
    assert world.transport.sent == []


def test_while_sales_are_stopped_no_link_is_handed_out(declined):
    with declined.store.transaction() as connection:
        turn_sales(connection, on=False, by="t", reason="r", now=declined.clock.now())
    with pytest.raises(NotPayable, match="switched off"):
        checkout(declined)
    assert declined.attempts() == ["declined"]


EXPIRED_CARD = {"token": "approved.1", "expiry_month": 12, "expiry_year": 2025}


@pytest.mark.parametrize(
    "card", [{"token": "decline_lost_or_stolen_card.1"}, EXPIRED_CARD, None], ids=str
)
def test_the_link_of_an_invoice_without_a_good_card_stores_the_card_that_pays_it(world, card):
    world.subscribe(card=card, ends_after_periods=2)
    world.tick()
    page = checkout(world)
    assert checkout(world) == page
    pay(world, page)
    world.run_for(HOUR, step=5 * MINUTE)
    assert (world.fate(), default_card(world)) == ("paid", payment(world).card_id)
    world.run_for(30 * DAY, step=12 * HOUR)
    assert world.debits() == {INVOICE: 1, "sub-1-p1": 1}


def test_a_link_without_a_good_card_that_nobody_paid_on_is_followed_by_another_one(world):
    world.subscribe("decline_lost_or_stolen_card")
    world.tick()
    first = checkout(world)
    world.run_for(3 * DAY, step=2 * HOUR)
    second = checkout(world)
    assert second["pay_path"] != first["pay_path"]
    pay(world, second)
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "paid"


# --- a link that nobody pays is no failed charge ---


def test_an_expired_link_gives_the_invoice_back_with_the_next_step_it_had(declined):
    before = declined.explain()
    checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    after = declined.explain()
    assert declined.attempts() == ["declined", "not_charged"]
    assert after["next_attempt_at"] == late_money_is_over(declined) > before["next_attempt_at"]
    assert after["reason"] == before["reason"]


def late_money_is_over(world):
    """The page may have been used: its money may come after it expired."""
    expired_at = max(row.unpaid_since for row in rows(world, tables.attempts) if row.unpaid_since)
    return (expired_at + world.ports.timings.expired_retry).isoformat()


def test_after_an_expired_link_the_next_step_comes_at_its_date_and_not_before(declined):
    due = declined.explain()["next_attempt_at"]
    checkout(declined)
    declined.run_for(5 * DAY, step=6 * HOUR)
    retried = declined.explain()["attempts"][2]
    assert retried["origin"] == "dunning"
    assert retried["submitted_at"] >= due


def test_an_expired_link_does_not_count_as_an_attempt_that_never_reached_the_card(world):
    world.subscribe("answer_lost_before")
    world.run_for(2.2 * HOUR, step=5 * MINUTE)
    assert world.attempts()[0] == "not_charged"
    with world.store.transaction() as connection:
        connection.execute(update(tables.invoices).values(next_attempt_at=None, enqueue_at=None,
                                                          reason="waits"))  # fmt: skip
    counted = rows(world, tables.invoices)[0].not_charged_count
    world.clock.advance(world.ports.timings.expired_retry)
    for _ in range(3):
        checkout(world)
        world.run_for(2.5 * HOUR, step=30 * MINUTE)
    assert rows(world, tables.invoices)[0].not_charged_count == counted
    assert world.explain()["reason"] == "waits"


def test_a_card_refused_on_the_page_keeps_the_slot_for_the_grace(declined):
    page = checkout(declined)
    _fail_on_page(declined, page)
    declined.run_for(50 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "submitted"]
    declined.run_for(20 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "declined"]


def test_a_customer_who_pays_with_the_second_card_on_the_page_has_paid_once(declined):
    page = checkout(declined)
    invoice = _fail_on_page(declined, page)
    declined.run_for(10 * MINUTE, step=MINUTE)
    invoice.status = "process_pending"
    pay(declined, page)
    declined.run_for(HOUR, step=5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.debits() == {INVOICE: 1}


def _fail_on_page(world, page):
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.acquirer._settle(
        invoice, "process_failed", "insufficient_funds", world.clock.now()
    )
    return invoice


# --- late money ---


def late_payment(world, page):
    """The gateway takes money on a page that it had called expired: no client can prevent that."""
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.acquirer.charge(invoice, world.clock.now())


def test_a_stale_page_that_is_paid_late_pays_the_invoice_if_it_is_still_owed(declined):
    page = checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    late_payment(declined, page)
    declined.run_for(1.5 * HOUR, step=5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]


def test_late_money_is_found_before_a_retry_and_the_retry_is_not_made(declined):
    page = checkout(declined)
    # The last recheck before the retry is a day after the page's end; the money comes after it.
    declined.run_for(1.5 * DAY, step=30 * MINUTE)
    late_payment(declined, page)
    declined.run_for(5 * DAY, step=6 * HOUR)
    assert declined.fate() == "paid"
    assert declined.debits() == {INVOICE: 1}


def test_a_stale_page_that_is_paid_after_a_retry_was_is_surplus_and_a_person_is_told(declined):
    page = checkout(declined)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    _let_the_card_pay(declined)
    declined.run_for(3.5 * DAY, step=3 * HOUR)
    assert declined.fate() == "paid"
    late_payment(declined, page)
    declined.run_for(5 * DAY, step=6 * HOUR)
    statuses = declined.attempts()
    assert statuses == ["declined", "surplus", "succeeded"]
    assert [e.alert for e in told(declined, "attempt.surplus")] == [True]


def _let_the_card_pay(world):
    _give_card(world, "approved.17")


def test_an_earlier_charge_that_flips_to_paid_refuses_the_link(world):
    world.subscribe("flips_to_processed")
    world.tick()
    world.clock.advance(20)
    with pytest.raises(NotPayable, match="turned out paid"):
        checkout(world)
    assert world.fate() == "paid"
    assert world.debits() == {INVOICE: 1}


def test_an_earlier_charge_that_is_pending_again_refuses_the_link(declined):
    invoice = declined.sandbox._books.with_reference("sub-1-p0-a1")[0]
    invoice.status = "process_pending"
    with pytest.raises(NotPayable, match="undecided again"):
        checkout(declined)
    assert declined.attempts()[-1] == "not_charged"


def test_a_link_whose_create_was_lost_does_not_keep_the_customer_from_the_next_one(declined):
    def lose_the_answer(request):
        if request.method == "POST":
            declined.transport.before_send = lambda _: declined.transport.__dict__.update(
                unreachable=True
            )

    declined.transport.before_send = lose_the_answer
    _give_card(declined, "create_answer_lost")
    with pytest.raises(GatewayError):
        checkout(declined)
    declined.transport.before_send = lambda _: None
    declined.transport.unreachable = False
    [lost] = declined.sandbox._books.with_reference("sub-1-p0-a2")
    assert lost.is_open
    pay(declined, checkout(declined))
    declined.run_for(5 * MINUTE)
    assert declined.attempts() == ["declined", "succeeded"]
    assert len(declined.sandbox._books.with_reference("sub-1-p0-a2")) == 1


def test_an_earlier_charge_that_cannot_be_asked_about_refuses_the_link(declined):
    declined.transport.unreachable = True
    with pytest.raises(GatewayError):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
@pytest.mark.parametrize("order", [*permutations(["link", "pay", "retry", "expire"])], ids="-".join)
def test_no_order_of_link_retry_and_late_payment_pays_an_invoice_twice_unnoticed(declined, order):
    world = declined
    _let_the_card_pay(world)
    page = None
    for event in order:
        match event:
            case "link":
                try:
                    page = checkout(world)
                except NotPayable:
                    page = None
            case "pay" if page:
                invoice = world.sandbox._books.with_id(page["gateway_id"])
                if invoice.is_open or invoice.status == "expired":
                    late_payment(world, page)
            case "retry":
                with world.store.transaction() as connection:
                    now = world.clock.now()
                    connection.execute(
                        update(tables.invoices)
                        .where(tables.invoices.c.status == "open")
                        .values(next_attempt_at=now, enqueue_at=now, next_origin="manual")
                    )
                world.run_for(2 * MINUTE)
            case "expire":
                world.run_for(2.5 * HOUR, step=30 * MINUTE)
    world.run_for(4 * DAY, step=8 * HOUR)
    debits = world.debits()[INVOICE]
    statuses = world.attempts()
    assert statuses.count("succeeded") == min(debits, 1)
    assert statuses.count("surplus") == max(debits - 1, 0)
    assert len(told(world, "attempt.surplus")) == max(debits - 1, 0)


# --- where a caller may die, or the gateway be silent ---


class Died(BaseException):
    """The process is gone: no handler runs."""


def dies_after(world, count):
    calls = []

    def before_send(_request):
        calls.append(_request)
        if len(calls) > count:
            raise Died

    world.transport.before_send = before_send


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


def overtaken(monkeypatch, ask):
    """What `ask` hands out to a second caller, while a first one asks the gateway and hands out
    nothing.
    """
    real = start.obtained
    pages = []

    def second_comes(*args, **options):
        monkeypatch.setattr(start, "obtained", real)
        pages.append(ask())
        return real(*args, **options)

    monkeypatch.setattr(start, "obtained", second_comes)
    with pytest.raises(ConcurrentChange):
        ask()
    [page] = pages
    return page


def test_a_caller_that_was_overtaken_hands_no_page_out(declined, monkeypatch):
    page = overtaken(monkeypatch, lambda: checkout(declined))
    assert declined.attempts() == ["declined", "submitted"]
    pay(declined, page)
    declined.run_for(5 * MINUTE)
    assert declined.debits() == {INVOICE: 1}


def test_a_slow_caller_whose_slot_was_given_back_hands_no_page_out(declined, monkeypatch):
    real = start.obtained

    def slept(*args, **options):
        declined.run_for(10 * MINUTE, step=MINUTE)
        return real(*args, **options)

    monkeypatch.setattr(start, "obtained", slept)
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
    _give_card(declined, token)
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


def _give_card(world, token):
    with world.store.transaction() as connection:
        connection.execute(update(tables.cards).values(token=world.vault.lock(Secret(token))))


@pytest.mark.parametrize(
    "token",
    ["wrong_amount", "wrong_currency", "wrong_payment_amount", "wrong_test_mode",
     "wrong_reference"],
)  # fmt: skip
def test_a_page_for_anything_but_what_was_ordered_is_not_handed_out(declined, token):
    _give_card(declined, token)
    with pytest.raises(NotPayable, match="expected"):
        checkout(declined)
    assert declined.attempts() == ["declined", "not_charged"]
    assert told(declined, "attempt.not_charged")[-1].alert


def test_a_token_that_the_gateway_refuses_opens_nothing(declined):
    _give_card(declined, "rejects_token")
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
    _answering(declined, lambda attributes: attributes.update(flow_data=flow))
    with pytest.raises(NotPayable, match="names no page"):
        checkout(declined)


def _answering(world, change, *, with_included=None):
    """Change the attributes, and the included resources, of every answer about one invoice."""
    real = world.transport.send

    def send(request, *, moves_money):
        response = real(request, moves_money=moves_money)
        document = json.loads(response.body, parse_float=Decimal)
        data = document.get("data")
        if isinstance(data, dict) and data.get("type") == "payment-invoices":
            change(data["attributes"])
            if with_included is not None:
                document["included"] = with_included(document.get("included", []))
        body = json.dumps(document, default=float).encode()
        return Response(response.status, body, response.content_type)

    world.transport.send = send


# --- records ---


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({}, "invoice"),
        ({"invoice": 1}, "invoice"),
        ({"invoice": INVOICE, "return_url": "ftp://x"}, "return_url"),
        ({"invoice": INVOICE, "amount": "1"}, "amount"),
    ],
)
def test_a_bad_record_of_a_link_names_its_field(record, field):
    with pytest.raises(BadRecord) as caught:
        parse_checkout(record)
    assert field in {fault.field for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"reference_id": None}, "reference_id"),
        ({"customer": {}}, "customer.reference_id"),
        ({"amount": 1.0}, "amount"),
        ({"amount": None}, "amount"),
        ({"currency": "usd"}, "currency"),
        ({"return_url": "javascript:1"}, "return_url"),
        # A charge that looks itself up by its reference would find this page's payment.
        ({"reference_id": "sub-1-p0-a1"}, "reference_id"),
    ],
)
def test_a_bad_record_of_a_card_page_names_its_field(change, field):
    record = {"reference_id": "card-1", "customer": {"reference_id": "c"}, "amount": "1.00",
              "currency": "USD", **change}  # fmt: skip
    with pytest.raises(BadRecord) as caught:
        parse_tokenisation(record)
    assert field in {fault.field for fault in caught.value.faults}


# --- tokenisation ---


def test_a_paid_card_page_stores_the_card_with_all_that_the_gateway_tells(world):
    pay(world, tokenise(world))
    world.run_for(MINUTE, step=timedelta(seconds=15))
    (card,) = rows(world, tables.cards)
    assert payment(world).status == "stored"
    assert payment(world).card_id == card.id
    assert (card.mask, card.brand, card.holder) == ("512381******0000", "mastercard", "JANE DOE")
    assert (card.expiry_month, card.expiry_year) == (12, 2032)
    assert (card.issuer_name, card.issuer_country) == ("FIRST DATA CORPORATION", "US")
    assert world.vault.unlock(card.token).reveal().startswith("approved.minted")


def test_the_order_of_a_card_page_is_the_one_of_the_seed(world):
    tokenise(world, description="TEST")
    assert sent(world)[-1]["data"]["attributes"] == {
        "test_mode": True, "reference_id": "card-1", "description": "TEST", "currency": "USD",
        "amount": 1, "customer": {"reference_id": "customer-of-sub-1"},
        "service": "payment_card_usd_hpp", "gateway_options": {"cardgate": {"tokenize": True}},
        "metadata": {"book": world.book.identity, "create": "create-1"},
    }  # fmt: skip


def test_a_stored_card_pays_what_its_customer_owes_from_then_on(world):
    world.subscribe(None)
    world.tick()
    assert world.explain()["reason"] == "card_missing"
    pay(world, tokenise(world))
    world.run_for(10 * MINUTE)
    assert world.fate() == "paid"
    assert world.debits() == {"card-1": 1, INVOICE: 1}


def test_a_subscription_with_a_good_card_keeps_it(world):
    world.subscribe("approved")
    pay(world, tokenise(world))
    world.run_for(10 * MINUTE)
    assert payment(world).status == "stored"
    assert rows(world, tables.subscriptions)[0].card_id == 1


def test_polling_again_and_again_stores_the_card_once(world):
    page = tokenise(world)
    pay(world, page)
    for _ in range(3):
        world.run_for(MINUTE, step=timedelta(seconds=20))
        with world.store.transaction() as connection:
            connection.execute(
                update(tables.hosted_payments).values(next_poll_at=world.clock.now())
            )
    world.tick()
    assert len(rows(world, tables.cards)) == 1
    assert len(told(world, "card.stored")) == 1
    assert payment(world).next_poll_at is None


def test_the_first_payment_is_booked_to_the_invoice_it_names(declined):
    page = tokenise(declined, invoice=INVOICE)
    assert page["gateway_reference"] == "sub-1-p0-a2"
    assert (page["amount"], page["invoice"]) == ("9.99", INVOICE)
    pay(declined, page)
    declined.run_for(5 * MINUTE)
    assert declined.fate() == "paid"
    assert declined.attempts() == ["declined", "succeeded"]
    assert declined.debits() == {INVOICE: 1}
    assert payment(declined).status == "stored"


def test_a_card_page_for_an_invoice_takes_its_one_slot(declined):
    tokenise(declined, invoice=INVOICE)
    with pytest.raises(SlotTaken):
        checkout(declined)
    with pytest.raises(SlotTaken):
        tokenise(declined, "card-2", invoice=INVOICE)
    declined.run_for(50 * MINUTE, step=5 * MINUTE)
    assert declined.attempts() == ["declined", "submitted"]


def test_a_card_page_that_nobody_pays_gives_the_invoice_back(declined):
    before = declined.explain()["next_attempt_at"]
    tokenise(declined, invoice=INVOICE)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    assert declined.attempts() == ["declined", "not_charged"]
    assert declined.explain()["next_attempt_at"] == late_money_is_over(declined) > before
    assert (payment(declined).status, payment(declined).outcome) == ("unpaid", "expired")


def test_a_card_page_for_somebody_elses_invoice_or_another_amount_is_refused(declined):
    with pytest.raises(InvalidInput, match="another customer"):
        tokenise(declined, customer="stranger", invoice=INVOICE)
    with pytest.raises(InvalidInput, match=r"asks for 9\.99"):
        tokenise(declined, invoice=INVOICE, amount="1.00", currency="USD")


def test_the_same_reference_is_the_same_page_and_other_contents_are_a_conflict(world):
    first = tokenise(world)
    assert tokenise(world)["action"] == first["action"]
    assert world.sandbox.requests.total("create") == 1
    with pytest.raises(InvalidInput, match="other contents"):
        tokenise(world, description="another")


@pytest.mark.parametrize("answer", ["lost", "error"])
def test_a_card_page_whose_create_got_no_answer_is_polled_for_before_it_is_repeated(world, answer):
    real = world.transport.send

    def once(request, *, moves_money):
        if request.method == "POST":
            world.transport.send = real
            if answer == "lost":
                real(request, moves_money=moves_money)
            raise OutcomeUnknown("connection closed")
        raise OutcomeUnknown("gateway away")

    world.transport.send = once
    if answer == "lost":
        tokenise(world)
        assert world.sandbox.requests.for_reference("create", "card-1") == 1
        return
    with pytest.raises(OutcomeUnknown):
        tokenise(world)
    tokenise(world)
    assert world.sandbox.requests.for_reference("create", "card-1") == 1
    assert payment(world).status == "open"


def test_of_two_callers_for_one_card_page_only_the_newer_hands_it_out(world, monkeypatch):
    page = overtaken(monkeypatch, lambda: tokenise(world))
    assert payment(world).gateway_id == page["gateway_id"]


def test_a_card_page_for_an_invoice_is_continued_by_its_reference(declined):
    dies_after(declined, 1)
    with pytest.raises(Died):
        tokenise(declined, invoice=INVOICE)
    declined.transport.before_send = lambda _: None
    page = tokenise(declined, invoice=INVOICE)
    assert page["gateway_reference"] == "sub-1-p0-a2"
    assert declined.attempts() == ["declined", "submitted"]


def test_a_card_page_that_the_gateway_refuses_is_used_up_and_gives_the_invoice_back(declined):
    real = declined.transport.send

    def refuse(request, *, moves_money):
        if request.method == "POST":
            body = b'{"errors":[{"title":"Unprocessable Content","status":"422"}]}'
            return Response(422, body, "application/json")
        return real(request, moves_money=moves_money)

    declined.transport.send = refuse
    with pytest.raises(GatewayError, match="422"):
        tokenise(declined, invoice=INVOICE)
    assert declined.attempts() == ["declined", "not_charged"]
    assert payment(declined).outcome.startswith("gateway refused the page")


def test_a_card_page_that_its_caller_never_handed_out_is_given_up(world):
    dies_after(world, 0)
    with pytest.raises(Died):
        tokenise(world)
    world.transport.before_send = lambda _: None
    world.run_for(10 * MINUTE, step=MINUTE)
    assert (payment(world).status, payment(world).outcome) == ("unpaid", "never_handed_out")
    with pytest.raises(NotPayable, match="use a new reference_id"):
        tokenise(world)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # about rules, not about SQL
@pytest.mark.parametrize("payload", [None, [], {"token": None}, {"payment_card": {"mask": "5*1"}}])
def test_a_paid_page_without_a_token_has_a_typed_reason_and_is_asked_about_for_a_month(
    world, payload
):
    page = tokenise(world)
    _answering(world, lambda attributes: attributes.update(payload=payload))
    pay(world, page)
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert (payment(world).status, payment(world).outcome) == ("no_card", "token_missing")
    (event,) = told(world, "card.not_stored")
    assert event.alert
    assert event.data["needs"] == "the customer enters the card once more, on a new page"
    polls = world.sandbox.requests.total("look")
    world.run_for(40 * DAY, step=6 * HOUR)
    assert world.sandbox.requests.total("look") == polls + 5
    assert payment(world).next_poll_at is None
    assert len(told(world, "card.not_stored")) == 1


def test_a_token_that_is_minted_after_the_first_poll_still_stores_the_card(world):
    page = tokenise(world)
    late = [True]
    _answering(world, lambda a: a.update(payload=None) if late[0] else None)
    pay(world, page)
    world.run_for(MINUTE, step=timedelta(seconds=15))
    assert payment(world).status == "no_card"
    late[0] = False
    world.run_for(2 * HOUR, step=10 * MINUTE)
    assert payment(world).status == "stored"
    assert len(rows(world, tables.cards)) == 1


def test_a_token_that_the_gateway_links_to_another_customer_is_not_stored(world):
    page = tokenise(world)

    def somebody_else(included):
        for resource in included:
            resource["attributes"]["reference_id"] = "somebody-else"
        return included

    _answering(world, lambda _: None, with_included=somebody_else)
    pay(world, page)
    world.run_for(HOUR, step=10 * MINUTE)
    assert payment(world).outcome == "token_of_another_customer"
    assert rows(world, tables.cards) == []
    assert told(world, "card.not_stored")[0].alert


def test_a_token_that_is_stored_for_another_customer_is_not_stored_again(world):
    pay(world, tokenise(world, "card-1", "customer-1"))
    world.run_for(MINUTE, step=timedelta(seconds=15))
    (card,) = rows(world, tables.cards)
    token = world.vault.unlock(card.token).reveal()
    page = tokenise(world, "card-2", "customer-2")
    pay(world, page)
    _answering(world, lambda attributes: attributes["payload"].update(token=token))
    world.run_for(HOUR, step=10 * MINUTE)
    assert payment(world).outcome == "token_of_another_customer"
    assert len(rows(world, tables.cards)) == 1


def test_a_card_page_that_is_paid_late_still_stores_the_card(world):
    page = tokenise(world)
    world.run_for(2.5 * HOUR, step=15 * MINUTE)
    assert payment(world).status == "unpaid"
    invoice = world.sandbox._books.with_id(page["gateway_id"])
    world.sandbox._books.mint_token(invoice)
    late_payment(world, page)
    world.run_for(1.5 * HOUR, step=5 * MINUTE)
    assert payment(world).status == "stored"


def test_a_page_paid_with_another_amount_stores_nothing_and_alerts_once(world):
    page = tokenise(world)
    pay(world, page)
    _answering(world, lambda attributes: attributes.update(amount=2))
    world.run_for(2 * HOUR, step=15 * MINUTE)
    assert payment(world).status == "open"
    assert rows(world, tables.cards) == []
    assert [e.alert for e in told(world, "card_page.looked")] == [True]


def test_no_secret_of_a_page_can_be_printed_by_accident(world):
    said = world.ports.gateway.poll_hosted(tokenise(world)["gateway_id"], [])
    assert isinstance(said, HostedStatement)
    assert "hpp/" not in repr(said)


def test_the_address_of_a_page_and_what_it_submits_are_in_no_event(declined):
    """Whoever reads the history must not be able to pay, or to take a page over."""

    def post(attributes):
        attributes["flow_data"]["params"] = {"one": "sesame} open", "two": "abracadabra"}
        attributes["flow_data"]["method"] = "POST"

    _answering(declined, post)
    page = checkout(declined)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert page["params"] == {"one": "sesame} open", "two": "abracadabra"}
    tokenise(declined)
    written = json.dumps([event.data for event in rows(declined, tables.events)])
    assert "abracadabra" not in written
    assert "sesame" not in written
    assert page["action"].rpartition("/")[2] not in written
    assert "/hpp/" not in written.replace("\\", "")


# --- a page is for what is owed and undoubted, as long as it is ---


def served(world, page):
    name = page["pay_path"].removeprefix("/pay/")
    return page_behind(world.store, world.vault, name) is not None


LINK, CARD_PAGE = pytest.param(checkout, id="link"), pytest.param(
    lambda world: tokenise(world, invoice=INVOICE), id="card page"
)  # fmt: skip
EITHER = pytest.mark.parametrize("ask", [LINK, CARD_PAGE])


def called_back(world, number=1):
    """The gateway calls back about an attempt, and we ask."""
    with world.store.transaction() as connection:
        gateway_id = world.explain()["attempts"][number - 1]["gateway_id"]
        key = callbacks.poll_now(connection, gateway_id, world.clock.now())
    world.run("look", (key.attempt_id,))


def at_gateway(world, number=1):
    (invoice,) = world.sandbox._books.with_reference(f"{INVOICE}-a{number}")
    return invoice


@EITHER
def test_a_page_is_neither_served_nor_given_again_once_an_earlier_charge_has_paid(world, ask):
    world.subscribe("flips_to_processed")
    world.tick()
    page = ask(world)
    world.clock.advance(30)
    called_back(world)
    assert world.fate() == "paid"
    assert not served(world, page)
    with pytest.raises(NotPayable, match="is paid"):
        ask(world)


@EITHER
def test_an_open_page_is_not_served_while_an_earlier_charge_is_undecided_again(declined, ask):
    page = ask(declined)
    assert served(declined, page)
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    assert not served(declined, page)
    with pytest.raises(NotPayable, match="a1 is undecided again"):
        ask(declined)
    at_gateway(declined).status = "process_failed"
    called_back(declined)
    assert served(declined, page)
    assert ask(declined)["action"] == page["action"]


@EITHER
def test_no_page_opens_when_an_earlier_charge_is_undecided_again_while_it_is_created(declined, ask):
    real = declined.transport.send

    def send(request, *, moves_money):
        response = real(request, moves_money=moves_money)
        if request.method == "POST":
            at_gateway(declined).status = "process_pending"
            called_back(declined)
        return response

    declined.transport.send = send
    with pytest.raises(NotPayable, match="a1 is undecided again"):
        ask(declined)
    assert declined.attempts() == ["declined", "not_charged"]


def test_what_is_undecided_again_is_dated_until_it_is_final_or_paid(declined):
    def since():
        return rows(declined, tables.attempts)[0].undecided_since

    assert since() is None
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    first = since()
    assert first == declined.clock.now()
    declined.clock.advance(10 * MINUTE)
    called_back(declined)
    assert since() == first
    at_gateway(declined).status = "expired"
    called_back(declined)
    assert since() is None
    at_gateway(declined).status = "process_pending"
    called_back(declined)
    declined.sandbox._books.acquirer.charge(at_gateway(declined), declined.clock.now())
    called_back(declined)
    assert declined.attempts() == ["succeeded"]
    assert since() is None


@EITHER
def test_no_page_opens_after_a_decline_that_may_have_been_a_payment(world, ask):
    world.subscribe("decline_duplicated_transaction")
    world.tick()
    with pytest.raises(NotPayable, match="a1 may have been paid"):
        ask(world)
    assert world.attempts() == ["declined"]


@EITHER
@pytest.mark.parametrize("change", ["cancelled", "paused", "sales stopped"])
def test_an_open_page_is_not_served_once_its_invoice_may_not_be_collected(declined, ask, change):
    page = ask(declined)
    match change:
        case "cancelled":
            lifecycle.cancel(declined.store, declined.clock, "sub-1", at_period_end=False, by="t")
        case "paused":
            lifecycle.pause(declined.store, declined.clock, "sub-1", by="t")
        case _:
            with declined.store.transaction() as connection:
                now = declined.clock.now()
                turn_sales(connection, on=False, by="t", reason="r", now=now)
    assert not served(declined, page)
    with pytest.raises(NotPayable):
        ask(declined)
    if change == "sales stopped":
        with declined.store.transaction() as connection:
            turn_sales(connection, on=True, by="t", reason="r", now=declined.clock.now())
        assert served(declined, page)


@EITHER
def test_a_page_that_is_refused_leaves_neither_an_attempt_nor_an_alert(declined, ask):
    lifecycle.pause(declined.store, declined.clock, "sub-1", by="t")
    before = len(rows(declined, tables.events))
    for _ in range(3):
        with pytest.raises(NotPayable, match="subscription is paused"):
            ask(declined)
    assert declined.attempts() == ["declined"]
    assert len(rows(declined, tables.events)) == before
    assert rows(declined, tables.hosted_payments) == []


def test_a_link_whose_card_is_dead_by_now_is_not_given_again(declined):
    checkout(declined)
    with declined.store.transaction() as connection:
        connection.execute(update(tables.cards).values(unusable_reason="lost"))
    with pytest.raises(NotPayable, match="card_unusable: lost"):
        checkout(declined)


def test_a_link_given_again_is_no_second_try_on_its_card(declined):
    """The last one that a network allows may still be asked for twice."""
    _decline_elsewhere(declined, 8)
    page = checkout(declined)
    assert checkout(declined)["action"] == page["action"]
    _decline_elsewhere(declined, 1)
    declined.run_for(2.5 * HOUR, step=15 * MINUTE)
    with pytest.raises(NotPayable, match="10_declines"):
        checkout(declined)


def _decline_elsewhere(world, count):
    """So many declines of another, void invoice on the Mastercard of the world's first attempt."""
    invoice, attempt = rows(world, tables.invoices)[0], rows(world, tables.attempts)[0]
    so_far = len(rows(world, tables.attempts))
    with world.store.transaction() as connection:
        connection.execute(update(tables.cards).values(brand="mastercard"))
        for n in range(so_far, so_far + count):
            other = {"id": 100 + n, "reference_id": f"other-{n}", "period_number": 100 + n}
            void = {"status": "void", "enqueue_at": None, "next_attempt_at": None}
            connection.execute(tables.invoices.insert(), invoice._asdict() | other | void)
            connection.execute(
                tables.attempts.insert(),
                attempt._asdict()
                | {"id": 100 + n, "reference_id": f"other-{n}-a1", "invoice_id": 100 + n}
                | {"gateway_id": f"cpi_other{n}", "next_poll_at": None},
            )


# --- the card that was asked for ---


def default_card(world, reference="sub-1"):
    (card_id,) = (
        s.card_id for s in rows(world, tables.subscriptions) if s.reference_id == reference
    )
    return card_id


def test_a_card_that_the_customer_was_asked_for_replaces_one_that_could_still_be_charged(world):
    world.subscribe("decline_declined")
    world.run_for(5 * DAY, step=8 * HOUR)
    assert [event.data["reason"] for event in told(world, "card.needed")]
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    assert default_card(world) == payment(world).card_id
    assert world.fate() == "paid"
    assert world.explain()["attempts"][-1]["origin"] == "new_card"
    assert world.debits() == {"card-1": 1, INVOICE: 1}


def test_a_card_that_a_customer_enters_for_something_else_does_not_revive_a_suspended_one(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=12 * HOUR)
    assert rows(world, tables.subscriptions)[0].status == "suspended"
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "uncollectible"
    assert rows(world, tables.subscriptions)[0].status == "suspended"
    assert world.debits() == {"card-1": 1}


def test_the_card_of_a_page_brings_a_suspended_one_back_once_somebody_gives_it_for_that(world):
    world.subscribe("decline_insufficient_funds")
    world.run_for(25 * DAY, step=12 * HOUR)
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    use_card(world.store, world.clock, subscription_reference="sub-1",
             card_id=payment(world).card_id, by="ann", why="wants it back")  # fmt: skip
    world.tick()
    assert (world.fate(), rows(world, tables.subscriptions)[0].status) == ("paid", "active")


def test_the_card_that_pays_an_invoice_on_its_page_becomes_its_subscriptions_default(world):
    world.subscribe("decline_insufficient_funds")
    world.subscribe("approved", "sub-2", customer={"reference_id": "customer-of-sub-1"})
    world.tick()
    pay(world, tokenise(world, invoice=INVOICE))
    world.run_for(HOUR, step=5 * MINUTE)
    assert world.fate() == "paid"
    assert default_card(world) == payment(world).card_id
    assert default_card(world, "sub-2") != payment(world).card_id
    assert world.debits() == {INVOICE: 1, "sub-2-p0": 1}


def test_a_card_for_several_subscriptions_is_stored_once_with_all_that_is_known_of_it(world):
    world.subscribe(None, "sub-1")
    world.subscribe(None, "sub-2", customer={"reference_id": "customer-of-sub-1"})
    world.tick()
    pay(world, tokenise(world))
    world.run_for(HOUR, step=5 * MINUTE)
    (card,) = rows(world, tables.cards)
    assert (card.holder, card.issuer_name) == ("JANE DOE", "FIRST DATA CORPORATION")
    assert default_card(world, "sub-1") == default_card(world, "sub-2") == card.id
    assert (world.fate(), world.fate("sub-2-p0")) == ("paid", "paid")


@pytest.mark.parametrize("year", ["20312", "100", "1999", 2101])
def test_a_card_with_a_year_that_is_none_is_stored_without_it(world, year):
    world.subscribe(None)
    world.tick()
    page = tokenise(world)
    pay(world, page)

    def misprint(attributes):
        if attributes["payload"]:
            attributes["payload"]["payment_card"]["expiry_year"] = year

    _answering(world, misprint)
    world.run_for(HOUR, step=5 * MINUTE)
    (card,) = rows(world, tables.cards)
    assert card.expiry_year is None
    assert world.fate() == "paid"


def test_a_bug_in_the_poll_at_one_page_is_alerted_and_keeps_no_other_waiting(world, monkeypatch):
    first, second = tokenise(world, "card-1"), tokenise(world, "card-2", "customer-2")
    pay(world, first)
    pay(world, second)
    real = poll.settle_page

    def trips_over_the_first(ports, payment, *rest):
        if payment.reference_id == "card-1":
            raise ValueError("year 20312 is out of range")
        return real(ports, payment, *rest)

    monkeypatch.setattr(poll, "settle_page", trips_over_the_first)
    with capture_logs() as logs:
        world.run_for(MINUTE, step=timedelta(seconds=15))
    states = {row.reference_id: row.status for row in rows(world, tables.hosted_payments)}
    assert states == {"card-1": "open", "card-2": "stored"}
    alerts = [log for log in logs if log["event"] == "billing.alert"]
    assert {(log["kind"], log["page"]) for log in alerts} == {("hosted.crashed", "card-1")}
    monkeypatch.undo()
    world.run_for(5 * MINUTE)
    assert {row.status for row in rows(world, tables.hosted_payments)} == {"stored"}


def test_a_page_that_paid_an_invoice_and_brought_no_card_says_so_in_the_invoices_history(declined):
    page = tokenise(declined, invoice=INVOICE)
    _answering(declined, lambda attributes: attributes.update(payload=None))
    pay(declined, page)
    declined.run_for(MINUTE, step=timedelta(seconds=10))
    assert declined.fate() == "paid"
    (entry,) = (e for e in declined.explain()["history"] if e["kind"] == "card.not_stored")
    assert entry["alert"]
    assert entry["data"]["reason"] == "token_missing"
