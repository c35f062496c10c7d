"""Retry limits of the card networks: a table of rules with dates and sources.

Each rule allows at most `most` declines of one card within `window`. It counts the declines with
one of its `codes` (all declines if it has none), with the same amount if `same_amount`, and of the
same invoice if `same_charge`. An attempt that could become one more is refused until the
oldest has left the window. So "never again" is at most one, for ever; "retry after 4 days" is at
most one in 4 days.

An open attempt counts as a decline, because it may become one. Rules with codes apply only when the
acquirer's code reaches us (`original_data.original_resolution`, gateway.md §2.2). The gateway does
not document that it passes this code on, and its own resolutions prove no network code. If the
network of a card is unknown or not listed, the rules of all networks apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta

from billing_worker.domain.money import Money

DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    network: str
    most: int
    window: timedelta | None  # None: for ever
    source: str
    since: date
    until: date | None = None  # the first day on which it no longer holds
    codes: frozenset[str] = frozenset()  # two characters, as the network prints them
    advice: bool = False  # `codes` are Mastercard's advice codes, not response codes
    same_amount: bool = False
    same_charge: bool = False

    def holds_on(self, day: date) -> bool:
        return self.since <= day and (self.until is None or day < self.until)


VISA, MASTERCARD = "visa", "mastercard"
_EVOLVED = "developers.getevolved.com/enterprise/docs/visas-processing-integrity-fee-program"
_CARDPOINTE = "support.cardpointe.com/compliance/visa-decline-rules"
_CIELO = (
    "docs.cielo.com.br/ecommerce-cielo-en/changelog/new-limit-for-visa-retries-starting-may-25-2025"
)
_TABAPAY = "developers.tabapay.com/docs/excessive-retry-rules"
_BRAINTREE = "developer.paypal.com/braintree/articles/risk-and-security/compliance/network-updates/2023/mastercard-f23"
_EVERONET = (
    "docs.everonet.com/en-us/gateway/developer-portal/appendix/mastercard-merchant-advice-code"
)

UNDATED = date(2023, 1, 1)
"""`since` of rules whose source names no day; all of them have been in force for years."""

RULES: tuple[Rule, ...] = (
    Rule(
        "visa.category_1_never", VISA, 1, None, _EVOLVED, date(2022, 4, 1),
        codes=frozenset({"04", "07", "12", "14", "15", "41", "43", "46", "57", "R0", "R1", "R3"}),
    ),
    # Of one charge: its first decline, and 15 re-attempts of it (20 since May 2025). Visa limits how
    # often a declined transaction is submitted again; the first try of another invoice is none of
    # these ("more than 15 retries of a single payment",
    # support.stripe.com/questions/payment-blocked-due-to-excessive-retries). A decline of unknown
    # category counts too.
    Rule(
        "visa.15_reattempts_in_30_days", VISA, 1 + 15, 30 * DAY, _CARDPOINTE, date(2022, 4, 1),
        until=date(2025, 5, 25), same_charge=True,
    ),
    Rule(
        "visa.20_reattempts_in_30_days", VISA, 1 + 20, 30 * DAY, _CIELO, date(2025, 5, 25),
        same_charge=True,
    ),
    # These count whatever the merchant tries on the card: the sources say "at the merchant level".
    Rule("mastercard.10_declines_in_24_hours", MASTERCARD, 10, DAY, _TABAPAY, UNDATED),
    Rule(
        "mastercard.35_declines_in_30_days", MASTERCARD, 35, 30 * DAY, _BRAINTREE,
        date(2023, 11, 1), same_amount=True,
    ),
    Rule(
        "mastercard.advice_never", MASTERCARD, 1, None, _EVERONET, UNDATED,
        codes=frozenset({"03", "21"}), advice=True,
    ),
    *(
        Rule(
            f"mastercard.advice_{code}_wait", MASTERCARD, 1, wait, _BRAINTREE, date(2023, 10, 1),
            codes=frozenset({code}), advice=True,
        )
        for code, wait in (
            ("24", timedelta(hours=1)),
            ("25", DAY),
            ("26", 2 * DAY),
            ("27", 4 * DAY),
            ("28", 6 * DAY),
            ("29", 8 * DAY),
            ("30", 10 * DAY),
        )
    ),
)  # fmt: skip

LONGEST_COUNTED = 30 * DAY
"""The longest window: older declines do not count. A "never" code needs no window, because it has
made the card unusable (`never_again`)."""


OPEN_ENDS_WITHIN = timedelta(hours=1)
"""Longest refusal that only open attempts cause: most of them are decided by then. A customer who
pays a dozen subscriptions at once with one card must not wait a day for ten short open attempts."""


@dataclass(frozen=True, slots=True)
class Try:
    """A declined or still open attempt on a card, whatever its origin and invoice."""

    at: datetime
    money: Money
    code: str | None = None  # the acquirer's code, verbatim
    open: bool = False  # it may still be paid, and then no longer counts
    charge: int = 0  # id of its invoice


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an attempt must not be made, and from when the rule allows it (`until` None: never)."""

    rule: str
    until: datetime | None
    source: str

    @property
    def reason(self) -> str:
        until = f" until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else ""
        return f"network rule {self.rule}{until}"


