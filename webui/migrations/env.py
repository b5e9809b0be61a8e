"""Runs the steps on the connection that ``database`` hands over; Alembic looks for this file."""

from alembic import context

from webui.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter columns in place
)
with context.begin_transaction():
    context.run_migrations()
