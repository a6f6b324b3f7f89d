"""What came of a stage: its best runs and groups as tables, and the figures that every stage has.

Each figure is saved with the numbers that it shows, as `<name>.png` (or svg, pdf) and `<name>.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame, concat
from sqlalchemy import Engine

from rnnq import families, frame, ranking, runs
from rnnq.errors import InputError, nearest
from rnnq.figures import bars, canvas, cost, curves, groups, influence, regression
from rnnq.figures.canvas import Save, Scale
from rnnq.figures.curves import Drawn
from rnnq.figures.regression import Regression
from rnnq.figures.subject import NO_WORDS, Examined
from rnnq.spread import Spread

# -------------------------------------------------------------------------------------------------- what was asked


def examine(
    engine: Engine,
    stage: str,
    filter: str | None = None,
    by: str | None = None,
    spread: Spread = Spread.std,
) -> Examined:
    """Rank the finished runs of a stage by a metric. Raises InputError for a wrong stage, filter or metric."""
    info = runs.stage_info(engine, stage)
    metric = info.metric(by or info.primary)
    rows = runs.find(engine, stage)
    found = rows if filter is None else runs.find(engine, stage, filter)
    best = ranking.best_first(found, info, metric)
    return Examined(info, metric, filter, rows, best, frame.of_rows(rows, info), spread)


# ---------------------------------------------------------------------------------------------------------- tables


def table(found: Examined, limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `limit` of the best runs, and the columns that tell them apart."""
    head = ["id", "label", *(["seed"] if found.frame["seed"].nunique() > 1 else [])]
    known = [str(metric["name"]) for metric in found.info.metrics]
    metrics = [name for name in dict.fromkeys((found.name, found.info.primary, "val_loss")) if name in known]
    named = _named(found, {*head, *metrics})
    rows = []
    for row in found.best[:limit]:
        config = frame.flat(row["config"])
        values = {name: frame.value(row, found.info, name) for name in metrics}
        rows.append({n: row[n] for n in head} | {name: config.get(field) for field, name in named.items()} | values)
    return rows, [*head, *named.values(), *metrics]


