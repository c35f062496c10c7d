import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from billing_worker.sandbox.card_outcomes import OUTCOMES
from billing_worker.sandbox.cli import sandbox

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from billing_worker.sandbox.cli import sandbox; sandbox()"]


@pytest.fixture
def started():
    """Start the program on a port of the system's choice; it is killed if the test forgets it."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [*COMMAND, "--port", "0", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_program_serves_what_it_announces_until_it_is_asked_to_stop(started, ending):
    process = started("--json", "--later", "7", "--second-sale", "charge", "--callbacks")

    facts = json.loads(process.stdout.readline())
    ledger = requests.get(f"{facts['url']}/_sandbox/ledger", timeout=10)
    behaviour = requests.post(f"{facts['url']}/_sandbox/behaviour", json={}, timeout=10).json()

    assert ledger.json() == {"debits": [], "totals": {}}
    assert (facts["username"], facts["password"]) == ("sandbox", "sandbox")
    assert facts["callback_secret"] == "sandbox-secret"
    assert [row["token"] for row in facts["tokens"]] == list(OUTCOMES)
    assert behaviour["later_seconds"] == 7
    assert behaviour["second_sale"] == "charge"
    process.send_signal(ending)
    assert process.wait(10) == 0


def test_people_get_the_token_table_and_the_credentials(started):
    process = started("--callback-secret", "very-own-secret")

    lines = []
    while "very-own-secret" not in "".join(lines):
        lines.append(process.stdout.readline())
    text = "".join(lines)

    assert "http://127.0.0.1:" in text
    assert "decline_insufficient_funds" in text
    assert "charged at once" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--duplicates", "sometimes"], "accept_new"),
        (["--lifetime", "-1"], "lifetime_seconds"),
        (["--latency", "nan"], "latency_seconds"),
    ],
)
def test_a_value_that_no_switch_has_is_a_usage_error(arguments, complaint):
    result = CliRunner().invoke(sandbox, arguments)

    assert result.exit_code == 2
    assert complaint in result.output


def test_a_port_that_is_taken_is_named_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(sandbox, ["--port", str(port)])

    assert result.exit_code == 1
    assert result.output == f"Error: 127.0.0.1:{port}: Address already in use\n"
