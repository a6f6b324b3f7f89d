"""Options that several commands share, each named once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"


Db = Annotated[
    str, typer.Option("--db", envvar="RNNQ_DB", help="The database: a path, or sqlite:///path.", show_default=True)
]
Defs = Annotated[
    Path, typer.Option("--defs", help="The folder of the definition files; code is loaded only from below it.")
]
Stage = Annotated[str | None, typer.Option("--stage", help="Only this stage.")]
Filter = Annotated[
    str | None, typer.Option("--filter", help='Only runs that fulfil a condition: "loss<1.9 and n_layers>=2".')
]
By = Annotated[str | None, typer.Option("--by", help="The metric to rank by; default: the family's primary one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Rows = Annotated[Format, typer.Option("--format", help="How rows are printed.", case_sensitive=False)]

DB = "experiments.db"
DEFS = Path("defs")
