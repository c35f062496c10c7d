"""Structured logs: one JSON line per event, with a constant event name and data in fields."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

# Whoever knows the name of a pay page can pay there. Web servers log paths when a request fails.
_PAGE_NAME: Final = re.compile(r"(/pay/)[\w-]+", re.ASCII)
# A terminal executes them, and a line end forges a second log line.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_TRACEBACK: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _without_what_must_not_be_shown(
    _logger: Any, _method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name, value in line.items():
        if isinstance(value, str):
            control = _CONTROL_IN_TRACEBACK if name == "exception" else _CONTROL
            legible = control.sub("\N{REPLACEMENT CHARACTER}", value)
            line[name] = _PAGE_NAME.sub(r"\1***", legible)
    return line


def configure(*, level: int = logging.INFO, as_json: bool | None = None) -> None:
    """Send our logs, and those of the libraries, to stderr in one format.

    The format is JSON unless stderr is a terminal. Tracebacks never show local variables, because a
    variable may hold a card token.
    """
    as_json = not sys.stderr.isatty() if as_json is None else as_json
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: Any = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    final = [structlog.processors.format_exc_info, _without_what_must_not_be_shown, renderer]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # urllib3 logs paths and retries at debug level. We store our own calls, redacted.
    logging.getLogger("urllib3").setLevel(logging.WARNING)
