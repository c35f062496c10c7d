from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from freezegun import freeze_time
from standardwebhooks import Webhook, WebhookVerificationError

from billing_worker.clock import SystemClock
from billing_worker.domain.errors import InvalidInput
from billing_worker.domain.secret import Secret
from billing_worker.receivers.signature import LONGEST, SHORTEST, new_secret, read_secret, signed

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
AT = int(NOW.timestamp())
BODY = '{"type":"invoice.paid","data":{"why":"é"}}'.encode()


def test_the_fixed_vector_of_the_specification():
    """go/webhook_test.go of standard-webhooks at b2fa7b8."""
    headers = signed(
        [Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@freeze_time(NOW)
def test_the_reference_library_takes_each_secret_of_a_rotation():
    old, new = new_secret(), new_secret()
    headers = signed([new, old], "evt_1", AT, BODY)
    for secret in (old, new):
        assert Webhook(secret.reveal()).verify(BODY, headers)["type"] == "invoice.paid"


@freeze_time(NOW)
@pytest.mark.parametrize(
    ("body", "at", "change"),
    [
        (BODY + b" ", AT, {}),
        (BODY, AT - 301, {}),
        (BODY, AT + 301, {}),
        (BODY, AT, {"webhook-id": "evt_2"}),
        (BODY, AT, {"webhook-signature": ""}),
        (BODY, AT, {"webhook-signature": "v1," + base64.b64encode(b"x" * 32).decode()}),
    ],
    ids=["tampered", "old", "from the future", "another id", "unsigned", "another signature"],
)
def test_the_reference_library_refuses_what_was_not_signed_now(body, at, change):
    secret = new_secret()
    headers = signed([secret], "evt_1", at, BODY) | change
    with pytest.raises(WebhookVerificationError):
        Webhook(secret.reveal()).verify(body, headers)


@pytest.mark.parametrize("size", [SHORTEST, LONGEST])
def test_a_secret_of_yours_is_taken_with_or_without_its_prefix(size):
    bare = base64.b64encode(b"k" * size).decode()
    assert read_secret(bare) == read_secret(f"whsec_{bare}") == Secret(f"whsec_{bare}")


@pytest.mark.parametrize(
    "text", ["", "whsec_", "whsec_c2hvcnQ=", "not base64!", base64.b64encode(b"x" * 65).decode()]
)
def test_a_secret_that_is_too_short_is_refused_and_not_shown(text):
    with pytest.raises(InvalidInput) as refused:
        read_secret(text)
    assert refused.value.field == "secret"
    assert not text or text not in refused.value.reason


def test_no_two_secrets_are_the_same():
    assert new_secret() != new_secret()


NODE_MODULES = os.environ.get("BILLING_TEST_NODE_MODULES", "")
WHY_NO_NODE = (
    "needs node and the npm package: npm install --prefix FOLDER standardwebhooks, then "
    "BILLING_TEST_NODE_MODULES=FOLDER/node_modules"
)
has_node = shutil.which("node") is not None and (Path(NODE_MODULES) / "standardwebhooks").is_dir()


@pytest.mark.node
@pytest.mark.skipif(not has_node, reason=WHY_NO_NODE)
@pytest.mark.parametrize(
    ("body", "age", "change", "said"),
    [
        (BODY, 0, {}, "invoice.paid"),
        (BODY + b" ", 0, {}, "refused"),
        (BODY, 301, {}, "refused"),
        (BODY, 0, {"webhook-signature": ""}, "refused"),
    ],
    ids=["as signed", "tampered", "old", "unsigned"],
)
def test_the_npm_library_takes_and_refuses_the_same(body, age, change, said):
    secret, old = new_secret(), new_secret()
    headers = signed([old, secret], "evt_1", int(SystemClock().now().timestamp()) - age, BODY)
    given = {"secret": secret.reveal(), "headers": headers | change, "body": body.decode()}
    script = Path(__file__).parent / "node" / "verify.cjs"
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(given), capture_output=True, text=True, check=True,
        env={"NODE_PATH": NODE_MODULES, "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.strip() == said
