"""What keeps books safe that have forgotten something, share an account, or hear late or by a wrong
clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from billing_worker.domain import dunning
from billing_worker.domain import statement as evidence
from billing_worker.domain.outcome import distance
from billing_worker.gateway import answer_bodies
from billing_worker.persistence import postgres
from billing_worker.persistence.switches import Switches
from billing_worker.services.attempts import submit
from billing_worker.services.attempts.claim import Claimed
from billing_worker.services.charging import charge
from billing_worker.services.guards import lost_memory, refusals
from billing_worker.services.invoicing import decided_at, renew
from tests.faults import stories
from tests.faults.boundaries import HOUR, Acts
from tests.faults.disabling import Disable, altered, both, swapped
from tests.faults.disasters import AnotherOrders, Behaves, GoesBack, IsBackedUp
from tests.faults.safeguards_of_a_charge import CREATE, PENDING, SALE
from tests.faults.scenarios import BREAKS, FINALS, scenario
from tests.faults.trials import Safeguard, Story, Trial

# --- books that have forgotten ---------------------------------------------------------------------

KEPT = IsBackedUp()
GOES_BACK = GoesBack(with_the_record=False)
GOES_BACK_WITH_THE_RECORD = GoesBack(with_the_record=True)
MARKED_RESTORED = Acts(
    "somebody notices that the books have forgotten something",
    "INSERT INTO switches (name, is_on, by, changed_at) "
    "SELECT 'restored', true, 'another worker', created_at FROM invoices",
)

FORGOT_ITS_SALE = Trial(
    PENDING, ((KEPT, "commit#1 of claim: after"), (GOES_BACK, f"{SALE}: after"))
)
FORGOT_ITS_SALE_AND_THE_RECORD = Trial(
    PENDING, ((KEPT, "commit#1 of claim: after"), (GOES_BACK_WITH_THE_RECORD, f"{SALE}: after"))
)
FORGOT_ITS_CHARGE = Trial(
    PENDING, ((KEPT, "commit#2 of renew: after"), (GOES_BACK, f"{SALE}: after"))
)
FORGOT_ITS_CHARGE_AND_THE_RECORD = Trial(
    PENDING, ((KEPT, "commit#2 of renew: after"), (GOES_BACK_WITH_THE_RECORD, f"{SALE}: after"))
)
NOTICED_IN_BETWEEN = Trial(
    PENDING,
    (
        *FORGOT_ITS_CHARGE_AND_THE_RECORD.faults,
        (MARKED_RESTORED, "POST /api/payment-invoices #2: before"),
    ),
)
FORGOT_AND_THE_GATEWAY_ANSWERS_WITH_WHAT_IT_HAS = Trial(
    replace(PENDING, behaviour=replace(PENDING.behaviour, duplicate_create="return_existing")),
    FORGOT_ITS_CHARGE_AND_THE_RECORD.faults,
)
FORGOT_AND_THE_GATEWAY_REFUSES_A_SECOND = Trial(
    replace(PENDING, behaviour=replace(PENDING.behaviour, duplicate_create="409")),
    FORGOT_ITS_CHARGE_AND_THE_RECORD.faults,
)
CANCELLED_BEFORE = Story(
    "a cancellation is forgotten, and the books wait for it",
    partial(stories.forgets_a_cancellation, waits=True),
)
CANCELLED_BEFORE_WITHOUT_A_WAIT = Story(
    "a cancellation is forgotten, and the books do not wait for it",
    partial(stories.forgets_a_cancellation, waits=False),
)
WITHDRAWN_BEFORE = Story(
    "it is forgotten that a cancellation was withdrawn",
    stories.forgets_that_a_cancellation_was_withdrawn,
)

_MAY_BE_FORGOTTEN_UNSEEN = altered(
    Switches.may_be_forgotten, (r"if self\.restored_at is None", "if True")
)
_NOTICED_UNSEEN = altered(
    submit.submit_all,
    (r"or request\.claimed\.restored_at != switched\.restored_at", "or False"),
)

# --- accounts that are shared ----------------------------------------------------------------------

ANOTHER_BOOKS = Trial(
    scenario("approved", "person", "0", horizon=2 * HOUR),
    (
        (
            AnotherOrders("sub-1-p0-a1", book="thebookofanother", customer="customer-of-sub-1"),
            "commit#1 of claim: after",
        ),
        (BREAKS, f"{CREATE}: before effect"),
    ),
)
ANOTHER_CUSTOMERS = Trial(
    scenario("approved", "person", "0", horizon=2 * HOUR),
    (
        (AnotherOrders("sub-1-p0-a1", book=None, customer="alice"), "commit#1 of claim: after"),
        (BREAKS, f"{CREATE}: before effect"),
    ),
)

PAID_AND_NOT_IN_THE_LIST = Trial(
    scenario("approved", list_filter="ignored", horizon=HOUR),
    (
        (KEPT, "commit#2 of renew: after"),
        (AnotherOrders("other-1", book=None, customer="alice", number=20), f"{SALE}: after"),
        (GOES_BACK, "begin#1 of settle: before"),
        (Behaves(list_filter="exact"), "GET /api/payment-invoices #1: after"),
    ),
)


def _unread(name: str) -> Disable:
    """Whoever the invoice names: it is not compared."""
    return altered(evidence.foreign, (rf'\("{name}", .*\),', ""))


_OTHERS, _NEXT, _FULL = (r"any\(invoice", r"_object\(", r"len\(found\)")


def _believed(*against: str) -> Disable:
    """A list is believed although this speaks against it: what else it holds is left out."""
    return both(
        altered(
            answer_bodies._why_incomplete, *((rf"if {why}.*:", "if False:") for why in against)
        ),
        altered(
            answer_bodies.invoices_of,
            (r"sorted\(found,", "sorted([i for i in found if i['reference_id'] == reference_id],"),
        ),
    )


# --- answers that come late -------------------------------------------------------------------------

FLIPS = Story(
    "a decline flips after another card was given",
    stories.replaces_the_card_of_a_decline_that_flips,
)
EXPIRES = scenario("answer_lost_before", "person", "0")


# --- a mode, and a clock -----------------------------------------------------------------------------

LIVE = Acts("these are live books", "UPDATE book SET test_mode = false")
IN_ANOTHER_MODE = scenario("approved", "dated", "0", horizon=2 * HOUR)
LIVE_FROM_THE_BEGINNING = Trial(IN_ANOTHER_MODE, ((LIVE, "publish charge: before"),))
LIVE_SINCE_THE_CLAIM = Trial(IN_ANOTHER_MODE, ((LIVE, f"{CREATE}: after effect"),))


OF_BOOKS: Sequence[Safeguard] = (
    Safeguard(
        "the record outside of the database is compared",
        altered(lost_memory._contradicted, (r"if missing is not None", "if False")),
        (FORGOT_ITS_SALE,),
    ),
    Safeguard(
        "what is found pending is proven unsold before it is sold",
        altered(Claimed.is_proven_unsold.fget, (r"return self.*", "return True")),
        (FORGOT_ITS_SALE_AND_THE_RECORD,),
    ),
    Safeguard(
        "a record that was begun after a period proves nothing of it",
        altered(lost_memory.has_forgotten_nothing_since, (r"record\.begun_at <= since", "True")),
        (FORGOT_ITS_SALE_AND_THE_RECORD,),
    ),
    Safeguard(
        "books that have forgotten look before they create",
        _MAY_BE_FORGOTTEN_UNSEEN,
        (FORGOT_ITS_CHARGE,),
    ),
    Safeguard(
        "what was claimed before a loss was noticed is not submitted",
        _NOTICED_UNSEEN,
        (NOTICED_IN_BETWEEN,),
    ),
    Safeguard(
        "an answer to a create that shows an older create's invoice is seen",
        altered(
            evidence.is_of_another_create, (r"return answered\.create != create", "return False")
        ),
        (FORGOT_AND_THE_GATEWAY_ANSWERS_WITH_WHAT_IT_HAS,),
    ),
    Safeguard(
        "an invoice that is found after a refused create is an older create's",
        altered(
            charge._after_failed_create,
            (r"found\.made_by\.count\(order\.create\)", "found.count"),
        ),
        (FORGOT_AND_THE_GATEWAY_REFUSES_A_SECOND,),
    ),
    Safeguard(
        "a decision that is said again counts from when it was made",
        altered(decided_at.decided_when, (r"at = not_in_the_future\(.*", "at = now")),
        (CANCELLED_BEFORE,),
    ),
    Safeguard(
        "nothing becomes due while books wait for decisions",
        altered(
            renew._renew_batch, (r"if switches\.waits_for_decisions\(connection\)", "if False")
        ),
        (WITHDRAWN_BEFORE,),
    ),
    Safeguard(
        "a decision that is said again takes back what became due after it",
        altered(decided_at.take_back, (r"if at >= moment\.now", "if True")),
        (CANCELLED_BEFORE_WITHOUT_A_WAIT,),
    ),
    Safeguard(
        "the book of a found invoice is compared",
        _unread("book"),
        (ANOTHER_BOOKS,),
    ),
    Safeguard(
        "the customer of a found invoice is compared",
        _unread("customer"),
        (ANOTHER_CUSTOMERS,),
    ),
    Safeguard(
        "a list that holds other references is no answer",
        _believed(_OTHERS),
        (PAID_AND_NOT_IN_THE_LIST,),
        covered_by="the link to the next page",
    ),
    Safeguard(
        "a list that goes on on another page is no answer",
        _believed(_NEXT),
        (PAID_AND_NOT_IN_THE_LIST,),
        covered_by="the other references in it",
    ),
    Safeguard(
        "a list that may be cut off is no answer",
        _believed(_FULL),
        (PAID_AND_NOT_IN_THE_LIST,),
        covered_by="the other references in it",
    ),
    Safeguard(
        "a list that cannot be believed is no answer",
        _believed(_OTHERS, _NEXT, _FULL),
        (PAID_AND_NOT_IN_THE_LIST,),
    ),
    Safeguard(
        "after `expired` the next attempt waits for late money",
        both(
            altered(dunning.after_expired, (r"since \+ timings\.expired_retry", "since")),
            altered(
                distance._not_before,
                (r"\(expired_at or ended_at\) \+ timings\.expired_retry", "None"),
            ),
        ),
        (Trial(FINALS[3]),),
    ),
    Safeguard(
        "after a second `expired` a person decides",
        altered(dunning.after_expired, (r"if again", "if False")),
        (Trial(replace(EXPIRES, horizon=3 * HOUR)),),
    ),
    Safeguard(
        "a decline stands for minutes before another card is charged",
        altered(distance._not_before, (r"if declined and", "if False and")),
        (FLIPS,),
    ),
    Safeguard(
        "a book has one mode",
        altered(refusals.other_mode, (r"if booked is None or booked == test_mode", "if True")),
        (LIVE_FROM_THE_BEGINNING,),
    ),
    Safeguard(
        "the mode is compared once more when a sale is submitted",
        altered(lost_memory.stands_against_submitting, (r"if refused is not None", "if False")),
        (LIVE_SINCE_THE_CLAIM,),
    ),
    Safeguard(
        "the clock is compared",
        altered(refusals.wrong_clock, (r"if abs\(ahead\) <= CLOCK_MAY_DIFFER", "if True")),
        (Story("the clock is set days ahead", stories.sets_the_clock_days_ahead),),
    ),
)

ON_POSTGRESQL: Sequence[Safeguard] = (
    Safeguard(
        "every transaction pins its isolation",
        swapped(
            postgres, "_BEGIN", postgres._BEGIN.replace(b" ISOLATION LEVEL READ COMMITTED", b"")
        ),
        (
            Story(
                "sales are stopped while a charge is submitted",
                stories.stops_sales_while_a_charge_is_submitted,
            ),
        ),
    ),
)
