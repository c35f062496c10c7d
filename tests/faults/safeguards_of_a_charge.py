"""What keeps one charge from being made twice, lost, or called failed while it is unknown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import requests
from sqlalchemy import bindparam, update
from urllib3.util import Retry

from billing_worker.domain import statement as evidence
from billing_worker.domain.outcome import NothingSent, attempt_changes, unpaid
from billing_worker.domain.secret import Secret
from billing_worker.gateway import http, paycore
from billing_worker.persistence import attempts as attempt_rows
from billing_worker.persistence import claims
from billing_worker.persistence.schema.tables import attempts
from billing_worker.persistence.vault import FernetVault
from billing_worker.services import doorbell
from billing_worker.services.attempts import claim as claiming
from billing_worker.services.attempts import settle, submit
from billing_worker.services.charging import charge, previous_attempts, reconcile
from tests.faults.boundaries import HOUR, MINUTE, Acts, Scenario, Sleeps
from tests.faults.disabling import Disable, altered, both, swapped, without
from tests.faults.scenarios import BREAKS, DIES, FINALS, LIES, scenario
from tests.faults.trials import Safeguard, Trial

CREATE = "POST /api/payment-invoices #1"
CREATE_AGAIN = "POST /api/payment-invoices #2"
SALE = "POST /payment/sale #1"
POLL = "GET /api/payment-invoices/{id} #1"
NAP = Sleeps(2 * MINUTE)  # past the lease
BLINK = Sleeps(timedelta(seconds=6))  # past the sale gate
DAY_OFF = Sleeps(3 * HOUR)

APPROVED = scenario("approved")
PENDING = scenario("approved_later", name="approved_later, still pending", later_seconds=300)
UNHEARD = scenario("answer_lost_after")
TWINS_REFUSED = scenario("approved", duplicate_create="422")
ANY_FATE = frozenset({"paid", "person", "dated", "waived"})


def _acted_on(story: Scenario) -> Scenario:
    return replace(story, fates=ANY_FATE, debits=frozenset({0, 1}), horizon=30 * MINUTE)


CANCEL = Acts(
    "an operator cancels",
    "UPDATE subscriptions SET status = 'cancelled', next_billing_at = NULL",
)
SWITCH_OFF = Acts("an operator stops sales", "UPDATE switches SET is_on = false")
FORGET = Acts(
    "a backup of before the create is restored, and what it has prepared is given up",
    "UPDATE attempts SET status = 'not_charged', outcome = 'overdue', gateway_id = NULL, "
    "bearer = NULL, next_poll_at = NULL, lease_until = NULL",
    "UPDATE invoices SET next_attempt_at = created_at, enqueue_at = created_at",
)
VOID = Acts(
    "an operator waives the invoice",
    "UPDATE invoices SET status = 'void', reason = 'waived', next_attempt_at = NULL, "
    "enqueue_at = NULL",
)
WRONG = {field: scenario(f"wrong_{field}", "person", "0", horizon=2 * HOUR) for field in
         ("amount", "currency", "payment_amount", "test_mode", "reference")}  # fmt: skip

SLEPT_WHILE_CREATING = Trial(PENDING, ((NAP, f"{CREATE}: after effect"),))
SLEPT_BEFORE_ARMING = Trial(PENDING, ((NAP, "begin#1 of submit: before"),))
LOST_ITS_CLAIM = Trial(
    TWINS_REFUSED,
    ((NAP, f"{CREATE}: before effect"), (DIES, f"{CREATE_AGAIN}: after effect")),
)


def _by_id_alone(statement: Any) -> Any:
    """The same UPDATE without its conditions."""
    blind = statement._clone()
    blind._where_criteria = statement._where_criteria[:1]
    return blind


_REFUSED_UNSEEN = altered(
    charge._after_failed_create, (r"found = by_reference\(.*\)", "found = None")
)
"""A refused create is taken at its word."""

_IS_OURS = altered(submit._is_ours, (r"return \(stored.*", "return True"))
_NOT_POLLED_UP = altered(
    claiming.Claimed.create_may_have_been_sent.fget, (r"return self.*", "return False")
)
_OUTDATED_HEARD = swapped(settle, "_is_outdated", lambda _case, _request: False)
_HOLDS_IGNORED = swapped(submit, "_held", lambda _case: None)
_SUBMIT_BLINDLY = swapped(attempt_rows, "_SUBMIT", _by_id_alone(attempt_rows._SUBMIT))

_FENCE_STANDS_STILL = both(
    swapped(
        claims,
        "_TAKE_OVER",
        update(attempts)
        .where(*claims._TAKE_OVER._where_criteria)
        .values(claims=attempts.c.claims + 1, lease_until=bindparam("new_lease_until")),
    ),
    altered(claims.take_over, (r"fence=a\.fence \+ 1", "fence=a.fence")),
)

_LIVE_ATTEMPT_UNSEEN = altered(
    claiming._claim_page,
    (r"item for item in due if item\.live is None", "item for item in due if True"),
    (r"item for item in free if item\.live is None", "item for item in free if True"),
)
_TWO_LIVE = without("DROP INDEX uq_attempts_one_live")


def _unchecked(*fields: str) -> Disable:
    changes = [(rf'"{field}": expected\.[a-z_.]+,', "") for field in fields]
    return altered(evidence.mismatch, *changes)


_VOID_UNSEEN = altered(submit._obstacle, (r"if case\.invoice\.status not in [^:]+:", "if False:"))
_VOID_OVERWRITTEN = swapped(attempt_rows, "_IN_FLIGHT", _by_id_alone(attempt_rows._IN_FLIGHT))

_PART_IS_PAID = swapped(evidence, "PAID_STATUSES", evidence.PAID_STATUSES | {"partially_processed"})
_ANY_SUM_IS_PAID = altered(evidence._judge_paid, (r"if processed is not None", "if False"))


def _retrying_session(tls: Any) -> requests.Session:
    session = _new_session(tls)
    for adapter in session.adapters.values():
        adapter.max_retries = Retry(total=2, allowed_methods=None, backoff_factor=0)
    return session


_new_session = http._new_session

_AND_SELL_ANYHOW = """try:
        submitted = submit(ports, request)
    except CommitUnknown:
        submitted = Submitted(ports.clock.monotonic())"""
_SELL_AGAIN = """try:
            answer = ports.gateway.sale(request.bearer, session.calls)
        except OutcomeUnknown:
            answer = ports.gateway.sale(request.bearer, session.calls)"""

OF_A_CHARGE: Sequence[Safeguard] = (
    Safeguard(
        "`submitted` is committed before the sale",
        altered(
            charge.charge,
            (
                r"submitted = submit\(ports, request\)",
                "ports.gateway.sale(request.bearer, session.calls)\n    submitted = submit(ports, request)",
            ),
            (
                r"return _sell\(session\.apart\(\), request, submitted, asked_at, may_poll=may_poll\)",
                "return _settle(session, NoAnswer('sold'))",
            ),
        ),
        (Trial(PENDING, ((DIES, f"{SALE}: after effect"),)),),
    ),
    Safeguard(
        "a commit that raised is not followed by a sale",
        altered(
            charge.charge,
            (
                r"submitted = submit\(ports, request\)",
                _AND_SELL_ANYHOW,
            ),
        ),
        (Trial(PENDING, ((BREAKS, "commit#1 of submit: before"),)),),
    ),
    Safeguard(
        "the sale is sent once",
        altered(
            charge._sell,
            (
                r"answer = ports\.gateway\.sale\(request\.bearer, session\.calls\)",
                _SELL_AGAIN,
            ),
        ),
        (Trial(UNHEARD),),
    ),
    Safeguard(
        "the HTTP client never repeats a request",
        swapped(http, "_new_session", _retrying_session),
        (Trial(UNHEARD, on_the_wire=True),),
    ),
    Safeguard(
        "not sent only when it is proven",
        altered(http._proof_of_not_sent, (r"case _:\n\s+return None", "case _:\n            return 'lost'")),
        (Trial(UNHEARD, on_the_wire=True),),
    ),
    Safeguard(
        "arming checks that the claim is still ours",
        _IS_OURS,
        (SLEPT_BEFORE_ARMING,),
        covered_by="the conditional UPDATE of the same transaction",
    ),
    Safeguard(
        "`submitted` is written by compare-and-set",
        _SUBMIT_BLINDLY,
        (SLEPT_BEFORE_ARMING,),
        covered_by="the check of the locked row",
    ),
    Safeguard(
        "arming checks the claim, compare-and-set, and the hold",
        both(_IS_OURS, _SUBMIT_BLINDLY, _HOLDS_IGNORED),
        (SLEPT_BEFORE_ARMING,),
    ),
    Safeguard(
        "a lease is renewed only by its own claim",
        altered(claims.renew, (r"if ours\.rowcount != 1:", "if False:")),
        (SLEPT_WHILE_CREATING,),
        covered_by="the check of arming",
    ),
    Safeguard(
        "the fence grows with every claim, and after a refused create is a look-up",
        both(_FENCE_STANDS_STILL, _REFUSED_UNSEEN),
        (SLEPT_BEFORE_ARMING, LOST_ITS_CLAIM),
    ),
    Safeguard(
        "news of a lost claim is dropped",
        _OUTDATED_HEARD,
        (LOST_ITS_CLAIM,),
        covered_by="the look-up after a refused create",
    ),
    Safeguard(
        "news of a lost claim is dropped, and after a refused create is a look-up",
        both(_OUTDATED_HEARD, _REFUSED_UNSEEN),
        (LOST_ITS_CLAIM,),
    ),
    Safeguard(
        "a claim passes over an invoice with a live attempt",
        _LIVE_ATTEMPT_UNSEEN,
        (SLEPT_BEFORE_ARMING,),
        covered_by="the unique index",
    ),
    Safeguard(
        "unique index: one live attempt",
        _TWO_LIVE,
        (SLEPT_BEFORE_ARMING,),
        covered_by="the claim, which reads under the invoice's lock",
    ),
    Safeguard(
        "one live attempt, by the claim, by the index and by the hold",
        both(_LIVE_ATTEMPT_UNSEEN, _TWO_LIVE, _HOLDS_IGNORED),
        (SLEPT_BEFORE_ARMING,),
    ),
    Safeguard(
        "look up before re-create",
        _NOT_POLLED_UP,
        (Trial(TWINS_REFUSED, ((DIES, f"{CREATE}: after effect"),)),),
        covered_by="the look-up after a refused create",
    ),
    Safeguard(
        "look up before re-create, or after it",
        both(_NOT_POLLED_UP, _REFUSED_UNSEEN),
        (Trial(TWINS_REFUSED, ((DIES, f"{CREATE}: after effect"),)),),
    ),
    Safeguard(
        "a sale without an answer stays unknown",
        altered(charge._sell, (r"NoAnswer\(f\"sale: ", 'NothingSent(f"sale: ')),
        (Trial(UNHEARD), Trial(PENDING, ((BREAKS, f"{SALE}: after effect"),))),
    ),
    Safeguard(
        "a refused sale stays unknown",
        altered(charge._sell, (r"except NotSent as", "except (NotSent, Refused) as")),
        (Trial(APPROVED, ((LIES, f"{SALE}: after effect"),)),),
    ),
    Safeguard(
        "a look without an answer proves nothing",
        altered(
            reconcile.poll,
            (r"NoAnswer\(error\.reason\)", "NothingSent(error.reason)"),
            names={"NothingSent": NothingSent},
        ),
        (Trial(UNHEARD, ((BREAKS, f"{POLL}: before effect"),)),),
    ),
    Safeguard(
        "the amount is compared",
        _unchecked("amount"),
        (Trial(WRONG["amount"]),),
        covered_by="the payment amount, which differs as well",
    ),
    Safeguard("the payment amount is compared", _unchecked("payment_amount"),
              (Trial(WRONG["payment_amount"]),)),
    Safeguard("amount and payment amount are compared", _unchecked("amount", "payment_amount"),
              (Trial(WRONG["amount"]),)),
    Safeguard("the currency is compared", _unchecked("currency"), (Trial(WRONG["currency"]),)),
    Safeguard("the test mode is compared", _unchecked("test_mode"), (Trial(WRONG["test_mode"]),)),
    Safeguard("the reference is compared", _unchecked("reference_id"),
              (Trial(WRONG["reference"]),)),
    Safeguard(
        "a partial payment is no payment, by its status",
        _PART_IS_PAID,
        (Trial(FINALS[4]),),
        covered_by="the processed amount",
    ),
    Safeguard(
        "a partial payment is no payment, by status and amount",
        both(_PART_IS_PAID, _ANY_SUM_IS_PAID),
        (Trial(FINALS[4]),),
    ),
    Safeguard(
        "an expired invoice counts as unpaid only after a grace",
        altered(unpaid._unpaid_final, (r"since \+ context\.timings\.expiry_grace", "since")),
        (Trial(FINALS[2]),),
    ),
    Safeguard(
        "earlier attempts are asked before a new one",
        altered(charge._earlier_attempts_may_pay, (r"claimed\.earlier", "()")),
        (Trial(FINALS[3]),),
    ),
    Safeguard(
        "an earlier attempt without an id is looked for by its reference",
        altered(previous_attempts._heard, (r"found = by_reference\(.*\)", "found = None")),
        (Trial(APPROVED, ((DIES, f"{SALE}: after effect"), (FORGET, "commit#4 of renew: after"))),),
    ),
    Safeguard(
        "what ended unpaid is asked about again",
        swapped(attempt_changes, "_first_recheck", lambda _attempt, _now: None),
        (Trial(replace(FINALS[1], horizon=2 * HOUR)),),
    ),
    Safeguard(
        "the sale follows its commit within seconds",
        altered(charge._sell, (r"if ports\.clock\.monotonic\(\) - [^:]+:", "if ports.clock.monotonic() < 0:")),
        (
            Trial(scenario("approved", sale_on_final="charge"),
                  ((DAY_OFF, "monotonic of charge"),)),
            Trial(_acted_on(APPROVED), ((BLINK, "monotonic of charge"),)),
        ),
    ),
    Safeguard(
        "arming reads whether the subscription is cancelled",
        altered(submit._obstacle, (r"if case\.subscription\.status not in [^:]+:", "if False:")),
        (Trial(_acted_on(APPROVED), ((CANCEL, f"{CREATE}: after effect"),)),),
    ),
    Safeguard(
        "arming reads the kill switch",
        altered(submit._obstacle, (r"if off is not None", "if False")),
        (Trial(_acted_on(APPROVED), ((SWITCH_OFF, f"{CREATE}: after effect"),)),),
    ),
    Safeguard(
        "arming reads whether the invoice is waived",
        _VOID_UNSEEN,
        (Trial(_acted_on(APPROVED), ((VOID, f"{CREATE}: after effect"),)),),
    ),
    Safeguard(
        "arming updates no invoice that is waived",
        _VOID_OVERWRITTEN,
        (Trial(_acted_on(APPROVED), ((VOID, f"{CREATE}: after effect"),)),),
        covered_by="the check of the locked row",
    ),
    Safeguard(
        "arming sells no invoice that is waived, by check and UPDATE",
        both(_VOID_UNSEEN, _VOID_OVERWRITTEN),
        (Trial(_acted_on(APPROVED), ((VOID, f"{CREATE}: after effect"),)),),
    ),
    Safeguard(
        "the sweep rings again for what a lost message was about",
        altered(doorbell.ring_due, (r"return _sweep.*", "return 0")),
        (Trial(replace(APPROVED, horizon=5 * MINUTE), ((BREAKS, "publish charge: before"),)),),
    ),
    Safeguard(
        "the sweep asks about what was submitted",
        altered(doorbell.poll_due, (r"return _sweep.*", "return 0")),
        (Trial(replace(UNHEARD, horizon=5 * MINUTE)),),
    ),
    Safeguard(
        "card tokens and bearers are encrypted at rest",
        both(
            swapped(FernetVault, "lock", lambda _, secret, __: secret.reveal().encode()),
            swapped(FernetVault, "unlock", lambda _, locked, __: Secret(bytes(locked).decode())),
        ),
        (Trial(UNHEARD, ()), Trial(APPROVED)),
    ),
    Safeguard(
        "requests are redacted in the history",
        swapped(paycore, "redact_body", lambda body, _: json.loads(json.dumps(body, default=str))),
        (Trial(APPROVED),),
    ),
    Safeguard(
        "answers are redacted in the history",
        swapped(paycore, "excerpt", lambda body, _: body.decode()),
        (Trial(APPROVED),),
    ),
    Safeguard(
        "history is append-only",
        without("DROP TRIGGER events_no_update", "DROP TRIGGER events_no_delete"),
        (Trial(APPROVED),),
    ),
)  # fmt: skip
