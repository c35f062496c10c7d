"""Tests before any charge whether the vault keys decrypt a sample of the stored tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from random import Random

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.domain.errors import WrongKey
from billing_worker.domain.secret import card_of
from billing_worker.persistence import cards
from billing_worker.persistence.store import AWAY
from billing_worker.services.charging import failures
from billing_worker.services.ports import Ports, Vault

EACH = 20
"""So many of the newest subscriptions, of the oldest, and at random."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class KeyTest:
    tried: int
    opened: int
    newest_closed_at: datetime | None  # when the newest card that does not decrypt was stored

    @property
    def open_nothing(self) -> bool:
        return self.tried > 0 and self.opened == 0

    @property
    def open_everything(self) -> bool:
        return self.opened == self.tried

    def __str__(self) -> str:
        if not self.tried:
            return "no card is stored yet"
        if self.open_everything:
            return f"all {self.tried} card tokens that were tried open"
        if self.open_nothing:
            return f"BILLING_VAULT_KEYS open none of the {self.tried} card tokens that were tried"
        stored = self.newest_closed_at.isoformat() if self.newest_closed_at else "unknown"
        return (
            f"BILLING_VAULT_KEYS open only {self.opened} of the {self.tried} card tokens that were "
            f"tried: put the key of the others back at the end (the newest was stored {stored})"
        )


def try_keys(connection: Connection, vault: Vault) -> KeyTest:
    random = Random()  # noqa: S311 - a sample, no key
    closed: list[datetime] = []
    rows = cards.tokens_in_use(connection, EACH, random)
    for row in rows:
        try:
            vault.unlock(row.token, card_of(row.customer_id))
        except WrongKey:
            closed.append(row.created_at)
    return KeyTest(len(rows), len(rows) - len(closed), max(closed, default=None))


def try_at_start(ports: Ports) -> bool:
    """Alert, and charge and encrypt nothing, when the keys open nothing. False: the database does
    not answer, so nobody knows.
    """
    try:
        with ports.store.reading() as connection:
            found = try_keys(connection, ports.vault)
        if found.open_nothing:
            ports.vault.doubt()
            failures.stop_charging(ports, str(found))
    except (*AWAY, SQLAlchemyError) as error:
        log.warning("vault_keys.not_tried", reason=type(error).__name__)
        return False
    if not found.open_everything and not found.open_nothing:
        log.error("billing.alert", kind="vault_keys.incomplete", reason=str(found))
    return True
