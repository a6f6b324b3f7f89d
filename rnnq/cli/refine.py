"""rnnq promote: what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, By, Db, Defs, DryRun, Filter, Format, Keep, Rows, Stage

if TYPE_CHECKING:
    from rnnq.promote import Promotion
    from rnnq.queue import Added


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
    keep: Keep = None,
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
        partial=partial, allow_missing=allow_missing, keep=keep, defs=defs,
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
