"""Addresses in settings: refused in words without repeating them, and encrypted in live mode."""

from __future__ import annotations

import ssl

import pytest
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import ConnectionError as RedisAwayError

from billing_worker import bootstrap
from billing_worker.addresses import shown
from billing_worker.client import BillingClient
from billing_worker.config import BadSettings, load
from billing_worker.entrypoints.checks import check_redis, redis_trouble
from billing_worker.entrypoints.worker.doorbell import CHARGES, doorbell_only
from billing_worker.redis_url import verified
from billing_worker.services.outbox.endpoints import InvalidInput, add
from tests.entrypoints.test_config import GOOD, faults
from tests.support.processes import CELERY, Process, beat, command, worker
from tests.support.redis_server import RedisServer
from tests.support.tls_proxy import TlsProxy

SECRET = "S3cr"
UNREADABLE = {
    "DATABASE_URL": (
        f"postgresql://u:{SECRET}/et@h/db", f"postgresql://u:12/{SECRET}@h/db",
        f"postgresql://u:{SECRET}?x@h/db", f"postgresql://u:{SECRET}#x@h/db",
        f"postgresql://u:12#{SECRET}@h/db", f"postgresql://u:12?{SECRET}@h/db",
        f"postgresql://u:p@{SECRET}@h/db", f"postgresql://u:{SECRET}@[::1/db", f"{SECRET}@h/db",
        f"mysql://u:{SECRET}@h/db",
    ),
    "REDIS_URL": (
        f"redis://:{SECRET}/et@h/0", f"redis://:12/{SECRET}@h/0", f"redis://:{SECRET}#x@h",
        f"redis://:12#{SECRET}@h", f"redis://:12?{SECRET}@h", f"redis://:p@{SECRET}@h/0",
        f"{SECRET}@h",
    ),
    "GATEWAY_URL": (f"https://u:{SECRET}/et@h", f"https://h/api?key={SECRET}", "https://h:port",
                    f"https://h/#{SECRET}"),
    "CARDGATE_URL": (f"https://u:{SECRET}@h",),
    "CALLBACK_URL": (f"https://h:{SECRET}/callback",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "url"), [(name, url) for name, urls in UNREADABLE.items() for url in urls]
)
def test_a_url_that_cannot_be_read_is_refused_and_no_part_of_it_is_shown(name, url):
    found = faults(**{f"BILLING_{name}": url})
    assert set(found) == {f"BILLING_{name}"}
    assert SECRET not in str(found)


@pytest.mark.again
def test_no_command_and_no_worker_prints_a_part_of_it(tmp_path):
    bad = {"BILLING_DATABASE_URL": UNREADABLE["DATABASE_URL"][0],
           "BILLING_REDIS_URL": UNREADABLE["REDIS_URL"][0]}  # fmt: skip
    done = command("status", settings=GOOD | bad)
    assert done.returncode == 2
    started = Process([*CELERY, "worker"], GOOD | bad, tmp_path / "log")
    assert started.wait() == 2
    assert SECRET not in done.stdout + done.stderr + started.output


def test_a_webhook_url_that_cannot_be_read_is_not_repeated(world):
    with pytest.raises(InvalidInput) as refused:
        add(world.store, world.vault, world.clock, url=f"https://h:{SECRET}/x", types=None)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        (
            "postgresql+psycopg://user:pw@db.internal:5433/billing",
            "postgresql+psycopg://db.internal",
        ),
        ("rediss://:pw@cache/0", "rediss://cache"),
        ("sqlite:///data/billing.db", "sqlite:///data/billing.db"),
    ],
)
def test_only_scheme_and_host_of_a_url_are_shown(url, seen):
    assert shown(url) == seen


PASSWORDS = ("p%40ss", "a%3Ab", "sl%2Fash", "per%25cent", "h%23sh")


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_may_have_every_character_if_it_is_encoded(password):
    settings = load(GOOD | {"BILLING_REDIS_URL": f"redis://user:{password}@127.0.0.1/0",
                            "BILLING_DATABASE_URL": f"postgres://u:{password}@127.0.0.1/db"})  # fmt: skip
    assert password in settings.redis_url
    assert settings.database_url == f"postgresql+psycopg://u:{password}@127.0.0.1/db"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory"])
def test_a_database_in_memory_is_refused(url):
    assert set(faults(BILLING_DATABASE_URL=url)) == {"BILLING_DATABASE_URL"}


@pytest.mark.parametrize(
    "template", ["{curency}", "{currency:>9}", "a b", "{}", "x{currency}{currency}"]
)
def test_a_service_template_that_would_fail_at_the_first_charge_is_refused(template):
    assert set(faults(BILLING_GATEWAY_SERVICE=template)) == {"BILLING_GATEWAY_SERVICE"}


# --- cleartext in live mode -----------------------------------------------------------------------

LIVE = GOOD | {
    "BILLING_TEST_MODE": "false",
    "BILLING_DATABASE_URL": "postgresql://u:p@db/billing?sslmode=verify-full",
    "BILLING_REDIS_URL": "rediss://:p@redis:6379/0",
}
CLEARTEXT = [
    ("gateway", "GATEWAY_URL", "http://api.example.com/api"),
    ("cardgate", "CARDGATE_URL", "http://cardgate.example.com"),
    ("callback", "CALLBACK_URL", "http://billing.example.com/callbacks"),
    ("redis", "REDIS_URL", "redis://:p@redis/0"),
    ("database", "DATABASE_URL", "postgresql://u:p@db/billing"),
    ("database", "DATABASE_URL", "postgresql://u:p@db/billing?sslmode=prefer"),
    ("database", "DATABASE_URL", "postgresql://u:p@/billing?host=db"),
    ("database", "DATABASE_URL", "postgresql://u:p@127.0.0.1,db/billing"),
]


