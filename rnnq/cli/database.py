"""rnnq db: upgrade, check, backup."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db

app = typer.Typer(help="Upgrade, check and copy the database.", no_args_is_help=True)


@app.command(epilog="Example: rnnq db upgrade --db experiments.db")
def upgrade(db: Db = DB) -> None:
    """Bring the database to the schema of this program, after a backup; refused while workers are at work."""
    from rnnq import db as database
    from rnnq import host
    from rnnq.errors import InputError

    name = host.masked(db)
    if not database.exists(db):
        raise InputError(f"there is no database {name}", "`rnnq init DEFINITION` makes one")
    output.say(database.upgrade(db) or f"{name} has schema {database.SCHEMA} already")


@app.command(epilog="Example: rnnq db check")
def check(db: Db = DB) -> None:
    """Look for damage in the database; exit code 1 when there is some."""
    from rnnq import db as database
    from rnnq import host

    engine = database.open(db)
    found = database.check(engine)
    for line in found:
        output.say(line)
    if found:
        raise typer.Exit(1)
    output.say(f"{host.masked(db)}: schema {database.SCHEMA}, no damage found")


@app.command(epilog="Example: rnnq db backup ~/safe/experiments.db")
def backup(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Where the copy goes; default: beside the database, with the time.", show_default=False
        ),
    ] = None,
    db: Db = DB,
) -> None:
    """Copy the database while workers write, and look through the copy; nobody waits, and nothing is overwritten."""
    from rnnq import db as database

    engine = database.open(db)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is taken away
    with output.bars() as watch:
        made = database.backup(
            engine,
            file.expanduser() if file else None,
            lambda done, pages: watch("copying", done, pages),
        )
    output.say(str(made))
    output.remark(f"copied {output.count(made.stat().st_size, 'byte')}; no damage found in the copy")
