"""Polls whether a page was paid, and stores the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from billing_worker.domain import card as card_rules
from billing_worker.domain import card_setup as rules
from billing_worker.domain.card_setup import (
    CardSetup,
    CardSetupStatus,
    PageStatement,
    StoredCard,
)
from billing_worker.domain.errors import BillingError, GatewayError
from billing_worker.domain.events import Event
from billing_worker.domain.new_card import APART
from billing_worker.domain.outcome import Context
from billing_worker.domain.secret import Secret
from billing_worker.gateway.port import WireCall
from billing_worker.persistence import (
    card_setups,
    cards,
    customers,
    history,
    pay_links,
    subscriptions,
)
from billing_worker.persistence.history import Entry
from billing_worker.services.attempts.settle import wire_data
from billing_worker.services.cards.keep import card_row
from billing_worker.services.cards.new_card import Given, Scope, give
from billing_worker.services.charging.session import GatewaySession
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.hosted_pages.gateway_page import find_page
from billing_worker.services.import_records.subscription import CardRecord
from billing_worker.services.ports import Ports

BY = "card_setup"
SETUP_BATCH = 200
SETUP_POLL_LOST_AFTER = timedelta(seconds=60)
"""A poll that was lost is due again after this. Polling twice is harmless."""

log = structlog.get_logger()


def poll_due_pages(ports: Ports) -> int:
    """Poll every page that is due. Returns how many were polled.

    Few customers are on a page at once, so the sweep polls by itself.
    """
    now = ports.clock.now()
    with ports.store.transaction() as connection:
        due = card_setups.take_due(connection, now, now + SETUP_POLL_LOST_AFTER, SETUP_BATCH)
    ports.pool.map(lambda setup: _poll_safely(ports, setup), due)
    return len(due)


def _poll_safely(ports: Ports, setup: CardSetup) -> str:
    try:
        return str(poll(ports, setup).status)
    except (BillingError, SQLAlchemyError) as error:
        log.warning("card_setup.interrupted", setup=setup.id, reason=type(error).__name__)
        return "interrupted"
    except Exception:
        # A bug of ours. The row keeps its state and is polled again; the others must not wait.
        log.exception("billing.alert", kind="card_setup.crashed", page=setup.reference_id)
        return "crashed"


def poll(ports: Ports, setup: CardSetup) -> CardSetup:
    """Poll one page. No answer proves nothing: it is polled again later."""
    session = GatewaySession(ports=ports, by=BY, owner=setup.whose.owner, forgetful=False)
    said = None
    try:
        said = _stated(session, setup)
    except GatewayError as error:
        log.info("card_setup.no_answer", setup=setup.id, reason=error.reason)
        if setup.status is CardSetupStatus.PREPARED:
            return setup  # It may have been paid: only the gateway's answer ends it.
    return settle_page(session, setup, said)


def _stated(session: GatewaySession, setup: CardSetup) -> PageStatement | None:
    """Return the gateway's statement, or None if it has nothing under the reference."""
    if setup.gateway_id is None:
        return find_page(session, setup.whose)
    session.wait()
    return session.poll_page(setup.gateway_id)


def settle_page(
    session: GatewaySession,
    setup: CardSetup,
    said: PageStatement | None,
    *,
    not_handed_out: str = rules.SETUP_NEVER_HANDED_OUT,
) -> CardSetup:
    """Apply the gateway's statement (None: no answer) in one transaction: card, state and history.

    `not_handed_out`: why the page of a prepared set-up is not handed out.
    """
    ports = session.ports
    with ports.store.transaction() as connection:
        context = Context(right_now(ports, connection), BY, ports.timings)
        token = said.card.token if said and said.card else None
        if token is not None:
            card_setups.lock_subscriptions_of(connection, setup.customer_id)
        before = card_setups.lock(connection, setup.id)
        if before.status is CardSetupStatus.PREPARED and before.fence != setup.fence:
            return before  # A newer caller continues it.
        owners = _owners(connection, token)
        concluded = rules.conclude(
            before,
            said,
            context,
            token_is_foreign=bool(owners.keys() - {before.customer_id}),
            not_handed_out=not_handed_out,
        )
        events = list(concluded.events)
        card_id = None
        if concluded.keep is not None:
            card_id = _keep(ports, connection, before, concluded.keep)
            events.append(rules.stored(before, card_id, concluded.keep.mask, context))
        card_setups.save(connection, before, concluded.setup, card_id)
        told = _with_calls(events, session.shown())
        history.write(connection, [_entry(connection, before, event) for event in told])
        if card_id is not None:
            _give(ports, connection, before, card_id)
    _alert(concluded.setup, events)
    return concluded.setup


