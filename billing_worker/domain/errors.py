"""All errors of this package, by what the caller may conclude from them.

BillingError
├── InvalidInput          a value from outside is wrong: which field, and why
├── InvariantBroken       a bug of ours: stop and alert
│   ├── IllegalTransition
│   ├── CurrencyMismatch
│   ├── WrongPlace        a stored secret belongs to another row: somebody has copied it
│   └── WrongKey          no vault key decrypts a stored secret
│       └── KeysInDoubt   … nor any other one so far: nothing may be encrypted with these keys
├── ConcurrentChange      another process changed the row first: stop; the next sweep continues
├── NotPayable            no page can be given to the customer, and why
│   ├── AlreadyPaid       there is nothing left to pay
│   └── SlotTaken         another attempt of the invoice is live and has to end first
└── GatewayError
    ├── NotSent           certain: nothing reached the gateway
    ├── Refused           certain: a clear 4xx, in the gateway's own shape, on a first send
    └── OutcomeUnknown    the default: anything else
        └── LookUpUnreliable   the list by reference was not filtered by it

A decline is an answer, not an exception.
"""

from __future__ import annotations

from typing import Final

AMBIGUOUS_STATUSES: Final = frozenset({408, 409, 425, 429})
"""4xx that do not prove "nothing happened": 409 and 429 may mean a duplicate (gateway.md §1.2)."""


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
    """A bug of this package. The caller must not continue."""


class IllegalTransition(InvariantBroken):
    """A change of state that the transition table does not allow."""


class CurrencyMismatch(InvariantBroken):
    """A calculation with amounts of two currencies."""


class WrongKey(InvariantBroken):
    """No vault key decrypts a stored secret: the configuration is wrong, or a key was removed while
    secrets were still encrypted with it.
    """


class KeysInDoubt(WrongKey):
    """The vault keys have decrypted no stored secret so far, so they may be the wrong ones: nothing
    may be encrypted with them.
    """


class WrongPlace(InvariantBroken):
    """A stored secret was encrypted for something else than the row in which it was found."""


class ConcurrentChange(BillingError):
    """Another process changed the row first. Stop without an alert: the next sweep continues."""


class NotPayable(BillingError):
    """No page can be given to the customer. `reason` says why, in words for a person."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AlreadyPaid(NotPayable):
    """It is paid. The customer must not be asked again, not even under another reference."""


class SlotTaken(NotPayable):
    """Another attempt of the same invoice may still be paid."""


class GatewayError(BillingError):
    """A gateway call without a usable answer.

    `reason` names the cause in a few words and never contains a secret.
    """

    http_status: int | None = None  # None: there was no answer

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def is_client_error(self) -> bool:
        """Whether the answer was a 4xx."""
        return 400 <= (self.http_status or 0) < 500  # noqa: PLR2004


class NotSent(GatewayError):
    """Certain: not one byte of the request reached the gateway."""


class Refused(GatewayError):
    """Certain: the gateway answered a clear 4xx in its own error shape.

    It proves that nothing was created only for a *first* send: a repeated send may be refused
    because the first one succeeded.
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
        """Whether the answer was a 4xx in another shape than the gateway's, perhaps from a proxy.
        Together with a look-up that finds nothing, it counts as a refusal.
        """
        return self.is_client_error and self.http_status not in AMBIGUOUS_STATUSES


class LookUpUnreliable(OutcomeUnknown):
    """The gateway's list by reference was not filtered by the reference.

    So an invoice that is not in the list may exist all the same.
    """
