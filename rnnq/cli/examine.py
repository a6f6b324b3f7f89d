"""rnnq examine: what came of a stage."""

from __future__ import annotations

import gc
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, By, Db, Filter, Format, Rows, Stage
from rnnq.errors import InputError
from rnnq.spread import Spread

if TYPE_CHECKING:
    from rnnq.figures.regression import Regression
    from rnnq.figures.subject import Examined


class Scale(StrEnum):
    """How the axis of a metric is divided."""

    auto = "auto"
    linear = "linear"
    log = "log"


def examine(
    stage: Stage = None,
    filter: Filter = None,
    by: By = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="A table of groups, as promote ranks them: mean and spread over seeds.")
    ] = False,
    regression: Annotated[
        bool, typer.Option("--regression", help="A table of what each hyper-parameter does, by linear regression.")
    ] = False,
    interval: Annotated[
        Spread,
        typer.Option("--interval", help="What ± means: the std over seeds, or a 95% t interval of their mean."),
    ] = Spread.std,
    across: Annotated[
        bool, typer.Option("--across", help="All stages side by side: their groups, and what families draw of all.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many rows the table shows.")] = 20,
    save: Annotated[
        Path | None, typer.Option("--save", help="The folder for figures; default: figures/STAGE.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="png, svg or pdf; several with commas. Default: png.", show_default=False),
    ] = None,
    scale: Annotated[
        Scale, typer.Option("--scale", help="The axis of the metric in figures.", case_sensitive=False)
    ] = Scale.auto,
    db: Db = DB,
    format: Rows = Format.table,
) -> None:
    """The best runs of a stage as a table, and its figures: curves, what each hyper-parameter does, what it costs."""
    if across:
        _across((stage, filter, groups, regression), by, interval, limit, save, image, db, format)
        return
    if groups and regression:
        raise InputError("--groups and --regression are two tables", "ask for one at a time; figures are drawn by both")
    with _spinner("reading") as say, _uncollected():
        from rnnq import db as database
        from rnnq import examine as study
        from rnnq import runs

        how = study.drawing(image or [], scale.value)
        engine = database.open(db)
        chosen = stage or runs.newest_finished_stage(engine)
        found = study.examine(engine, chosen, filter, by, interval)
        folder = save or Path("figures") / chosen
        written = study.draw(engine, found, folder, lambda name: say(f"drawing {name}"), how)
        fit = study.fitted(found) if regression else None
        said = study.findings(found)
    if stage is None:
        output.remark(f"stage {chosen} (the newest with finished runs)")
    if fit is not None:
        _show_fit(found, fit, limit, format)
    elif groups:
        _show_groups(found, limit, format)
    else:
        _show_best(found, limit, format)
    sys.stdout.flush()
    for line in said:
        output.remark(line)
    output.remark(_drawn(folder, written, how.formats))
    if fit is None:
        _show_promote_line(found, limit, groups, db, format)


def _across(
    others: tuple[Any, ...],
    by: str | None,
    interval: Spread,
    limit: int,
    save: Path | None,
    image: Sequence[str] | None,
    db: str,
    format: Format,
) -> None:
    """The groups of all stages as one table, and the figures that families draw of all their stages together."""
    if any(others):
        raise InputError("--across is about all stages", "leave out --stage, --filter, --groups and --regression")
    with _spinner("reading"):
        from rnnq import db as database
        from rnnq import examine as study

        how = study.drawing(image or [], Scale.auto.value)
        engine = database.open(db)
        found = study.across(engine, by, interval)
        folder = save or Path("figures")
        written, silent = study.draw_across(engine, found, folder, how)
    rows = study.across_table(found)
    if format is Format.table:
        said = f"mean ± {interval.value} (n)"
        output.rows(format, rows[:limit], ["stage", "label", "metric", said])
        more = len(rows) - limit
        if more > 0:
            output.remark(f"{output.count(more, 'group')} more; --limit {len(rows)} shows all")
    else:
        plain = [{name: value for name, value in row.items() if "±" not in name} for row in rows]
        output.rows(format, plain, list(plain[0]) if plain else ["stage", "label", "metric", "mean", "std", "n", "of"])
    if not rows:
        output.remark("no stage has finished runs yet: `rnnq worker` trains what is pending")
    if written:
        pictures = ", ".join(str(path) for path in written if path.suffix != ".csv")
        output.remark(f"figures of all stages together: {pictures}")
    if silent:
        output.remark(f"of all stages together nothing is drawn for {', '.join(silent)}")


def _drawn(folder: Path, written: Sequence[Path], formats: Sequence[str]) -> str:
    if len(formats) == 1:
        return f"figures in {folder}/: " + ", ".join(path.name for path in written if path.suffix != ".csv")
    names = ", ".join(path.stem for path in written if path.suffix == ".csv")
    return f"figures in {folder}/, each as {', '.join(formats)}: {names}"


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


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave cycles where they are: to look for them among a million points takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------- runs and groups


