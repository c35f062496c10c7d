from __future__ import annotations

from typing import Final

CALLBACKS: Final = "/callbacks/payment-invoices"
"""Where the gateway calls; `BILLING_CALLBACK_URL` ends with it."""
