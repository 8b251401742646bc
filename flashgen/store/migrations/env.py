"""Runs migrations on the connection that `flashgen.store.schema` hands over; no ini file, no logging set up."""

from __future__ import annotations

from alembic import context

from flashgen.errors import DatabaseError
from flashgen.store.models import VERSION_TABLE, Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise DatabaseError(
        "migrations run through `flashgen db migrate`, which keeps a copy first; not by alembic's own command."
    )

# The caller owns the transaction: on SQLite and PostgreSQL alike a migration happens as a whole or not at all.
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite alters tables by copying them
)
context.run_migrations()
