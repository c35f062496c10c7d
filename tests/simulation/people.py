"""Operators, customers and other services of a simulation: they act at any moment, and at odds.

Each act is drawn by the simulation's own chance and runs as one of its tasks, so it may be overtaken
and killed at every boundary like all others. Who asks for what is not possible is told so: the typed
errors of the services are answers, not failures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from billing_worker.domain.attempt import Origin
from billing_worker.domain.dunning import POLICIES
from billing_worker.domain.errors import ConcurrentChange, GatewayError, InvalidInput, NotPayable
from billing_worker.domain.secret import Secret
from billing_worker.persistence import switches
from billing_worker.persistence.schema import tables
from billing_worker.sandbox.gateway import SandboxGateway
from billing_worker.services import dunning
from billing_worker.services.cards.new_card import Scope, replace_card
from billing_worker.services.charging.charge import charge_batch
from billing_worker.services.hosted_pages.page_address import page_behind
from billing_worker.services.hosted_pages.pay_link import start_checkout
from billing_worker.services.import_records.subscription import (
    BadRecord,
    CardRecord,
    parse_record,
)
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.operators.debts import IfCharged, mark_paid, void_invoice
from billing_worker.services.operators.resolve import resolve_unknown
from billing_worker.services.ports import Ports
from billing_worker.services.subscriptions import lifecycle
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.simulation.witness import people_call_unpaid

ANSWERS = (InvalidInput, BadRecord, NotPayable, GatewayError, ConcurrentChange)
NEW_CARDS = (
    "approved",
    "approved",
    "decline_insufficient_funds",
    "decline_card_expired",
    "needs_3ds",
)

Act = Callable[[Ports], Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """An act that may have to be said again, as of the time when it was made."""

    reference: str
    say: Callable[[Ports, datetime | None], Any]

    def __call__(self, ports: Ports) -> Any:
        return self.say(ports, None)


LATER_ACTS = 0.2
"""Chance of an act that `rarely` draws: most seeds go on as they did before it was known."""


class People:
    def __init__(self, rng: random.Random, references: list[str], rarely: random.Random) -> None:
        self._rng = rng
        self._rarely = rarely
        self._references = references
        self._new_cards = 0
        self.pages: list[dict[str, Any]] = []

    def next_act(self) -> tuple[str, Act]:
        """(what it is called in the trace, what to do)."""
        reference = self._rng.choice(self._references)
        if self._rarely.random() < LATER_ACTS:
            name, act = self._rarely.choice(
                [
                    ("moves the next date of", self._reschedule),
                    ("pauses for a while", self._pause_for_a_while),
                    ("pauses for a while", self._pause_for_a_while),
                    ("agrees on an amount for later with", self._agree),
                    ("agrees on an amount for later with", self._agree),
                    ("subscribes again beside", self._subscribe_beside),
                    ("forgives", self._forgive),
                ]
            )
            return f"somebody {name} {reference}", act(reference)
        name, act = self._rng.choice(
            [
                ("pauses", self._pause),
                ("resumes", self._resume),
                ("resumes", self._resume),
                ("cancels", self._cancel),
                ("keeps", self._uncancel),
                ("changes", self._change),
                ("retries", self._retry),
                ("retries", self._retry),
                ("replaces the card of", self._replace_card),
                ("replaces the card of", self._replace_card),
                ("chooses a policy for", self._choose_policy),
                ("asks for a page for", self._ask_for_page),
                ("asks for a page for", self._ask_for_page),
                ("turns sales for", self._turn_sales),
                ("gives up what is overdue, not only", self._give_up),
                *[("charges by hand, and says what became of it, not only", self._resolve)] * 6,
                ("voids an invoice of", self._void),
                ("marks an invoice as paid of", self._mark_paid),
            ]
        )
        return f"somebody {name} {reference}", act(reference)

    def leave_pages_open(self) -> None:
        """Some who have a page are at the gateway's already, and need our books no more."""
        self.pages = [page | {"left_open": self._rng.random() < 0.5} for page in self.pages]

    def page_to_pay(self) -> dict[str, Any] | None:
        return self.pages.pop(self._rng.randrange(len(self.pages))) if self.pages else None

    # --- acts --------------------------------------------------------------------------------

    def _pause(self, reference: str) -> Act:
        return Decision(
            reference,
            lambda p, at: lifecycle.pause(
                p.store, p.clock, reference, by="somebody", decided_at=at
            ),
        )

    def _resume(self, reference: str) -> Act:
        shift = self._rng.random() < 0.5
        return Decision(
            reference,
            lambda p, at: lifecycle.resume(
                p.store, p.clock, reference, shift_anchor=shift, by="somebody", decided_at=at
            ),
        )

    def _cancel(self, reference: str) -> Act:
        end = self._rng.random() < 0.8
        return Decision(
            reference,
            lambda p, at: lifecycle.cancel(
                p.store, p.clock, reference, at_period_end=end, by="somebody", decided_at=at
            ),
        )

    def _uncancel(self, reference: str) -> Act:
        return Decision(
            reference,
            lambda p, at: lifecycle.uncancel(
                p.store, p.clock, reference, by="somebody", decided_at=at
            ),
        )

    def _change(self, reference: str) -> Act:
        wanted = self._rng.choice(
            [{"amount": "12.50"}, {"interval": "week"}, {"interval": "month", "interval_count": 2}]
        )
        return Decision(
            reference,
            lambda p, at: lifecycle.change(
                p.store, p.clock, reference, by="somebody", decided_at=at, **wanted
            ),
        )

    def _reschedule(self, reference: str) -> Act:
        how = self._rarely.choice([{"days": 3}, {"billing_day": 31}, {"free_periods": 1}])
        return Decision(
            reference,
            lambda p, at: lifecycle.reschedule(
                p.store, p.clock, reference, by="somebody", decided_at=at, **how
            ),
        )

    def _pause_for_a_while(self, reference: str) -> Act:
        days, shift = self._rarely.choice([1, 9]), self._rarely.random() < 0.5
        return Decision(
            reference,
            lambda p, at: lifecycle.pause(
                p.store, p.clock, reference, until=_from_then(p, at, days), shift_anchor=shift,
                by="somebody", decided_at=at,
            ),
        )  # fmt: skip

    def _agree(self, reference: str) -> Act:
        days = self._rarely.choice([1, 9, 30])
        return Decision(
            reference,
            lambda p, at: lifecycle.change(
                p.store, p.clock, reference, amount="7.77", amount_from=_from_then(p, at, days),
                by="somebody", decided_at=at,
            ),
        )  # fmt: skip

    def _subscribe_beside(self, reference: str) -> Act:
        """Another subscription of the same customer, on their default card or on another one."""
        new = f"sub-{len(self._references)}"
        self._references.append(new)
        chosen = self._rarely.choice([None, *NEW_CARDS])
        terms = {
            "reference_id": new,
            "card": chosen and {"token": f"{chosen}.{new}"},
            "amount": "9.99",
            "currency": "USD",
            "interval": self._rarely.choice(["week", "month"]),
            "ends_after_periods": self._rarely.choice([None, 2]),
        }

        def subscribes(ports: Ports, at: datetime | None) -> Any:
            anchor = (at or ports.clock.now()).isoformat()
            customer = {"reference_id": _customer_of(ports, reference)}
            record = parse_record(terms | {"customer": customer, "anchor_at": anchor})
            return subscribe(ports.store, ports.vault, ports.clock, [record], by="somebody")

        return Decision(new, subscribes)

    def _forgive(self, reference: str) -> Act:
        return lambda p: lifecycle.forgive(p.store, p.clock, reference, by="somebody")

    def _retry(self, reference: str) -> Act:
        chosen = self._rng.random()

        def act(ports: Ports) -> Any:
            invoice = _some_invoice(ports, reference, chosen)
            return invoice and dunning.retry_invoice(
                ports.store, ports.clock, reference=invoice, by="somebody", why="asked"
            )

        return act

    def _replace_card(self, reference: str) -> Act:
        self._new_cards += 1
        token = f"{self._rng.choice(NEW_CARDS)}.{reference}-{self._new_cards}"
        brand = self._rng.choice(["visa", "mastercard", None])
        card = CardRecord(Secret(token), None, brand, 12, 2032)
        scope = self._rng.choice(list(Scope))
        return Decision(
            reference,
            lambda p, at: replace_card(
                p.store, p.vault, p.clock, subscription_reference=reference, card=card,
                scope=scope, by="somebody", why=None, decided_at=at,
            ),
        )  # fmt: skip

    def _choose_policy(self, reference: str) -> Act:
        policy = self._rng.choice(sorted(POLICIES))
        return lambda p: dunning.choose_policy(
            p.store, p.clock, subscription_reference=reference, policy=policy,
            by="somebody", why="asked",
        )  # fmt: skip

    def _ask_for_page(self, reference: str) -> Act:
        chosen = self._rng.random()

        def act(ports: Ports) -> None:
            invoice = _some_invoice(ports, reference, chosen)
            if invoice:
                self.pages.append(start_checkout(ports, {"invoice": invoice}))

        return act

    def _turn_sales(self, _: str) -> Act:
        on = self._rng.random() < 0.6

        def act(ports: Ports) -> None:
            with ports.store.transaction() as connection:
                switches.turn_sales(
                    connection, on=on, by="somebody", reason=None, now=ports.clock.now()
                )

        return act

    def _give_up(self, _: str) -> Act:
        return lambda p: dunning.give_up_overdue(p.store, p.clock)

    def _resolve(self, _: str) -> Act:
        """Of whatever is unknown. Most look at the account's statement first; some err all the same."""
        chosen, errs = self._rng.random(), self._rng.random() < 0.3

        def act(ports: Ports) -> Any:
            renew_due(ports)
            charge_batch(ports, _due(ports))
            unknown = _some_unknown_attempt(ports, chosen)
            if unknown is None:
                return None
            sandbox = _sandbox_of(ports)
            debited = any(debit.gateway_id == unknown.gateway_id for debit in sandbox.ledger)
            paid = debited is not errs
            if not paid:
                people_call_unpaid(sandbox, unknown.gateway_id, ports.clock.now())
            return resolve_unknown(
                ports, reference=unknown.reference_id, paid=paid, evidence="the statement",
                by="somebody", why="asked",
            )  # fmt: skip

        return act

    def _void(self, reference: str) -> Act:
        chosen, how = self._rng.random(), self._rng.choice(list(IfCharged))

        def act(ports: Ports) -> Any:
            invoice = _some_invoice(ports, reference, chosen)
            return invoice and void_invoice(
                ports.store, ports.clock, reference=invoice, by="somebody", why="asked",
                if_charged=how,
            )  # fmt: skip

        return act

    def _mark_paid(self, reference: str) -> Act:
        chosen = self._rng.random()
        how = self._rng.choice([IfCharged.REFUSE, IfCharged.ALL_THE_SAME])

        def act(ports: Ports) -> Any:
            invoice = _some_invoice(ports, reference, chosen)
            return invoice and mark_paid(
                ports.store, ports.clock, reference=invoice, evidence="cash", by="somebody",
                why="asked", if_charged=how,
            )  # fmt: skip

        return act


