"""`invoices resolve | void | mark-paid`: what people type, and what they and their programs are told."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints.cli import cli
from tests.entrypoints.test_config import GOOD
from tests.support.recovery import events
from tests.support.world import KEY

INVOICE = "sub-1-p0"
SAID = ("--evidence", "portal, case 7", "--by", "ann", "--why", "customer called")


@pytest.fixture
def run(database_url, monkeypatch):
    settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": KEY}
    for name, value in (GOOD | settings).items():
        monkeypatch.setenv(name, value)

    def run(*arguments, status=0):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 or "--json" in arguments else result.output

    return run


@pytest.fixture
def unknown(world):
    world.sandbox.behaviour = replace(world.sandbox.behaviour, lifetime_seconds=10_000_000)
    world.subscribe("pending_forever")
    world.run_for(timedelta(hours=1), step=timedelta(minutes=20))
    return world


def test_an_unknown_is_resolved_in_somebodys_name(unknown, run):
    told = run("invoices", "resolve", INVOICE, "--not-paid", *SAID)
    assert "sub-1-p0-a1: changed, not_charged; sub-1-p0 is open." in told
    assert "`invoices retry sub-1-p0` charges it" in told
    [event] = [e for e in unknown.explain()["history"] if e["kind"] == "attempt.resolved"]
    assert (event["by"], event["data"]["evidence"]) == ("operator:ann", "portal, case 7")
    again = json.loads(run("invoices", "resolve", INVOICE, "--paid", *SAID, "--json"))
    assert again.pop("next") == "Nothing more is charged for it."
    assert again == {
        "invoice": INVOICE, "attempt": "sub-1-p0-a1", "outcome": "changed",
        "attempt_status": "succeeded", "invoice_status": "paid", "reason": None,
    }  # fmt: skip
    assert "A person stated" in run("explain", INVOICE)


def test_a_refusal_is_one_line_or_one_object_and_status_1(world, run):
    world.subscribe()
    world.tick()
    refused = run("invoices", "resolve", INVOICE, "--paid", *SAID, status=1)
    assert "reference: sub-1-p0-a1 is not unknown: it is succeeded" in refused
    asked = ("invoices", "resolve", "sub-9-p0", "--paid", *SAID, "--json")
    assert json.loads(run(*asked, status=1))["error"]["field"] == "reference"
    assert events(world, "attempt.resolved") == []


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--evidence", "portal", "--why", "x"),
        ("--paid", "--why", "x"),
        ("--not-paid", "--evidence", "portal"),
    ],
)
def test_the_answer_the_evidence_and_the_reason_have_to_be_said(run, arguments):
    run("invoices", "resolve", INVOICE, *arguments, status=2)


# --- void, mark-paid ------------------------------------------------------------------------------

DECIDED = ("--by", "ann", "--why", "a mistake")


def test_a_debt_is_voided_in_somebodys_name(world, run):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    told = run("invoices", "void", INVOICE, *DECIDED)
    assert told == "sub-1-p0: changed, void (voided: a mistake).\n"
    assert json.loads(run("invoices", "void", INVOICE, *DECIDED, "--json")) == {
        "invoice": INVOICE, "outcome": "unchanged", "status": "void",
        "reason": "voided: a mistake", "withdrawn": [],
    }  # fmt: skip
    assert "voided: a mistake" in run("explain", INVOICE)


def test_a_debt_is_marked_as_paid_elsewhere(world, run):
    world.subscribe("decline_insufficient_funds")
    world.tick()
    marked = ("invoices", "mark-paid", INVOICE, *DECIDED, "--evidence", "cash, receipt 12")
    assert json.loads(run(*marked, "--json"))["status"] == "paid"
    assert "paid elsewhere: cash, receipt 12" in run("explain", INVOICE)
    assert run(*marked).startswith("sub-1-p0: unchanged, paid")


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("decision", [("void",), ("mark-paid", "--evidence", "cash")])
def test_what_may_be_charged_is_refused_with_the_ways_out(run, decision):
    command, *more = decision
    said = ("invoices", command, INVOICE, *more, *DECIDED)
    refused = run(*said, status=1)
    assert "may be charged already" in refused
    assert "`invoices resolve` says what became of it" in refused
    assert json.loads(run(*said, "--json", status=1))["error"]["field"] == "reference"
    assert "changed" in run(*said, "--even-if-charged")


@pytest.mark.usefixtures("unknown")
def test_what_is_in_flight_is_voided_in_case_it_ends_unpaid(run):
    told = run("invoices", "void", INVOICE, *DECIDED, "--if-unpaid")
    assert told == "sub-1-p0: changed, open (void if it ends unpaid).\n"
    run("invoices", "void", INVOICE, *DECIDED, "--if-unpaid", "--even-if-charged", status=2)


@pytest.mark.parametrize("command", [("void",), ("mark-paid", "--evidence", "cash")])
def test_a_decision_about_a_debt_needs_its_reason(run, command):
    run("invoices", *command, INVOICE, status=2)