@pytest.mark.parametrize(("called", "name", "url"), CLEARTEXT)
def test_live_mode_refuses_clear_text_to_another_machine_unless_a_setting_names_it(
    called, name, url
):
    load(LIVE)
    clear = LIVE | {f"BILLING_{name}": url}
    with pytest.raises(BadSettings) as refused:
        load(clear)
    assert set(refused.value.faults) == {f"BILLING_{name}"}
    load(clear | {"BILLING_ALLOW_CLEARTEXT": called})
    load(clear | {"BILLING_TEST_MODE": "true"})


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("GATEWAY_URL", "http://127.0.0.1:8088/api"),
        ("REDIS_URL", "redis://localhost/0"),
        ("DATABASE_URL", "postgresql://u@[::1]:5432/billing"),
        ("DATABASE_URL", "postgresql:///billing?host=/run/postgresql"),
        ("DATABASE_URL", "sqlite:///billing.db"),
    ],
)
def test_clear_text_inside_of_one_machine_is_allowed(name, url):
    load(LIVE | {f"BILLING_{name}": url})


def test_a_misspelt_exception_is_refused():
    assert set(faults(BILLING_ALLOW_CLEARTEXT="redis,databse")) == {"BILLING_ALLOW_CLEARTEXT"}


# --- files with secrets ----------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text(GOOD["BILLING_VAULT_KEYS"])
    # As in a folder that everybody may enter: those of pytest are closed.
    monkeypatch.setattr("billing_worker.config.stat.S_IXOTH", 0o7777)
    return file


def with_file(file):
    rest = {name: value for name, value in GOOD.items() if name != "BILLING_VAULT_KEYS"}
    return rest | {"BILLING_VAULT_KEYS_FILE": str(file)}


def test_a_key_file_that_everybody_can_read_is_refused(key_file):
    key_file.chmod(0o644)
    with pytest.raises(BadSettings, match="every user of this machine"):
        load(with_file(key_file))
    key_file.chmod(0o640)
    load(with_file(key_file))


def test_a_folder_that_keeps_others_out_is_enough(key_file, monkeypatch):
    monkeypatch.undo()
    key_file.chmod(0o644)
    key_file.parent.chmod(0o700)
    load(with_file(key_file))


# --- real TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server, \
            Redis.from_url(server.url) as admin:  # fmt: skip
        admin.config_set("requirepass", "sesame")
        yield server


@pytest.fixture
def proxy(server, tmp_path):
    proxy = TlsProxy(tmp_path, server.port)
    yield proxy
    proxy.close()


def through(proxy, query=""):
    return f"rediss://:sesame@localhost:{proxy.port}/0{query}"


def trusting(proxy):
    return through(proxy, f"?ssl_ca_certs={proxy.ca_file}")


USES = {
    "client": lambda url: BillingClient(url).describe(customer="x").answer(timeout=0.5),
    "client without answers": lambda url: BillingClient(url, answers=False).describe(customer="x"),
    "bell": lambda url: doorbell_only(url).send_task("x", queue=CHARGES, retry=False),
    "rate limit": lambda url: bootstrap._impatient_redis(of(url)).ping(),
    "check": lambda url: check_redis(of(url)),
}


def of(url):
    return load(GOOD | {"BILLING_REDIS_URL": url})


REFUSED_USES = [
    # Celery tries to connect for six seconds.
    pytest.param(use, marks=pytest.mark.again) if use == "bell" else use
    for use in USES
]


@pytest.mark.parametrize("use", REFUSED_USES)
def test_no_password_goes_to_a_server_whose_certificate_nobody_has_signed(proxy, use):
    with pytest.raises((OperationalError, RedisAwayError, ssl.SSLError)):
        USES[use](through(proxy))
    assert proxy.heard == b""


@pytest.mark.parametrize("use", REFUSED_USES)
def test_no_password_goes_to_a_server_of_another_name(server, tmp_path, use):
    proxy = TlsProxy(tmp_path, server.port, "elsewhere")
    with pytest.raises((OperationalError, RedisAwayError, ssl.SSLError)):
        USES[use](trusting(proxy))
    assert proxy.heard == b""
    proxy.close()


@pytest.mark.parametrize("use", USES)
def test_a_certificate_of_the_given_ca_is_accepted(proxy, use):
    try:
        USES[use](trusting(proxy))
    except TimeoutError:
        assert use == "client"  # nobody answers it
    assert b"sesame" in proxy.heard


def test_verification_can_be_turned_off_in_one_way(proxy):
    assert redis_trouble(verified(through(proxy, "?ssl_cert_reqs=none"))) is None


@pytest.mark.again
def test_worker_and_beat_start_over_tls_and_end_with_a_stranger(proxy, tmp_path, postgres_url):
    good = GOOD | {"BILLING_DATABASE_URL": postgres_url, "BILLING_REDIS_URL": trusting(proxy)}
    with worker(good, tmp_path), beat(good, tmp_path) as ticking:
        ticking.says("beat: Starting")
    proxy.heard = b""
    started = Process(
        [*CELERY, "worker"], good | {"BILLING_REDIS_URL": through(proxy)}, tmp_path / "other.log"
    )
    started.says("Cannot connect")
    started.kill()
    assert proxy.heard == b""
    assert "sesame" not in started.output
