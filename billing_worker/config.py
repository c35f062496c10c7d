"""Settings: environment variables with one prefix, read once, every fault reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cryptography.fernet import Fernet
from marshmallow import Schema, ValidationError, fields, validate

from billing_worker.domain.secret import Secret
from billing_worker.domain.timings import Timings


class BadSettings(Exception):
    """One or more settings are missing or malformed; `faults` names each (variable, reason)."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        self.faults = dict(faults)
        lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(self.faults.items()))
        super().__init__(f"{len(self.faults)} setting(s) are missing or malformed:\n{lines}")


def _is_http_url(text: str) -> bool:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise ValidationError("must be an http(s) URL without credentials in it.")
    return True


def _is_username(text: str) -> bool:
    if ":" in text:
        raise ValidationError("must not contain a colon: Basic authentication cannot carry it.")
    return True


def _is_database_url(text: str) -> bool:
    parts = _split_url(text, {"postgresql", "postgresql+psycopg", "sqlite"})
    if parts.scheme == "sqlite" and parts.netloc:
        raise ValidationError("needs three slashes before a relative path: sqlite:///billing.db.")
    return True


def _is_redis_url(text: str) -> bool:
    _split_url(text, {"redis", "rediss"})
    return True


def _split_url(text: str, schemes: set[str]) -> SplitResult:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError as error:
        raise ValidationError(f"is not a URL: {error}.") from None
    if parts.scheme not in schemes:
        raise ValidationError(f"must begin with one of {', '.join(sorted(schemes))}, then ://")
    return parts


def _are_fernet_keys(text: str) -> bool:
    try:
        keys = [Fernet(key.strip()) for key in text.split(",")]
    except ValueError:
        raise ValidationError(
            "must be comma-separated Fernet keys; make one with `billing-worker new-key`."
        ) from None
    return bool(keys)


class _StrictBoolean(fields.Field[bool]):
    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if value not in {"true", "false"}:
            raise ValidationError("must be `true` or `false`.")
        return bool(value == "true")


def _seconds(meaning: str, default: int) -> Any:
    return _setting(
        fields.Integer(validate=validate.Range(min=1, max=31_536_000)), meaning, default
    )


def _setting(kind: Any, meaning: str, default: Any = None, *, secret: bool = False) -> Any:
    kind.metadata.update(meaning=meaning, default=default, secret=secret)
    return kind


class _Environment(Schema):
    """One field per variable, without the prefix. The table in docs/settings.md is checked against it."""

    DATABASE_URL = _setting(
        fields.String(validate=_is_database_url),
        "SQLAlchemy URL; PostgreSQL for more than one machine, an SQLite file for one",
        secret=True,
    )  # fmt: skip
    REDIS_URL = _setting(
        fields.String(validate=_is_redis_url),
        "broker and rate limiter",
        secret=True,
    )  # fmt: skip
    GATEWAY_URL = _setting(
        fields.String(validate=_is_http_url),
        "Private API base, with or without `/api`, e.g. `https://api.example.com/api`",
    )
    GATEWAY_USERNAME = _setting(
        fields.String(validate=_is_username), "commerce account id (Basic auth)"
    )
    GATEWAY_PASSWORD = _setting(
        fields.String(validate=validate.Length(min=1)), "API key (Basic auth)", secret=True
    )
    CARDGATE_URL = _setting(
        fields.String(validate=_is_http_url), "Cardgate base, e.g. `https://cardgate.example.com`"
    )
    GATEWAY_SERVICE = _setting(
        fields.String(validate=validate.Length(min=1)),
        "template of the service code",
        "payment_card_{currency}_hpp",
    )
    TEST_MODE = _setting(
        _StrictBoolean(), "`true` or `false`; sent explicitly, compared with the answer"
    )
    VAULT_KEYS = _setting(
        fields.String(validate=_are_fernet_keys),
        "comma-separated Fernet keys, newest first, for card tokens and bearers",
        secret=True,
    )
    CALLBACK_URL = _setting(
        fields.String(validate=_is_http_url), "where the gateway calls back", ""
    )
    CALLBACK_SECRET = _setting(
        fields.String(), "key that a callback's signature is checked with", "", secret=True
    )
    GATEWAY_TIMEOUT_SECONDS = _seconds("read timeout of a gateway call", 30)
    GATEWAY_MAX_REQUESTS_PER_SECOND = _setting(
        fields.Integer(validate=validate.Range(min=1, max=100_000)),
        "cap shared by all workers; empty means none",
        "",
    )
    CHARGE_CONCURRENCY = _setting(
        fields.Integer(validate=validate.Range(min=1, max=2_000)),
        "charges in flight per worker process",
        100,
    )
    RENEW_EVERY_SECONDS = _seconds("beat cadence of the sweep that opens due periods", 15)
    RECONCILE_EVERY_SECONDS = _seconds("beat cadence of the sweep that asks the gateway", 10)
    RECONCILE_AFTER_SECONDS = _seconds("age at which a submitted attempt is first asked for", 15)
    STUCK_AFTER_SECONDS = _seconds("age at which a prepared attempt is rung again", 300)
    EXPIRY_GRACE_SECONDS = _seconds(
        "wait after the gateway's `expired` before it counts as not charged", 3600
    )
    NOT_CHARGED_RETRY_SECONDS = _seconds(
        "wait before the next attempt when certainly nothing was charged", 3600
    )
    EXPIRED_RETRY_SECONDS = _seconds(
        "wait after the gateway's `expired` before the next automatic attempt, where a sale may have "
        "arrived and can still be approved",
        259_200,
    )
    UNKNOWN_BLOCKS_SECONDS = _seconds(
        "how long a charge of unknown outcome holds back later periods of its subscription", 604_800
    )
    REQUIRE_SYNCHRONOUS_STANDBY = _setting(
        _StrictBoolean(),
        "`true` sells nothing while a fail-over of PostgreSQL could lose commits",
        "false",
    )


