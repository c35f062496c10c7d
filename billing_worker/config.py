"""Settings: environment variables with one prefix, read once. All faults are reported together."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from billing_worker.addresses import (
    cardgate_url,
    database_url,
    http_url,
    is_cleartext,
    redis_url,
)
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.outgoing.notice import USUAL_POLICY, NoticePolicy
from billing_worker.domain.outgoing.webhooks import USUAL_WAITS
from billing_worker.domain.secret import Secret
from billing_worker.domain.timings import Timings

VARIABLE_PREFIX = "BILLING_"
_LONGEST_WAIT_SECONDS = 31_536_000


class BadSettings(Exception):
    """One or more settings are missing or malformed; `faults` names each (variable, reason)."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        self.faults = dict(faults)
        lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(self.faults.items()))
        super().__init__(f"{len(self.faults)} setting(s) are missing or malformed:\n{lines}")


# --- readers: text to value. A ValueError says what the text must be and never repeats the text ---


def _username(text: str) -> str:
    if ":" in text:
        raise ValueError("must not contain a colon: Basic authentication cannot carry it.")
    return text


def _fernet_keys(text: str) -> Secret:
    try:
        for key in text.split(","):
            Fernet(key.strip())
    except ValueError:
        raise ValueError(
            "must be comma-separated Fernet keys; make one with `billing-worker new-key`."
        ) from None
    return Secret(text)


def _service(text: str) -> str:
    """Of all fields only {currency} is filled in; the code becomes part of a request."""
    if not re.fullmatch(r"[\w-]*(?:\{currency\}[\w-]*)?", text, re.ASCII):
        raise ValueError("must be letters, digits, _ and -, and {currency} at most once.")
    return text


def _cleartext(text: str) -> frozenset[str]:
    named = frozenset(name.strip() for name in text.split(","))
    if not named <= CLEARTEXT.keys():
        raise ValueError(f"must name some of {', '.join(CLEARTEXT)}, comma-separated.")
    return named


CLEARTEXT = {
    "gateway": "GATEWAY_URL",
    "cardgate": "CARDGATE_URL",
    "callback": "CALLBACK_URL",
    "database": "DATABASE_URL",
    "redis": "REDIS_URL",
}


def _true_or_false(text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError("must be `true` or `false`.")
    return text == "true"


def _whole_number(most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text[: len(str(most)) + 1]) <= most):
            raise ValueError(f"must be a whole number from 1 to {most}.")
        return int(text)

    return read


def _foreign_queue(text: str) -> str:
    if text.startswith(_OUR_QUEUES) or not text.isascii() or any(c.isspace() for c in text):
        raise ValueError(f"must be ASCII without spaces, and must not begin with {_OUR_QUEUES}")
    return text


_OUR_QUEUES = "billing."


def _schedule(text: str) -> tuple[timedelta, ...]:
    parts = [part.strip() for part in text.split(",")]
    good = all(
        p.isascii() and p.isdigit() and len(p) <= len(str(_LONGEST_WAIT_SECONDS)) for p in parts
    )
    if not good or len(parts) > _MOST_TRIES:
        raise ValueError(f"must be up to {_MOST_TRIES} comma-separated whole seconds.")
    return tuple(timedelta(seconds=int(part)) for part in parts)


_MOST_TRIES = 50


def _notices(text: str) -> NoticePolicy:
    try:
        return NoticePolicy.parse(text)
    except InvalidInput as error:
        raise ValueError(f"{error.reason}.") from None


def _short_text(text: str) -> str:
    if len(text) > _LONGEST_SETTING:
        raise ValueError(f"must have at most {_LONGEST_SETTING} characters.")
    return text


_LONGEST_SETTING = 500


def _tokens(text: str) -> Secret:
    if any(len(token.strip()) < _SHORTEST_TOKEN for token in text.split(",")):
        raise ValueError(
            f"must be comma-separated tokens of at least {_SHORTEST_TOKEN} characters."
        )
    return Secret(text)


_SHORTEST_TOKEN = 20

_seconds = _whole_number(_LONGEST_WAIT_SECONDS)
_port = _whole_number(65_535)


# --- the settings --------------------------------------------------------------------------------

_NONE = Secret("")


