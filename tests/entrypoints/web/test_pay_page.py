"""The page that sends a customer's browser on, and the two commands that open one."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from flask import Flask
from sqlalchemy import select, update

from billing_worker.clock import SystemClock
from billing_worker.domain.card_setup import Page
from billing_worker.domain.secret import OF_PAGE, Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.entrypoints.web.pay_page import pay_routes, render
from billing_worker.persistence.schema import tables
from billing_worker.sandbox.gateway import Behaviour, SandboxGateway
from billing_worker.sandbox.server import SandboxServer
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.operators.debts import IfCharged, mark_paid
from tests.entrypoints.test_config import GOOD
from tests.support.backup import backup, restore
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


def says_paid(browser, page):
    answer = browser.get(page["pay_path"])
    return answer.status_code == 200 and "This is paid" in answer.text and "form" not in answer.text


def test_a_paid_page_says_that_it_is_paid(world, browser, link):
    card_page = tokenised(world)
    for page in (link, card_page):
        world.sandbox.pay_on_page(page["gateway_id"])
    world.clock.advance(20)
    world.tick()
    assert says_paid(browser, link)
    assert says_paid(browser, card_page)


def test_a_page_whose_invoice_was_paid_in_another_way_says_so(world, browser, link):
    mark_paid(world.store, world.clock, reference="sub-1-p0", evidence="bank", by="ann", why="x",
              if_charged=IfCharged.ALL_THE_SAME)  # fmt: skip
    assert says_paid(browser, link)


def test_an_expired_link_leads_nowhere_even_during_its_grace(world, browser, link):
    world.clock.advance(3600)
    world.tick()
    assert world.attempts() == ["declined", "submitted"]
    assert browser.get(link["pay_path"]).status_code == 410


def test_a_name_that_we_did_not_give_leads_nowhere(browser, link):
    name = link["pay_path"].removeprefix("/pay/")
    for token in ["x", "2", name[:-4], name[::-1], name + "=", "_" * 32]:
        answer = browser.get(f"/pay/{token}")
        assert answer.status_code == 410
        assert "no longer valid" in answer.text


def test_a_name_says_nothing_about_a_row_and_is_in_no_column_in_clear(world, link):
    name = link["pay_path"].removeprefix("/pay/")
    assert len(name) == 32  # 192 random bits
    other = tokenised(world)["pay_path"].removeprefix("/pay/")
    assert name != other
    with world.store.reading() as connection:
        for table in tables.metadata.sorted_tables:
            kept = str(connection.execute(select(table)).all())
            assert name not in kept
            assert other not in kept


def test_the_same_page_again_has_the_same_name(world, link):
    assert start_checkout(world.ports, {"invoice": "sub-1-p0"})["pay_path"] == link["pay_path"]
    assert tokenised(world)["pay_path"] == tokenised(world)["pay_path"]


def test_a_link_of_the_old_form_leads_nowhere(world, browser, link):
    """Its name was the id of a row, and ids are given out once more after a restore."""
    [*_, attempt] = rows(world, tables.attempts)
    old = world.vault.lock(Secret(f"pay link {attempt.id}"), OF_PAGE).decode()
    assert browser.get(f"/pay/{old}").status_code == 410
    assert browser.get(link["pay_path"]).status_code == 200


def test_a_page_that_was_opened_without_a_name_gets_one_when_it_is_asked_for_again(world, browser):
    """By the version before this one."""
    world.subscribe("decline_insufficient_funds")
    world.tick()
    for ask in (lambda: start_checkout(world.ports, {"invoice": "sub-1-p0"}),
                lambda: tokenised(world)):  # fmt: skip
        page = ask()
        with world.store.transaction() as connection:
            for table in (tables.attempts, tables.card_setups):
                connection.execute(update(table).where(table.c.page.is_not(None)).values(
                    page=world.vault.lock(Secret(json.dumps({
                        "action": page["action"], "method": page["method"],
                        "params": page["params"],
                    })), OF_PAGE), page_digest=None,
                ))  # fmt: skip
        assert browser.get(page["pay_path"]).status_code == 410
        again = ask()
        assert again | {"pay_path": ""} == page | {"pay_path": ""}
        assert Form(browser.get(again["pay_path"]).text).form["action"] == page["action"]
        assert ask() == again


@pytest.mark.parametrize("kind", ["link", "card page"])
def test_a_link_from_before_a_restore_opens_nobody_elses_page(world, browser, kind):
    """The ids of rows are given out once more: A's old link opened B's page, and A's card became
    B's.
    """
    for name in ("a", "b"):
        world.subscribe("decline_insufficient_funds", f"sub-{name}")
    world.tick()
    kept = backup(world.store)

    def page_for(name):
        if kind == "link":
            return start_checkout(world.ports, {"invoice": f"sub-{name}-p0"})
        return tokenised(world, f"card-{name}", f"customer-of-sub-{name}")

    of_a = page_for("a")
    table = tables.attempts if kind == "link" else tables.card_setups
    before = rows(world, table)[-1].id
    restore(world.store, kept)
    of_b = page_for("b")
    assert rows(world, table)[-1].id == before, "the id is that of A's page"
    assert browser.get(of_a["pay_path"]).status_code == 410
    assert Form(browser.get(of_b["pay_path"]).text).form["action"] == of_b["action"]


def tokenised(world, reference="card-1", customer="c"):
    return start_tokenisation(
        world.ports,
        {"reference_id": reference, "customer": {"reference_id": customer}, "amount": "1.00",
         "currency": "USD"},
    )  # fmt: skip


def rows(world, table):
    with world.store.reading() as connection:
        return connection.execute(select(table).order_by(table.c.id)).all()


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
