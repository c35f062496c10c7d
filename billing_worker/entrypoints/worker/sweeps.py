"""The periodic sweeps: which there are, and how often the beat sends them."""

from __future__ import annotations

from billing_worker.config import Settings

TELL = "billing.publish"
"""Numbers what is told and wakes the threads that send it; runs from the webhooks queue."""

GIVE_UP_EVERY_SECONDS = 300
PUBLISH_EVERY_SECONDS = 1
ANNOUNCE_EVERY_SECONDS = 300
WARN_EVERY_SECONDS = 3600
"""Each warning is sent once, whenever the sweep runs: a beat that restarts daily must not
miss it.
"""

INSPECT_EVERY_SECONDS = 60
"""Each run asks what is due: an invariant has an interval of its own."""


def intervals(settings: Settings) -> dict[str, int]:
    """Return the seconds between two runs, by the name of the sweep's task."""
    return {
        TELL: PUBLISH_EVERY_SECONDS,
        "billing.renew": settings.renew_every_seconds,
        "billing.ring": settings.renew_every_seconds,
        "billing.reconcile": settings.reconcile_every_seconds,
        "billing.card_pages": settings.reconcile_every_seconds,
        "billing.give_up": GIVE_UP_EVERY_SECONDS,
        "billing.invariants": INSPECT_EVERY_SECONDS,
        "billing.forget_events": WARN_EVERY_SECONDS,
        "billing.warn_expiring": WARN_EVERY_SECONDS,
        "billing.announce": ANNOUNCE_EVERY_SECONDS,
    }
