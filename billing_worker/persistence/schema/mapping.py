"""Objects in the rows of a table: which field is which column, said once for reading and writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import Connection, Row, Table, bindparam, update

from billing_worker.domain.errors import ConcurrentChange, InvariantBroken

T = TypeVar("T")


class Part(NamedTuple):
    """A field that is not simply the value of the column of its name."""

    columns: tuple[str, ...]
    made: Callable[..., Any]
    """From the values of the columns."""
    split: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)
    """Into them again."""


class Objects(Generic[T]):
    """A dataclass in the rows of a table: each field is the column of its name, or one of `parts`.

    A field that has no column, or that a query leaves out, raises AttributeError at the first row.
    """

    def __init__(self, made: Callable[..., T], **parts: Part) -> None:
        self._object = made
        self.parts = parts
        self.fields = [field.name for field in fields(made)]  # type: ignore[arg-type] # a dataclass
        self._plain = [name for name in self.fields if name not in parts]
        self._plain_of = _values(self._plain)
        self._made = [(name, _values(part.columns), part.made) for name, part in parts.items()]

    def read(self, row: Row[Any]) -> T:
        values = dict(zip(self._plain, self._plain_of(row), strict=True))
        for name, columns_of, made in self._made:
            values[name] = made(*columns_of(row))
        return self._object(**values)


class Update(Generic[T]):
    """Writes the named fields of changed objects. The columns in `under` must still be what they
    were.

    A change of any other field would be lost, so it raises InvariantBroken.
    """

    def __init__(
        self,
        objects: Objects[T],
        table: Table,
        written: Sequence[str],
        *,
        under: Sequence[str] = (),
        **also: Any,
    ) -> None:
        parts = [
            objects.parts.get(name, Part((name,), made=lambda value: value)) for name in written
        ]
        columns = [column for part in parts for column in part.columns]
        self._written = [
            (attrgetter(name), part.split) for name, part in zip(written, parts, strict=True)
        ]
        self._kept = _values([name for name in objects.fields if name not in written])
        self._old = _values(["id", *under])
        self._names = [
            "row_id",
            *(f"old_{name}" for name in under),
            *(f"new_{name}" for name in columns),
        ]
        self._statement = (
            update(table)
            .where(
                table.c.id == bindparam("row_id"),
                *(table.c[name] == bindparam(f"old_{name}") for name in under),
            )
            .values({name: bindparam(f"new_{name}") for name in columns} | also)
        )

    def write(
        self, connection: Connection, changes: Iterable[tuple[T, T]], **parameters: Any
    ) -> None:
        """Write (before, after) pairs. Raises ConcurrentChange if a row is not as before.

        `parameters` are those of the columns in `also`.
        """
        rows = [self._row(before, after) | parameters for before, after in changes]
        if rows and connection.execute(self._statement, rows).rowcount != len(rows):
            raise ConcurrentChange("a row changed although it was locked")

    def _row(self, before: T, after: T) -> dict[str, Any]:
        if self._kept(before) != self._kept(after):
            raise InvariantBroken(f"a change would be lost: {before} became {after}")
        new = (value for of, split in self._written for value in split(of(after)))
        return dict(zip(self._names, (*self._old(before), *new), strict=True))


def _values(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """The attributes of these names, as a tuple also if it is one."""
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda of: (get(of),)
