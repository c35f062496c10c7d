"""Alembic's entry point: it runs the migrations on the connection of `migrate`."""

from alembic import context

from billing_worker.persistence.schema.tables import customers

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=customers.metadata,
    render_as_batch=True,
)
context.run_migrations()
