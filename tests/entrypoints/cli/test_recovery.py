"""The command line of cards and retries: what people type, and what they are told."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from billing_worker.clock import SystemClock
from billing_worker.entrypoints.cli import cli
from tests.entrypoints.test_config import GOOD
from tests.support.recovery import events
from tests.support.world import KEY, World

pytestmark = pytest.mark.usefixtures("declined")

NEW_CARD = {"token": "approved.new", "mask": "411111******1111", "expiry_month": 12,
            "expiry_year": 2040}  # fmt: skip


@pytest.fixture
def declined(store):
    world = World(store)
    world.clock.advance(SystemClock().now() - world.clock.now())  # the command line's
    world.subscribe("decline_insufficient_funds")
    world.tick()
    return world


@pytest.fixture
def run(database_url, monkeypatch):
    settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": KEY}
    for name, value in (GOOD | settings).items():
        monkeypatch.setenv(name, value)

    def run(*arguments, status=0, **options):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False, **options)
        assert result.exit_code == status, result.output
        return result.output

    return run


def test_a_card_is_replaced_from_standard_input_and_tried_on_what_waits(run):
    said = run("cards", "replace", "sub-1", "--why", "lost", input=json.dumps(NEW_CARD))
    assert "tried: sub-1-p0. It is charged at" in said
    listed = json.loads(run("cards", "list", "sub-1", "--json"))
    assert [card["default_for"] for card in listed] == [[], ["sub-1"]]
    assert "approved" not in said


def test_a_stored_card_is_named_by_its_number_and_the_answer_says_what_follows(run, declined):
    declined.subscribe("approved.2", "sub-2", customer={"reference_id": "customer-of-sub-1"})
    _, second = json.loads(run("cards", "list", "customer-of-sub-1", "--json"))
    said = run("cards", "use", "sub-1", str(second["card_id"]), "--scope", "customer")
    assert "sub-1 is paid with card 2" in said
    assert "tried: sub-1-p0. It is charged at" in said
    shown = run("cards", "list", "customer-of-sub-1")
    assert "yes" in shown
    assert "no card 99" in run("cards", "use", "sub-1", "99", status=1)
    assert "no customer and no subscription" in run("cards", "list", "nobody", status=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "token"),
        (json.dumps(NEW_CARD | {"expiry_year": 2020}), "card.expiry_year"),
    ],
)
def test_a_card_that_cannot_be_read_or_charged_is_refused_with_its_field(run, given, said):
    assert said in run("cards", "replace", "sub-1", input=given, status=1)


def test_a_card_of_another_customer_is_refused_with_its_field(declined, run):
    declined.subscribe("approved.2", "sub-2")
    given = json.dumps(NEW_CARD | {"token": "approved.2"})
    said = run("cards", "replace", "sub-1", input=given, status=1)
    assert "card.token: belongs to another customer" in said
    assert "approved" not in said


def test_a_backup_card_needs_a_consent(run):
    run("cards", "add-backup", "sub-1", input=json.dumps(NEW_CARD), status=2)
    run("cards", "add-backup", "sub-1", "--consent", "form 7", input=json.dumps(NEW_CARD))
    backups = [card["backup"] for card in json.loads(run("cards", "list", "sub-1", "--json"))]
    assert backups[0] is None
    assert backups[1].endswith("form 7")


def test_a_retry_is_ordered_in_somebodys_name(declined, run):
    run("invoices", "retry", "sub-1-p0", "--by", "ann", "--why", "phone call")
    assert events(declined, "retry.ordered")[0]["why"] == "phone call"
    assert "no invoice" in run("invoices", "retry", "sub-9-p0", "--why", "x", status=1)


def test_a_subscription_gets_a_ladder_of_its_own(run):
    assert "3, 5, 7 days" in run("subscriptions", "dunning", "sub-1", "short", "--why", "contract")
    run("subscriptions", "dunning", "sub-1", "hourly", "--why", "impatience", status=2)


def test_a_ladder_and_its_refusal_can_be_read_by_a_program(run):
    chosen = ("short", "--why", "contract", "--json")
    assert json.loads(run("subscriptions", "dunning", "sub-1", *chosen)) == {
        "subscription": "sub-1", "policy": "short", "delays_days": [3, 5, 7], "end": "leave_open",
    }  # fmt: skip
    refused = json.loads(run("subscriptions", "dunning", "sub-9", *chosen, status=1))
    assert refused["error"]["field"] == "reference_id"


def test_the_switch_of_sales_can_be_read_by_a_program(run):
    asked = ("--reason", "audit", "--by", "ann", "--json")
    told = {
        "service": None,
        "reason": "audit",
        "by": "operator:ann",
        "restored": False,
        "moved": False,
    }
    stopped = json.loads(run("sales", "stop", *asked))
    assert stopped.pop("next").startswith("Sales are stopped")
    assert stopped == {"on": False} | told
    assert json.loads(run("status", "--json"))["sales_on"] is False
    started = json.loads(run("sales", "start", *asked))
    assert started.pop("next").startswith("Sales are on")
    assert started == {"on": True} | told


def test_a_service_is_resumed_by_its_own_name_and_sales_that_are_stopped_stay_so(run):
    assert "is not paused; paused: none" in run(
        "sales", "start", "--service", "payment_card_eur_hp", "--reason", "typo", status=1
    )
    run("sales", "stop", "--service", "payment_card_eur_hpp", "--reason", "theirs")
    run("sales", "stop", "--reason", "ours")
    told = run("sales", "start", "--service", "payment_card_eur_hpp", "--reason", "mended")
    assert "payment_card_eur_hpp is resumed." in told
    assert "Sales are stopped" in told


def test_a_paused_service_is_shown_and_resumed(run):
    service = "payment_card_usd_hpp"
    run("sales", "stop", "--service", service, "--reason", "credentials")
    assert f"PAUSED {service}: credentials" in run("status")
    run("sales", "start", "--service", service, "--reason", "mended")
    assert "PAUSED" not in run("status")


def test_a_card_goes_and_a_customer_gets_another_name_on_the_command_line(run):
    run("cards", "replace", "sub-1", input=json.dumps(NEW_CARD))
    assert "it cannot be charged any more" in run("cards", "remove", "customer-of-sub-1", "1")
    assert "pays sub-1" in run("cards", "remove", "customer-of-sub-1", "2", status=1)
    update = ("customers", "update", "customer-of-sub-1", "--name", "Jo")
    assert "changed: name" in run(*update)
    assert "unchanged" in run(*update)
    assert "no customer" in run("customers", "update", "nobody", "--name", "Jo", status=1)
    assert "is past_due; must be suspended" in run("subscriptions", "forgive", "sub-1", status=1)
