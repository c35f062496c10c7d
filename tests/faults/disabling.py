"""Ways to take one safeguard out of the code, or out of the database, and to put it back."""

from __future__ import annotations
import __future__

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from tests.faults.bench import Bench

Disable = Callable[[Bench], AbstractContextManager[None]]


def altered(
    function: Any, *changes: tuple[str, str], names: Mapping[str, Any] | None = None
) -> Disable:
    """Replace lines in a function: each pattern must match exactly once.

    Only the code object is exchanged, so whoever has imported the function gets the change too.
    """

    @contextmanager
    def disable(_: Bench) -> Iterator[None]:
        target = inspect.unwrap(function)
        source = textwrap.dedent(inspect.getsource(target))
        for pattern, replacement in changes:
            source, count = re.subn(pattern, lambda _, text=replacement: text, source)
            if count != 1:
                raise LookupError(f"{target.__qualname__} has {count} times: {pattern}")
        flags = __future__.annotations.compiler_flag
        code = compile(source, f"<altered {target.__qualname__}>", "exec", flags, True)
        made: dict[str, Any] = {}
        exec(code, dict(target.__globals__), made)  # noqa: S102 - our own source, changed by us
        (mutant,) = made.values()
        mutant = mutant.fget if isinstance(mutant, property) else inspect.unwrap(mutant)
        before = target.__code__
        added = {k: v for k, v in (names or {}).items() if k not in target.__globals__}
        target.__globals__.update(added)
        target.__code__ = mutant.__code__
        try:
            yield
        finally:
            target.__code__ = before
            for name in added:
                del target.__globals__[name]

    return disable


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def swapped(owner: Any, name: str, value: Any) -> Disable:
    return lambda _: exchanged(owner, name, value)


def without(*statements: str) -> Disable:
    """Take a guard out of the database."""

    @contextmanager
    def disable(bench: Bench) -> Iterator[None]:
        bench.sabotage = (*bench.sabotage, *statements)
        try:
            yield
        finally:
            bench.sabotage = ()

    return disable


def both(*disables: Disable) -> Disable:
    @contextmanager
    def disable(bench: Bench) -> Iterator[None]:
        with ExitStack() as stack:
            for one in disables:
                stack.enter_context(one(bench))
            yield

    return disable
