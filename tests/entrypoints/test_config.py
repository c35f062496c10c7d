from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography.fernet import Fernet

from billing_worker.config import DATABASE, SETTINGS, BadSettings, load, sources

GOOD = {
    "BILLING_DATABASE_URL": "postgresql://u:p@db/billing",
    "BILLING_REDIS_URL": "redis://redis:6379/0",
    "BILLING_GATEWAY_URL": "https://api.example.com/api",
    "BILLING_GATEWAY_USERNAME": "coma_1",
    "BILLING_GATEWAY_PASSWORD": "key-of-the-account",
    "BILLING_CARDGATE_URL": "https://cardgate.example.com",
    "BILLING_TEST_MODE": "true",
    "BILLING_VAULT_KEYS": Fernet.generate_key().decode(),
}
SECONDS = {  # and where the process reads them
    "GATEWAY_TIMEOUT_SECONDS": lambda settings: settings.gateway_timeout_seconds,
    "RENEW_EVERY_SECONDS": lambda settings: settings.renew_every_seconds,
    "RECONCILE_EVERY_SECONDS": lambda settings: settings.reconcile_every_seconds,
    "RECONCILE_AFTER_SECONDS": lambda settings: settings.timings.reconcile_after.seconds,
    "STUCK_AFTER_SECONDS": lambda settings: settings.timings.stuck_after.seconds,
    "EXPIRY_GRACE_SECONDS": lambda settings: settings.timings.expiry_grace.seconds,
    "UNKNOWN_BLOCKS_SECONDS": lambda settings: settings.timings.unknown_blocks.total_seconds(),
    "NOT_CHARGED_RETRY_SECONDS": lambda settings: settings.timings.not_charged_retry.seconds,
    "EXPIRED_RETRY_SECONDS": lambda settings: settings.timings.expired_retry.seconds,
}


def faults(**changes):
    environ = {k: v for k, v in (GOOD | changes).items() if v is not None}
    with pytest.raises(BadSettings) as caught:
        load(environ)
    return caught.value.faults


def test_the_required_settings_are_enough():
    settings = load(GOOD)
    assert settings.database_url == "postgresql+psycopg://u:p@db/billing"
    assert settings.test_mode is True
    assert settings.timings.expiry_grace == timedelta(hours=1)
    assert settings.timings.expired_retry == timedelta(days=3)


@pytest.mark.parametrize("end", ["/payment/sale", "/payment/sale/"])
def test_a_cardgate_address_that_has_the_path_of_sales_already_is_refused(end):
    found = faults(BILLING_CARDGATE_URL=f"https://cardgate.example.com{end}")
    assert "without /payment/sale" in found["BILLING_CARDGATE_URL"]


def test_everything_missing_is_named_at_once():
    with pytest.raises(BadSettings) as caught:
        load({})
    assert set(caught.value.faults) == set(GOOD)


def test_missing_and_malformed_are_named_together():
    found = faults(
        BILLING_REDIS_URL=None, BILLING_TEST_MODE="yes", BILLING_CHARGE_CONCURRENCY="many"
    )
    assert set(found) == {
        "BILLING_REDIS_URL", "BILLING_TEST_MODE", "BILLING_CHARGE_CONCURRENCY",
    }  # fmt: skip


def test_a_process_is_not_asked_for_what_it_does_not_need():
    settings = load({"BILLING_DATABASE_URL": "sqlite:///x.db"}, DATABASE)
    assert settings.database_url == "sqlite:///x.db"
    assert settings.gateway_url == ""


def test_a_malformed_setting_is_a_fault_even_where_it_is_not_needed():
    with pytest.raises(BadSettings) as caught:
        load({"BILLING_DATABASE_URL": "sqlite:///x.db", "BILLING_TEST_MODE": "1"}, DATABASE)
    assert set(caught.value.faults) == {"BILLING_TEST_MODE"}


