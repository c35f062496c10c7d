"""What befalls the books from outside of a charge: they forget, and others use their account."""

from __future__ import annotations

from billing_worker.domain.money import Money
from billing_worker.domain.secret import Secret
from billing_worker.gateway.port import InstantOrder
from tests.faults.boundaries import Crossing, Fault, ProcessDied, Run
from tests.support.backup import backup


class Outside(Fault):
    """It strikes between transactions: inside of one the database would make it wait."""

    def applies_to(self, crossing: Crossing) -> bool:
        return not crossing.in_transaction and crossing.what != "clock"


class IsBackedUp(Outside):
    name = "a backup is taken"

    def strike(self, run: Run, crossing: Crossing) -> None:
        run.kept = backup(run.world.store)


class GoesBack(Outside):
    """The process dies, and the database is as it was when the backup was taken.

    As a fail-over to a standby that was behind: nobody is told, and messages are delivered.
    """

    def __init__(self, *, with_the_record: bool) -> None:
        self.loses_the_record = with_the_record
        self.name = "goes back" + (" and loses the record outside" if with_the_record else "")

    def strike(self, run: Run, crossing: Crossing) -> None:
        run.go_back()
        if self.loses_the_record:
            run.world.outside[0].known = None
        raise ProcessDied(crossing.name)


class AnotherOrders(Outside):
    """Somebody else orders at the gateway, under this reference, on the same account."""

    def __init__(self, reference: str, *, book: str | None, customer: str, number: int = 1) -> None:
        self.name = f"{customer} orders {number} times under {reference}"
        self._order = InstantOrder(
            reference_id=reference,
            money=Money.parse("9.99", "USD"),
            test_mode=True,
            customer_reference_id=customer,
            card_token=Secret("approved.of-another"),
            book=book,
        )
        self._number = number

    def strike(self, run: Run, crossing: Crossing) -> None:
        gateway = run.world.gateway()
        for _ in range(self._number):
            gateway.create(self._order, [])


class Behaves(Outside):
    """From now on the gateway behaves otherwise."""

    def __init__(self, **changes: object) -> None:
        self.name = f"the gateway changes: {changes}"
        self._changes = changes

    def strike(self, run: Run, crossing: Crossing) -> None:
        sandbox = run.world.sandbox
        sandbox.behaviour = sandbox.behaviour.changed(self._changes)
