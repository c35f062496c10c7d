"""The tables of what other systems are told: outbox, feed, endpoints and deliveries.

History may change freely; see domain/public_events.py.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
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
    text,
)

from billing_worker.persistence.schema.columns import Instant, Json, Key, metadata, one_of

outbox = Table(
    "outbox",
    metadata,
    # Written in the transaction of the fact, taken out in the one that gives it a number.
    Column("id", Key, primary_key=True),
    Column("at", Instant, nullable=False),
    Column("type", String(48), nullable=False),
    Column("stream", Key, nullable=False),  # the subscription's id; 0: about none
    Column("invoice_id", Key),
    Column("details", Json, nullable=False),
    Column("trouble", Text),  # why it could not be rendered; it holds back its stream
    Column("again_at", Instant),  # when that is tried again
    Index(
        "ix_outbox_trouble",
        "stream",
        postgresql_where=text("again_at IS NOT NULL"),
        sqlite_where=text("again_at IS NOT NULL"),
    ),
)

public_events = Table(
    "public_events",
    metadata,
    # Without gaps and in the order of commit: one writer at a time, see `feed`.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("event_id", String(64), nullable=False, unique=True),
    Column("type", String(48), nullable=False),
    Column("at", Instant, nullable=False),
    Column("stream", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("body", Text, nullable=False),  # the bytes that are signed, at each try the same
    Column("published_at", Instant, nullable=False, index=True),
    UniqueConstraint("stream", "sequence"),
)

streams = Table(
    "streams",
    metadata,
    Column("stream", BigInteger, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),  # the last one; outlives its events
)

feed = Table(
    "feed",
    metadata,
    # One row, made by the migration. Its lock is the right to give out numbers.
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),  # the last one
    # After a restore numbers and sequences go on above all that may have been given out before.
    Column("floor", BigInteger, nullable=False, server_default="0"),
    Column("restored_at", Instant),  # the restore that this has been done for
    Column("forgotten", BigInteger, nullable=False, server_default="0"),  # the last one deleted
    Column("queued", BigInteger),  # the last one sent to the queue; None: none ever
    Column("queue_claim", Integer, nullable=False, server_default="0"),
    Column("queue_lease_until", Instant),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Key, primary_key=True),
    Column("url", Text, nullable=False, unique=True),
    Column("types", Text),  # comma-separated; None: all
    Column("status", String(16), nullable=False),
    Column("reason", Text),  # why it is paused
    Column("secret", LargeBinary, nullable=False),  # encrypted by the vault
    Column("old_secret", LargeBinary),  # signs too until then, so that a receiver may change over
    Column("old_until", Instant),
    Column("created_at", Instant, nullable=False),
    one_of("status", "active", "paused"),
)

webhook_cursors = Table(
    "webhook_cursors",
    metadata,
    # Where one endpoint is in one stream: the next event goes out only after this one was taken.
    Column("endpoint_id", ForeignKey("webhook_endpoints.id"), primary_key=True),
    Column("stream", BigInteger, primary_key=True, autoincrement=False),
    Column("head", BigInteger),  # sequence of the event that is next; None: nothing waits
    Column("next_at", Instant),  # when it is tried, or tried again if its claim has died
    Column("tries", Integer, nullable=False),  # of the head, in vain
    Column("claim", Integer, nullable=False),  # grows with every claim; an older one is refused
    Column("parked_at", Instant),  # the schedule is used up
    Column("replay_until", BigInteger),  # a replay runs up to this sequence,
    Column("resume_at", BigInteger),  # and then goes on here
    CheckConstraint("(head IS NULL) = (next_at IS NULL)", name="waits_with_a_date"),
    CheckConstraint(
        "(replay_until IS NULL) = (resume_at IS NULL)", name="replay_knows_its_way_back"
    ),
    Index(
        "ix_webhook_cursors_due",
        "endpoint_id",
        "next_at",
        postgresql_where=text("next_at IS NOT NULL"),
        sqlite_where=text("next_at IS NOT NULL"),
    ),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("endpoint_id", ForeignKey("webhook_endpoints.id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # of the event
    Column("tries", Integer, nullable=False),
    Column("first_at", Instant, nullable=False),
    Column("last_at", Instant, nullable=False),
    Column("status", Integer),  # the last answer's; None: there was none
    Column("reason", Text),  # why the last try failed; None: it was delivered
    Column("delivered_at", Instant),
)
