"""What plain `requests` needs for the same three calls, with nothing written down.

    python bare_loop.py GATEWAY_URL CARDGATE_URL CHARGES THREADS

Prints seconds and CPU seconds. The yardstick for the worker, never a model of it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import requests

AUTH = ("sandbox", "sandbox")
_of_thread = threading.local()


def charge(gateway: str, cardgate: str, number: int) -> None:
    session = getattr(_of_thread, "session", None)
    if session is None:
        session = _of_thread.session = requests.Session()
    reference = f"bare-{os.getpid()}-{number}"
    order = {
        "data": {
            "type": "payment-invoices",
            "attributes": {
                "test_mode": True,
                "reference_id": reference,
                "currency": "USD",
                "amount": 9.99,
                "service": "payment_card_usd_hpp",
                "token": f"approved.{number}",
                "customer": {"reference_id": "bare"},
                "gateway_options": {"cardgate": {"instant": True}},
            },
        }
    }
    created = session.post(f"{gateway}/payment-invoices", json=order, auth=AUTH, timeout=60)
    invoice = created.json()["data"]
    bearer = invoice["attributes"]["flow_data"]["metadata"]["token"]
    sale = requests.post(
        f"{cardgate}/payment/sale",
        json={"data": {"type": "sale-operation", "attributes": {}}},
        headers={"Authorization": f"Bearer {bearer}"},
        timeout=60,
    )
    assert sale.status_code == HTTPStatus.OK
    seen = session.get(f"{gateway}/payment-invoices/{invoice['id']}", auth=AUTH, timeout=60)
    assert seen.json()["data"]["attributes"]["status"] == "processed"


def main() -> None:
    gateway, cardgate, charges, threads = sys.argv[1:]
    started = time.monotonic()
    with ThreadPoolExecutor(int(threads)) as pool:
        list(pool.map(lambda n: charge(gateway, cardgate, n), range(int(charges))))
    elapsed = time.monotonic() - started
    print(json.dumps({"seconds": elapsed, "cpu_seconds": time.process_time()}))


if __name__ == "__main__":
    main()
