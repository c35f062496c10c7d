"""The tables, with the domain's rules as constraints.

The code already keeps these rules; a constraint is the second guard, and says which promise it
keeps. The migrations create the same tables; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

from billing_worker.persistence.schema import outgoing  # noqa: F401 - so that `metadata` knows them all
from billing_worker.persistence.schema.columns import Instant, Json, Key, metadata, one_of


def _reference(**options: Any) -> Column[str]:
    return Column("reference_id", String(160), nullable=False, **options)


customers = Table(
    "customers",
    metadata,
    Column("id", Key, primary_key=True),
    _reference(unique=True),
    Column("name", Text),
    Column("email", Text),
    Column("created_at", Instant, nullable=False),
)

cards = Table(
    "cards",
    metadata,
    Column("id", Key, primary_key=True),
    Column("customer_id", ForeignKey("customers.id"), nullable=False, index=True),
    Column("token", LargeBinary, nullable=False),  # encrypted by the vault
    Column("mask", String(32)),
    Column("brand", String(32)),
    Column("expiry_month", Integer),
    Column("expiry_year", Integer),
    Column("holder", Text),
    Column("issuer_name", Text),
    Column("issuer_country", String(8)),
    Column("created_at", Instant, nullable=False),
    # Of the token. Equal ones share retry limits. None: older than fingerprints.
    Column("fingerprint", String(64), index=True),
    Column("declined_at", Instant),  # the last decline of an equal card
    Column("unusable_reason", Text),  # after a hard decline: it is never charged again
    Column("backup_since", Instant),  # consent to charge it when the default card is dead
    Column("backup_consent", Text),  # who recorded the consent, and its source
    Column("default_since", Instant),  # since when it is the customer's default card
    Column("warned_days", Integer),  # the last warning before its expiry
    Index("ix_cards_expiry", "expiry_year", "expiry_month"),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", Key, primary_key=True),
    _reference(unique=True),
    Column("customer_id", ForeignKey("customers.id"), nullable=False, index=True),
    Column("card_id", ForeignKey("cards.id")),
    Column("status", String(16), nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("interval", String(8), nullable=False),
    Column("interval_count", Integer, nullable=False),
    Column("anchor_at", Instant, nullable=False),
    Column("timezone", String(64), nullable=False),
    Column("billing_day", Integer),  # of the month, where the anchor is on a cut month's end
    Column("ends_after_periods", Integer),
    Column("next_period", Integer, nullable=False),
    Column("next_billing_at", Instant),
    Column("description", Text),
    Column("metadata", Json, nullable=False),
    Column("record_digest", String(64), nullable=False),  # of the record: same or conflict
    Column("created_at", Instant, nullable=False),
    Column("kind", String(16), nullable=False, server_default="recurring"),
    Column("held", Boolean, nullable=False, server_default=false()),  # imported, not yet activated
    Column("trial_end", Instant),  # as imported; the anchor of its periods
    Column("paid_through", Instant),  # as imported
    Column("series_start", Integer, nullable=False, server_default="0"),  # number at the anchor
    Column("paused_at", Instant),
    Column("resumes_at", Instant),  # the pause ends by itself
    Column("resumes_shifted", Boolean, nullable=False, server_default=false()),
    Column("paused_from", String(16)),  # the status after the pause
    Column("cancels_at", Instant),  # from then on no period becomes due: the agreement is cancelled
    Column("catch_up", String(24), nullable=False, server_default="collect_latest"),
    Column("catch_up_days", Integer),
    Column("dunning_policy", String(32)),  # a name in domain/dunning.py; None: the default
    Column("ends_at", Instant),  # no period that begins then or later becomes due
    Column("new_amount_minor", BigInteger),  # agreed for later
    Column("new_amount_from", Instant),  # for periods that begin then or later
    Column("notices", String(16)),  # a policy of domain/outgoing/notice.py; None: the default
    Column("trouble", Text),  # why the sweep cannot plan it; reported once
    Column("plan_again_at", Instant),  # when the sweep tries again, after trouble
    Column("handed_over_at", Instant),  # another book bills it since then; open invoices stay here
    Column("taken_back_at", Instant),  # until then another book may have billed it
    Column("from_book", String(32)),  # identity of the former book
    Column("from_prefix", String(16)),  # prefix of its references at the gateway, there and here
    one_of("catch_up", "collect_latest", "collect_all", "forgive_older_than", "hold"),
    CheckConstraint(
        "(catch_up IN ('collect_all', 'forgive_older_than')) = (catch_up_days IS NOT NULL)",
        name="catch_up_days_where_needed",
    ),
    CheckConstraint("paused_at IS NULL OR status = 'paused'", name="paused_at_while_paused"),
    one_of(
        "status",
        "trialing",
        "active",
        "past_due",
        "suspended",
        "paused",
        "cancelled",
        "ended",
    ),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
    CheckConstraint("new_amount_minor > 0", name="new_amount_positive"),
    CheckConstraint(
        "(new_amount_minor IS NULL) = (new_amount_from IS NULL)", name="new_amount_has_a_date"
    ),
    CheckConstraint("interval_count > 0", name="interval_positive"),
    # A subscription that must not be billed must not be found by the sweep.
    CheckConstraint(
        "next_billing_at IS NULL OR status IN ('trialing', 'active', 'past_due')",
        name="billed_only_while_billable",
    ),
    CheckConstraint("NOT held OR next_billing_at IS NULL", name="held_is_not_billed"),
    # Two books must not bill one period.
    CheckConstraint(
        "handed_over_at IS NULL OR next_billing_at IS NULL", name="handed_over_is_not_billed"
    ),
    # Activation guard: a period that another system has collected is not collected again.
    CheckConstraint(
        "next_billing_at IS NULL OR paid_through IS NULL OR next_billing_at >= paid_through",
        name="nothing_due_before_paid_through",
    ),
    one_of("kind", "recurring", "one_off"),
    CheckConstraint("kind = 'recurring' OR ends_after_periods = 1", name="one_off_is_one_period"),
    Index(
        "ix_subscriptions_due",
        "next_billing_at",
        postgresql_where=text("next_billing_at IS NOT NULL"),
        sqlite_where=text("next_billing_at IS NOT NULL"),
    ),
    Index(
        "ix_subscriptions_resuming",
        "resumes_at",
        postgresql_where=text("resumes_at IS NOT NULL"),
        sqlite_where=text("resumes_at IS NOT NULL"),
    ),
    # No period becomes due while it is suspended, but a cancellation still takes effect.
    Index(
        "ix_subscriptions_leaving",
        "cancels_at",
        postgresql_where=text("status = 'suspended' AND cancels_at IS NOT NULL"),
        sqlite_where=text("status = 'suspended' AND cancels_at IS NOT NULL"),
    ),
)

notices = Table(
    "notices",
    metadata,
    # What was last told to the customer of the charge for a period, before it.
    Column("subscription_id", ForeignKey("subscriptions.id"), primary_key=True),
    Column("period_number", Integer, primary_key=True, autoincrement=False),
    Column("period_start", Instant, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("edition", Integer, nullable=False),  # grows with another amount or date
    Column("told_at", Instant),  # None: accepted before it was told
    Column("accepted_at", Instant),
    Column("accepted_by", Text),
    CheckConstraint("(accepted_at IS NULL) = (accepted_by IS NULL)", name="accepted_by_somebody"),
)

invoices = Table(
    "invoices",
    metadata,
    Column("id", Key, primary_key=True),
    _reference(unique=True),
    Column("subscription_id", ForeignKey("subscriptions.id"), nullable=False),
    Column("period_number", Integer, nullable=False),
    Column("period_start", Instant, nullable=False),
    Column("period_end", Instant, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text),
    Column("next_attempt_at", Instant),
    Column("enqueue_at", Instant),
    Column("not_charged_count", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("paid_at", Instant),
    Column("description", Text),  # as agreed when the period became due
    Column("paused_attempt_at", Instant),  # the date of the next step, kept during a pause
    Column("next_origin", String(16), nullable=False, server_default="scheduled"),
    Column("first_declined_at", Instant),
    Column("give_up_at", Instant),  # how long the customer is waited for
    # Ordered while it was in flight: it is void as soon as that has ended unpaid.
    Column("void_if_unpaid", Boolean, nullable=False, server_default=false()),
    # A period is (subscription, number): any number of sweeps opens it once.
    UniqueConstraint("subscription_id", "period_number"),
    one_of("status", "open", "paid", "uncollectible", "void"),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
    CheckConstraint("(status = 'paid') = (paid_at IS NOT NULL)", name="paid_has_a_time"),
    # Workers are woken only for open invoices.
    CheckConstraint("enqueue_at IS NULL OR status = 'open'", name="rung_only_while_open"),
    CheckConstraint("give_up_at IS NULL OR status = 'open'", name="patience_only_while_open"),
    Index(
        "ix_invoices_give_up",
        "give_up_at",
        postgresql_where=text("give_up_at IS NOT NULL"),
        sqlite_where=text("give_up_at IS NOT NULL"),
    ),
    Index(
        "ix_invoices_ring",
        "enqueue_at",
        postgresql_where=text("enqueue_at IS NOT NULL"),
        sqlite_where=text("enqueue_at IS NOT NULL"),
    ),
)

_LIVE = text("status IN ('prepared', 'submitted')")
_SUCCEEDED = text("status = 'succeeded'")
_SURPLUS = text("status = 'surplus'")
_UNDECIDED = text("undecided_since IS NOT NULL")
_TO_POLL = text("next_poll_at IS NOT NULL")
_HAS_PAGE = text("page_digest IS NOT NULL")
_COUNTED = text("status IN ('prepared', 'submitted', 'declined')")

attempts = Table(
    "attempts",
    metadata,
    Column("id", Key, primary_key=True),
    _reference(unique=True),
    Column("invoice_id", ForeignKey("invoices.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("card_id", ForeignKey("cards.id")),  # None: the customer enters a card on a page
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("test_mode", Boolean, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("claims", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("lease_until", Instant),
    Column("gateway_id", String(128), unique=True),
    Column("bearer", LargeBinary),  # encrypted; kept only while the sale is unexplained
    Column("page", LargeBinary),  # encrypted; the pay page, kept only while it is open
    Column("page_digest", String(64)),  # of the random name that leads there
    Column("submitted_at", Instant),
    Column("settled_at", Instant),
    Column("next_poll_at", Instant),
    Column("rechecks", Integer, nullable=False),
    Column("unpaid_since", Instant),
    Column("sale_status", Text),
    Column("sale_resolution", Text),
    Column("outcome", Text),
    Column("original_code", Text),  # the acquirer's own code, if the gateway passes it on
    Column("heard_at", Instant),  # when the gateway gave the answer that is stored
    Column("undecided_since", Instant),  # when the gateway took its final answer back
    Column("resolved_at", Instant),  # when a named person resolved it
    Column("resolved_over", Text),  # what the gateway said at that time
    # Prepared, and found at the gateway by books that cannot tell whether they have sold it.
    Column("maybe_sold", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("invoice_id", "number"),
    one_of("status", "prepared", "submitted", "succeeded", "declined", "not_charged", "surplus"),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
    # A sale that cannot be polled is lost: the gateway id is committed before the sale is sent.
    CheckConstraint(
        "status IN ('prepared', 'not_charged') OR gateway_id IS NOT NULL",
        name="sold_only_with_gateway_id",
    ),
    # Only a customer on a page pays without a stored card.
    CheckConstraint("card_id IS NOT NULL OR origin = 'link'", name="card_unless_link"),
    # While one attempt may still move money, no other may start.
    Index(
        "uq_attempts_one_live",
        "invoice_id",
        unique=True,
        postgresql_where=_LIVE,
        sqlite_where=_LIVE,
    ),
    # An invoice is paid at most once. Further money is `surplus` and must be returned.
    Index(
        "uq_attempts_one_succeeded",
        "invoice_id",
        unique=True,
        postgresql_where=_SUCCEEDED,
        sqlite_where=_SUCCEEDED,
    ),
    Index(
        "uq_attempts_page_digest",
        "page_digest",
        unique=True,
        postgresql_where=_HAS_PAGE,
        sqlite_where=_HAS_PAGE,
    ),
    Index(
        "ix_attempts_undecided",
        "undecided_since",
        postgresql_where=_UNDECIDED,
        sqlite_where=_UNDECIDED,
    ),
    Index("ix_attempts_surplus", "id", postgresql_where=_SURPLUS, sqlite_where=_SURPLUS),
    Index("ix_attempts_look", "next_poll_at", postgresql_where=_TO_POLL, sqlite_where=_TO_POLL),
    # Attempts that count towards a card's retry limits, or are about to. `persistence/cards.py`
    # repeats the condition literally: otherwise SQLite does not use the index.
    Index(
        "ix_attempts_budget",
        "card_id",
        "submitted_at",
        postgresql_where=_COUNTED,
        sqlite_where=_COUNTED,
    ),
)

_ALERT = text("alert")

events = Table(
    "events",
    metadata,
    Column("id", Key, primary_key=True),
    Column("at", Instant, nullable=False),
    Column("kind", String(48), nullable=False),
    Column("by", Text, nullable=False),
    Column("alert", Boolean, nullable=False),
    Column("subscription_id", Key),
    Column("invoice_id", Key),
    Column("attempt_id", Key),
    Column("data", Json, nullable=False),
    # No foreign keys: history is append-only (a trigger refuses update and delete) and outlives its
    # rows.
    Index("ix_events_subscription_id", "subscription_id"),
    Index("ix_events_invoice_id", "invoice_id"),
    Index("ix_events_alerts", "id", postgresql_where=_ALERT, sqlite_where=_ALERT),
)

book = Table(
    "book",
    metadata,
    # One row, created by the migration: it identifies the book in every copy of the database.
    Column("identity", String(32), primary_key=True),
    Column("prefix", String(16), nullable=False),  # of new references at the gateway
    Column("made_at", Instant, nullable=False),
    Column("test_mode", Boolean),  # mode of the first charge and of every other; None before it
    Column("server", Text),  # server of the last claim; see `persistence/book/identity.py`
    Column("timeline", Integer),
    Column("server_since", Instant),
    Column("taken_back_at", Instant),
    Column("other_book", String(32)),  # which has billed in between; it may know repeated commands
    Column("other_prefix", String(16)),
)

switches = Table(
    "switches",
    metadata,
    Column(
        "name", String(160), primary_key=True
    ),  # "sales", "restored", "decisions", "handed_over", or "service:" and its code
    Column("is_on", Boolean, nullable=False),
    Column("reason", Text),
    Column("by", Text),
    Column("changed_at", Instant),
)

_DONE = text("outcome = 'done'")

commands = Table(
    "commands",
    metadata,
    Column("id", Key, primary_key=True),
    Column("received_at", Instant, nullable=False),
    Column("task", Text, nullable=False),
    # The caller's key; None: the message had none that can be read.
    Column("reference_id", Text, index=True),
    Column("message_id", Text, index=True),  # Celery's: the caller asks by it what happened
    Column("arguments", Json, nullable=False),  # redacted: no card token
    Column("digest", String(64), nullable=False),  # of all arguments: same or conflict
    Column("outcome", String(16), nullable=False),
    Column("errors", Json, nullable=False),
    Column("answer", Json, nullable=False),
    one_of("outcome", "done", "unchanged", "refused", "failed"),
    # A command is carried out once, however often it arrives.
    Index(
        "uq_commands_one_done",
        "task",
        "reference_id",
        unique=True,
        postgresql_where=_DONE,
        sqlite_where=_DONE,
    ),
)

card_setups = Table(
    "card_setups",
    metadata,
    Column("id", Key, primary_key=True),
    _reference(unique=True),  # the caller's
    Column("gateway_reference", String(160), nullable=False, unique=True),
    Column("record_digest", String(64), nullable=False),  # of the order: same or conflict
    Column("customer_id", ForeignKey("customers.id"), nullable=False),
    Column("attempt_id", ForeignKey("attempts.id")),  # holds the slot of the invoice that it pays
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("test_mode", Boolean, nullable=False),
    Column("status", String(16), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("gateway_id", String(128), unique=True),
    Column("page", LargeBinary),  # encrypted; only while the customer may pay there
    Column("page_digest", String(64)),  # of the random name that leads there
    Column("opened_at", Instant),
    Column("settled_at", Instant),
    Column("next_poll_at", Instant),
    Column("unpaid_since", Instant),
    Column("outcome", Text),
    Column("card_id", ForeignKey("cards.id")),  # what it was for
    one_of("status", "prepared", "open", "stored", "no_card", "unpaid"),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
    # A page that cannot be asked about must not be handed out.
    CheckConstraint(
        "status IN ('prepared', 'unpaid') OR gateway_id IS NOT NULL",
        name="opened_only_with_gateway_id",
    ),
    CheckConstraint("(status = 'stored') = (card_id IS NOT NULL)", name="stored_has_a_card"),
    Index(
        "uq_card_setups_page_digest",
        "page_digest",
        unique=True,
        postgresql_where=_HAS_PAGE,
        sqlite_where=_HAS_PAGE,
    ),
    Index("ix_card_setups_look", "next_poll_at", postgresql_where=_TO_POLL, sqlite_where=_TO_POLL),
)

callbacks = Table(
    "callbacks",
    metadata,
    Column("id", Key, primary_key=True),
    Column("received_at", Instant, nullable=False),
    Column("gateway_id", String(128), nullable=False, index=True),
    Column("digest", String(64), nullable=False, unique=True),  # the same bytes are kept once
    Column("body", LargeBinary, nullable=False),  # encrypted: it holds bearers and card tokens
)

sweep_runs = Table(
    "sweep_runs",
    metadata,
    Column("sweep", String(48), primary_key=True),  # the name of its task
    Column("finished_at", Instant, nullable=False),
)

# When each invariant was last asked about, and from which row it goes on.
invariant_runs = Table(
    "invariant_runs",
    metadata,
    Column("invariant", String(48), primary_key=True),
    Column("ran_at", Instant, nullable=False),
    Column("next_id", BigInteger, nullable=False),
)

# What breaks an invariant now, so that each is told of once.
breaches = Table(
    "breaches",
    metadata,
    Column("invariant", String(48), primary_key=True),
    Column("row_id", BigInteger, primary_key=True, autoincrement=False),
    Column("reference", Text, nullable=False),
    Column("found_at", Instant, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(48), primary_key=True),
    Column("total", BigInteger, nullable=False),
    Column("changed_at", Instant, nullable=False),
)
