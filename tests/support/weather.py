"""What a storm is made of: gusts, drawn from a seed before anything happens."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

WORKERS = ("one", "two", "three")
BEATS = ("first", "second")

LEASE_SECONDS = 3
"""BILLING_STUCK_AFTER_SECONDS in a storm; an ordinary charge takes some hundredths of a second."""

GATEWAY_TIMEOUT_SECONDS = 2

HOUR = 3600
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Gust:
    """One act of the weather: `after` seconds of calm it begins, and what can end lasts `lasts`."""

    after: float
    kind: str
    target: str = ""
    lasts: float = 0.0
    step: int = 0  # seconds that a worker's clock is set wrong by

    def __str__(self) -> str:
        said = [f"{self.after:.2f} s later", self.kind, self.target]
        said += [f"by {self.step:+d} s"] if self.step else []
        said += [f"for {self.lasts:.1f} s"] if self.lasts else []
        return " ".join(filter(None, said))


KINDS = (
    "worker killed", "worker frozen", "clock stepped", "beat killed", "redis flushed",
    "redis killed", "redis lost", "postgres crashed", "gateway frozen", "gateway slow",
)  # fmt: skip

RARER_KINDS = (
    "postgres restarted", "postgres fails over", "clock days ahead", "wrong vault key",
)  # fmt: skip
"""Of long storms only: each of them costs seconds."""

_OFTEN = ("worker killed", "worker killed", "worker frozen", "postgres crashed", "redis flushed")


def forecast(seed: int, gusts: int, known: tuple[str, ...] = KINDS) -> list[Gust]:
    """Every kind once, in any order, then whatever comes; workers are killed most."""
    draw = random.Random(seed)
    kinds = draw.sample(known, len(known))
    kinds += [draw.choice(known + _OFTEN) for _ in range(gusts - len(known))]
    return [_gust(draw, kind) for kind in kinds[:gusts]]


LASTS = {
    "worker frozen": (LEASE_SECONDS + 0.5, LEASE_SECONDS + 3),  # longer than its lease
    "clock stepped": (1, 4),
    "clock days ahead": (1, 4),
    "wrong vault key": (2, 5),
    "gateway frozen": (0.5, GATEWAY_TIMEOUT_SECONDS + 1.5),  # maybe longer than anybody waits
    "gateway slow": (1, 3),
    "redis killed": (0, 1.5),
    "redis lost": (0, 1.5),
    "postgres crashed": (0, 1.5),
    "postgres fails over": (0.3, 2),  # so long the standby has heard nothing when its primary dies
}

STEPS = {"clock stepped": (-HOUR, HOUR), "clock days ahead": (3 * DAY,)}


def _gust(draw: random.Random, kind: str) -> Gust:
    gust = Gust(draw.uniform(0.1, 1.2), kind)
    if kind in LASTS:
        gust = replace(gust, lasts=draw.uniform(*LASTS[kind]))
    if kind in STEPS:
        gust = replace(gust, step=draw.choice(STEPS[kind]))
    if kind.startswith("beat"):
        return replace(gust, target=draw.choice(BEATS))
    if kind.startswith(("worker", "clock", "wrong")):
        return replace(gust, target=draw.choice(WORKERS))
    return gust