def refusal(
    brand: str | None, money: Money, tries: Sequence[Try], now: datetime, *, charge: int = 0
) -> Refusal | None:
    """Return the rule that forbids an attempt of this amount now, or None.

    `tries` are those of the card, by its fingerprint. Of several rules, the one that forbids the
    attempt longest is returned. If only open attempts cause the refusal, it ends within an hour.
    """
    longest = max(_refusals(brand, money, tries, now, charge), key=_duration, default=None)
    ended = [one for one in tries if not one.open]
    if longest is None or longest.until is None or any(_refusals(brand, money, ended, now, charge)):
        return longest
    return replace(longest, until=min(longest.until, now + OPEN_ENDS_WITHIN))


def never_again(brand: str | None, code: str | None, now: datetime) -> Refusal | None:
    """Return the rule that forbids the card for ever because of this decline code, or None."""
    if code is None:
        return None
    networks = _networks(brand)
    for rule in RULES:
        forever = rule.window is None and rule.network in networks and rule.holds_on(now.date())
        if forever and _has_code(rule, code):
            return Refusal(rule.name, None, rule.source)
    return None


def _refusals(
    brand: str | None, money: Money, tries: Sequence[Try], now: datetime, charge: int
) -> Iterator[Refusal]:
    networks = _networks(brand)
    for rule in RULES:
        if rule.network not in networks or not rule.holds_on(now.date()):
            continue
        of_it = [one for one in tries if one.charge == charge or not rule.same_charge]
        counted = sorted(_counted(rule, money, of_it, now))
        if len(counted) >= rule.most:
            # Once this one has left the window, fewer than `most` remain in it.
            leaves = counted[len(counted) - rule.most]
            until = leaves + rule.window if rule.window is not None else None
            yield Refusal(rule.name, until, rule.source)


def _counted(rule: Rule, money: Money, tries: Iterable[Try], now: datetime) -> Iterator[datetime]:
    for one in tries:
        fresh = rule.window is None or one.at + rule.window > now
        if fresh and (one.money == money or not rule.same_amount) and _has_code(rule, one.code):
            yield one.at


def _duration(refused: Refusal) -> float:
    return refused.until.timestamp() if refused.until else math.inf


_OTHERS = frozenset(
    {
        "amex", "americanexpress", "discover", "diners", "dinersclub", "dinersclubinternational",
        "jcb", "unionpay", "chinaunionpay", "unionpayinternational", "cup", "mir", "elo",
        "hipercard", "troy", "rupay", "interac", "uatp", "humo", "uzcard", "belkart", "prostir",
    }
)  # fmt: skip
"""Networks without rules here. Co-badged ones (Cartes Bancaires, Dankort, EFTPOS) are not listed:
an attempt may go through Visa or Mastercard."""


def _networks(brand: str | None) -> frozenset[str]:
    """Return the networks whose rules apply. An unknown or unlisted brand may be either network."""
    name = "".join(letter for letter in (brand or "").lower() if letter.isalnum())
    if name.startswith("visa"):
        return frozenset({VISA})
    if name.startswith(("mastercard", "maestro")):
        return frozenset({MASTERCARD})
    return frozenset() if name in _OTHERS else frozenset({VISA, MASTERCARD})


_RESPONSE = re.compile(r"([0-9A-Z]{2})(?:\.([0-9]{2}))?")
"""`51`, or `59.03` with the advice behind the dot (docs.payabl.com/docs/mastercard-merchant-advice-codes)."""

_ADVICE = re.compile(r"\bMAC[ :=_-]*([0-9]{2})\b", re.IGNORECASE)


def _has_code(rule: Rule, code: str | None) -> bool:
    """Whether `code` is one of the rule's. A bare `03` is a response code, never an advice code."""
    if not rule.codes:
        return True
    if code is None:
        return False
    response = _RESPONSE.fullmatch(code.strip())
    if not rule.advice:
        return response is not None and response[1] in rule.codes
    advice = _ADVICE.search(code)
    return (response is not None and response[2] in rule.codes) or (
        advice is not None and advice[1] in rule.codes
    )
