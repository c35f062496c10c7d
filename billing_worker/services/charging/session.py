"""The gateway as one charge, one poll or one pay link talks to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from billing_worker.domain.card_setup import PageStatement
from billing_worker.domain.secret import Secret, card_of
from billing_worker.domain.statement import Owner, Statement
from billing_worker.gateway.port import CallLog, PageOrder, WireCall
from billing_worker.gateway.redaction import hide
from billing_worker.persistence import claims
from billing_worker.persistence.claims import Payer
from billing_worker.services.attempts.claim import BY, Claimed
from billing_worker.services.guards.refusals import right_now
from billing_worker.services.ports import Ports


def card_token(ports: Ports, payer: Payer) -> Secret:
    """Decrypt. Raises WrongKey, and WrongPlace for a token that was stored for another customer."""
    return ports.vault.unlock(payer.card_token, card_of(payer.customer_id))


@dataclass(slots=True, kw_only=True)
class GatewaySession:
    """Sends requests under the shared rate limit, and keeps the calls for the history."""

    ports: Ports
    by: str
    """Who decides, for the history."""
    owner: Owner
    """The owner that an invoice must have to count."""
    forgetful: bool
    """The books were restored from a backup and may have lost sales."""
    remembers: bool = False
    """It is proven that these books have lost no sale of this invoice."""
    calls: CallLog = field(default_factory=list)
    """The calls that are not in the history yet."""

    def wait(self, requests: int = 1) -> float:
        """Wait until so many requests may be sent. Returns the seconds waited."""
        began = self.ports.clock.monotonic()
        self.ports.pace.wait(requests)
        return self.ports.clock.monotonic() - began

    def find(self, reference_id: str) -> list[Statement]:
        return self.ports.gateway.find(reference_id, self.calls)

    def poll(self, gateway_id: str) -> Statement:
        return self.ports.gateway.poll(gateway_id, self.calls)

    def create_page(self, order: PageOrder) -> PageStatement:
        return self.ports.gateway.create_page(order, self.calls)

    def poll_page(self, gateway_id: str) -> PageStatement:
        return self.ports.gateway.poll_page(gateway_id, self.calls)

    def apart(self) -> Self:
        """Return the same session with a log of its own, for calls that get their own entry."""
        return replace(self, calls=[])

    def shown(self) -> tuple[WireCall, ...]:
        """Return the calls as the history may show them."""
        return tuple(self.calls)


@dataclass(slots=True, kw_only=True)
class ChargeSession(GatewaySession):
    """The session of a claimed attempt. It renews the lease while it waits, and hides the token."""

    claimed: Claimed

    @classmethod
    def of(cls, ports: Ports, claimed: Claimed) -> ChargeSession:
        return cls(
            ports=ports,
            by=BY,
            owner=claimed.payer.owner,
            forgetful=claimed.may_be_forgotten,
            remembers=claimed.is_proven_unsold,
            claimed=claimed,
        )

    @property
    def is_our_mode(self) -> bool:
        """Whether the attempt was prepared in the present test mode."""
        return self.claimed.attempt.test_mode == self.ports.test_mode

    def wait(self, requests: int = 1) -> float:
        """Wait as any session does, and keep the lease.

        Raises ConcurrentChange if another claim has taken over.
        """
        began = self.ports.clock.monotonic()
        self.ports.pace.wait(requests, self._keep_lease)
        self._keep_lease()
        return self.ports.clock.monotonic() - began

    def _keep_lease(self) -> None:
        """Renew the lease at half of its time: a waiting worker is not a dead one.

        Otherwise a small rate limit ends every lease before its sale, for ever.
        """
        lease = self.claimed.lease
        if lease.until - self.ports.clock.now() > lease.length / 2:
            return
        with self.ports.store.transaction() as connection:
            now = right_now(self.ports, connection)
            claims.renew(connection, self.claimed.attempt, now + lease.length)
        lease.until = now + lease.length

    def shown(self) -> tuple[WireCall, ...]:
        """Return the calls without the card token, which only the create contained."""
        token = card_token(self.ports, self.claimed.payer)
        return tuple(
            replace(call, answer=hide(call.answer, (token,))) if call.answer else call
            for call in self.calls
        )
