"""What may be written of a customer. It goes to the gateway with every charge, and to the terminal."""

from __future__ import annotations

import re
from typing import Final

from billing_worker.domain.errors import InvalidInput

MAX_NAME: Final = 200
MAX_EMAIL: Final = 254  # RFC 5321, 4.5.3.1.3: a path of 256 with its brackets
MAX_PHONE: Final = 32

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Only what is no address for sure is refused: whether one is read, only a mail tells.
_EMAIL = re.compile(
    r"[^\s@\x00-\x1f\x7f-\x9f]+@[^\s@.\x00-\x1f\x7f-\x9f]+(?:\.[^\s@.\x00-\x1f\x7f-\x9f]+)+"
)
_PHONE = re.compile(r"\+?[0-9(][0-9 ()./-]{3,}")


def check_name(name: str) -> None:
    """Raise InvalidInput on `name`."""
    if len(name) > MAX_NAME or _CONTROL.search(name):
        raise InvalidInput("name", f"must be one line of at most {MAX_NAME} characters")


def check_email(email: str) -> None:
    """Raise InvalidInput on `email`."""
    if len(email) > MAX_EMAIL or not _EMAIL.fullmatch(email):
        raise InvalidInput("email", "must be an e-mail address, such as jo@example.com")


def check_phone(phone: str) -> None:
    """Raise InvalidInput on `phone`."""
    if len(phone) > MAX_PHONE or not _PHONE.fullmatch(phone):
        raise InvalidInput("phone", "must be a phone number, such as +49 30 123456")
