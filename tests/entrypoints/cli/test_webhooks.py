from __future__ import annotations

import base64
import json

import pytest
from click.testing import CliRunner

from billing_worker.entrypoints.cli import cli
from billing_worker.services.outbox.deliver import Outbound, deliver
from billing_worker.services.outbox.publish import publish
from tests.support.receivers import AtOnce, Receivers
from tests.support.world import KEY

URL = "https://shop.example/billing"


@pytest.fixture
def run(database_url, monkeypatch):
    monkeypatch.setenv("BILLING_DATABASE_URL", database_url)
    monkeypatch.setenv("BILLING_VAULT_KEYS", KEY)

    def run(*arguments, status=0, **options):
        result = CliRunner().invoke(cli, ["webhooks", *arguments], **options)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return run


def test_an_endpoint_lives_from_add_to_remove(run):
    added = json.loads(run("add", URL, "--events", "invoice.paid, invoice.failed", "--json").stdout)
    assert (added["id"], added["url"]) == (1, URL)
    assert len(base64.b64decode(added["secret"].removeprefix("whsec_"))) == 32
    [shown] = json.loads(run("list", "--json").stdout)
    assert (shown["events"], shown["status"]) == (["invoice.failed", "invoice.paid"], "active")
    run("pause", "1", "--why", "they move")
    assert "they move" in run("list").stdout
    run("resume", "1")
    new = json.loads(run("rotate-secret", "1", "--json").stdout)["secret"]
    assert new != added["secret"]
    assert added["secret"] not in run("list", "--json").stdout
    run("remove", "1")
    assert json.loads(run("list", "--json").stdout) == []


def test_what_failed_is_listed_and_sent_again(world, run):
    run("add", URL)
    receivers = Receivers()
    receivers.say(302)
    out = Outbound(world.store, world.clock, world.vault, receivers, ())
    world.subscribe()
    publish(world.store, world.clock)
    deliver(out, 1, AtOnce())
    [failed] = json.loads(run("deliveries", "--failed", "--json").stdout)
    assert (failed["type"], failed["status"]) == ("subscription.created", 302)
    assert failed["reason"] == "302: a redirect, not followed"
    assert "302" in run("deliveries").stdout
    assert "1 subscription" in run("replay", "1", "--parked").stdout
    assert "1 subscription" in run("replay", "1", "--event", failed["event"]).stdout
    assert "1 subscription" in run("replay", "1", "--from", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["add", "http://shop.example/"], "https", 1),
        (["add", URL, "--events", "invoice.payed"], "invoice.payed", 1),
        (["add", URL, "--secret-file", "-"], "secret", 1),
        (["pause", "7"], "no endpoint 7", 1),
        (["replay", "1"], "--from", 2),
        (["replay", "1", "--from", "1", "--parked"], "--from", 2),
    ],
)
def test_what_makes_no_sense_is_named(run, arguments, words, status):
    assert words in run(*arguments, status=status, input="whsec_c2hvcnQ=").output


def test_a_private_address_is_allowed_by_the_setting_alone(run, monkeypatch):
    run("add", "http://127.0.0.1:9/hook", status=1)
    monkeypatch.setenv("BILLING_WEBHOOKS_ALLOW_PRIVATE", "true")
    run("add", "http://127.0.0.1:9/hook")
    tested = json.loads(run("test", "1", "--json", status=1).stdout)
    assert tested["status"] is None
    assert tested["reason"]
