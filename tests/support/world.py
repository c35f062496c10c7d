"""A whole billing world in one process: real services, real SQL, a virtual clock and the twin.

The twin is the shipped sandbox, called without a socket through the real gateway adapter, so that
what is exercised here is the code that runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from cryptography.fernet import Fernet
from sqlalchemy import select

from billing_worker.domain.errors import NotSent, OutcomeUnknown
from billing_worker.domain.invoice import is_paid_elsewhere
from billing_worker.domain.secret import Secret
from billing_worker.domain.timings import Timings
from billing_worker.gateway.http import Request, Response
from billing_worker.gateway.paycore import GatewaySettings, PaycoreGateway
from billing_worker.gateway.rate_limit import Unlimited
from billing_worker.persistence.book.identity import Book
from billing_worker.persistence.book.identity import read as read_book
from billing_worker.persistence.book.outside import Memory
from billing_worker.persistence.schema import tables
from billing_worker.persistence.store import Store
from billing_worker.persistence.vault import FernetVault
from billing_worker.sandbox.gateway import Behaviour, Delivery, SandboxGateway
from billing_worker.services.charging.charge import charge_batch, charge_on_probation
from billing_worker.services.charging.reconcile import poll_batch, reconcile_due
from billing_worker.services.doorbell import ring_due
from billing_worker.services.hosted_pages.poll import poll_due_pages
from billing_worker.services.import_records.subscription import parse_record
from billing_worker.services.invoicing.renew import renew_due
from billing_worker.services.ports import Ports
from billing_worker.services.reports import status
from billing_worker.services.subscriptions.subscribe import subscribe
from tests.support.one_by_one import EachAlone, OneByOne

START = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
KEY = Fernet.generate_key().decode()


class VirtualClock:
    def __init__(self, now: datetime = START) -> None:
        self._now = now

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._now.timestamp()

    def advance(self, by: timedelta | float) -> None:
        self._now += by if isinstance(by, timedelta) else timedelta(seconds=by)


class TwinTransport:
    """Carries a request to the sandbox in this process, and reports how the wire ended it."""

    def __init__(self, sandbox: SandboxGateway, clock: VirtualClock) -> None:
        self._sandbox = sandbox
        self._clock = clock
        self.unreachable = False
        self.before_send: Callable[[Request], None] = lambda _: None
        self.sent: list[Request] = []

    def send(self, request: Request, *, moves_money: bool) -> Response:
        self.before_send(request)
        if self.unreachable:
            raise NotSent("connection refused")
        self.sent.append(request)
        parts = urlsplit(request.url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        reply = self._sandbox.handle(request.method, target, request.headers, request.body or b"")
        self._clock.advance(reply.delay_seconds)
        if reply.delivery is Delivery.NEVER:
            self._clock.advance(30)
            raise OutcomeUnknown("read timeout")
        if reply.delivery is Delivery.HANG_UP:
            raise OutcomeUnknown("connection closed without an answer")
        kind = reply.headers.get("Content-Type", "")
        return Response(reply.status, reply.body, kind)


class PatientBell:
    """Keeps the messages until somebody delivers them: in order, doubled, or never."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, tuple[int, ...]]] = []

    def charge(self, invoice_ids: Sequence[int]) -> None:
        self.messages.append(("charge", tuple(invoice_ids)))

    def poll(self, attempt_ids: Sequence[int]) -> None:
        self.messages.append(("poll", tuple(attempt_ids)))


