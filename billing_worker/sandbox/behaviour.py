"""Switches for what the gateway's documents leave open: each is a question of gateway.md §12."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

DuplicateCreate = Literal["accept_new", "return_existing", "409", "422", "429"]
SecondSale = Literal["refuse", "ignore", "charge"]
SaleOnFinal = Literal["refuse", "charge"]
SaleShape = Literal["flat", "nested"]
ListFilter = Literal["exact", "ignored", "expression"]
RefusalShape = Literal["jsonapi", "error", "errors_by_field", "code", "html"]

_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "duplicate_create": get_args(DuplicateCreate),
    "second_sale": get_args(SecondSale),
    "sale_on_final": get_args(SaleOnFinal),
    "sale_shape": get_args(SaleShape),
    "list_filter": get_args(ListFilter),
    "refusal_shape": get_args(RefusalShape),
}

# Ten years. A longer time is a typing error and would overflow a date.
_LONGEST_SECONDS = 315_360_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The settings of all switches. Raises ValueError for a value that a switch does not have."""

    duplicate_create: DuplicateCreate = "accept_new"
    """Answer to a create with a known reference_id. The default is the worst case (§0 D)."""

    second_sale: SecondSale = "refuse"
    """Reaction to a second sale of an invoice: refuse (422), ignore (repeat the answer, no debit)
    or charge (a second real debit, §0 F)."""

    sale_on_final: SaleOnFinal = "refuse"
    """Reaction to a sale of an invoice that ended unpaid. `charge` breaks the one assumption that
    the worker makes about the gateway; the bearer then never expires."""

    sale_shape: SaleShape = "flat"
    """Shape of the answer to a sale. Both were seen on real white labels (§6)."""

    list_filter: ListFilter = "exact"
    """How a list by reference_id is filtered. `ignored`: not at all, 20 newest invoices a page.
    `expression`: a leading `-` means "not" and a comma "or", as in the vendor's list library."""

    refusal_shape: RefusalShape = "jsonapi"
    """Body of a 4xx answer to a create: JSON:API, shapes of other white labels, or a web page."""

    lifetime_seconds: float = 3600.0
    """Age at which an undecided invoice expires. A change applies to invoices created after it."""

    later_seconds: float = 10.0
    """What "later" means in the token table."""

    slow_seconds: float = 5.0
    """Time until the sale of a `slow` token is answered."""

    latency_seconds: float = 0.0
    """Delay of every answer of the two documented APIs."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}")
        for name in SECONDS:
            if not 0 <= getattr(self, name) <= _LONGEST_SECONDS:
                raise ValueError(f"{name} is a number of seconds from 0 to {_LONGEST_SECONDS:.0f}")

    def changed(self, changes: Mapping[str, object]) -> Self:
        """Return a copy with some switches set from parsed JSON. Raises ValueError."""
        typed: dict[str, Any] = {name: _typed(name, value) for name, value in changes.items()}
        return dataclasses.replace(self, **typed)

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


SECONDS: Final = tuple(
    field.name for field in dataclasses.fields(Behaviour) if field.name.endswith("_seconds")
)


def _typed(name: str, value: object) -> float | str:
    """Accept `409` for `"409"` and `"3"` for `3`: people type these by hand."""
    if name in _CHOICES:
        return str(value)
    if name not in SECONDS:
        raise ValueError(f"{name} is no switch; known: {', '.join([*_CHOICES, *SECONDS])}")
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"{name} is a number of seconds") from None
