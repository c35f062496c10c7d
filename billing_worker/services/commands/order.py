"""Which commands are carried out one after the other: those about one subscription, as they came.

A `billing.subscribe` and the `billing.cancel` that follows it are two messages; taken by two workers
at once, the second would find no subscription and the first would go on to be charged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from billing_worker.services.commands.records import SUBSCRIBE

Subject = tuple[str, str] | None

_NAMES_ITSELF = frozenset({SUBSCRIBE, "billing.charge_once"})
"""Their `reference_id` is that of the subscription, or of the charge, which they bring about."""

_PERIOD = re.compile(r"-p\d+$")


def subject_of(task: str, arguments: Any) -> Subject:
    """What a command is about, however malformed it may be; None when it does not say.

    Subscriptions and one-off charges share their references, and an invoice begins with its
    subscription's. A command that names neither is about its customer.
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
