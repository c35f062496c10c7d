"""Pages that are handed out: stored encrypted and found by a random name.

Whoever knows the name can pay, so the name is stored encrypted with the page and looked up by its
digest. It contains no row id: after a restore ids are used again, and such a name would open
another customer's page.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from billing_worker.domain.card_setup import Page
from billing_worker.domain.money import Money
from billing_worker.domain.secret import OF_PAGE, Secret
from billing_worker.persistence import card_setups, pay_links
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Vault

_NAME_BYTES: Final = 24
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NamedPage:
    """A page, and the name under which our own page sends the customer to it."""

    page: Page
    name: Secret

    @property
    def path(self) -> str:
        return "/pay/" + self.name.reveal()

    @property
    def digest(self) -> str:
        return _digest(self.name.reveal())

    def form(self, money: Money) -> dict[str, Any]:
        """The form that leads to the page, and the path of our page that submits it."""
        return {
            "amount": str(money.amount),
            "currency": money.currency,
            "action": self.page.action,
            "method": self.page.method,
            "params": dict(self.page.params),
            "pay_path": self.path,
        }


def named(page: Page) -> NamedPage:
    return NamedPage(page, Secret(secrets.token_urlsafe(_NAME_BYTES)))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def lock_page(vault: Vault, named_page: NamedPage) -> bytes:
    page = named_page.page
    content = {
        "action": page.action,
        "method": page.method,
        "params": dict(page.params),
        "name": named_page.name.reveal(),
    }
    return vault.lock(Secret(json.dumps(content)), OF_PAGE)


def unlock_page(
    vault: Vault, locked: bytes, keep: Callable[[bytes, str], object] = lambda *_: None
) -> NamedPage:
    """Decrypt a page.

    `keep` stores name and digest of a page that is older than names.
    """
    content = json.loads(vault.unlock(locked, OF_PAGE).reveal())
    name = content.pop("name", None)
    if name is not None:
        return NamedPage(Page(**content), Secret(name))
    now_named = named(Page(**content))
    keep(lock_page(vault, now_named), now_named.digest)
    return now_named


def page_behind(store: Store, vault: Vault, name: str) -> Page | None:
    """Return the page behind a name, or None if the name is unknown or nothing is to be
    paid there.
    """
    if not _NAME.fullmatch(name):
        return None
    digest = _digest(name)
    with store.reading() as connection:
        locked = pay_links.page_named(connection, digest) or card_setups.page_named(
            connection, digest
        )
    return unlock_page(vault, locked).page if locked else None


def is_paid(store: Store, name: str) -> bool:
    """Return whether the page behind this name is already paid."""
    if not _NAME.fullmatch(name):
        return False
    digest = _digest(name)
    with store.reading() as connection:
        return pay_links.is_paid(connection, digest) or card_setups.is_paid(connection, digest)
