"""rnnq examine, promote: what came of a stage, and what comes next."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, By, Db, Defs, DryRun, Filter, Format, Rows, Stage

if TYPE_CHECKING:
    from rnnq.examine import Examined
    from rnnq.promote import Promotion
    from rnnq.queue import Added


# ------------------------------------------------------------------------------------------------------- examine


def examine(
    stage: Stage = None,
    filter: Filter = None,
    by: By = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many runs the table shows.")] = 20,
    save: Annotated[
        Path | None, typer.Option("--save", help="The folder for figures; default: figures/STAGE.", show_default=False)
    ] = None,
    db: Db = DB,
    format: Rows = Format.table,
) -> None:
    """The best runs of a stage as a table, and its figures: curves, and what each hyper-parameter does."""
    with _spinner("reading") as say:
        from rnnq import db as database
        from rnnq import examine as study
        from rnnq import runs

        engine = database.open(db)
        chosen = stage or runs.newest_finished_stage(engine)
        found = study.examine(engine, chosen, filter, by)
        folder = save or Path("figures") / chosen
        written = study.draw(engine, found, folder, lambda name: say(f"drawing {name}"))
    if stage is None:
        output.remark(f"stage {chosen} (the newest with finished runs)")
    _show_best(found, limit, format)
    sys.stdout.flush()
    output.remark(f"figures in {folder}/: " + ", ".join(path.name for path in written if path.suffix == ".png"))
    _show_promote_line(found, limit, db, format)


@contextmanager
def _spinner(text: str) -> Iterator[Callable[[str], None]]:
    """On a terminal, say what is being done once it takes over two seconds."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    status = Console(stderr=True).status(text)
    timer = threading.Timer(2.0, status.start)
    timer.start()
    try:
        yield status.update
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def _show_best(found: Examined, limit: int, format: Format) -> None:
    from rnnq import examine as study

    if format is Format.json:
        output.as_json(study.records(found, limit))
    else:
        rows, columns = study.table(found, limit)
        if rows and format is Format.table:
            output.say(_head(found, len(rows)))
        if rows or format is Format.csv:
            output.rows(format, rows, columns)
    if not found.best:
        output.remark(_nothing_found(found))


def _head(found: Examined, n: int) -> str:
    name, unit = found.metric["name"], found.metric["unit"]
    order = f"{'lowest' if found.metric['better'] == 'min' else 'highest'} {name}{f' in {unit}' if unit else ''} first"
    where = f" with {found.filter}" if found.filter else ""
    return f"{found.info.name}: {n} of {output.count(len(found.best), 'finished run')}{where}, {order}"


def _nothing_found(found: Examined) -> str:
    finished = sum(row["state"] == "done" for row in found.rows)
    of = output.count(len(found.rows), "run")
    if finished == 0:
        return f"none of the {of} of stage {found.info.name} has finished yet"
    return f"none of the {finished} finished runs of stage {found.info.name} fulfils {found.filter}"


def _show_promote_line(found: Examined, limit: int, db: str, format: Format) -> None:
    """The command that takes the runs shown further: the last line of a table; beside JSON and CSV on stderr."""
    from rnnq import examine as study
    from rnnq import runs

    words = study.promote_words(found, limit)
    if words is None:
        return
    if any(len(group) > 1 for group in runs.groups(found.rows).values()):
        output.remark(_about_means(found, limit))
    words += ["--db", db] if db != DB else []
    (output.say if format is Format.table else output.remark)(shlex.join(words))


def _about_means(found: Examined, limit: int) -> str:
    """How the rows shown, which are runs, compare with what promote ranks: the means of groups."""
    from rnnq import promote as selection

    shown = {row["group_key"] for row in found.best[:limit] if found.value(row) is not None}
    by_id = {row["id"]: row["group_key"] for row in found.rows}
    ranked, left_out = selection.rank(found.rows, {row["id"] for row in found.best}, found.metric, found.info, False)
    top = {by_id[group.runs[0]] for group in ranked[: len(shown)]}
    takes = "all" if top == shown else len(shown & top)
    text = f"promote ranks groups by their mean over seeds: of the {output.count(len(shown), 'group')} shown"
    lacking = f"; it leaves out {len(left_out)} that lack seeds (see --allow-missing)" if left_out else ""
    return f"{text} it takes {takes}{lacking}"


# ------------------------------------------------------------------------------------------------------- promote


def promote(
    top: Annotated[str, typer.Option("--top", help="How many configs: 10, or a share of them: 10%.")],
    stage: Stage = None,
    filter: Filter = None,
    by: By = None,
    to: Annotated[str | None, typer.Option("--to", help="The new stage; default: the definition's next=.")] = None,
    rules: Annotated[Path | None, typer.Option("--rules", help="A definition file whose refine rule to apply.")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value for every child, after the rule.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Seeds 0..N-1; default: the parents'.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Rank what is finished of a stage with open runs.")
    ] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Rank groups that lack seeds, too.")] = False,
    db: Db = DB,
    defs: Defs = DEFS,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """The best of a stage, grown by its rule, become the next stage."""
    from rnnq import db as database
    from rnnq import promote as selection
    from rnnq import queue, runs

    engine = database.open(db)
    chosen = stage or runs.newest_finished_stage(engine)
    request = selection.Request(
        stage=chosen, top=top, filter=filter, by=by, to=to, rules=rules, changes=set or (), seeds=seeds,
        partial=partial, allow_missing=allow_missing, defs=defs,
    )  # fmt: skip
    made = selection.prepare(engine, request)
    if stage is None:
        output.remark(f"stage {chosen} (the newest with finished runs)")
    [added] = queue.preview(engine, [made.stage]) if dry_run else queue.init(engine, [made.stage])
    _show_promotion(made, chosen, added, dry_run, format)


def _show_promotion(made: Promotion, stage: str, added: Added, dry_run: bool, format: Format) -> None:
    ranked = [
        {
            "place": group.place,
            "config": group.label,
            made.metric: group.mean,
            "std": group.std,
            "n": f"{group.n} of {group.of}",
            "runs": list(group.runs),
        }
        for group in made.chosen
    ]
    if format is Format.json:
        numbers = {"parents": len(made.chosen), "entries": made.entries, "distinct": made.distinct}
        numbers |= {"added": added.added, "present": added.present}
        ends = {"from": stage, "to": made.stage.name, "ranked_by": made.metric}
        output.as_json({**ends, **numbers, "ranked": ranked, "left_out": made.left_out})
        return
    output.rows(format, ranked, ["place", "config", made.metric, "std", "n", "runs"])
    for line in made.left_out:
        output.remark(f"left out: {line}")
    output.remark(
        f"{stage} -> {made.stage.name}: {output.count(len(made.chosen), 'parent')} of {len(made.ranked)}, "
        f"{output.count(made.entries, 'entry').replace('entrys', 'entries')}, "
        f"{output.count(made.distinct, 'distinct config')}, {'would add' if dry_run else 'added'} "
        f"{output.count(added.added, 'run')} ({added.present} present)"
    )
