"""Which cards are charged: those of the customer, never one that was refused for good, and none more
often than its network allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, text

from billing_worker.domain.attempt import Origin
from billing_worker.domain.card import died_of_age
from billing_worker.domain.declines import DECLINES, DeclineClass
from billing_worker.domain.network_rules import RULES
from billing_worker.persistence.invariants.asking import DAY_AGO, MONTH_AGO, Question, sliced
from billing_worker.persistence.schema.tables import (
    attempts,
    cards,
    customers,
    invoices,
    subscriptions,
)

CHARGED_CARD_OF_ANOTHER = Question(
    sliced(
        attempts.c.id,
        attempts.c.reference_id,
        attempts.c.card_id == cards.c.id,
        attempts.c.invoice_id == invoices.c.id,
        invoices.c.subscription_id == subscriptions.c.id,
        cards.c.customer_id != subscriptions.c.customer_id,
    ),
    by=attempts.c.id,
)

PAYS_WITH_CARD_OF_ANOTHER = Question(
    sliced(
        subscriptions.c.id,
        subscriptions.c.reference_id,
        subscriptions.c.card_id == cards.c.id,
        cards.c.customer_id != subscriptions.c.customer_id,
    ),
    by=subscriptions.c.id,
)

_alike = cards.alias("alike")


def usable_after(codes: Iterable[str]) -> Question:
    """Find declines with these codes whose card, or an equal one, may be charged again."""
    return Question(
        sliced(
            attempts.c.id,
            attempts.c.reference_id,
            attempts.c.status == "declined",
            attempts.c.outcome.in_(sorted(codes)),
            attempts.c.origin != Origin.LINK,  # a page takes any card
            attempts.c.card_id == cards.c.id,
            select(_alike.c.id)
            .where(
                or_(_alike.c.id == cards.c.id, _alike.c.fingerprint == cards.c.fingerprint),
                _alike.c.unusable_reason.is_(None),
            )
            .exists(),
        ),
        by=attempts.c.id,
    )


_HARD = {code for code, one in DECLINES.items() if one.kind is DeclineClass.HARD}
OF_AGE = frozenset(code for code in _HARD if died_of_age(code))
"""A bank renews such a card, and then it is charged again under the same token."""

REFUSED_CARD_USABLE = usable_after(_HARD - OF_AGE)

# Literally the condition of the index `ix_attempts_budget`.
_COUNTED = text("attempts.status IN ('prepared', 'submitted', 'declined')")
_MOST = {rule.name: rule.most for rule in RULES}
_BRAND = func.lower(func.coalesce(cards.c.brand, "mastercard"))
"""A card of unknown brand has the limits of all networks."""


_equal = cards.alias("equal")


def _tries_since(since: ColumnElement[datetime]) -> Select[Any]:
    """Count the attempts on the card and its equals that are, or may become, declines."""
    return (
        select(func.count())
        .select_from(_equal)
        .join(attempts, attempts.c.card_id == _equal.c.id)
        .where(
            or_(_equal.c.id == cards.c.id, _equal.c.fingerprint == cards.c.fingerprint),
            _COUNTED,
            attempts.c.submitted_at > since,
        )
        .correlate(cards)
    )


_of_one_charge = (
    _tries_since(MONTH_AGO)
    .group_by(attempts.c.invoice_id)
    .having(func.count() > _MOST["visa.20_reattempts_in_30_days"])
)
_of_all = _tries_since(DAY_AGO).scalar_subquery()
BEYOND_NETWORK_LIMIT = Question(
    sliced(
        cards.c.id,
        customers.c.reference_id,
        customers.c.id == cards.c.customer_id,
        cards.c.declined_at > MONTH_AGO,
        or_(
            _of_one_charge.exists(),
            and_(
                _BRAND.startswith("mastercard"),
                _of_all > _MOST["mastercard.10_declines_in_24_hours"],
            ),
        ),
    ),
    by=cards.c.id,
)
