"""A real worker that kills itself with SIGKILL at the boundary named in FAULT_KILL_AT.

The product does not know: this launcher wraps the ports that the product builds, in this process
alone, and then runs Celery's own main with the arguments it was given.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from celery.__main__ import main

from billing_worker import bootstrap
from billing_worker.gateway.http import Request, Response
from billing_worker.services.attempts.submit import Submit

KILL_AT = "FAULT_KILL_AT"


def cross(name: str) -> None:
    if name == os.environ[KILL_AT]:
        os.kill(os.getpid(), signal.SIGKILL)


def use_case_of(frame: Any) -> str:
    """The module that crosses; of the transaction that settling and arming share, which of them."""
    module = str(frame.f_globals["__name__"]).rpartition(".")[-1]
    if module == "commit":
        asked = frame.f_locals.get("requests") or frame.f_locals.get("sales", ())
        return "submit" if any(isinstance(one, Submit) for one in asked) else "settle"
    return module


class _Store:
    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def transaction(self) -> Any:
        return self._transaction(use_case_of(sys._getframe(1)))

    @contextmanager
    def _transaction(self, use_case: str) -> Iterator[Any]:
        with self._store.transaction() as connection:
            yield connection
            cross(f"commit of {use_case}: before")
        cross(f"commit of {use_case}: after")


class _Transport:
    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: Request, *, moves_money: bool) -> Response:
        verb = "sale" if moves_money else "create" if request.method == "POST" else "poll"
        cross(f"{verb}: before effect")
        answer: Response = self._transport.send(request, moves_money=moves_money)
        cross(f"{verb}: after effect")
        return answer


class _Bell:
    def __init__(self, bell: Any) -> None:
        self._bell = bell

    def charge(self, invoice_ids: Sequence[int]) -> None:
        cross("publish charge: before")
        self._bell.charge(invoice_ids)
        cross("publish charge: after")

    def poll(self, attempt_ids: Sequence[int]) -> None:
        self._bell.poll(attempt_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bell, name)


def wrapped(build_ports: Callable[..., Any]) -> Callable[..., Any]:
    def build(settings: Any, bell: Any) -> Any:
        ports, pool = build_ports(settings, bell)
        ports.gateway._transport = _Transport(ports.gateway._transport)
        return replace(ports, store=_Store(ports.store), bell=_Bell(ports.bell)), pool

    return build


if __name__ == "__main__":
    bootstrap.build_ports = wrapped(bootstrap.build_ports)
    main()