class World:
    def __init__(
        self,
        store: Store,
        behaviour: Behaviour | None = None,
        timings: Timings | None = None,
        beside: World | None = None,
    ) -> None:
        """`beside`: another book on the same gateway account, in the same time."""
        self.store = store
        self.clock = beside.clock if beside else VirtualClock()
        self.sandbox = (
            beside.sandbox if beside else SandboxGateway(behaviour or Behaviour(), self.clock.now)
        )
        self.transport = TwinTransport(self.sandbox, self.clock)
        self.bell = PatientBell()
        self.vault = FernetVault(Secret(KEY))
        # Counted and not random: a simulation is repeated hash for hash. Never begun anew.
        self.creates: Iterator[int] = beside.creates if beside else itertools.count(1)
        self.outside = (Memory(),)
        self.ports = self.ports_of_a_worker(timings)

    def ports_of_a_worker(self, timings: Timings | None = None, **overrides: Any) -> Ports:
        collaborators: dict[str, Any] = {
            "store": self.store,
            "gateway": self.gateway(),
            "clock": self.clock,
            "bell": self.bell,
            "pool": OneByOne(),
            "vault": self.vault,
            "pace": Unlimited(),
            "timings": timings or Timings(),
            "test_mode": True,
            "commit_group": EachAlone(),
            "outside": self.outside,
            "name_create": lambda: f"create-{next(self.creates)}",
        }
        return Ports(**(collaborators | overrides))

    def gateway(self, transport: Any = None) -> PaycoreGateway:
        return PaycoreGateway(
            transport or self.transport,
            self.clock,
            GatewaySettings(
                api_url="https://gateway.test/api",
                username=self.sandbox.username,
                password=Secret(self.sandbox.password),
                cardgate_url="https://cardgate.test",
            ),
        )

    # --- what happens ------------------------------------------------------------------------

    def subscribe(self, token: str | None = "approved", reference: str = "sub-1", **fields: Any):
        customer = fields.get("customer", {"reference_id": f"customer-of-{reference}"})
        if token is not None and "." not in token:  # no two customers have one card
            token = f"{token}.{customer['reference_id']}"
        record = {
            "reference_id": reference,
            "customer": customer,
            "card": {"token": token} if token else None,
            "amount": "9.99",
            "currency": "USD",
            "interval": "month",
            "anchor_at": self.clock.now().isoformat(),
        }
        parsed = parse_record(record | fields)
        return subscribe(self.store, self.vault, self.clock, [parsed], by="test")

    def tick(self) -> None:
        """One beat of every sweep, and every message delivered once."""
        self.sweep()
        self.deliver()

    def sweep(self, *, opens: bool = True) -> None:
        """`opens` False: no period becomes due any more."""
        if opens:
            renew_due(self.ports)
        charge_on_probation(self.ports)
        ring_due(self.ports)
        reconcile_due(self.ports)
        poll_due_pages(self.ports)

    def deliver(self, ports: Ports | None = None) -> None:
        while self.bell.messages:
            self.run(*self.bell.messages.pop(0), ports=ports)

    def run(self, kind: str, ids: tuple[int, ...], ports: Ports | None = None) -> dict[str, int]:
        work = charge_batch if kind == "charge" else poll_batch
        return work(ports or self.ports, ids)

    def run_for(self, span: timedelta, step: timedelta = timedelta(minutes=1)) -> None:
        end = self.clock.now() + span
        while self.clock.now() < end:
            self.tick()
            self.clock.advance(step)
        self.tick()

    # --- what can be seen --------------------------------------------------------------------

    def explain(self, reference: str = "sub-1-p0") -> dict[str, Any]:
        with self.store.reading() as connection:
            data = status.explain(connection, reference)
        assert data is not None, f"no invoice {reference}"
        return data

    def fate(self, reference: str = "sub-1-p0") -> str:
        return str(self.explain(reference)["fate"])

    def attempts(self, reference: str = "sub-1-p0") -> list[str]:
        return [attempt["status"] for attempt in self.explain(reference)["attempts"]]

    def events(self, reference: str = "sub-1-p0") -> list[str]:
        return [event["kind"] for event in self.explain(reference)["history"]]

    @property
    def book(self) -> Book:
        with self.store.reading() as connection:
            return read_book(connection)

    def alerts(self) -> list[str]:
        """The reasons that a person was told, oldest first."""
        with self.store.reading() as connection:
            data = connection.execute(
                select(tables.events.c.data).where(tables.events.c.alert).order_by("id")
            ).scalars()
            return [str(one.get("evidence") or one.get("reason") or one) for one in data]

    def sales(self, reference: str) -> int:
        """How many sales for an attempt's reference reached the gateway."""
        return self.sandbox.requests.for_reference("sale", reference)

    def debits(self, *, everybody: bool = False) -> Counter[str]:
        """Movements of money at the gateway, by our invoice; `everybody`: by other books too."""
        prefix = self.book.prefix
        ours = [one.removeprefix(prefix) for one in self._debited(everybody=everybody)]
        return Counter(reference.rpartition("-a")[0] or reference for reference in ours)

    def _debited(self, *, everybody: bool = False) -> list[str]:
        """References of what was debited, but for other books on the same account."""
        ours = {None, self.book.identity}
        return [
            debit.reference_id
            for debit in self.sandbox.ledger
            if everybody or self.sandbox.metadata_of(debit.gateway_id).get("book") in ours
        ]

    def discrepancies(self) -> list[str]:
        """Every way in which our books and the gateway's ledger disagree."""
        with self.store.reading() as connection:
            invoices = connection.execute(select(tables.invoices)).all()
            attempts = connection.execute(select(tables.attempts)).all()
        return _discrepancies(self.debits(), invoices, attempts, self._debited_attempts())

    def _debited_attempts(self) -> set[str]:
        with self.store.reading() as connection:
            pages = set(
                connection.execute(
                    select(tables.card_setups.c.gateway_reference).where(
                        tables.card_setups.c.attempt_id.is_(None)
                    )
                ).scalars()
            )
        return set(self._debited()) - pages


def _discrepancies(
    debits: Counter[str], invoices: Sequence[Any], attempts: Sequence[Any], debited: set[str]
) -> list[str]:
    succeeded = Counter(a.invoice_id for a in attempts if a.status == "succeeded")
    surplus = Counter(a.invoice_id for a in attempts if a.status == "surplus")
    found = [
        f"{invoice.reference_id} charged {debits[invoice.reference_id]} times"
        for invoice in invoices
        # Money that the gateway took late is no secret: it is flagged, to be given back.
        if debits[invoice.reference_id] > max(1, succeeded[invoice.id] + surplus[invoice.id])
    ]
    by_reference = {attempt.reference_id: attempt for attempt in attempts}
    for reference in sorted(debited):
        attempt = by_reference.get(reference)
        if attempt is None:
            found.append(f"{reference} moved money and is not in our books")
        elif (
            attempt.status not in {"submitted", "succeeded", "surplus"} and not attempt.next_poll_at
        ):
            found.append(f"{reference} moved money, is {attempt.status}, and is never asked about")
    found += [
        f"{attempt.reference_id} is {attempt.status} and no money moved"
        for attempt in attempts
        if attempt.status in {"succeeded", "surplus"}
        and attempt.reference_id not in debited
        and attempt.resolved_at is None  # A person may say so before the gateway does.
    ]
    by_word = {a.invoice_id for a in attempts if a.resolved_at and a.status == "succeeded"}
    in_flight = {a.invoice_id for a in attempts if a.status == "submitted"}
    for invoice in invoices:
        by_person = invoice.id in by_word or is_paid_elsewhere(invoice.reason)
        moved = debits[invoice.reference_id] > 0 or by_person
        if invoice.status == "paid" and not moved:
            found.append(f"{invoice.reference_id} is paid and no money moved")
        if invoice.status == "open" and not (
            invoice.next_attempt_at or invoice.reason or invoice.id in in_flight
        ):
            found.append(f"{invoice.reference_id} is open without a next step, reason or attempt")
    return found
