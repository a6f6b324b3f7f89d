"""Alembic's entry. It uses only the connection that it is handed, which is already inside a transaction.

Alembic on SQLite is not transactional by itself: a migration of its own connection would be left half done.
"""

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("error: migrations run inside rnnq's own transaction\nhint: `rnnq db upgrade`")

context.configure(connection=connection, transactional_ddl=True, render_as_batch=True)
context.run_migrations()
