"""Which disasters a seed brings: every life has its own kind, and all are run the same way."""

from __future__ import annotations

import tempfile
import traceback
import zoneinfo
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from billing_worker.persistence.schema.migrate import migrate
from billing_worker.persistence.store import Store
from tests.simulation.forgetful import Forgetful
from tests.simulation.memory import template_bytes
from tests.simulation.restored import Restored
from tests.simulation.shared import Shared
from tests.simulation.simulator import Simulation, Violation, silence_logs
from tests.support.books import name_book

LIVES: dict[str, type[Simulation]] = {
    "ordinary": Simulation,
    "restored": Restored,
    "forgetful": Forgetful,
    "shared": Shared,
}


def must_reach(life: str | None) -> frozenset[str]:
    """The states without which a long campaign has not tested this life, or all of them."""
    lives = LIVES.values() if life is None else [LIVES[life]]
    return frozenset[str]().union(*(one.must_reach for one in lives))


@dataclass(slots=True)
class Lived:
    seed: int
    violation: str | None = None
    reached: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    """Second debits that no client could know of, by the reason; each has its surplus alert."""


def live(seed: int, template: bytes, life: str | None = None) -> Lived:
    """One seed, of this life or of the one whose turn it is."""
    names = list(LIVES)
    simulation = LIVES[life or names[seed % len(names)]](seed, template)
    lived = Lived(seed)
    try:
        simulation.run()
    except Violation as violation:
        lived.violation = str(violation)
    except Exception as error:
        lived.violation = f"seed {seed}: {_where(error)}\n{simulation.story()}"
    lived.reached = simulation.reached()
    lived.excused = Counter(simulation.excused.values())
    return lived


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def migrated_template() -> bytes:
    """What every life begins with. Also quiets this process."""
    silence_logs()
    zoneinfo.reset_tzpath(())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.db"
        with Store(f"sqlite:///{path}") as store:
            migrate(store)
            name_book(store, prefix="")
        return template_bytes(path)
