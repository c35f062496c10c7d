"""Which commands run one after the other: those about one subscription, in the order of arrival.

`billing.subscribe` and a following `billing.cancel` are two messages. Taken by two workers at once,
the second finds no subscription, and the first one is charged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from billing_worker.services.commands.records import SUBSCRIBE

Subject = tuple[str, str] | None

_NAMES_ITSELF = frozenset({SUBSCRIBE, "billing.charge_once"})
"""Their `reference_id` is that of the subscription or charge that they create."""

_PERIOD = re.compile(r"-p\d+$")


def subject_of(task: str, arguments: Any) -> Subject:
    """Return the subject of a command, however malformed, or None if it does not name one.

    Subscriptions and one-off charges share their references, and an invoice's reference begins with
    its subscription's. A command that names neither is about its customer.
    """
    if not isinstance(arguments, Mapping):
        return None
    if task in _NAMES_ITSELF:
        return _named("subscription", arguments.get("reference_id"))
    billed = arguments.get("subscription") or arguments.get("charge")
    invoice = arguments.get("invoice")
    if billed is None and isinstance(invoice, str):
        billed = _PERIOD.sub("", invoice)
    return _named("subscription", billed) or _named("customer", arguments.get("customer"))


def _named(kind: str, value: Any) -> Subject:
    if isinstance(value, Mapping):
        value = value.get("reference_id")
    return (kind, value) if isinstance(value, str) and value else None
