"""All four flows of the gateway's page, end to end: real worker, beat, web server and sockets."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import requests
from click.testing import CliRunner
from sqlalchemy import select

from billing_worker.entrypoints.cli import cli
from billing_worker.persistence import counters
from billing_worker.persistence.schema import tables
from billing_worker.sandbox.callbacks import CallbackSender
from tests.support.ports import free_port
from tests.support.processes import CLI, Process, beat, eventually, worker


@pytest.fixture
def callbacks(installation):
    """The sandbox calls back, and the web process that is called; polling waits ten minutes."""
    port = free_port()
    installation.settings |= {
        "BILLING_CALLBACK_URL": f"http://127.0.0.1:{port}/callbacks/payment-invoices",
        "BILLING_CALLBACK_SECRET": installation.sandbox.callback_secret,
        "BILLING_RECONCILE_AFTER_SECONDS": "600",
    }
    with web(installation, port), CallbackSender(installation.sandbox, retry_seconds=0.2):
        yield installation


@contextmanager
def web(installation, port):
    log = installation.folder / "web.log"
    arguments = [*CLI, "web", "--host", "127.0.0.1", "--port", str(port)]
    process = Process(arguments, installation.settings, log)
    try:
        process.says("Listening at")
        yield
    finally:
        process.kill()


def run(installation, *arguments):
    """A command, in this process: starting another one takes longer than the whole flow."""
    done = CliRunner().invoke(cli, [*arguments, "--json"], env=installation.settings)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def customer_pays(installation, page):
    """A browser: our page, the gateway's page behind its form, and the button on that."""
    base = installation.settings["BILLING_CALLBACK_URL"].removesuffix("/callbacks/payment-invoices")
    html = requests.get(base + page["pay_path"], timeout=10).text
    assert page["action"] in html
    hosted = requests.get(page["action"], timeout=10).text
    target = hosted.partition('action="')[2].partition('"')[0]
    origin = page["action"].partition("/hpp/")[0]
    assert requests.post(origin + target, timeout=10).status_code == 200


def number(installation, table):
    with installation.store.reading() as connection:
        return len(connection.execute(select(table)).all())


def counted(installation):
    with installation.store.reading() as connection:
        return counters.counts(connection, "callbacks.")


def test_card_page_write_off_and_pay_link_are_all_settled_by_signed_callbacks(callbacks):
    callbacks.subscribe("decline_insufficient_funds")
    with worker(callbacks.settings, callbacks.folder) as process, \
            beat(callbacks.settings, callbacks.folder):  # fmt: skip
        # Write-off by token: declined, so that it stays open.
        eventually(lambda: callbacks.explain() and callbacks.explain()["attempts"] and
                   callbacks.explain()["attempts"][0]["status"] == "declined", why="a decline")  # fmt: skip
        # Predefined checkout pays it.
        page = run(callbacks, "invoices", "pay-link", "sub-1-p0")
        customer_pays(callbacks, page)
        eventually(lambda: callbacks.explain()["fate"] == "paid", why="the link's callback")
        # Tokenisation of another customer.
        page = run(callbacks, "cards", "tokenise", "--customer", "customer-9", "--amount", "1.00",
                   "--currency", "USD", "--reference", "card-9")  # fmt: skip
        customer_pays(callbacks, page)
        eventually(lambda: number(callbacks, tables.cards) == 2, why="the card is stored")
        # The callbacks, and a forged one.
        assert number(callbacks, tables.callbacks) >= 4
        url = callbacks.settings["BILLING_CALLBACK_URL"]
        assert requests.post(url, b"{}", timeout=10).status_code == 401
        assert counted(callbacks) == {"forged": 1}
        output = process.output
    assert callbacks.debits_per_invoice()["sub-1-p0"] == 1
    for secret in ("decline_insufficient_funds", "approved.minted", "/hpp/cgi_"):
        assert secret not in output


def test_a_charge_whose_answer_was_lost_is_settled_by_its_callback_long_before_the_poll(callbacks):
    callbacks.subscribe("answer_lost_after")
    with worker(callbacks.settings, callbacks.folder), beat(callbacks.settings, callbacks.folder):
        eventually(lambda: callbacks.paid() == 1, why="paid by callback")
    kinds = [event["kind"] for event in callbacks.explain()["history"]]
    assert "attempt.called_back" in kinds
    assert callbacks.debits_per_invoice() == {"sub-1-p0": 1}
