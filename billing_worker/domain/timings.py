from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

_DECLINE_STANDS = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the worker waits for what. Built once from the settings of the same names."""

    reconcile_after: timedelta = timedelta(seconds=15)
    """Age at which a submitted attempt is first asked for."""

    stuck_after: timedelta = timedelta(seconds=300)
    """Age at which a prepared attempt is rung again."""

    expiry_grace: timedelta = timedelta(seconds=3600)
    """How long a final, unpaid statement has to stand before it counts as not charged."""

    not_charged_retry: timedelta = timedelta(seconds=3600)
    """Wait before the next attempt when certainly nothing was charged."""

    expired_retry: timedelta = timedelta(seconds=259_200)
    """Wait from the gateway's `expired` until the next automatic attempt, where a sale may have
    arrived: it may still be approved.
    """

    unknown_blocks: timedelta = timedelta(days=7)
    """How long an attempt of unknown outcome holds back later periods of its subscription."""

    longest_charge: timedelta = timedelta(seconds=120)
    """The longest a charge can take with every call at its deadline: bounds lease growth."""

    sale_gate_seconds: float = 5.0
    """The call of the sale begins only this soon after its commit, or not at all; then its fresh
    connection has to stand within the connect timeout, or nothing is sent.

    A frame that slept longer may wake up after the invoice was given up.
    """

    @property
    def decline_stands(self) -> timedelta:
        """How long a decline has to stand before another attempt that does not wait for a day
        anyway: declines were seen to become payments within minutes (gateway.md §0 H).
        """
        return min(self.expiry_grace, _DECLINE_STANDS)