def _show_best(found: Examined, limit: int, format: Format) -> None:
    from rnnq import examine as study

    if format is Format.json:
        output.as_json(study.records(found, limit))
    else:
        rows, columns = study.table(found, limit)
        if rows and format is Format.table:
            output.say(_head(found, len(rows), len(found.best), "finished run"))
        if rows or format is Format.csv:
            output.rows(format, rows, columns)
    if not found.best:
        output.remark(_nothing_found(found))


def _show_groups(found: Examined, limit: int, format: Format) -> None:
    from rnnq import examine as study

    if format is Format.json:
        output.as_json(study.group_records(found, limit))
    else:
        rows, columns = study.groups_table(found, limit)
        if format is Format.csv:
            output.rows(format, rows, columns)
        elif rows:
            output.say(_head(found, len(rows), len(found.chosen_groups), "group"))
            mean = f"mean ± {found.spread.value} (n)"
            shown = [row | {mean: found.counted(group)} for row, group in zip(rows, found.chosen_groups, strict=False)]
            numbers = columns[columns.index("mean") :]
            output.rows(format, shown, [*(name for name in columns if name not in numbers), mean])
    if not found.best:
        output.remark(_nothing_found(found))
    lacking = sum(group.place is None for group in found.chosen_groups)
    if lacking:
        have = "group lacks seeds and has" if lacking == 1 else "groups lack seeds and have"
        output.remark(f"{lacking:,} {have} no place: promote leaves such out (see its --allow-missing)")


def _head(found: Examined, n: int, of: int, noun: str) -> str:
    name, unit = found.name, found.metric["unit"]
    order = f"{'lowest' if found.metric['better'] == 'min' else 'highest'} {name}{f' in {unit}' if unit else ''} first"
    where = f" with {found.filter}" if found.filter else ""
    return f"{found.info.name}: {n} of {output.count(of, noun)}{where}, {order}"


def _nothing_found(found: Examined) -> str:
    stage, of = found.info.name, output.count(len(found.rows), "run")
    if found.finished:
        return f"none of the {found.finished} finished runs of stage {stage} fulfils {found.filter}"
    if found.open:
        return f"none of the {of} of stage {stage} has finished yet"
    states: dict[str, int] = {}
    for row in found.rows:
        states[row["state"]] = states.get(row["state"], 0) + 1
    ended = ", ".join(f"{n} {state}" for state, n in states.items())
    return f"none of the {of} of stage {stage} has finished, and none is open: {ended} (see `rnnq status`)"


def _show_promote_line(found: Examined, limit: int, groups: bool, db: str, format: Format) -> None:
    """The command that takes what is shown further: the last line of a table; beside JSON and CSV on stderr."""
    from rnnq import examine as study

    words = study.promote_words(found, limit, groups)
    if words is None:
        return
    if found.has_seeds and not groups:
        for line in _about_means(found, limit):
            output.remark(line)
    words += ["--db", db] if db != DB else []
    (output.say if format is Format.table else output.remark)(shlex.join(words))


def _about_means(found: Examined, limit: int) -> Iterator[str]:
    """How the rows shown, which are runs, compare with what promote ranks: the means of groups."""
    sizes = found.frame["group_key"].value_counts()
    low, high = int(sizes.min()), int(sizes.max())
    of = str(high) if low == high else f"{low} to {high}"
    yield f"these are runs, in {output.count(len(sizes), 'group')} of {of} equal but for their seeds: see --groups"
    shown = {row["group_key"] for row in found.best[:limit] if found.value(row) is not None}
    ranked = [group for group in found.chosen_groups if group.place is not None]
    top = {group.key for group in ranked[: len(shown)]}
    takes = "all" if top == shown else len(shown & top)
    lacking = len(found.chosen_groups) - len(ranked)
    but = f"; it leaves out {lacking} that lack seeds (see --allow-missing)" if lacking else ""
    n = output.count(len(shown), "group")
    yield f"promote ranks groups by their mean over seeds: of the {n} shown it takes {takes}{but}"


# ------------------------------------------------------------------------------------------------------ regression


def _show_fit(found: Examined, fit: Regression, limit: int, format: Format) -> None:
    """The coefficients as rows; what is said of the whole fit stands around them, and in JSON beside them."""
    rows: list[dict[str, Any]] = [] if fit.coefficients is None else fit.coefficients.to_dict("records")
    if format is Format.json:
        said = {"stage": found.info.name, "filter": found.filter, **fit.numbers()}
        output.as_json({**said, "reason": fit.reason, "remarks": list(fit.remarks), "coefficients": rows})
        return
    columns = ["feature", "scale", "coefficient", "std", "all"]
    if format is Format.csv:
        output.rows(format, rows, columns)
    elif rows:
        where = f" with {found.filter}" if found.filter else ""
        output.say(
            f"{found.info.name}: {fit.target} by hyper-parameter, {output.count(fit.n, 'run')}{where}, all z-scored"
        )
        output.rows(format, rows[:limit], columns)
    said_to = output.say if format is Format.table and rows else output.remark
    said_to(fit.judgement() if rows else f"no regression of {fit.target}: {fit.reason}")
    for line in fit.remarks:
        output.remark(line)
