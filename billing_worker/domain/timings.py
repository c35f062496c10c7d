from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from billing_worker.domain.outgoing.notice import USUAL_POLICY, NoticePolicy

_DECLINE_STANDS = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Timings:
    """The worker's waiting times, built once from the settings of the same names."""

    reconcile_after: timedelta = timedelta(seconds=15)
    """Age at which a submitted attempt is first polled."""

    stuck_after: timedelta = timedelta(seconds=300)
    """Age at which a prepared attempt is enqueued again."""

    expiry_grace: timedelta = timedelta(seconds=3600)
    """How long a final, unpaid statement has to stand before it counts as not charged."""

    not_charged_retry: timedelta = timedelta(seconds=3600)
    """Wait before the next attempt when certainly nothing was charged."""

    expired_retry: timedelta = timedelta(seconds=259_200)
    """Wait from the gateway's `expired` to the next automatic attempt if a sale may have arrived:
    the sale may still be approved.
    """

    unknown_blocks: timedelta = timedelta(days=7)
    """How long an attempt of unknown outcome holds back later periods of its subscription."""

    longest_charge: timedelta = timedelta(seconds=120)
    """Duration of a charge in which every call takes its full deadline. It limits the lease."""

    sale_gate_seconds: float = 5.0
    """Longest time from the commit of `submitted` to the start of the sale call; later, the sale is
    not sent. Its new connection must also be made within the connect timeout, or nothing is sent.

    A process that was suspended for longer may continue after the invoice was given up.
    """

    silence: timedelta = timedelta(minutes=10)
    """How long no sweep has finished before that is reported."""

    notices: NoticePolicy = USUAL_POLICY
    """How early customers are told of a charge, unless their subscription has a policy of its own."""

    @property
    def decline_stands(self) -> timedelta:
        """Wait after a decline before an attempt that would follow at once. Declines have become
        payments within minutes (gateway.md §0 H).
        """
        return min(self.expiry_grace, _DECLINE_STANDS)
