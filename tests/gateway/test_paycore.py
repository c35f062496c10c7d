"""What each verb of the port asks for, and what it concludes from the answer."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from billing_worker.domain.errors import (
    InvalidInput,
    LookUpUnreliable,
    NotSent,
    OutcomeUnknown,
    Refused,
)
from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.domain.statement import Statement
from billing_worker.gateway import answer_bodies
from billing_worker.gateway.paycore import PaycoreGateway
from billing_worker.gateway.port import Gateway
from tests.gateway.samples import (
    BASIC,
    BEARER,
    GATEWAY_ID,
    PASSWORD,
    TOKEN,
    body,
    canned,
    exact,
    invoice,
    listed,
    order,
    paycore,
    settings,
)
from tests.gateway.wire_server import WireServer, answer

CREATED = answer(201, body("06"))
NOT_FOUND = answer(404, {"errors": [{"title": "Not Found", "status": "404"}]})
UNAUTHORIZED = answer(401, {"errors": [{"title": "Unauthorized", "status": "401"}]})


def test_the_adapter_fits_the_port():
    gateway: Gateway = paycore("http://gateway.example")
    assert isinstance(gateway, PaycoreGateway)


# --- create ---


def create(calls, *, amount="1", act=CREATED, configured=None, **changes):
    with WireServer([act]) as server:
        statement = paycore(server.url, **configured or {}).create(order(amount, **changes), calls)
    (request,) = server.requests
    return statement, request


def test_the_create_request_is_the_one_of_the_seed(calls):
    _, request = create(calls)
    assert (request.method, request.target) == ("POST", "/api/payment-invoices")
    assert exact(request.body) == exact(body("05"))
    assert request.headers["authorization"] == f"Basic {BASIC}"
    assert request.headers["content-type"] == "application/json"


def test_optional_attributes_are_sent_only_when_given(calls):
    _, request = create(
        calls,
        configured={"callback_url": "https://us.example/callbacks"},
        customer_name="John Doe",
        customer_email="john@example.com",
        description="Pro plan",
    )
    expected = exact(body("05"))["data"]["attributes"]
    expected["customer"] |= {"name": "John Doe", "email": "john@example.com"}
    expected |= {"description": "Pro plan", "callback_url": "https://us.example/callbacks"}
    assert exact(request.body)["data"]["attributes"] == expected


@pytest.mark.parametrize(
    ("money", "on_the_wire"),
    [
        (Money.parse("1", "USD"), b'"amount": 1,'),
        (Money.parse("9.99", "USD"), b'"amount": 9.99,'),
        (Money.parse("9.90", "USD"), b'"amount": 9.9,'),
        (Money.parse("100", "USD"), b'"amount": 100,'),
        (Money.parse("0.07", "USD"), b'"amount": 0.07,'),
        (Money.parse("1000000000", "USD"), b'"amount": 1000000000,'),
        (Money.parse("999999999.99", "USD"), b'"amount": 999999999.99,'),
        (Money.parse("500", "JPY"), b'"amount": 500,'),
        (Money.parse("1.234", "KWD"), b'"amount": 1.234,'),
    ],
    ids=str,
)
def test_an_amount_is_an_exact_json_number(money, on_the_wire, calls):
    _, request = create(calls, money=money)
    assert on_the_wire in request.body
    assert request.json["data"]["attributes"]["currency"] == money.currency


@pytest.mark.parametrize(
    ("template", "service"),
    [
        ("payment_card_{currency}_hpp", "payment_card_eur_hpp"),
        ("card_{currency}", "card_eur"),
        ("cards", "cards"),
    ],
)
def test_the_service_follows_the_template_in_lower_case(template, service, calls):
    _, request = create(
        calls, money=Money.parse("1", "EUR"), configured={"service_template": template}
    )
    assert request.json["data"]["attributes"]["service"] == service


@pytest.mark.parametrize("test_mode", [True, False])
def test_the_test_mode_of_the_order_is_sent(test_mode, calls):
    _, request = create(calls, test_mode=test_mode, configured={"test_mode": None})
    assert request.json["data"]["attributes"]["test_mode"] is test_mode


def test_an_order_of_the_other_test_mode_is_never_sent(calls):
    with WireServer([CREATED]) as server, pytest.raises(NotSent, match="test mode"):
        paycore(server.url, test_mode=True).create(order(test_mode=False), calls)
    assert server.connections == 0


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/payment-invoices"),
        ("/", "/payment-invoices"),
        ("/api", "/api/payment-invoices"),
        ("/api/", "/api/payment-invoices"),
        ("/a/b", "/a/b/payment-invoices"),
    ],
)
def test_the_api_url_is_used_exactly_as_configured(suffix, path, calls):
    with WireServer([CREATED]) as server:
        gateway = paycore(server.url, api_url=server.url + suffix)
        gateway.create(order(), calls)
        gateway.poll(GATEWAY_ID, calls)
    targets = [request.target for request in server.requests]
    assert targets == [path, f"{path}/{GATEWAY_ID}"]
    assert [call.path for call in calls] == targets


@pytest.mark.parametrize("status", [200, 201, 202])
def test_a_created_invoice_becomes_a_statement(status, calls):
    statement, _ = create(calls, act=answer(status, body("06")))
    assert statement == Statement(
        gateway_id=GATEWAY_ID,
        status="process_pending",
        resolution="ok",
        reference_id="test_live_recurrent_11",
        amount=Decimal(1),
        payment_amount=Decimal(1),
        processed_amount=None,
        currency="USD",
        test_mode=True,
        moderation_required=False,
        bearer=Secret("eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzUxMiJ9*****"),
        created_at=datetime(2020, 3, 25, 22, 24, 15, tzinfo=UTC),
    )


def test_the_name_of_a_create_is_sent_and_read_where_it_is_echoed(calls):
    echoed = invoice(metadata={"book": "b", "create": "c-1"})
    with WireServer([answer(201, echoed)]) as server:
        statement = paycore(server.url).create(order(book="b", create="c-1"), calls)
    (request,) = server.requests
    assert exact(request.body)["data"]["attributes"]["metadata"] == {"book": "b", "create": "c-1"}
    assert (statement.owner.book, statement.create) == ("b", "c-1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        {"data": None},
        {"data": []},
        {"data": [invoice()["data"]]},
        {"data": {}},
        {"data": invoice()["data"] | {"id": None}},
        {"data": invoice()["data"] | {"id": 17}},
        {"data": invoice()["data"] | {"id": ""}},
        {"data": invoice()["data"] | {"id": "../refunds"}},
        {"data": invoice()["data"] | {"id": "a" * 129}},
        {"data": invoice()["data"] | {"type": "refunds"}},
        {"data": invoice()["data"] | {"attributes": []}},
        {"errors": [{"title": "Unprocessable Content"}]},
    ],
    ids=lambda content: str(content)[:50],
)
def test_a_success_without_a_readable_invoice_is_unknown(content, calls):
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(OutcomeUnknown) as caught:
        create(calls, act=answer(201, encoded))
    assert caught.value.http_status == 201
    assert calls[0].outcome.startswith("unknown: 201")


@pytest.mark.parametrize(
    "link",
    [
        f"https://evil.example/api/payment-invoices/{GATEWAY_ID}",
        f"//evil.example/payment-invoices/{GATEWAY_ID}",
        f"/api/payment-invoices/{GATEWAY_ID}/../cpi_other",
        f"/api/payment-invoices/{GATEWAY_ID}?as=admin",
        "/api/payment-invoices/cpi_other",
        f"payment-invoices/{GATEWAY_ID}",
        "",
        17,
    ],
)
def test_a_self_link_that_leads_elsewhere_makes_the_create_unknown(link, calls):
    found = invoice()
    found["data"]["links"] = {"self": link}
    with pytest.raises(OutcomeUnknown, match=r"links\.self"):
        canned(201, found).create(order(), calls)


@pytest.mark.parametrize(
    "links",
    [
        None,
        [],
        {},
        {"self": None},
        {"self": f"/payment-invoices/{GATEWAY_ID}"},
        {"self": f"/api/v2/payment-invoices/{GATEWAY_ID}"},
    ],
)
def test_a_missing_or_relative_self_link_is_fine(links, calls):
    found = invoice()
    found["data"]["links"] = links
    assert canned(201, found).create(order(), calls).gateway_id == GATEWAY_ID


def test_a_clear_4xx_in_the_gateways_own_shape_is_a_refusal(calls):
    with pytest.raises(Refused, match="422 Unprocessable Content") as caught:
        create(calls, act=answer(422, body("93")))
    assert caught.value.http_status == 422


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 504])
def test_any_other_error_leaves_a_create_unknown(status, calls):
    with pytest.raises(OutcomeUnknown) as caught:
        create(calls, act=answer(status, body("93")))
    assert caught.value.http_status == status


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        {},
        [],
        {"errors": []},
        {"errors": {}},
        {"errors": ["Unprocessable"]},
        {"error": "Unprocessable"},
        {"error": {"message": None}},
        {"errors": [{"title": "x"}], "data": {"id": "cpi_1"}},
    ],
    ids=str,
)
def test_a_4xx_that_does_not_say_why_leaves_a_create_unknown(content, calls):
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(OutcomeUnknown, match="status 422") as caught:
        create(calls, act=answer(422, encoded))
    assert caught.value.reads_like_a_refusal


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"message": "Forbidden"}, "422 Forbidden"),
        ({"code": 1002, "message": "card token is dead"}, "422 card token is dead"),
        ({"error": {"message": "card token is dead"}}, "422 card token is dead"),
        (
            {"message": "The given data was invalid.", "errors": {"amount": ["is too small"]}},
            "422 amount: is too small",
        ),
    ],
    ids=str,
)
def test_a_4xx_of_another_label_says_why_it_refuses(content, said, calls):
    with pytest.raises(Refused) as caught:
        create(calls, act=answer(422, json.dumps(content).encode()))
    assert caught.value.reason == said


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503])
def test_some_statuses_never_read_like_a_refusal(status, calls):
    with pytest.raises(OutcomeUnknown) as caught:
        create(calls, act=answer(status, b'{"message": "no"}'))
    assert not caught.value.reads_like_a_refusal


# --- find ---


def test_find_asks_in_the_documented_form(calls):
    with WireServer([answer(200, body("94"))]) as server:
        (found,) = paycore(server.url).find("ORDER1233", calls)
    assert found.gateway_id == "cpi_XXXXXXXXXXXXXXXX"
    assert found.amount == Decimal(1)
    (request,) = server.requests
    assert request.method == "GET"
    assert request.target == "/api/payment-invoices/?filter%5Breference_id%5D=ORDER1233"
    assert request.headers["authorization"] == f"Basic {BASIC}"


def test_a_reference_cannot_add_parameters_or_change_the_path(calls):
    reference = "a&b=c/../d?e#f g%é"
    with WireServer([answer(200, listed(invoice(reference_id=reference)))]) as server:
        (found,) = paycore(server.url).find(reference, calls)
    assert found.reference_id == reference
    encoded = "a%26b%3Dc%2F..%2Fd%3Fe%23f%20g%25%C3%A9"
    assert server.requests[0].target == f"/api/payment-invoices/?filter%5Breference_id%5D={encoded}"


@pytest.mark.parametrize("status", [404, 405, 301, 308])
def test_find_tries_once_without_the_slash(status, calls):
    with WireServer([answer(status), answer(200, body("94"))]) as server:
        assert len(paycore(server.url).find("ORDER1233", calls)) == 1
    paths = [request.target.partition("?")[0] for request in server.requests]
    assert paths == ["/api/payment-invoices/", "/api/payment-invoices"]
    assert [call.path for call in calls] == [request.target for request in server.requests]
    assert [call.outcome[:8] for call in calls] == ["unknown:", "200"]


def test_find_without_the_slash_is_not_tried_for_ever(calls):
    with WireServer([NOT_FOUND]) as server, pytest.raises(OutcomeUnknown, match="404"):
        paycore(server.url).find("ORDER1233", calls)
    assert len(server.requests) == len(calls) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 422, 429, 500, 503])
def test_find_never_refuses(status, calls):
    with WireServer([answer(status, body("93"))]) as server:
        with pytest.raises(OutcomeUnknown) as caught:
            paycore(server.url).find("ORDER1233", calls)
        assert caught.value.http_status == status
    assert len(server.requests) == 1


def test_nothing_found_is_an_empty_list(calls):
    assert canned(200, {"data": []}).find("ORDER1233", calls) == []


@pytest.mark.parametrize("other", ["ORDER12", "ORDER12333", "order1233", "ORDER1233 "])
@pytest.mark.parametrize("ours", [[], ["ORDER1233"]])
def test_a_list_with_other_references_proves_nothing(other, ours, calls):
    content = listed(*(invoice(reference_id=said) for said in [other, *ours]))
    with pytest.raises(LookUpUnreliable, match="other references"):
        canned(200, content).find("ORDER1233", calls)
    assert calls[-1].outcome.startswith("unknown: ")


@pytest.mark.parametrize("link", ["/api/payment-invoices?page=2", {"href": "/x"}])
@pytest.mark.parametrize("ours", [[], ["ORDER1233"]])
def test_a_list_that_goes_on_proves_nothing(link, ours, calls):
    content = listed(*(invoice(reference_id=said) for said in ours)) | {"links": {"next": link}}
    with pytest.raises(LookUpUnreliable, match="another page"):
        canned(200, content).find("ORDER1233", calls)


@pytest.mark.parametrize("links", [None, [], {}, {"next": None}, {"next": ""}, "", 7])
def test_a_list_that_is_whole_may_say_so_as_it_likes(links, calls):
    content = listed(invoice(reference_id="ORDER1233")) | {"links": links}
    assert len(canned(200, content).find("ORDER1233", calls)) == 1


def test_a_list_as_long_as_a_page_proves_nothing(calls):
    rows = [invoice(reference_id="R")] * answer_bodies.FULL_PAGE
    assert len(canned(200, listed(*rows[1:])).find("R", calls)) == answer_bodies.FULL_PAGE - 1
    with pytest.raises(LookUpUnreliable, match="cut off"):
        canned(200, listed(*rows)).find("R", calls)


@pytest.mark.parametrize("reference", ["-sub-1-p0-a1", "a,b-p0-a1"])
def test_an_empty_list_proves_nothing_for_a_reference_that_reads_as_an_expression(reference, calls):
    with pytest.raises(LookUpUnreliable, match="expression"):
        canned(200, {"data": []}).find(reference, calls)
    known = listed(invoice(reference_id=reference))
    assert len(canned(200, known).find(reference, calls)) == 1


def test_the_newest_invoice_comes_last(calls):
    ages = {"processed": 300, "expired": 100, "process_failed": 200, "created": 300}
    content = listed(
        *(invoice(reference_id="R", status=status, created=age) for status, age in ages.items())
    )
    found = canned(200, content).find("R", calls)
    assert [s.status for s in found] == ["expired", "process_failed", "processed", "created"]


def test_without_a_date_an_invoice_is_the_oldest(calls):
    content = listed(
        invoice(reference_id="R", status="processed", created=5),
        invoice(reference_id="R", status="expired", created=None),
    )
    found = canned(200, content).find("R", calls)
    assert [s.status for s in found] == ["expired", "processed"]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"data": None},
        {"data": {}},
        {"data": invoice()["data"]},
        {"data": ["cpi_1"]},
        {"data": [None]},
        {"data": [{"id": "cpi_1", "attributes": []}]},
        listed(invoice(reference_id="R", status=None)),
        listed(invoice(reference_id="R", amount="9,99")),
        listed(invoice(reference_id="R"), invoice(reference_id=None)),
        b"<html>",
    ],
    ids=lambda content: str(content)[:60],
)
def test_a_list_of_wrong_shape_is_unknown(content, calls):
    with pytest.raises(OutcomeUnknown):
        canned(200, content).find("R", calls)


# --- look ---


def test_poll_asks_for_one_invoice(calls):
    with WireServer([answer(200, body("17"))]) as server:
        statement = paycore(server.url).poll("cpi_zGmR6BYegfcNmFet", calls)
    assert (statement.status, statement.processed_amount) == ("processed", Decimal(2))
    (request,) = server.requests
    assert (request.method, request.target) == (
        "GET",
        "/api/payment-invoices/cpi_zGmR6BYegfcNmFet",
    )
    assert request.headers["authorization"] == f"Basic {BASIC}"


def test_an_answer_about_another_invoice_is_unknown(calls):
    with pytest.raises(OutcomeUnknown, match="another invoice"):
        canned(200, invoice(status="processed")).poll("cpi_other", calls)


@pytest.mark.parametrize("act", [NOT_FOUND, UNAUTHORIZED])
def test_a_look_up_that_fails_is_never_a_refusal(act, calls):
    with WireServer([act]) as server, pytest.raises(OutcomeUnknown):
        paycore(server.url).poll(GATEWAY_ID, calls)
    assert len(server.requests) == 1


@pytest.mark.parametrize("gateway_id", ["", "..", "a/b", "a?b", "a%2Fb", "a b", "é", "a" * 129])
def test_an_id_that_would_change_the_path_is_not_sent(gateway_id, calls):
    with WireServer([CREATED]) as server, pytest.raises(NotSent):
        paycore(server.url).poll(gateway_id, calls)
    assert server.connections == 0
    assert calls == []


# --- the log of calls ---


def test_each_request_leaves_one_wire_call(calls):
    with WireServer([CREATED, answer(200, body("06")), answer(200, body("90"))]) as server:
        gateway = paycore(server.url)
        gateway.create(order("9.99"), calls)
        gateway.poll(GATEWAY_ID, calls)
        gateway.sale(Secret(BEARER), calls)
    assert [(c.operation, c.method, c.path, c.outcome) for c in calls] == [
        ("create", "POST", "/api/payment-invoices", "201"),
        ("look", "GET", f"/api/payment-invoices/{GATEWAY_ID}", "200"),
        ("sale", "POST", "/payment/sale", "200"),
    ]
    assert all(call.at.tzinfo is not None and call.duration_ms >= 0 for call in calls)
    assert calls[1].request is None
    assert calls[2].request == exact(body("07"))
    assert json.loads(calls[2].answer) == {"status": "processed"}


def test_the_request_in_the_log_fits_a_json_column_and_hides_the_token(calls):
    create(calls, amount="9.99")
    logged = json.loads(json.dumps(calls[0].request))["data"]["attributes"]
    assert logged["amount"] == "9.99"
    assert logged["token"] == "***"
    assert logged["reference_id"] == "ORDER1233"
    assert logged["gateway_options"] == {"cardgate": {"instant": True}}


def test_a_failed_call_is_logged_with_its_reason(calls):
    with WireServer([answer(502, "<h1>Bad gateway</h1>")]) as server, pytest.raises(OutcomeUnknown):
        paycore(server.url).create(order(), calls)
    assert calls[0].outcome == "unknown: status 502"
    assert calls[0].answer == "<h1>Bad gateway</h1>"


def test_a_call_that_our_own_bug_interrupts_is_logged_too(calls):
    class Broken:
        def send(self, *_: object, **__: object) -> None:
            raise KeyError("bug")

    with pytest.raises(KeyError):
        paycore("http://gateway.example", Broken()).sale(Secret(BEARER), calls)
    assert [call.outcome for call in calls] == ["unknown: interrupted"]


# --- connections ---


def test_only_the_sale_leaves_the_kept_connection(calls):
    answers = [CREATED, answer(200, body("90")), answer(200, body("90")), answer(200, body("06"))]
    with WireServer(answers) as server:
        gateway = paycore(server.url)
        gateway.create(order(), calls)
        gateway.sale(Secret(BEARER), calls)
        gateway.sale(Secret(BEARER), calls)
        gateway.poll(GATEWAY_ID, calls)
    assert [request.connection for request in server.requests] == [1, 2, 3, 1]


# --- settings ---


@pytest.mark.parametrize("field", ["api_url", "cardgate_url"])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "gateway.example",
        "ftp://gateway.example",
        "https://",
        "https://user:password@gateway.example",
        "https://gateway.example/api?key=1",
        "https://gateway.example/api#top",
        "https://gateway.example\\@evil.example",
        "https://gateway.example /",
        "https://gateway.example/\r\nX: 1",
    ],
)
def test_a_url_that_could_leak_credentials_or_never_work_is_rejected(field, url):
    with pytest.raises(InvalidInput) as caught:
        settings("http://gateway.example", **{field: url})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080", "https://api.example.com/api/", "http://[::1]:80/api"],
)
def test_a_plain_url_is_accepted(url):
    assert settings("http://gateway.example", api_url=url).api_url == url


def test_a_user_name_with_a_colon_is_rejected():
    with pytest.raises(InvalidInput, match="username"):
        settings("http://gateway.example", username="a:b")


def test_settings_do_not_show_the_password():
    assert PASSWORD not in repr(settings("http://gateway.example"))
    assert TOKEN not in repr(order())
