"""The sandbox on real sockets, at the system's own time."""

import _thread
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from http.client import HTTPConnection, RemoteDisconnected

import pytest
import requests

from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer


def now():
    return datetime.now(UTC)  # noqa: TID251 - real sockets live in real time.


class Client:
    """One keep-alive connection of a merchant."""

    def __init__(self, url, merchant):
        self.url = url
        self.merchant = merchant
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.auth = ("sandbox", "sandbox")

    def create(self, token="approved", **changes):
        body = json.dumps(self.merchant.order(token, **changes), default=float)
        return self.session.post(f"{self.url}/api/payment-invoices", data=body, timeout=10)

    def sell(self, created, timeout=10):
        bearer = created.json()["data"]["attributes"]["flow_data"]["metadata"]["token"]
        return requests.post(
            f"{self.url}/payment/sale",
            json={"data": {"type": "sale-operation", "attributes": {}}},
            headers={"Authorization": f"Bearer {bearer}"},
            timeout=timeout,
        )

    def get(self, path):
        return self.session.get(self.url + path, timeout=10)


@pytest.fixture
def serving(merchant):
    """Serve a gateway that behaves as told; the client's connection is closed at the end."""

    @contextmanager
    def serve(**behaviour):
        gateway = SandboxGateway(Behaviour(**behaviour), now)
        with SandboxServer(gateway) as server:
            client = Client(server.url, merchant)
            try:
                yield client, gateway
            finally:
                client.session.close()

    return serve


@pytest.fixture
def client_and_gateway(serving):
    with serving() as both:
        yield both


@pytest.fixture
def client(client_and_gateway):
    return client_and_gateway[0]


@pytest.fixture
def talk(client):
    """Send raw bytes and return everything that comes back until the server closes."""

    def exchange(data):
        host, port = client.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65_536), b""))

    return exchange


def test_one_charge_over_the_wire_from_order_to_ledger(client_and_gateway):
    client, gateway = client_and_gateway

    created = client.create()
    sold = client.sell(created)
    looked = client.get(created.json()["data"]["links"]["self"])
    found = client.get("/payment-invoices/?filter[reference_id]=order-1")

    assert (created.status_code, sold.status_code) == (201, 200)
    assert sold.json() == {"status": "processed", "resolution": "ok"}
    assert looked.json()["data"]["attributes"]["status"] == "processed"
    assert [row["id"] for row in found.json()["data"]] == [created.json()["data"]["id"]]
    assert gateway.ledger.totals() == {"USD": Decimal("9.99")}
    assert client.get("/_sandbox/ledger").json()["totals"] == {"USD": 9.99}


def test_a_connection_serves_request_after_request(client):
    host, port = client.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=10)
    sockets = set()
    for _ in range(3):
        connection.request("GET", "/_sandbox/requests")
        sockets.add(connection.sock)
        assert json.loads(connection.getresponse().read())
    connection.close()

    assert len(sockets) == 1


def test_two_requests_in_one_packet_are_both_answered(talk):
    one = b"GET /_sandbox/requests HTTP/1.1\r\nHost: x\r\n"

    answers = talk(one + b"\r\n" + one + b"Connection: close\r\n\r\n")

    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 2


def test_an_old_client_gets_its_answer_and_a_closed_connection(talk):
    assert b"Connection: close" in talk(b"GET /_sandbox/requests HTTP/1.0\r\n\r\n")


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(talk):
    body = b'{"second_sale":"charge"}'

    answer = talk(
        b"POST /_sandbox/behaviour HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )

    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n" + b"x" * 1_048_577, 413),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else str(value),
)
def test_bytes_that_are_no_request_of_ours_are_refused(talk, data, status):
    assert talk(data).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_of_one_mebibyte_is_read_and_one_byte_more_is_not(client):
    sizes = {
        size: client.session.post(
            f"{client.url}/payment-invoices", data=b" " * size, timeout=10
        ).status_code
        for size in (1_048_576, 1_048_577)
    }

    assert sizes == {1_048_576: 400, 1_048_577: 413}


