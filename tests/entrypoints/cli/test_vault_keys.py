"""Commands that encrypt or decrypt try the vault keys first, as the worker does."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet

from billing_worker.entrypoints.cli import cli
from tests.entrypoints.test_config import GOOD
from tests.support.world import KEY

SAID = ("--by", "ann", "--why", "x")
COMMANDS = {
    "import": ("subscriptions", "import", "book.jsonl"),
    "export": ("subscriptions", "export", "--with-tokens"),
    "replace": ("cards", "replace", "sub-1", "--card", "card.json", *SAID),
    "tokenise": ("cards", "tokenise", "--customer", "c", "--amount", "1", "--currency", "USD"),
    "pay-link": ("invoices", "pay-link", "sub-1-p0"),
    "web": ("web",),
}


@pytest.fixture
def keys(database_url, monkeypatch, tmp_path):
    """Choose the keys of the commands' settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.jsonl").write_text("")
    (tmp_path / "card.json").write_text(json.dumps({"token": "approved.new"}))

    def keys(*chosen):
        settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": ",".join(chosen)}
        for name, value in (GOOD | settings).items():
            monkeypatch.setenv(name, value)

    return keys


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_vault_keys_are_one_sentence_before_anything_is_done(world, keys, command):
    world.subscribe()
    keys(Fernet.generate_key().decode())
    done = CliRunner().invoke(cli, COMMANDS[command])
    assert done.exit_code == 1
    assert (
        done.output == "Error: BILLING_VAULT_KEYS open none of the 1 card tokens that were tried\n"
    )
    assert world.transport.sent == []


def test_a_key_that_opens_what_is_stored_is_enough(world, keys):
    world.subscribe()
    keys(Fernet.generate_key().decode(), KEY)
    done = CliRunner().invoke(cli, COMMANDS["export"])
    assert done.exit_code == 0
    assert '"token": "approved.customer-of-sub-1"' in done.stdout
