"""The client for other services: it sends commands to the billing worker. It needs only Celery.

    from billing_worker.client import BillingClient

    billing = BillingClient("redis://redis:6379/0")
    sent = billing.pause(reference_id="pause-7781", subscription="sub-1", why="holiday")
    sent.answer(timeout=10)  # {"status": "done", "errors": [], "subscription": {…}}

`reference_id` is your own key for the command: a command with the same key is carried out only
once. Only the answer proves that a command was carried out; without an answer, send the same
command again. `decided_at` is the time of the decision, if the command is sent later. See
docs/commands.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, repeat
from typing import Any, Final, Literal, NotRequired, TypedDict, cast

from celery.result import AsyncResult

from billing_worker.broker import OwnBroker

QUEUE: Final = "billing.commands"

_EAGER_WAITS = (0.01, 0.02, 0.05, 0.1)
_PATIENT_WAIT = 0.2

Scope = Literal["subscription", "customer"]
Interval = Literal["day", "week", "month", "quarter", "year"]


class Customer(TypedDict):
    reference_id: str
    name: NotRequired[str | None]
    email: NotRequired[str | None]


class Card(TypedDict):
    token: str
    mask: NotRequired[str | None]
    brand: NotRequired[str | None]
    expiry_month: NotRequired[int | None]
    expiry_year: NotRequired[int | None]


class Error(TypedDict):
    field: str
    reason: str


class Answer(TypedDict):
    """The result of a command. Further keys depend on the command."""

    status: Literal["done", "unchanged", "refused", "failed"]
    errors: list[Error]
    subscription: NotRequired[dict[str, Any]]
    invoice: NotRequired[Any]


@dataclass(frozen=True, slots=True)
class Sent:
    id: str
    """Celery's task id. `billing-worker commands --message ID` shows the result."""

    _result: AsyncResult[Any] = field(repr=False)

    def answer(self, timeout: float) -> Answer:
        """Wait for the answer. Raises TimeoutError after `timeout` seconds.

        Then the command may or may not have been carried out: send the same command again.
        """
        # Polled, because a subscription does not survive a restart of Redis.
        deadline = time.monotonic() + timeout
        for wait in chain(_EAGER_WAITS, repeat(_PATIENT_WAIT)):
            if self._result.ready():
                return cast("Answer", self._result.result)
            if time.monotonic() > deadline:
                break
            time.sleep(wait)
        raise TimeoutError(f"no answer to {self.id} within {timeout} s")


