from __future__ import annotations

import pytest
import structlog

from tests.simulation.memory import template_bytes
from tests.simulation.simulator import Simulation, silence_logs
from tests.simulation.told import Receiver

SEEDS = 8


class Told(Simulation):
    """A life that a receiver follows from event to event."""

    def _subscribe(self):
        self.receiver = Receiver(self.store, self.world.clock)
        super()._subscribe()

    def _check_money(self):
        """After each step, and after each sweep once the faults have stopped."""
        super()._check_money()
        self.receiver.listen()

    def _problems(self):
        return super()._problems() + self.receiver.misled()


@pytest.fixture(scope="module")
def template(sqlite_template):
    silence_logs()
    yield template_bytes(sqlite_template)
    structlog.reset_defaults()


def test_who_knows_only_the_newest_event_of_each_thing_knows_what_the_books_say(template):
    for seed in range(SEEDS):
        Told(seed, template).run()