def customer_pays(ports: Ports, page: dict[str, Any], pay: Callable[[str], Any]) -> str:
    """The customer opens our page and pays at once, if it still sends them on. One who is at the
    gateway's page already needs us no more.
    """
    if not page.get("left_open"):
        behind = page_behind(ports.store, ports.vault, page["pay_path"].removeprefix("/pay/"))
        if behind is None:
            return f"customer finds {page['reference_id']} closed"
        assert (behind.action, dict(behind.params)) == (page["action"], page["params"]), (
            f"the link of {page['reference_id']} opens another page"
        )
    return f"customer pays {page['reference_id']}: {pay(page['gateway_id']).status}"


def _sandbox_of(ports: Ports) -> SandboxGateway:
    sandbox: SandboxGateway = ports.gateway._transport._sandbox  # type: ignore[attr-defined]
    return sandbox


def _due(ports: Ports) -> list[int]:
    invoices = tables.invoices
    query = select(invoices.c.id).where(invoices.c.enqueue_at <= ports.clock.now())
    with ports.store.reading() as connection:
        return list(connection.execute(query.order_by(invoices.c.id)).scalars())


def _some_unknown_attempt(ports: Ports, chosen: float) -> Any:
    """One that may be unknown, or that somebody has resolved: who asks hears what it is."""
    attempts = tables.attempts
    query = (
        select(attempts.c.reference_id, attempts.c.gateway_id)
        .where(
            ((attempts.c.status == "submitted") & (attempts.c.origin != Origin.LINK))
            | attempts.c.undecided_since.is_not(None)
            | attempts.c.resolved_at.is_not(None)
        )
        .order_by(attempts.c.id)
    )
    with ports.store.reading() as connection:
        found = connection.execute(query).all()
    return found[int(chosen * len(found))] if found else None