class BillingClient:
    def __init__(self, broker_url: str, *, answers: bool = True) -> None:
        """`answers=False` is for a sender that never waits: no answers are stored in Redis."""
        self._wants_answers = answers
        self._app = OwnBroker(
            "billing_client", broker=broker_url, results=None, set_as_current=False
        )
        self._app.conf.update(
            task_serializer="json",
            # A sender must not block while the broker is down.
            broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 3},
        )
        # A second application, because one with a result backend subscribes with every send.
        results = broker_url if answers else None
        self._answers = OwnBroker(
            "billing_answers", broker=broker_url, results=results, set_as_current=False
        )
        self._answers.conf.update(
            accept_content=["json"],
            redis_socket_timeout=5,
            redis_socket_connect_timeout=3,
        )

    def subscribe(
        self,
        *,
        reference_id: str,
        customer: Customer,
        card: Card | None,
        amount: str,
        currency: str,
        interval: Interval,
        anchor_at: datetime,
        interval_count: int = 1,
        timezone: str = "UTC",
        trial_end: datetime | None = None,
        paid_through: datetime | None = None,
        ends_after_periods: int | None = None,
        ends_at: datetime | None = None,
        billing_day: int | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        catch_up: str | None = None,
        dunning: str | None = None,
        notices: str | None = None,
    ) -> Sent:
        """Add a subscription. `amount` is decimal text in major units: "9.99". Datetimes are aware.

        `catch_up`, `dunning` and `notices` name policies; None: the worker's default.
        """
        optional = {
            "ends_at": _instant(ends_at), "billing_day": billing_day, "catch_up": catch_up,
            "dunning": dunning, "notices": notices,
        }  # fmt: skip
        return self._send(
            "billing.subscribe",
            {
                "reference_id": reference_id,
                "customer": customer,
                "card": card,
                "amount": amount,
                "currency": currency,
                "interval": interval,
                "interval_count": interval_count,
                "anchor_at": _instant(anchor_at),
                "timezone": timezone,
                "trial_end": _instant(trial_end),
                "paid_through": _instant(paid_through),
                "ends_after_periods": ends_after_periods,
                "description": description,
                "metadata": dict(metadata or {}),
                # A worker of an older version knows only the names above.
                **{name: value for name, value in optional.items() if value is not None},
            },
        )

    def change_subscription(
        self,
        *,
        reference_id: str,
        subscription: str,
        amount: str | None = None,
        currency: str | None = None,
        interval: Interval | None = None,
        interval_count: int | None = None,
        description: str | None = None,
        catch_up: str | None = None,
        notices: str | None = None,
        ends_at: datetime | Literal[""] | None = None,
        amount_from: datetime | Literal[""] | None = None,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Set new terms from the next period on. None changes nothing; `ends_at=""` removes it.

        With `amount_from` the amount counts for periods that begin then or later; `amount_from=""`
        takes it back.
        """
        changes: dict[str, Any] = {
            "amount": amount,
            "currency": currency,
            "interval": interval,
            "interval_count": interval_count,
            "description": description,
            "catch_up": catch_up,
        }
        if ends_at is not None:
            changes["ends_at"] = _instant(ends_at) if ends_at else ""
        if notices is not None:
            changes["notices"] = notices
        if amount_from is not None:
            changes["amount_from"] = _instant(amount_from) if amount_from else ""
        return self._about(
            "billing.change_subscription",
            reference_id,
            subscription,
            by,
            why,
            decided_at,
            **changes,
        )

    def notice_sent(
        self,
        *,
        reference_id: str,
        subscription: str,
        period: int,
        amount: str,
        currency: str,
        sent_at: datetime | None = None,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Say that the customer was told of the charge for a period, and of which amount.

        `sent_at`: when, if not now. The answer's `notice` holds `charged_from`.
        """
        record: dict[str, Any] = {"period": period, "amount": amount, "currency": currency}
        if sent_at is not None:
            record["sent_at"] = _instant(sent_at)
        return self._about(
            "billing.notice_sent", reference_id, subscription, by, why, decided_at, **record
        )

    def reschedule(
        self,
        *,
        reference_id: str,
        subscription: str,
        days: int | None = None,
        billing_day: int | None = None,
        free_periods: int | None = None,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Move the next date: give one of `days` later, `billing_day` of a month, `free_periods`."""
        given = {"days": days, "billing_day": billing_day, "free_periods": free_periods}
        how = {name: value for name, value in given.items() if value is not None}
        return self._about(
            "billing.reschedule", reference_id, subscription, by, why, decided_at, **how
        )

    def pause(
        self,
        *,
        reference_id: str,
        subscription: str,
        until: datetime | None = None,
        shift_anchor: bool = False,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Pause. `until` ends the pause by itself, as `resume` with this `shift_anchor` does."""
        # A worker that is older than this file does not know it.
        dated = {} if until is None else {"until": _instant(until), "shift_anchor": shift_anchor}
        return self._about(
            "billing.pause", reference_id, subscription, by, why, decided_at, **dated
        )

    def resume(
        self,
        *,
        reference_id: str,
        subscription: str,
        shift_anchor: bool,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """End a pause. `shift_anchor` moves all dates by its length; False keeps the calendar."""
        return self._about(
            "billing.resume",
            reference_id,
            subscription,
            by,
            why,
            decided_at,
            shift_anchor=shift_anchor,
        )

    def cancel(
        self,
        *,
        reference_id: str,
        subscription: str,
        at_period_end: bool,
        void_open: bool = False,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Cancel. `void_open` voids the open invoices; an ended subscription needs it."""
        # A worker of an older version does not know the key.
        optional = {"void_open": True} if void_open else {}
        return self._about(
            "billing.cancel",
            reference_id,
            subscription,
            by,
            why,
            decided_at,
            at_period_end=at_period_end,
            **optional,
        )

    def uncancel(
        self,
        *,
        reference_id: str,
        subscription: str,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Withdraw a cancellation at the period's end, before it takes effect."""
        return self._about("billing.uncancel", reference_id, subscription, by, why, decided_at)

    def end(
        self,
        *,
        reference_id: str,
        subscription: str,
        void_open: bool = False,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """No further period. What is open is still collected, unless `void_open`."""
        return self._about(
            "billing.end",
            reference_id,
            subscription,
            by,
            why,
            decided_at,
            void_open=void_open,
        )

    def retry(
        self,
        *,
        reference_id: str,
        invoice: str,
        by: str | None = None,
        why: str | None = None,
    ) -> Sent:
        """Order one attempt now, on the default card."""
        record = {"reference_id": reference_id, "invoice": invoice, "by": by, "why": why}
        return self._send("billing.retry", record)

    def describe(
        self,
        *,
        subscription: str | None = None,
        charge: str | None = None,
        invoice: str | None = None,
        customer: str | None = None,
        at: str | None = None,
    ) -> Sent:
        """Ask what became of one of these. The answer has its state, in words and data.

        `at`, a day or an instant in ISO 8601: also what was charged then to a subscription or a customer,
        and why nothing else was.
        """
        named = {
            "subscription": subscription,
            "charge": charge,
            "invoice": invoice,
            "customer": customer,
        }
        given = {kind: reference for kind, reference in named.items() if reference is not None}
        if len(given) != 1:
            raise ValueError(f"name exactly one of {', '.join(named)}")
        return self._send("billing.describe", given | ({"at": at} if at is not None else {}))

    def forgive(
        self,
        *,
        reference_id: str,
        subscription: str,
        by: str | None = None,
        why: str | None = None,
    ) -> Sent:
        """Void what a suspended subscription owes, and bill it again from its next period."""
        return self._about("billing.forgive", reference_id, subscription, by, why, None)

    def remove_card(
        self,
        *,
        reference_id: str,
        customer: str,
        card_id: int,
        by: str | None = None,
        why: str | None = None,
    ) -> Sent:
        """Forget a stored card. Refused while it pays a subscription."""
        record = {"reference_id": reference_id, "customer": customer, "card_id": card_id}
        return self._send("billing.remove_card", record | {"by": by, "why": why})

    def update_customer(
        self,
        *,
        reference_id: str,
        customer: str,
        name: str | None = None,
        email: str | None = None,
        by: str | None = None,
        why: str | None = None,
    ) -> Sent:
        """Give a customer another name or e-mail; what is None stays, an empty text removes it."""
        record = {"reference_id": reference_id, "customer": customer, "name": name, "email": email}
        return self._send("billing.update_customer", record | {"by": by, "why": why})

    def replace_card(
        self,
        *,
        reference_id: str,
        subscription: str,
        card: Card,
        scope: Scope | None = None,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Replace the card. `scope`: this subscription only (default), or all subscriptions of the
        customer that the replaced card pays.
        """
        return self._about(
            "billing.replace_card", reference_id, subscription, by, why, decided_at,
            card=card, **_scope(scope),
        )  # fmt: skip

    def use_card(
        self,
        *,
        reference_id: str,
        subscription: str,
        card_id: int,
        scope: Scope | None = None,
        by: str | None = None,
        why: str | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Like `replace_card`, but with a stored card, named by its `card_id`."""
        return self._about(
            "billing.use_card", reference_id, subscription, by, why, decided_at,
            card_id=card_id, **_scope(scope),
        )  # fmt: skip

    def charge_once(
        self,
        *,
        reference_id: str,
        customer: Customer,
        amount: str,
        currency: str,
        card: Card | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        decided_at: datetime | None = None,
    ) -> Sent:
        """Charge once. `reference_id` also names the charge. Without a card: the default one."""
        return self._send(
            "billing.charge_once",
            {
                "reference_id": reference_id,
                "customer": customer,
                "card": card,
                "amount": amount,
                "currency": currency,
                "description": description,
                "metadata": dict(metadata or {}),
                **_decided(decided_at),
            },
        )

    def cancel_charge(
        self,
        *,
        reference_id: str,
        charge: str,
        by: str | None = None,
        why: str | None = None,
    ) -> Sent:
        """Cancel a one-off charge. Refused if it was charged or may have been."""
        record = {"reference_id": reference_id, "charge": charge, "by": by, "why": why}
        return self._send("billing.cancel_charge", record)

    def start_tokenisation(
        self,
        *,
        reference_id: str,
        customer: Customer,
        amount: str | None = None,
        currency: str | None = None,
        invoice: str | None = None,
        phone: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        description: str | None = None,
        return_url: str | None = None,
    ) -> Sent:
        """Open a page where the customer enters a card and pays `amount`, or the open `invoice`."""
        optional = {"metadata": dict(metadata)} if metadata else {}
        return self._send(
            "billing.start_tokenisation",
            {
                "reference_id": reference_id,
                "customer": customer,
                "amount": amount,
                "currency": currency,
                "invoice": invoice,
                "phone": phone,
                "description": description,
                "return_url": return_url,
                **optional,
            },
        )

    def start_checkout(
        self, *, reference_id: str, invoice: str, return_url: str | None = None
    ) -> Sent:
        """Open a page where the customer pays an open invoice with the stored card."""
        return self._send(
            "billing.start_checkout",
            {"reference_id": reference_id, "invoice": invoice, "return_url": return_url},
        )

    def _about(
        self,
        task: str,
        reference_id: str,
        subscription: str,
        by: str | None,
        why: str | None,
        decided_at: datetime | None,
        **details: Any,
    ) -> Sent:
        record = {"reference_id": reference_id, "subscription": subscription, "by": by, "why": why}
        return self._send(task, record | details | _decided(decided_at))

    def _send(self, task: str, record: Mapping[str, Any]) -> Sent:
        result = self._app.send_task(
            task,
            args=[record],
            queue=QUEUE,
            ignore_result=not self._wants_answers,
            argsrepr="(a record)",  # Celery would log the arguments, with the card token.
        )
        return Sent(str(result.id), self._answers.AsyncResult(result.id))


def _scope(scope: Scope | None) -> dict[str, Any]:
    """Return the key only if it is given: a worker of an older version does not know it."""
    return {} if scope is None else {"scope": scope}


def _decided(at: datetime | None) -> dict[str, Any]:
    """Return the key only if it is given: a worker of an older version does not know it."""
    return {} if at is None else {"decided_at": _instant(at)}


def _instant(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    if moment.utcoffset() is None:
        raise ValueError(f"{moment!r} needs a time zone")
    return moment.isoformat()
