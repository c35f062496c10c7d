from __future__ import annotations

from typing import Final

CALLBACKS: Final = "/callbacks/payment-invoices"
"""The path of the gateway's callbacks; `BILLING_CALLBACK_URL` ends with it."""
