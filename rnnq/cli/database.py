"""rnnq db: upgrade, check."""

from __future__ import annotations

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db

app = typer.Typer(help="Upgrade and check the database.", no_args_is_help=True)


@app.command()
def upgrade(db: Db = DB) -> None:
    """Bring the database to the schema of this program, after a backup; refused while workers are at work."""
    from rnnq import db as database
    from rnnq.errors import InputError

    if not database.path_of(db).exists():
        raise InputError(f"there is no database {db}", "`rnnq init DEFINITION` makes one")
    output.say(database.upgrade(db) or f"{db} has schema {database.SCHEMA} already")


@app.command()
def check(db: Db = DB) -> None:
    """Look for damage in the database; exit code 1 when there is some."""
    from rnnq import db as database

    engine = database.open(db)
    found = database.check(engine)
    for line in found:
        output.say(line)
    if found:
        raise typer.Exit(1)
    output.say(f"{db}: schema {database.SCHEMA}, no damage found")
