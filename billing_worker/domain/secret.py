from __future__ import annotations

from typing import NewType

Place = NewType("Place", str)
"""What a stored secret belongs to. It is encrypted together with the secret: a ciphertext that is
copied to another place does not decrypt there.
"""

OF_CALLBACK = Place("callback")
OF_PAGE = Place("page")


def card_of(customer_id: int) -> Place:
    return Place(f"card of customer {customer_id}")


def bearer_of(attempt_id: int) -> Place:
    return Place(f"bearer of attempt {attempt_id}")


def webhook_to(url: str) -> Place:
    return Place(f"webhook to {url}")


class Secret:
    """A card token or bearer that cannot be printed by accident.

    `repr`, `str`, f-strings and tracebacks show `***`; pickling is refused so that it cannot
    travel in a message. Only `reveal()` gives the text: for the gateway, for encryption and for
    digests.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str:
        raise TypeError("a Secret is never serialised")