def _setting(
    read: Callable[[str], Any],
    meaning: str,
    default: Any,
    *,
    required: bool = False,
    secret: bool = False,
) -> Any:
    metadata = {"read": read, "meaning": meaning, "required": required, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


def _required(
    read: Callable[[str], Any], meaning: str, empty: Any = "", *, secret: bool = False
) -> Any:
    """Declare a required setting. `empty` is its value in a process that does not need it."""
    return _setting(read, meaning, empty, required=True, secret=secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings as typed values: field `x` is the variable `BILLING_X`."""

    database_url: str = _required(
        database_url,
        "SQLAlchemy URL; PostgreSQL for more than one machine, an SQLite file for one",
        secret=True,
    )
    redis_url: str = _required(redis_url, "broker and rate limiter", secret=True)
    gateway_url: str = _required(
        http_url, "Private API base, with or without `/api`, e.g. `https://api.example.com/api`"
    )
    gateway_username: str = _required(_username, "commerce account id (Basic auth)")
    gateway_password: Secret = _required(Secret, "API key (Basic auth)", _NONE, secret=True)
    cardgate_url: str = _required(
        cardgate_url, "Cardgate base, e.g. `https://cardgate.example.com`"
    )
    gateway_service: str = _setting(
        _service, "template of the service code", "payment_card_{currency}_hpp"
    )
    test_mode: bool = _required(
        _true_or_false,
        "`true` or `false`; sent explicitly, compared with the answer",
        empty=False,
    )
    vault_keys: Secret = _required(
        _fernet_keys,
        "comma-separated Fernet keys, newest first, for card tokens and bearers",
        _NONE,
        secret=True,
    )
    callback_url: str = _setting(http_url, "where the gateway calls back", "")
    callback_secret: Secret = _setting(
        Secret, "key that a callback's signature is checked with", _NONE, secret=True
    )
    gateway_timeout_seconds: int = _setting(_seconds, "read timeout of a gateway call", 30)
    gateway_max_requests_per_second: int | None = _setting(
        _whole_number(100_000), "cap shared by all workers; empty means none", None
    )
    charge_concurrency: int = _setting(
        _whole_number(2_000), "charges in flight per worker process", 100
    )
    renew_every_seconds: int = _setting(
        _seconds, "beat cadence of the sweep that opens due periods", 15
    )
    reconcile_every_seconds: int = _setting(
        _seconds, "beat cadence of the sweep that asks the gateway", 10
    )
    reconcile_after_seconds: int = _setting(
        _seconds, "age at which a submitted attempt is first polled", 15
    )
    stuck_after_seconds: int = _setting(
        _seconds, "age at which a prepared attempt is enqueued again", 300
    )
    expiry_grace_seconds: int = _setting(
        _seconds, "wait after the gateway's `expired` before it counts as not charged", 3600
    )
    not_charged_retry_seconds: int = _setting(
        _seconds, "wait before the next attempt when certainly nothing was charged", 3600
    )
    expired_retry_seconds: int = _setting(
        _seconds,
        "wait after the gateway's `expired` before the next automatic attempt, where a sale may have "
        "arrived and can still be approved",
        259_200,
    )
    unknown_blocks_seconds: int = _setting(
        _seconds,
        "how long a charge of unknown outcome holds back later periods of its subscription",
        604_800,
    )
    api_tokens: Secret = _setting(
        _tokens,
        "comma-separated bearer tokens of other systems that may read events, states and metrics",
        _NONE,
        secret=True,
    )
    silence_seconds: int = _setting(
        _seconds, "age of a sweep's last run from which on readiness fails", 600
    )
    metrics_port: int | None = _setting(
        _port, "TCP port on which a worker serves its metrics; empty means none", None
    )
    metrics_host: str = _setting(
        str, "address on which a worker serves its metrics; they need no token", "127.0.0.1"
    )
    events_queue: str = _setting(
        _foreign_queue,
        "queue of other systems that each event is also sent to, as the Celery task `billing.event`",
        "",
    )
    events_keep_days: int | None = _setting(
        _whole_number(36_500),
        "how long an event is kept after it was published; empty means for ever",
        None,
    )
    notices: NoticePolicy = _setting(
        _notices,
        "how early customers are told of a charge, and whether it waits for that: `tell`, `require`, "
        "`require:30` (days), `require:30:7` (and before the end of a trial)",
        USUAL_POLICY,
    )
    how_to_cancel: str = _setting(
        _short_text, "text or URL in notices and receipts: how a customer cancels", ""
    )
    webhooks_schedule_seconds: tuple[timedelta, ...] = _setting(
        _schedule,
        "wait before each try of a webhook, comma-separated; afterwards once a day",
        USUAL_WAITS,
    )
    webhooks_allow_private: bool = _setting(
        _true_or_false,
        "`true` lets webhooks go to private addresses, and without TLS",
        default=False,
    )
    allow_cleartext: frozenset[str] = _setting(
        _cleartext,
        "what may go to another machine without TLS although cards are charged for real: some of "
        "`gateway`, `cardgate`, `callback`, `database`, `redis`",
        frozenset(),
    )
    require_synchronous_standby: bool = _setting(
        _true_or_false,
        "`true` sells nothing while a fail-over of PostgreSQL could lose commits",
        default=False,
    )

    @property
    def events_kept(self) -> timedelta | None:
        return None if self.events_keep_days is None else timedelta(days=self.events_keep_days)

    @property
    def timings(self) -> Timings:
        return Timings(
            reconcile_after=timedelta(seconds=self.reconcile_after_seconds),
            stuck_after=timedelta(seconds=self.stuck_after_seconds),
            expiry_grace=timedelta(seconds=self.expiry_grace_seconds),
            not_charged_retry=timedelta(seconds=self.not_charged_retry_seconds),
            expired_retry=timedelta(seconds=self.expired_retry_seconds),
            unknown_blocks=timedelta(seconds=self.unknown_blocks_seconds),
            silence=timedelta(seconds=self.silence_seconds),
            notices=self.notices,
            # Create, sale and poll, each with its connection and its whole deadline.
            longest_charge=timedelta(seconds=3 * (self.gateway_timeout_seconds + 10)),
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one field of `Settings`."""

    name: str
    read: Callable[[str], Any]
    meaning: str
    default: str
    """The text that the variable would hold."""
    required: bool
    """True: a process that needs the setting does not start without it."""
    secret: bool

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.name


def _as_text(value: Any) -> str:
    if value is None or value is _NONE:
        return ""
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    if isinstance(value, tuple):
        return ",".join(str(int(wait.total_seconds())) for wait in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


SETTINGS = tuple(
    Setting(one.name.upper(), default=_as_text(one.default), **one.metadata)
    for one in fields(Settings)
)

# --- what each process needs ---------------------------------------------------------------------

DATABASE = ("DATABASE_URL",)
VAULT = ("VAULT_KEYS",)
REDIS = ("REDIS_URL",)
GATEWAY = (
    "GATEWAY_URL",
    "GATEWAY_USERNAME",
    "GATEWAY_PASSWORD",
    "CARDGATE_URL",
    "TEST_MODE",
)
WEB = (*DATABASE, *REDIS, *VAULT, "TEST_MODE")
EVERYTHING = (*DATABASE, *REDIS, *GATEWAY, *VAULT)


def load(environ: Mapping[str, str], needs: Iterable[str] = EVERYTHING) -> Settings:
    """Read the settings that a process needs. Raises BadSettings naming every fault at once.

    `BILLING_X_FILE` names a file that holds the value of `BILLING_X`.
    """
    needs = set(needs)
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for setting in SETTINGS:
        variable = setting.variable
        try:
            text = _text(environ, variable, is_secret=setting.secret)
            if text:
                values[setting.name.lower()] = setting.read(text)
            elif setting.name in needs:
                faults[variable] = "is missing."
        except _BadFile as error:
            faults[f"{variable}_FILE"] = str(error)
        except ValueError as error:
            faults[variable] = str(error)
    if not faults and values.get("test_mode") is False:
        faults = _in_cleartext(values, environ)
    if faults:
        raise BadSettings(faults)
    return Settings(**values)


def _in_cleartext(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses of a live installation that would send secrets in clear text."""
    allowed = values.get("allow_cleartext", frozenset())
    return {
        VARIABLE_PREFIX
        + name: "has no TLS and leads to another machine, and cards are charged for "
        f"real: use https, rediss or sslmode=verify-full, or put {called} into "
        "BILLING_ALLOW_CLEARTEXT."
        for called, name in CLEARTEXT.items()
        if called not in allowed and is_cleartext(values.get(name.lower(), ""), environ)
    }


def sources(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the source of each setting that is given: {variable: "environment" or "file PATH"}."""
    found: dict[str, str] = {}
    for variable in (setting.variable for setting in SETTINGS):
        if file := environ.get(f"{variable}_FILE", "").strip():
            found[variable] = f"file {file}"
        if environ.get(variable, "").strip():
            found[variable] = "environment"
    return found


class _BadFile(Exception):
    """The file of a `BILLING_X_FILE` variable cannot be read as text."""


def _text(environ: Mapping[str, str], variable: str, *, is_secret: bool) -> str:
    """Return the text of a variable or of its file; empty if neither is given."""
    value = environ.get(variable, "").strip()
    file = environ.get(f"{variable}_FILE", "").strip()
    if not file:
        return value
    if value:
        raise ValueError(f"is given twice, also as {variable}_FILE.")
    try:
        if is_secret and _is_open_to_all(Path(file)):
            raise _BadFile("can be read by every user of this machine: chmod o-r it.")
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise _BadFile(f"cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise _BadFile("is not text.") from None


def _is_open_to_all(file: Path) -> bool:
    """Return whether any user of the machine can read it. A folder may keep them out."""
    path = file.resolve(strict=True)
    folders = all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    return bool(path.stat().st_mode & stat.S_IROTH) and folders
