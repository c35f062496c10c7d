"""The page that sends a customer's browser on, and the two commands that open one."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from flask import Flask

from billing_worker.clock import SystemClock
from billing_worker.domain.hosted import Page
from billing_worker.domain.secret import Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.pay_page import pay_routes, render
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from billing_worker.services.hosted import start_checkout, start_tokenisation
from tests.entrypoints.test_config import GOOD
from tests.support.world import KEY


class Form(HTMLParser):
    """What a browser would send."""

    def __init__(self, text):
        super().__init__()
        self.fields, self.form, self.tags = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "form":
            self.form = values
        if tag == "input":
            self.fields.append((values["name"], values["value"]))


@pytest.fixture
def browser(world):
    app = Flask("test")
    app.register_blueprint(pay_routes(world.store, world.vault))
    return app.test_client()


@pytest.fixture
def link(world):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    return start_checkout(world.ports, {"invoice": "sub-1-p0"})


def test_an_open_link_sends_the_browser_to_the_gateways_page(browser, link):
    answer = browser.get(link["pay_path"])
    assert answer.status_code == 200
    assert Form(answer.text).form == {"method": "get", "action": link["action"]}


def test_an_open_card_page_sends_the_browser_to_the_gateways_page(world, browser):
    record = {"reference_id": "card-1", "customer": {"reference_id": "c"}, "amount": "1.00",
              "currency": "USD"}  # fmt: skip
    page = start_tokenisation(world.ports, record)
    assert Form(browser.get(page["pay_path"]).text).form["action"] == page["action"]


def test_a_page_is_not_kept_by_anybody_on_the_way(browser, link):
    headers = browser.get(link["pay_path"]).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "script-src 'sha256-" in headers["Content-Security-Policy"]


def test_a_paid_link_leads_nowhere(world, browser, link):
    world.sandbox.pay_hosted(link["gateway_id"])
    world.clock.advance(20)
    world.tick()
    assert browser.get(link["pay_path"]).status_code == 410


def test_an_expired_link_leads_nowhere_even_during_its_grace(world, browser, link):
    world.clock.advance(3600)
    world.tick()
    assert world.attempts() == ["declined", "submitted"]
    assert browser.get(link["pay_path"]).status_code == 410


def test_a_name_that_we_did_not_sign_leads_nowhere(world, browser, link):
    name = link["pay_path"].removeprefix("/pay/")
    tokens = ["x", "2", name[:-4], name[::-1], world.vault.lock(Secret("approved.1")).decode(),
              world.vault.lock(Secret("pay link x")).decode(),
              world.vault.lock(Secret("pay link 1")).decode()]  # fmt: skip
    for token in tokens:
        assert browser.get(f"/pay/{token}").status_code == 410


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_whatever_the_gateway_names_is_escaped(method):
    evil = '"><script>alert(1)</script>'
    form = Form(render(Page(f"https://x.test/{evil}", method, {evil: evil})))
    assert form.tags.count("script") == 1
    assert form.fields == [(evil, evil)]


def test_a_query_in_the_action_of_a_get_form_is_sent_as_fields():
    form = Form(render(Page("https://x.test/p?sid=1&b=", "GET", {"c": "2"})))
    assert form.form["action"] == "https://x.test/p"
    assert form.fields == [("sid", "1"), ("b", ""), ("c", "2")]
    form = Form(render(Page("https://x.test/p?sid=1", "POST", {})))
    assert form.form["action"] == "https://x.test/p?sid=1"


# --- the commands, over a real socket ---


@pytest.fixture
def run(world, database_url, monkeypatch):  # noqa: ARG001 - the books that the database has
    """The command line against a sandbox on a socket, with the books of `world`."""
    sandbox = SandboxGateway(Behaviour(), SystemClock().now)
    with SandboxServer(sandbox) as server:
        environment = GOOD | {
            "BILLING_DATABASE_URL": database_url,
            "BILLING_GATEWAY_URL": f"{server.url}/api",
            "BILLING_CARDGATE_URL": server.url,
            "BILLING_GATEWAY_USERNAME": sandbox.username,
            "BILLING_GATEWAY_PASSWORD": sandbox.password,
            "BILLING_VAULT_KEYS": KEY,
            "BILLING_CALLBACK_URL": "https://pay.example.com/b/callbacks/payment-invoices",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def run(*arguments, status=0):
            result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
            assert result.exit_code == status, result.output
            return result

        yield run


def test_cards_tokenise_prints_the_page_and_is_repeated_by_its_reference(run):
    arguments = ["cards", "tokenise", "--customer", "cust-1", "--amount", "1.00",
                 "--currency", "USD", "--reference", "card-1", "--json"]  # fmt: skip
    page = json.loads(run(*arguments).stdout)
    assert page["reference_id"] == "card-1"
    assert page["action"].startswith("http://127.0.0.1")
    assert page["pay_url"] == "https://pay.example.com/b" + page["pay_path"]
    assert json.loads(run(*arguments).stdout)["action"] == page["action"]


def test_invoices_pay_link_prints_the_page_and_writes_one_that_submits_itself(world, run, tmp_path):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    world.transport.unreachable = True  # from here on the books speak to the sandbox on the socket
    with world.store.transaction() as connection:
        connection.exec_driver_sql("UPDATE attempts SET gateway_id = NULL, status = 'not_charged'")
    file = tmp_path / "pay.html"
    result = run("invoices", "pay-link", "sub-1-p0", "--html", str(file))
    assert "send the customer to  https://pay.example.com/b/pay/" in result.stdout
    assert Form(file.read_text()).form["action"] in result.stdout
    again = run("invoices", "pay-link", "nobody", "--json", status=1)
    assert json.loads(again.stdout)["error"]["kind"] == "InvalidInput"