def test_a_client_that_is_still_sending_lives_to_see_the_refusal(talk):
    size = 12 * 1024 * 1024

    answer = talk(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)

    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_request_that_is_cut_off_has_no_effect_and_no_answer(client_and_gateway):
    client, gateway = client_and_gateway
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /payment-invoices HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)

        assert connection.recv(1) == b""

    assert gateway.requests.total("create") == 0


@pytest.mark.parametrize(("token", "debits"), [("answer_lost_before", 0), ("answer_lost_after", 1)])
def test_a_lost_answer_closes_the_connection_without_a_byte(client_and_gateway, token, debits):
    client, gateway = client_and_gateway
    created = client.create(token)

    with pytest.raises(requests.ConnectionError) as lost:
        client.sell(created)

    assert isinstance(lost.value.args[0].args[1], RemoteDisconnected)
    assert len(gateway.ledger) == debits


def test_a_lost_create_leaves_an_invoice_to_be_found(client):
    with pytest.raises(requests.ConnectionError):
        client.create("create_answer_lost")

    found = client.get("/payment-invoices?filter%5Breference_id%5D=order-1").json()["data"]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("token", "debits"), [("never_answers_before", 0), ("never_answers_after", 1)]
)
def test_a_sale_without_an_answer_lasts_until_the_client_gives_up(
    client_and_gateway, token, debits
):
    client, gateway = client_and_gateway
    created = client.create(token)

    with pytest.raises(requests.ReadTimeout):
        client.sell(created, timeout=0.3)

    assert len(gateway.ledger) == debits


def test_a_web_page_arrives_where_json_was_expected(client):
    answer = client.sell(client.create("html_502_after"))

    assert answer.status_code == 502
    with pytest.raises(requests.JSONDecodeError):
        answer.json()


def test_stopping_frees_everybody_who_waits_for_an_answer(serving):
    outcomes = []

    def wait_for(client, created):
        try:
            outcomes.append(client.sell(created, timeout=30))
        except requests.ConnectionError as error:
            outcomes.append(error)

    with serving(slow_seconds=30) as (client, gateway):
        silent, slow = client.create("never_answers_after"), client.create("slow")
        threads = [
            threading.Thread(target=wait_for, args=(client, created)) for created in (silent, slow)
        ]
        for thread in threads:
            thread.start()
        while gateway.requests.total("sale") < 2:
            time.sleep(0.01)
        stopping_at = time.monotonic()
    for thread in threads:
        thread.join()

    assert [type(outcome) for outcome in outcomes] == [requests.ConnectionError] * 2
    assert time.monotonic() - stopping_at < 15  # they would wait 30 s


def test_a_stopped_server_refuses_connections_and_its_port_is_free_again():
    gateway = SandboxGateway(Behaviour(), now)
    with SandboxServer(gateway) as server:
        url, port = server.url, int(server.url.rpartition(":")[2])
        requests.get(f"{url}/_sandbox/requests", timeout=10)

    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/_sandbox/requests", timeout=10)
    with SandboxServer(gateway, port=port) as server:
        assert requests.get(f"{url}/_sandbox/requests", timeout=10).status_code == 200


def test_stopping_leaves_no_thread_behind(serving):
    before = _thread._count()
    with serving() as (client, _):
        client.create()
        assert _thread._count() > before

    deadline = time.monotonic() + 30
    while _thread._count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _thread._count() <= before  # one of another test may have ended meanwhile


def test_two_hundred_calls_of_half_a_second_wait_side_by_side(serving):
    with serving(latency_seconds=0.5) as (client, gateway):

        def create(number):
            order = client.merchant.order(reference_id=f"order-{number}")
            connection = HTTPConnection(client.url.removeprefix("http://"), timeout=10)
            with closing(connection):
                connection.request(
                    "POST",
                    "/payment-invoices",
                    json.dumps(order, default=float),
                    {"Authorization": client.merchant.credentials},
                )
                return connection.getresponse().status

        started = time.monotonic()
        with ThreadPoolExecutor(200) as pool:
            statuses = list(pool.map(create, range(200)))
        elapsed = time.monotonic() - started

    assert statuses == [201] * 200
    assert gateway.requests.total("create") == 200
    assert 0.5 <= elapsed < 10  # One after the other they would take 100 s.