PREFIX = "BILLING_"

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


@dataclass(frozen=True, slots=True)
class Settings:
    """Values as the process uses them. One that it does not need, and was not given, is empty."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    gateway_url: str
    gateway_username: str
    gateway_password: Secret
    cardgate_url: str
    gateway_service: str
    test_mode: bool
    vault_keys: Secret
    callback_url: str
    callback_secret: Secret
    gateway_timeout_seconds: int
    gateway_max_requests_per_second: int | None
    charge_concurrency: int
    renew_every_seconds: int
    reconcile_every_seconds: int
    require_synchronous_standby: bool
    timings: Timings


def load(environ: Mapping[str, str], needs: Iterable[str] = EVERYTHING) -> Settings:
    """Read the settings that a process needs. Raises BadSettings naming every fault at once.

    `BILLING_X_FILE` names a file that holds the value of `BILLING_X`.
    """
    given, faults = _given(environ)
    try:
        values = _Environment().load(given)
    except ValidationError as error:
        messages: dict[str, Any] = error.normalized_messages()  # type: ignore[no-untyped-call] # marshmallow
        for name, reasons in messages.items():
            faults[PREFIX + name] = " ".join(map(str, reasons))
        values = error.valid_data or {}
    for name in needs:
        known = {PREFIX + name, f"{PREFIX}{name}_FILE"}
        if name not in given and not known & faults.keys():
            faults[PREFIX + name] = "is missing."
    if faults:
        raise BadSettings(faults)
    return _settings(values)


def sources(environ: Mapping[str, str]) -> dict[str, str]:
    """Where each setting that is given comes from: {variable: "environment" or "file PATH"}."""
    found: dict[str, str] = {}
    for name in _Environment._declared_fields:  # noqa: SLF001 - marshmallow's registry
        variable = PREFIX + name
        if file := environ.get(f"{variable}_FILE", "").strip():
            found[variable] = f"file {file}"
        if environ.get(variable, "").strip():
            found[variable] = "environment"
    return found


def _given(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    given: dict[str, str] = {}
    faults: dict[str, str] = {}
    for name in _Environment._declared_fields:  # noqa: SLF001 - marshmallow's registry
        value = environ.get(PREFIX + name, "").strip()
        file = environ.get(f"{PREFIX}{name}_FILE", "").strip()
        if file:
            if value:
                faults[PREFIX + name] = f"is given twice, also as {PREFIX}{name}_FILE."
            try:
                value = Path(file).read_text(encoding="utf-8").strip()
            except OSError as error:
                faults[f"{PREFIX}{name}_FILE"] = f"cannot be read: {error.strerror}."
            except UnicodeDecodeError:
                faults[f"{PREFIX}{name}_FILE"] = "is not text."
        if value:
            given[name] = value
    return given, faults


def _settings(values: Mapping[str, Any]) -> Settings:
    def value(name: str) -> Any:
        default = _Environment._declared_fields[name].metadata["default"]  # noqa: SLF001
        return values.get(name, "" if default is None else default)

    timeout = value("GATEWAY_TIMEOUT_SECONDS")
    return Settings(
        database_url=_with_driver(value("DATABASE_URL")),
        redis_url=value("REDIS_URL"),
        gateway_url=value("GATEWAY_URL"),
        gateway_username=value("GATEWAY_USERNAME"),
        gateway_password=Secret(value("GATEWAY_PASSWORD")),
        cardgate_url=value("CARDGATE_URL"),
        gateway_service=value("GATEWAY_SERVICE"),
        test_mode=bool(value("TEST_MODE")),
        vault_keys=Secret(value("VAULT_KEYS")),
        callback_url=value("CALLBACK_URL"),
        callback_secret=Secret(value("CALLBACK_SECRET")),
        gateway_timeout_seconds=timeout,
        gateway_max_requests_per_second=value("GATEWAY_MAX_REQUESTS_PER_SECOND") or None,
        charge_concurrency=value("CHARGE_CONCURRENCY"),
        renew_every_seconds=value("RENEW_EVERY_SECONDS"),
        reconcile_every_seconds=value("RECONCILE_EVERY_SECONDS"),
        require_synchronous_standby=value("REQUIRE_SYNCHRONOUS_STANDBY") is True,
        timings=Timings.in_seconds(
            reconcile_after=value("RECONCILE_AFTER_SECONDS"),
            stuck_after=value("STUCK_AFTER_SECONDS"),
            expiry_grace=value("EXPIRY_GRACE_SECONDS"),
            not_charged_retry=value("NOT_CHARGED_RETRY_SECONDS"),
            expired_retry=value("EXPIRED_RETRY_SECONDS"),
            unknown_blocks=value("UNKNOWN_BLOCKS_SECONDS"),
            # create, sale and look, each with its connection and its whole deadline
            longest_charge=3 * (timeout + 10),
        ),
    )


def _with_driver(url: str) -> str:
    """`postgresql://` means psycopg 3 here; SQLAlchemy would look for psycopg2."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


@dataclass(frozen=True, slots=True)
class SettingInfo:
    variable: str
    meaning: str
    default: str | None  # None: required by the processes that need it
    secret: bool


def described() -> list[SettingInfo]:
    """Every setting with its meaning and default, in the order of the table in docs/settings.md."""
    return [
        SettingInfo(
            PREFIX + name,
            kind.metadata["meaning"],
            None if kind.metadata["default"] is None else str(kind.metadata["default"]),
            kind.metadata["secret"],
        )
        for name, kind in _Environment._declared_fields.items()  # noqa: SLF001
    ]