def _entry(connection: Connection, setup: CardSetup, event: Event) -> Entry:
    """Return the history entry, also about the invoice that the page pays."""
    if setup.attempt_id is None:
        return Entry(event)
    key = pay_links.key_of(connection, setup.attempt_id)
    return Entry.about(key, event)


def _owners(connection: Connection, token: Secret | None) -> dict[int, int]:
    if token is None:
        return {}
    return card_setups.owners_of(connection, card_rules.fingerprint(token))


def _keep(
    ports: Ports,
    connection: Connection,
    setup: CardSetup,
    card: StoredCard,
) -> int:
    """Store the customer's card of this token once, and return it."""
    row = card_row(ports.vault, _record(card), setup.customer_id, right_now(ports, connection))
    row |= {
        "holder": card.holder,
        "issuer_name": card.issuer_name,
        "issuer_country": card.issuer_country and card.issuer_country[:8],
    }
    [card_id] = customers.add_cards(connection, [row])
    return card_id


def _record(card: StoredCard) -> CardRecord:
    assert card.token is not None  # noqa: S101 - the domain keeps no card without one; tells mypy
    return CardRecord(
        token=card.token,
        mask=card.mask and card.mask[:32],
        brand=card.brand and card.brand[:32],
        expiry_month=card.expiry_month,
        expiry_year=card.expiry_year,
    )


def _give(ports: Ports, connection: Connection, setup: CardSetup, card_id: int) -> None:
    """Make the new card the default where the customer expects it, and where no other card can pay.

    A page that pays an invoice is for its subscription and for all subscriptions that used the
    replaced card. Other subscriptions with a good card keep it: a customer may use two cards on
    purpose.
    """
    now = right_now(ports, connection)
    obstacle = card_rules.obstacle(cards.by_ids(connection, {card_id})[card_id], now)
    if obstacle is not None:
        log.warning("card_setup.card_not_used", page=setup.reference_id, reason=obstacle)
        return
    paid_here = card_setups.subscription_of(connection, setup)
    wanted = {row.id for row in card_setups.that_wait(connection, setup.customer_id)}
    wanted |= _without_a_good_card(connection, setup.customer_id, now)
    if paid_here is not None:
        alike = cards.paid_with(connection, setup.customer_id, paid_here.card_id)
        wanted |= {paid_here.id, *(row.id for row in alike)}
    given_to, _ = subscriptions.lock_these(connection, wanted)
    why = f"entered on page {setup.reference_id}"
    give(
        connection,
        given_to,
        Given(card_id, BY, why, Scope.CUSTOMER, now),
        given_for={paid_here.id} if paid_here else set(),
        # The page has just debited the customer once.
        first_at=now + APART if paid_here else now,
    )


def _without_a_good_card(connection: Connection, customer_id: int, now: datetime) -> set[int]:
    rows = card_setups.billed_to(connection, customer_id)
    default = cards.by_ids(connection, {row.card_id for row in rows if row.card_id})
    good = {card.id for card in default.values() if card_rules.obstacle(card, now) is None}
    return {row.id for row in rows if row.card_id not in good}


def _with_calls(events: Sequence[Event], calls: Sequence[WireCall]) -> list[Event]:
    if not events or not calls:
        return list(events)
    first: dict[str, Any] = {**events[0].data, "calls": wire_data(calls)}
    return [replace(events[0], data=first), *events[1:]]


def _alert(setup: CardSetup, events: Sequence[Event]) -> None:
    for event in events:
        if event.alert:
            log.error("billing.alert", kind=str(event.kind), page=setup.reference_id,
                      reason=setup.outcome)  # fmt: skip