def _from_then(ports: Ports, at: datetime | None, days: int) -> str:
    return ((at or ports.clock.now()) + timedelta(days=days)).isoformat()


def _customer_of(ports: Ports, reference: str) -> str:
    query = (
        select(tables.customers.c.reference_id)
        .join(tables.subscriptions)
        .where(tables.subscriptions.c.reference_id == reference)
    )
    with ports.store.reading() as connection:
        found: str | None = connection.execute(query).scalar()
    if found is None:
        raise InvalidInput("customer", "is not known here")
    return found


def forgive_whom_it_may_concern(ports: Ports) -> str | None:
    """Return who was suspended and is billed again."""
    stored = tables.subscriptions.c
    query = select(stored.reference_id).where(stored.status == "suspended").order_by(stored.id)
    with ports.store.reading() as connection:
        found: str | None = connection.execute(query).scalar()
    if found is not None:
        lifecycle.forgive(ports.store, ports.clock, found, by="somebody")
    return found


def _some_invoice(ports: Ports, reference: str, chosen: float) -> str | None:
    with ports.store.reading() as connection:
        query = (
            select(tables.invoices.c.reference_id)
            .join(tables.subscriptions)
            .where(tables.subscriptions.c.reference_id == reference)
            .order_by(tables.invoices.c.id)
        )
        found = list(connection.execute(query).scalars())
    return found[int(chosen * len(found))] if found else None
