"""Secrets that are stored encrypted, and card data that must never be stored: PCI DSS 4.0.1, 3.3.1
and 3.5.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NewType

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


# --- card numbers and card codes ---------------------------------------------------------------

# 13 to 19 digits, or the groups that are printed on cards; not inside of a longer word, so that a
# token or a UUID is none by chance.
_NUMBER: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9]{13,19}"
    r"|[0-9]{4}(?P<gap>[ -])[0-9]{4}(?P=gap)[0-9]{4}(?P=gap)[0-9]{1,4}(?:(?P=gap)[0-9]{1,3})?"
    r"|[0-9]{4}[ -][0-9]{6}[ -][0-9]{4,5})(?![0-9A-Za-z])"
)
# A Luhn digit alone would take one in ten of all long numbers for a card: times, order numbers.
_ISSUED: Final = re.compile(
    r"4.{12}(?:...)?(?:...)?"  # Visa: 13, 16, 19
    r"|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720).{12}"  # Mastercard
    r"|3[47].{13}"  # American Express
    r"|3[0689].{12,17}|35.{14,17}"  # Diners Club, JCB
    r"|(?:50|5[6-9]|6.).{11,17}"  # Maestro, Discover, UnionPay, RuPay
    r"|220[0-4].{12,15}|9792.{12}"  # Mir, Troy
)
_CODE: Final = re.compile(r"\bc[vs][vc]2?\b\W{0,6}[0-9]{3,4}\b", re.IGNORECASE)


def holds_card_data(text: str) -> bool:
    """Return whether a text holds a card number, with spaces or dashes too, or a CVV."""
    if text.isalpha():
        return False
    return any(_is_card(found[0]) for found in _NUMBER.finditer(text)) or bool(_CODE.search(text))


def _is_card(text: str) -> bool:
    digits = "".join(filter(str.isdigit, text))
    return bool(_ISSUED.fullmatch(digits)) and passes_luhn([int(digit) for digit in digits])


def passes_luhn(digits: Sequence[int]) -> bool:
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return sum([*digits[-1::-2], *doubled]) % 10 == 0