def groups_table(found: Examined, limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `limit` groups as promote ranks them, and the columns that tell them apart.

    A group that lacks seeds comes after those and has no place. `n` of `of` runs are in its mean; `t95` is half of the
    interval that was asked for.
    """
    interval = [] if found.spread is Spread.std else [found.spread.value]
    before, after = ["place", "label"], ["mean", "std", *interval, "n", "of", "min", "max"]
    named = _named(found, {*before, *after})
    rows = []
    for group in found.chosen_groups[:limit]:
        config = frame.flat(group.config)
        own = {name: config.get(field) for field, name in named.items()}
        spread = {"min": min(group.values), "max": max(group.values)}
        numbers = {"mean": group.mean, "std": group.std, "n": group.n, "of": group.of}
        numbers |= {name: found.half(group) for name in interval}
        rows.append({"place": group.place, "label": group.label, **own, **numbers, **spread})
    return rows, [*before, *named.values(), *after]


def _named(found: Examined, taken: set[str]) -> dict[str, str]:
    """The fields that vary, each with the name of its column: `config.` before it where its own is taken."""
    return {field: f"{frame.CONFIG}{field}" if field in taken else field for field in found.varying}


def records(found: Examined, limit: int) -> list[dict[str, Any]]:
    """The same runs whole: what JSON shows."""
    same = ("id", "stage", "label", "state", "seed", "attempt", "loss", "config")
    return [
        {name: row[name] for name in same}
        | {"summary": row["summary"] or {}}
        | {name: row[name]["path"] if row[name] else None for name in ("checkpoint", "checkpoint_best")}
        for row in found.best[:limit]
    ]


def group_records(found: Examined, limit: int) -> list[dict[str, Any]]:
    """The same groups whole: what JSON shows."""
    numbers = ("place", "label", "mean", "std", "n", "of")
    return [
        {name: getattr(group, name) for name in numbers}
        | ({} if found.spread is Spread.std else {found.spread.value: found.half(group)})
        | {"min": min(group.values), "max": max(group.values), "metric": found.name, "runs": list(group.runs)}
        | {"config": dict(group.config)}
        for group in found.chosen_groups[:limit]
    ]


def promote_words(found: Examined, limit: int, groups: bool = False) -> list[str] | None:
    """The command that promotes the groups of the runs shown, or those shown; None when none has the metric."""
    if groups:
        top = sum(group.place is not None for group in found.chosen_groups[:limit])
    else:
        top = len({row["group_key"] for row in found.best[:limit] if found.value(row) is not None})
    if not top:
        return None
    words = ["rnnq", "promote", "--stage", found.info.name]
    if found.name != found.info.primary:
        words += ["--by", found.name]
    if found.filter is not None:
        words += ["--filter", found.filter]
    return [*words, "--top", str(top), *(["--partial"] if found.open else [])]


def fitted(found: Examined) -> Regression:
    """The regression of the runs that the table shows: those of the filter, where there is one."""
    return regression.regress(found, filtered=found.filter is not None)


# ---------------------------------------------------------------------------------------------------- all figures


@dataclass(frozen=True)
class Drawing:
    """How figures are drawn."""

    formats: Sequence[str] = canvas.IMAGES[:1]
    scale: Scale = Scale.auto  # of the axis of the metric


def drawing(formats: Sequence[str], scale: str) -> Drawing:
    """The same from words of a user: `--image png,svg`, `--scale log`. Raises InputError."""
    return Drawing(canvas.images(formats), Scale(scale))


def draw(
    engine: Engine,
    found: Examined,
    folder: Path,
    on_figure: Callable[[str], object] = lambda name: None,
    how: Drawing = Drawing(),
) -> list[Path]:
    """Draw a stage into a folder; returns what was written. Raises InputError for a folder that cannot be written.

    `on_figure` hears the name of each figure before it is drawn. A family that has figures of its own has a module
    with `draw(runs, curves, save)`, `drawn(runs)` and CURVES (the runs and metrics whose curves it draws), and what
    its metrics are called: WORDS for a run's, CURVE_WORDS while it trains. With `draw_lineage(links, runs, curves,
    save)` it draws what runs that start from each other's weights did one after the other, with `draw_weights(runs,
    weights, save)` what the weights of runs say (`weights` as weights.OfStage).
    """
    module = None if found.info.family_in_source else families.find_figures(found.info.family)
    save = canvas.saver(folder, how.formats)
    written: list[Path] = []
    with canvas.style():
        recorded = frame.curves_frame(engine, found.info.name, list(dict.fromkeys([found.name, found.info.primary])))
        for name, figure in _figures(engine, found, recorded, module, how.scale):
            on_figure(name)
            written += save(*figure())
        if module is not None:
            on_figure(f"those of {found.info.family}")
            own = frame.curves_frame(engine, found.info.name, module.CURVES, module.drawn(found.frame))
            written += module.draw(found.frame, own, save)
            if hasattr(module, "draw_lineage"):
                written += _draw_lineage(engine, found, module, save)
            if hasattr(module, "draw_weights"):
                written += _draw_weights(engine, found, module, save)
    return written


def findings(found: Examined) -> list[str]:
    """What a family has to say of the runs of a stage, a line each: `findings(runs)` of its module of figures."""
    module = None if found.info.family_in_source else families.find_figures(found.info.family)
    return list(module.findings(found.frame)) if module is not None and hasattr(module, "findings") else []


def across(engine: Engine, by: str | None = None, spread: Spread = Spread.std) -> list[Examined]:
    """Every stage that has finished runs, ranked by its own primary metric, or by one that it has.

    Raises InputError for a metric that no stage has.
    """
    infos = runs.stage_infos(engine)
    known = {str(metric["name"]) for info in infos.values() for metric in info.metrics} | {"loss"}
    if by is not None and by not in known:
        raise InputError(f"no stage has a metric {by!r}", nearest(by, known))
    has_it = [n for n, info in infos.items() if by in (None, "loss", *(str(m["name"]) for m in info.metrics))]
    found = [examine(engine, name, None, by, spread) for name in has_it]
    return [one for one in found if one.finished]


def draw_across(
    engine: Engine, found: Sequence[Examined], folder: Path, how: Drawing = Drawing()
) -> tuple[list[Path], list[str]]:
    """What each built-in family draws of all its stages together, in a folder of its name; and the families that have
    nothing of their own to draw. Raises InputError for a folder that cannot be written.
    """
    families_of = dict.fromkeys(one.info.family for one in found if not one.info.family_in_source)
    written: list[Path] = []
    silent = []
    for family in families_of:
        module = families.find_figures(family)
        own = [one for one in found if one.info.family == family]
        made = [] if module is None else _draw_family(engine, module, own, canvas.saver(folder / family, how.formats))
        written += made
        silent += [] if made else [family]
    return written, silent


def _draw_family(engine: Engine, module: Any, found: Sequence[Examined], save: Save) -> list[Path]:
    points = [frame.curves_frame(engine, one.info.name, module.CURVES, module.drawn(one.frame)) for one in found]
    with canvas.style():
        return list(module.draw(concat([one.frame for one in found], ignore_index=True), concat(points), save))


def across_table(found: Sequence[Examined]) -> list[dict[str, Any]]:
    """The groups of many stages, each with its place in its own: stage, label, metric, mean, std, n, of."""
    rows = []
    for one in found:
        for group in one.chosen_groups:
            half = {} if one.spread is Spread.std else {one.spread.value: one.half(group)}
            numbers = {"mean": group.mean, "std": group.std, **half}
            rows.append(
                {"stage": one.info.name, "label": group.label, "metric": one.name, **numbers}
                | {"n": group.n, "of": group.of, "mean ± " + one.spread.value + " (n)": one.counted(group)}
            )
    return rows


def _figures(
    engine: Engine, found: Examined, recorded: DataFrame, module: Any, scale: Scale
) -> Iterator[tuple[str, Callable[[], Drawn]]]:
    """Each figure of a stage and what draws it, in the order of the drawing."""
    words: Mapping[str, str] = getattr(module, "WORDS", NO_WORDS)
    own: Mapping[str, str] = getattr(module, "CURVE_WORDS", NO_WORDS)
    yield "curves", lambda: curves.curves_figure(found, recorded, words, own, scale)
    if found.has_seeds:
        yield "groups", lambda: bars.bars_figure(found, words, scale)
        yield "curves_groups", lambda: groups.means_figure(found, recorded, words, own, scale)
        yield "curves_seeds", lambda: groups.seeds_figure(found, recorded, own, scale)
    yield "hyperparameters", lambda: influence.hyperparameters_figure(found, words, False, scale)
    yield "regression", lambda: _regression(found, words, False)
    if found.filter is not None and found.best:
        yield "hyperparameters_filtered", lambda: influence.hyperparameters_figure(found, words, True, scale)
        yield "regression_filtered", lambda: _regression(found, words, True)
    yield "cost", lambda: cost.cost_figure(found, runs.seconds(engine, found.info.name), words, scale)


def _draw_lineage(engine: Engine, found: Examined, module: Any, save: Save) -> list[Path]:
    """What a family draws of the runs whose weights those of a stage went on from, however far back."""
    links = runs.ancestry(engine, found.info.name)
    if not links:
        return []
    ids = {run for link in links for run in (link["child"], link["parent"])}
    rows, points = [], []
    for stage in dict.fromkeys(stage for link in links for stage in (link["parent_stage"], link["stage"])):
        every = found.frame if stage == found.info.name else frame.runs_frame(engine, stage)
        rows.append(every[every["id"].isin(ids)])
        points.append(frame.curves_frame(engine, stage, module.CURVES, [int(run) for run in rows[-1]["id"]]))
    return list(module.draw_lineage(DataFrame(links), concat(rows), concat(points), save))


def _draw_weights(engine: Engine, found: Examined, module: Any, save: Save) -> list[Path]:
    """What a family draws of weights: it alone needs torch."""
    from rnnq import weights

    return list(module.draw_weights(found.frame, weights.OfStage(engine, found.rows), save))


def _regression(found: Examined, words: Mapping[str, str], filtered: bool) -> Drawn:
    return regression.regression_figure(found, regression.regress(found, filtered), words, filtered)
