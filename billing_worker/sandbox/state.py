"""All data of the sandbox; a reset replaces it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from itertools import islice

from billing_worker.sandbox.acquirer import Acquirer
from billing_worker.sandbox.behaviour import Behaviour
from billing_worker.sandbox.card_outcomes import Outcome
from billing_worker.sandbox.invoices import Invoice, open_invoice, serial
from billing_worker.sandbox.ledger import Ledger, Requests
from billing_worker.sandbox.orders import Order


class Books:
    """Invoices, customers, tokens, ledger and request counts. Ids come from counters, so that the
    same calls make the same ids.
    """

    def __init__(
        self, behaviour: Behaviour, on_change: Callable[[Invoice], None], first_number: int
    ) -> None:
        self._first_number = first_number
        self.ledger = Ledger()
        self.requests = Requests()
        self.acquirer = Acquirer(self.ledger, behaviour, on_change)
        self._by_id: dict[str, Invoice] = {}
        self._by_session: dict[str, Invoice] = {}
        self._by_bearer: dict[str, Invoice] = {}
        self._by_reference: defaultdict[str, list[Invoice]] = defaultdict(list)
        self._customer_ids: dict[str, str] = {}
        self._minted_for: dict[str, str] = {}
        self._tried: set[str] = set()

    def open(self, order: Order, outcome: Outcome, *, origin: str, now: datetime) -> Invoice:
        customer_id = self._customer_ids.setdefault(
            order.customer.reference_id, f"cus_{serial(len(self._customer_ids) + 1)}"
        )
        number = self._first_number + len(self._by_id)
        invoice = open_invoice(
            number, order, outcome, origin=origin, customer_id=customer_id, now=now
        )
        self._by_id[invoice.gateway_id] = invoice
        self._by_session[invoice.session_id] = invoice
        self._by_bearer[invoice.bearer] = invoice
        self._by_reference[order.reference_id].append(invoice)
        self.acquirer.admit(invoice, now)
        return invoice

    def with_id(self, gateway_id: str) -> Invoice | None:
        return self._by_id.get(gateway_id)

    def with_session(self, session_id: str) -> Invoice | None:
        return self._by_session.get(session_id)

    def with_bearer(self, bearer: str) -> Invoice | None:
        return self._by_bearer.get(bearer)

    def with_reference(self, reference_id: str) -> list[Invoice]:
        """Return the invoices whose order had this reference, oldest first."""
        return list(self._by_reference.get(reference_id, ()))

    def matching(self, expression: str) -> list[Invoice]:
        """Return the invoices of the named references, or after `-` all others, oldest first."""
        named = set(expression.removeprefix("-").split(","))
        negated = expression.startswith("-")
        return [one for one in self._by_id.values() if (one.order.reference_id in named) != negated]

    def latest(self, count: int) -> list[Invoice]:
        """Return the newest `count` invoices, oldest first."""
        return list(islice(reversed(self._by_id.values()), count))[::-1]

    def is_first_try(self, reference_id: str) -> bool:
        """Return True once per reference_id: some creates fail the first time only."""
        first = reference_id not in self._tried
        self._tried.add(reference_id)
        return first

    def mint_token(self, invoice: Invoice) -> None:
        """Give the card a token that is charged at once: `approved.minted.<serial>`."""
        invoice.minted_token = f"approved.minted.{serial(invoice.number)}"
        self._minted_for[invoice.minted_token] = invoice.order.customer.reference_id

    def may_use(self, token: str, customer_reference_id: str) -> bool:
        """Whether a token may pay for this customer. A minted token belongs to one customer
        (gateway.md §8); a scripted one works for every customer.
        """
        return self._minted_for.get(token, customer_reference_id) == customer_reference_id
