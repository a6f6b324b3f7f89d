"""Options that several commands share, each named once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rnnq.cli import complete


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"


Db = Annotated[
    str,
    typer.Option(
        "--db", envvar="RNNQ_DB", help="The database: a path, or an address of PostgreSQL.", show_default=True
    ),
]
Defs = Annotated[
    Path, typer.Option("--defs", help="The folder of the definition files; code is loaded only from below it.")
]
Stage = Annotated[str | None, typer.Option("--stage", help="Only this stage.", autocompletion=complete.stages)]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help="A stage.", autocompletion=complete.stages)]
RunId = Annotated[
    int,
    typer.Argument(metavar="RUN", help="The id of a run.", min=0, max=2**63 - 1, autocompletion=complete.run_ids),
]
# without a default at least one must be given; with `= None` there may be none
RunIds = Annotated[
    list[int] | None,
    typer.Argument(metavar="RUN...", help="The ids of runs.", min=0, max=2**63 - 1, autocompletion=complete.run_ids),
]
Filter = Annotated[
    str | None,
    typer.Option(
        "--filter",
        help='Only runs that fulfil a condition: "loss<1.9 and n_layers>=2".',
        autocompletion=complete.filters,
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        "--by", help="The metric to rank by; default: the family's primary one.", autocompletion=complete.metrics
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda:N, or auto.", autocompletion=complete.devices)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Keep = Annotated[
    str | None,
    typer.Option("--keep", help='Its rule of which checkpoints of finished runs stay: "best of top 10%".'),
]
Rows = Annotated[Format, typer.Option("--format", help="How rows are printed.", case_sensitive=False)]

DB = "experiments.db"
DEFS = Path("defs")
