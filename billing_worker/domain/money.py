"""Amounts as whole minor units, without floats and without rounding."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal

from iso4217 import Currency

from billing_worker.domain.errors import CurrencyMismatch, InvalidInput

MAX_MAJOR_UNITS = 1_000_000_000
"""Card Gate takes no larger amount (gateway.md §2.1)."""

# ASCII digits only: `\d` and int() would also take Arabic-Indic and full-width ones.
_MAJOR_UNITS = re.compile(r"([0-9]+)(?:\.([0-9]+))?")
# int() is quadratic in the digits, so a long text is refused before it is converted.
_LONGEST_TEXT = 32

_EXPONENTS = {c.code: c.exponent for c in Currency if c.exponent is not None}
_MILLION = 1_000_000
_WIDE = Context(prec=60)
"""Enough digits for every amount in an answer; the default context would round."""


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Money:
    """`minor` whole minor units (cents, yen, fils) of one ISO 4217 currency, never negative.

    Two amounts are equal when both fields are equal. Comparing by order or adding two currencies
    raises CurrencyMismatch. A withdrawn currency is allowed, because old amounts stay stored; only
    `parse` requires a current one. Raises InvalidInput on `amount` or `currency`.
    """

    minor: int
    currency: str

    def __post_init__(self) -> None:
        # `isinstance(True, int)` is true, and True is no amount.
        if type(self.minor) is not int or self.minor < 0:
            raise InvalidInput("amount", "must be a whole number of minor units, zero or more")
        _decimals(self.currency)

    @classmethod
    def parse(cls, text: object, currency: object) -> Money:
        """Read a price in major units: `parse("9.99", "USD")` is 999 cents.

        Takes plain decimal text only, above zero, at most MAX_MAJOR_UNITS and with no more
        decimals than the currency has, not even zeros: "5.00" JPY was written for another
        currency. Raises InvalidInput on `amount` or `currency`.
        """
        digits = exponent(currency)
        whole, decimals = _split(text)
        if len(decimals) > digits:
            raise InvalidInput("amount", f"{currency} has {digits} decimals, not {len(decimals)}")
        minor = int(whole + decimals.ljust(digits, "0"))
        if minor == 0:
            raise InvalidInput("amount", "must be above zero")
        if minor > MAX_MAJOR_UNITS * 10**digits:
            raise InvalidInput("amount", f"must be at most {MAX_MAJOR_UNITS}")
        return cls(minor, str(currency))

    @classmethod
    def from_minor(cls, minor: int, currency: str) -> Money:
        return cls(minor, currency)

    @classmethod
    def zero(cls, currency: str) -> Money:
        """The start of a sum: `sum(prices, Money.zero("USD"))`. No price is zero."""
        return cls(0, currency)

    @property
    def amount(self) -> Decimal:
        """Major units, exact, written with all of the currency's decimals: Decimal("9.90")."""
        # From text, because arithmetic on decimals would round to the context's precision.
        return Decimal(f"{self.minor}e-{_decimals(self.currency)}")

    def is_stated_by(self, amount: Decimal) -> bool:
        """Whether `amount` (major units) is this amount with a float's error: 9.9900000000000002.

        The tolerance is a millionth of a minor unit, so no other amount ever matches.
        """
        distance = abs(amount.scaleb(_decimals(self.currency), _WIDE) - self.minor)
        return distance * _MILLION <= 1

    def __str__(self) -> str:
        return f"{self.amount:f} {self.currency}"

    def __add__(self, other: Money) -> Money:
        if not isinstance(other, Money):
            return NotImplemented
        self._require_same_currency(other)
        return Money(self.minor + other.minor, self.currency)

    def __lt__(self, other: Money) -> bool:
        if not isinstance(other, Money):
            return NotImplemented
        self._require_same_currency(other)
        return self.minor < other.minor

    def _require_same_currency(self, other: Money) -> None:
        if self.currency != other.currency:
            raise CurrencyMismatch(f"{self} and {other}")


def exponent(currency: object) -> int:
    """How many decimals the currency has: 2 for USD, 0 for JPY, 3 for KWD.

    Raises InvalidInput on `currency` for anything that is not an upper-case ISO 4217 code, and
    for codes without a minor unit (gold XAU, tests XTS, none XXX): they are no means of payment.
    """
    digits = _EXPONENTS.get(currency) if isinstance(currency, str) else None
    if digits is None:
        raise InvalidInput("currency", "must be an ISO 4217 code of a currency to pay in")
    return digits


WITHDRAWN: Mapping[str, int] = {
    "ANG": 2, "BGN": 2, "BYR": 0, "CUC": 2, "EEK": 2, "HRK": 2, "LTL": 2, "LVL": 2, "MRO": 2,
    "SLL": 2, "STD": 2, "VEF": 2, "ZMK": 2, "ZWL": 2,
}  # fmt: skip
"""Currencies withdrawn since 2011, with their decimals as ISO 4217 list one stated them then (list
three, "historic denominations", has no decimals:
https://www.six-group.com/en/products-services/financial-information/data-standards.html).

Together with an upgrade of `iso4217`, add the codes that its new list drops. Never assume two
decimals.
"""


def _decimals(currency: str) -> int:
    """Like `exponent`, but also for a withdrawn currency."""
    digits = WITHDRAWN.get(currency)
    return exponent(currency) if digits is None else digits


def _split(text: object) -> tuple[str, str]:
    """Digits before and after the point: "9.99" gives ("9", "99"), "9" gives ("9", "")."""
    if not isinstance(text, str):
        raise InvalidInput("amount", 'must be decimal text such as "9.99", not a number')
    match = _MAJOR_UNITS.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    if match is None:
        raise InvalidInput("amount", 'must be plain decimal text above zero such as "9.99"')
    return match[1], match[2] or ""


def redenominated(money: Money, currency: str, rate: Decimal) -> Money:
    """Return an amount in another currency, one of which is `rate` units of the old one.

    Divided by the full rate and rounded half up, as Regulation (EC) No 1103/97, articles 4 and 5,
    has it for the euro. Raises InvalidInput on `currency`, or on `amount` where nothing is left.
    """
    smallest = Decimal(1).scaleb(-exponent(currency))
    amount = (money.amount / rate).quantize(smallest, ROUND_HALF_UP)
    if amount < smallest:
        raise InvalidInput("amount", f"{money} is less than the smallest unit of {currency}")
    return Money.parse(f"{amount:f}", currency)
