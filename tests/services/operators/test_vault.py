"""Stored secrets: bound to their rows, and encrypted with a new key while charges go on."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from billing_worker.domain.errors import WrongPlace
from billing_worker.domain.secret import Place, Secret
from billing_worker.entrypoints.cli import cli
from billing_worker.persistence.schema.tables import cards, events, invoices
from billing_worker.persistence.vault import FernetVault, encrypted
from billing_worker.services.operators.vault import Lock, inspect, rotate
from tests.entrypoints.test_config import GOOD
from tests.support.stored_tokens import put_token, token_of
from tests.support.world import KEY

NEW = Fernet.generate_key().decode()
CHANGED_OVER = FernetVault(Secret(f"{NEW},{KEY}"))
ONLY_NEW = FernetVault(Secret(NEW))


def silent(called, done):
    pass


def stored(world):
    with world.store.reading() as connection:
        return connection.execute(select(cards).order_by(cards.c.id)).all()


def why(world):
    with world.store.reading() as connection:
        query = select(invoices.c.reason).where(invoices.c.reference_id == "sub-1-p0")
        return connection.execute(query).scalar_one()


def write_token(world, card_id, token):
    with world.store.transaction() as connection:
        connection.execute(update(cards).where(cards.c.id == card_id).values(token=token))


def as_older_versions_did(token):
    return Fernet(KEY).encrypt(token.encode())


def turned(world, vault=CHANGED_OVER):
    return rotate(world.store, vault, world.clock, silent, by="operator:ann", why="yearly")


def test_a_token_that_was_copied_to_another_customers_card_charges_nobody(world):
    world.subscribe("approved.of-ann", "sub-1")
    world.subscribe("approved.of-bob", "sub-2")
    of_ann, of_bob = stored(world)
    write_token(world, of_ann.id, of_bob.token)
    world.tick()
    assert world.fate("sub-2-p0") == "paid"
    assert world.fate("sub-1-p0") != "paid"
    assert not [s for s in world.transport.sent if b"sub-1-p0" in (s.body or b"")]
    assert "was stored for another customer" in why(world)


@pytest.mark.by_hand
def test_a_subscription_that_was_turned_to_another_customers_card_charges_nobody(world):
    world.subscribe("approved.of-ann", "sub-1")
    world.subscribe("approved.of-bob", "sub-2")
    with world.store.transaction() as connection:
        connection.exec_driver_sql("UPDATE subscriptions SET card_id = 2 WHERE id = 1")
    world.tick()
    assert world.fate("sub-1-p0") != "paid"


def test_a_secret_opens_in_its_own_place_only():
    locked = CHANGED_OVER.lock(Secret("token"), Place("card of customer 1"))
    assert CHANGED_OVER.unlock(locked, Place("card of customer 1")).reveal() == "token"
    for other in ("card of customer 11", "card of customer", "bearer of attempt 1", ""):
        with pytest.raises(WrongPlace):
            CHANGED_OVER.unlock(locked, Place(other))


def test_a_token_of_an_older_version_is_charged_and_bound_by_a_rotation(world):
    world.subscribe("approved.of-ann")
    [card] = stored(world)
    write_token(world, card.id, as_older_versions_did("approved.of-ann"))
    world.tick()
    assert world.fate("sub-1-p0") == "paid"
    assert turned(world, world.vault).total(Lock.OLDER) >= 1
    [card] = stored(world)
    with pytest.raises(WrongPlace):
        world.vault.unlock(card.token, Place("card of customer 99"))


def test_after_a_rotation_everything_opens_with_the_new_key_alone(world, monkeypatch):
    monkeypatch.setattr(encrypted, "BATCH", 2)
    for number in range(5):
        world.subscribe(None if number == 4 else "approved", f"sub-{number}")
    world.tick()
    before = inspect(world.store, CHANGED_OVER, silent)
    assert before.is_good
    assert before.total(Lock.OLDER) >= 4
    turned(world)
    after = inspect(world.store, ONLY_NEW, silent)
    assert after.is_good
    assert after.total(Lock.NEWEST) == before.total(Lock.OLDER)
    assert after.total(Lock.OLDER) == 0


def test_a_rotation_that_was_interrupted_goes_on_with_the_rest(world, monkeypatch):
    monkeypatch.setattr(encrypted, "BATCH", 1)
    for number in range(4):
        world.subscribe(reference=f"sub-{number}")

    def interrupted(_, done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(world.store, CHANGED_OVER, world.clock, interrupted, by="ann", why="x")
    assert turned(world).total(Lock.OLDER) == 2
    assert inspect(world.store, ONLY_NEW, silent).total(Lock.NEWEST) == 4


def test_a_rotation_keeps_a_token_that_was_stored_while_it_ran(world):
    world.subscribe("approved.old")
    real = CHANGED_OVER.renewed

    class Slow:
        def renewed(self, locked, place):
            new = real(locked, place)
            put_token(world, "approved.stored-meanwhile")
            return new

    turned(world, Slow())
    [card] = stored(world)
    assert token_of(world, card) == "approved.stored-meanwhile"


def test_a_rotation_is_in_the_history(world):
    world.subscribe()
    turned(world)
    with world.store.reading() as connection:
        event = connection.execute(select(events).where(events.c.kind == "vault.rotated")).one()
    assert (event.by, event.data["why"], event.data["renewed"]) == ("operator:ann", "yearly", 1)


@pytest.fixture
def run(database_url, monkeypatch):
    settings = {"BILLING_DATABASE_URL": database_url, "BILLING_VAULT_KEYS": f"{NEW},{KEY}"}
    for name, value in (GOOD | settings).items():
        monkeypatch.setenv(name, value)
    return lambda *arguments: CliRunner().invoke(cli, arguments)


def test_vault_check_names_the_rows_that_do_not_decrypt(world, run):
    world.subscribe(reference="sub-1")
    world.subscribe(reference="sub-2")
    world.subscribe(reference="sub-3")
    write_token(world, 1, Fernet(Fernet.generate_key()).encrypt(b"t"))
    write_token(world, 2, stored(world)[2].token)
    done = run("vault", "check", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["broken"] == ["card tokens 1: no_key", "card tokens 2: elsewhere"]
    assert found["secrets"]["card tokens"] == {"no_key": 1, "elsewhere": 1, "older": 1}


def test_vault_rotate_says_what_is_left_afterwards(world, run):
    world.subscribe()
    done = run("vault", "rotate", "--why", "yearly")
    assert (done.exit_code, done.stdout) == (
        0, "1 encrypted with the newest key and bound to its row\n",
    )  # fmt: skip
    assert "1 encrypted anew" in done.stderr


def test_an_export_with_tokens_is_in_the_history(world, run):
    world.subscribe()
    assert run("subscriptions", "export").exit_code == 0
    assert run("subscriptions", "export", "--with-tokens", "--by", "ann").exit_code == 0
    with world.store.reading() as connection:
        [event] = connection.execute(select(events).where(events.c.kind == "tokens.exported"))
    assert event.by == "operator:ann"
