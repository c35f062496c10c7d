"""Pages that are handed out: kept encrypted, and found again behind an opaque, signed name."""

from __future__ import annotations

import json

from billing_worker.domain.errors import WrongKey
from billing_worker.domain.hosted import Page
from billing_worker.domain.secret import Secret
from billing_worker.persistence import hosted, links
from billing_worker.persistence.store import Store
from billing_worker.services.ports import Vault

_LINK, _CARD = "pay link ", "card page "
"""Keep these names apart from everything else that the vault's keys encrypt."""


def lock_page(vault: Vault, page: Page) -> bytes:
    content = {"action": page.action, "method": page.method, "params": dict(page.params)}
    return vault.lock(Secret(json.dumps(content)))


def unlock_page(vault: Vault, locked: bytes) -> Page:
    return Page(**json.loads(vault.unlock(locked).reveal()))


def path_of_link(vault: Vault, attempt_id: int) -> str:
    return _path(vault, f"{_LINK}{attempt_id}")


def path_of_card_page(vault: Vault, payment_id: int) -> str:
    return _path(vault, f"{_CARD}{payment_id}")


def _path(vault: Vault, name: str) -> str:
    return "/pay/" + vault.lock(Secret(name)).decode()


def page_behind(store: Store, vault: Vault, name: str) -> Page | None:
    """The page to send the customer to; None: no such name, or nothing is to be paid there."""
    try:
        kind, _, number = vault.unlock(name.encode()).reveal().rpartition(" ")
    except WrongKey:
        return None
    find = {_LINK: links.page_of, _CARD: hosted.page_of}.get(f"{kind} ")
    if find is None or not number.isdecimal():
        return None
    with store.reading() as connection:
        locked = find(connection, int(number))
    return unlock_page(vault, locked) if locked else None
