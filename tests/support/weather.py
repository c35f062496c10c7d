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

_OFTEN = ("worker killed", "worker killed", "worker frozen", "postgres crashed", "redis flushed")


def forecast(seed: int, gusts: int) -> list[Gust]:
    """Every kind once, in any order, then whatever comes; workers are killed most."""
    draw = random.Random(seed)
    kinds = draw.sample(KINDS, len(KINDS))
    kinds += [draw.choice(KINDS + _OFTEN) for _ in range(gusts - len(KINDS))]
    return [_gust(draw, kind) for kind in kinds[:gusts]]


def _gust(draw: random.Random, kind: str) -> Gust:
    gust = Gust(draw.uniform(0.1, 1.2), kind)
    match kind:
        case "worker killed":
            gust = replace(gust, target=draw.choice(WORKERS))
        case "worker frozen":  # longer than its lease
            lasts = LEASE_SECONDS + draw.uniform(0.5, 3)
            gust = replace(gust, target=draw.choice(WORKERS), lasts=lasts)
        case "clock stepped":
            step = draw.choice((-HOUR, HOUR))
            lasts = draw.uniform(1, 4)
            gust = replace(gust, target=draw.choice(WORKERS), lasts=lasts, step=step)
        case "beat killed":
            gust = replace(gust, target=draw.choice(BEATS))
        case "gateway frozen":  # sometimes longer than anybody waits for it
            gust = replace(gust, lasts=draw.uniform(0.5, GATEWAY_TIMEOUT_SECONDS + 1.5))
        case "gateway slow":
            gust = replace(gust, lasts=draw.uniform(1, 3))
        case "redis killed" | "redis lost" | "postgres crashed":
            gust = replace(gust, lasts=draw.uniform(0, 1.5))
    return gust
