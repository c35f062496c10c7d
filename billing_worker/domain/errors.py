"""Everything that can go wrong, by what the caller may conclude from it.

BillingError
├── InvalidInput          somebody's data is wrong: which field, and why
├── InvariantBroken       our bug: stop, page
│   ├── IllegalTransition
│   ├── CurrencyMismatch
│   ├── AmountMismatch
│   └── WrongKey          none of the vault keys opens what is stored
│       └── KeysInDoubt   … nor anything else so far: nothing is encrypted with them
├── ConcurrentChange      someone else moved the row: leave quietly, the sweep returns
├── NotPayable            no page can be handed to the customer, and why
│   ├── AlreadyPaid       there is nothing left to pay
│   └── SlotTaken         another attempt of the invoice is live: its end comes first
└── GatewayError
    ├── NotSent           certain: nothing reached the gateway
    ├── Refused           certain: a clear 4xx, in the gateway's own shape, on a first send
    └── OutcomeUnknown    the default: anything else
        └── LookUpUnreliable   the list by reference shows that its filter was not obeyed

A decline is an answer, not an exception.
"""

from __future__ import annotations

from typing import Final

AMBIGUOUS_STATUSES: Final = frozenset({408, 409, 425, 429})
"""4xx that do not say "nothing happened": 409 and 429 may mean a duplicate (gateway.md §1.2)."""


class BillingError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(BillingError):
    """A value from outside breaks a rule.

    `field` is a dotted path into the record ("card.token"), `reason` a sentence for a person.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class InvariantBroken(BillingError):
    """Our own bug. Nobody may continue as if nothing had happened."""


class IllegalTransition(InvariantBroken):
    """A state was asked to move along an edge that its table does not have."""


class CurrencyMismatch(InvariantBroken):
    """Two amounts of different currencies met in one calculation."""


class AmountMismatch(InvariantBroken):
    """An amount is not the one that was agreed."""


class WrongKey(InvariantBroken):
    """None of the vault keys opens a stored secret: the configuration is wrong, or a key was taken
    away while something was still encrypted with it.
    """


class KeysInDoubt(WrongKey):
    """The vault keys have opened nothing of what is stored: what they encrypt, nobody may open."""


class ConcurrentChange(BillingError):
    """Someone else moved the row first. Leave quietly: the sweep returns."""


class NotPayable(BillingError):
    """No page for the customer: `reason` says why, in words for a person."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AlreadyPaid(NotPayable):
    """It is paid. Nobody may be asked to pay it once more, under another reference either."""


class SlotTaken(NotPayable):
    """Another attempt for the same invoice may still move money."""


class GatewayError(BillingError):
    """A gateway call that did not end in an answer we can use.

    `reason` names the cause in a few words and never contains a secret.
    """

    http_status: int | None = None  # None: there was no answer

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def is_client_error(self) -> bool:
        """Answered with a 4xx."""
        return 400 <= (self.http_status or 0) < 500  # noqa: PLR2004


class NotSent(GatewayError):
    """Certain: not one byte of the request reached the gateway."""


class Refused(GatewayError):
    """Certain: the gateway answered a clear 4xx in its own error shape.

    Only a *first* send proves that nothing was created: a repeated one may be refused
    because its twin succeeded.
    """

    def __init__(self, reason: str, *, http_status: int) -> None:
        super().__init__(reason)
        self.http_status = http_status


class OutcomeUnknown(GatewayError):
    """The request may or may not have taken effect. Ask the gateway; never assume.

    `http_status` is the status of an answer that proved nothing, or None when there was none.
    """

    def __init__(self, reason: str, *, http_status: int | None = None) -> None:
        super().__init__(reason)
        self.http_status = http_status

    @property
    def reads_like_a_refusal(self) -> bool:
        """A 4xx in a shape that is not the gateway's own: a proxy's page, perhaps. Together with a
        look-up that finds nothing it is as good as a refusal.
        """
        return self.is_client_error and self.http_status not in AMBIGUOUS_STATUSES


class LookUpUnreliable(OutcomeUnknown):
    """The list by reference was answered, and the answer shows that its filter was not obeyed.

    So what is not in it may be there all the same.
    """