@pytest.mark.parametrize("name", SECONDS)
def test_one_second_is_allowed_and_is_what_the_setting_of_that_name_becomes(name):
    settings = load(GOOD | {f"BILLING_{name}": "1"})
    assert [one for one, seconds_in in SECONDS.items() if seconds_in(settings) == 1] == [name]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "999999999999"])
@pytest.mark.parametrize("name", SECONDS)
def test_seconds_are_positive_whole_numbers(name, value):
    assert set(faults(**{f"BILLING_{name}": value})) == {f"BILLING_{name}"}


@pytest.mark.parametrize("url", ["api.example.com", "ftp://x", "https://user:pw@api.example.com"])
def test_a_gateway_url_must_be_plain_http(url):
    assert set(faults(BILLING_GATEWAY_URL=url)) == {"BILLING_GATEWAY_URL"}


def test_a_fault_never_shows_the_secret():
    found = faults(BILLING_VAULT_KEYS="not-a-key-but-secret")
    assert set(found) == {"BILLING_VAULT_KEYS"}
    assert "not-a-key-but-secret" not in str(found)


def test_a_secret_may_come_from_a_file(tmp_path):
    file = tmp_path / "password"
    file.write_text("from-the-file\n")
    environ = {k: v for k, v in GOOD.items() if k != "BILLING_GATEWAY_PASSWORD"}
    settings = load(environ | {"BILLING_GATEWAY_PASSWORD_FILE": str(file)})
    assert settings.gateway_password.reveal() == "from-the-file"


def test_a_secret_given_twice_is_a_fault(tmp_path):
    file = tmp_path / "password"
    file.write_text("x")
    assert "BILLING_GATEWAY_PASSWORD" in faults(BILLING_GATEWAY_PASSWORD_FILE=str(file))


def test_any_setting_may_come_from_a_file(tmp_path):
    file = tmp_path / "name"
    file.write_text("coma_from_a_file\n")
    environ = {k: v for k, v in GOOD.items() if k != "BILLING_GATEWAY_USERNAME"}
    settings = load(environ | {"BILLING_GATEWAY_USERNAME_FILE": str(file)})
    assert settings.gateway_username == "coma_from_a_file"


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe")
    found = faults(BILLING_GATEWAY_PASSWORD=None, BILLING_GATEWAY_PASSWORD_FILE=str(file))
    assert found == {"BILLING_GATEWAY_PASSWORD_FILE": "is not text."}


def test_a_user_name_with_a_colon_is_a_fault():
    found = faults(BILLING_GATEWAY_USERNAME="coma:1")
    assert "colon" in found["BILLING_GATEWAY_USERNAME"]


def test_where_each_setting_comes_from():
    given = {"BILLING_TEST_MODE": "true", "BILLING_VAULT_KEYS_FILE": "/run/keys", "OTHER": "x"}
    assert sources(given) == {
        "BILLING_TEST_MODE": "environment",
        "BILLING_VAULT_KEYS": "file /run/keys",
    }


def test_an_unreadable_secret_file_is_named():
    found = faults(BILLING_GATEWAY_PASSWORD=None, BILLING_GATEWAY_PASSWORD_FILE="/does/not/exist")
    assert set(found) == {"BILLING_GATEWAY_PASSWORD_FILE"}


def test_no_secret_is_in_the_repr_of_the_settings():
    shown = repr(load(GOOD))
    for variable in ("DATABASE_URL", "GATEWAY_PASSWORD", "VAULT_KEYS"):
        assert GOOD[f"BILLING_{variable}"] not in shown


def test_every_setting_says_what_it_means():
    assert all(info.meaning for info in SETTINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "sqlite://data/billing.db"),
        ("DATABASE_URL", "postgresql://u:p@host:notaport/db"),
        ("DATABASE_URL", "mysql://u:p@host/db"),
        ("REDIS_URL", "redis://127.0.0.1:notaport/0"),
        ("REDIS_URL", "unix:///run/redis.sock"),
    ],
)
def test_a_url_that_nobody_could_connect_to_is_a_fault(name, value):
    assert set(faults(**{f"BILLING_{name}": value})) == {f"BILLING_{name}"}
