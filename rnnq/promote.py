"""The best of a stage become the next stage: rank groups, take the top, grow them by the definition's rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from rnnq import definitions, families, plan, ranking, retention, runs, sweep
from rnnq.config import Config, start_key
from rnnq.definitions import Definition
from rnnq.errors import InputError
from rnnq.query import OPEN
from rnnq.queue import NewStage
from rnnq.ranking import Ranked
from rnnq.runs import StageInfo
from rnnq.sweep import Stage

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a user asks of `promote`."""

    stage: str
    top: str
    filter: str | None = None
    by: str | None = None
    to: str | None = None
    rules: Path | None = None
    changes: Sequence[str] = ()  # "key=value", applied to every child
    seeds: int | None = None
    partial: bool = False
    allow_missing: bool = False
    keep: str | None = None  # the new stage's rule of what to keep; None: that of the definition, else the parent's
    defs: Path = Path("defs")


@dataclass(frozen=True)
class Promotion:
    """A promotion that is worked out, and not yet written."""

    metric: str
    unit: str
    ranked: list[Ranked]
    chosen: list[Ranked]
    left_out: list[str]  # groups that lack seeds, in words
    entries: int  # configs that the rule made
    distinct: int  # of those, seeds aside
    stage: NewStage


# ------------------------------------------------------------------------------------------------- the next stage


def prepare(engine: Engine, request: Request) -> Promotion:
    """Work out a promotion; nothing is written. Raises InputError with everything that is wrong."""
    info = runs.stage_info(engine, request.stage)
    metric = info.metric(request.by or info.primary)
    ranking.top_count(request.top, 1)  # a bad --top is refused before anything is read
    rows = runs.find(engine, request.stage)
    _refuse_open(rows, request)
    chosen_ids = {row["id"] for row in runs.find(engine, request.stage, request.filter, "done")}
    ranked, left_out = ranking.rank(rows, chosen_ids, metric, info, request.allow_missing)
    if not ranked:
        raise InputError(_nothing(request, left_out), "`rnnq examine` shows what there is")
    chosen = ranked[: ranking.top_count(request.top, len(ranked))]

    definition = _definition(info, request)
    rule = _rule(definition, info.defined_as or info.name, request)
    origin, to = _origin(info, definition, rule, request)
    entries, made = _children(chosen, rule, origin.config, request)
    origin = replace(origin, keep=_keep(engine, to, origin.keep, info, request))
    _refuse_foreign(engine, to, origin)
    # what imported runs were trained on need not be here: the worker that trains their children will ask for it
    here = {row["id"] for row in rows if row["attempt"]}
    entries = [replace(entry, data_here=any(run in here for run, _, _ in entry.parents)) for entry in entries]
    stage = plan.new_stage(to, origin, entries)
    distinct = len({run.group_key for run in stage.runs})
    return Promotion(metric["name"], metric["unit"], ranked, chosen, left_out, made, distinct, stage)


def _refuse_open(rows: Sequence[Row], request: Request) -> None:
    waiting = sum(row["state"] in OPEN for row in rows)
    if waiting and not request.partial:
        raise InputError(
            f"stage {request.stage} still has {waiting} open run{'s' if waiting != 1 else ''} of {len(rows)}",
            "wait until `rnnq status` shows none, or rank what is finished with --partial",
        )


def _nothing(request: Request, left_out: Sequence[str]) -> str:
    if left_out:
        return f"no group of stage {request.stage} has all its seeds: {'; '.join(left_out[:5])}; see --allow-missing"
    where = f" that fulfil {request.filter}" if request.filter else ""
    return f"stage {request.stage} has no finished runs{where}"


def _definition(info: StageInfo, request: Request) -> Definition | None:
    """The definition file that made the stage, opened only where its family or its rule is needed."""
    if info.source is None or info.source_sha256 is None:
        return None
    if info.family_in_source or (info.has_rule and request.rules is None):
        return definitions.load_source(info.source, info.source_sha256, request.defs)
    return None


def _rule(definition: Definition | None, stage: str, request: Request) -> Stage | None:
    """What grows the winners: the rule of `--rules`, else that of the definition. None: they stay as they are."""
    if request.rules is None:
        return definition.rule(stage) if definition else None
    rules = definitions.load(request.rules)
    own = rules.rule(stage)
    if own is not None:
        return own
    with_rule = [stage for stage in rules.stages if stage.refine is not None]
    if len(with_rule) != 1:
        names = ", ".join(stage.name for stage in with_rule) or "none"
        raise InputError(
            f"{request.rules} has no rule for stage {request.stage}; its stages with one: {names}",
            f"name one of them {request.stage}, or keep just one",
        )
    return with_rule[0]


def _origin(
    info: StageInfo, definition: Definition | None, rule: Stage | None, request: Request
) -> tuple[plan.Origin, str]:
    following = rule.next if rule is not None else None
    named = following.name if isinstance(following, Stage) else following
    to = request.to or named or f"{request.stage}-2"
    if to == request.stage:
        raise InputError(f"--to {to}: a stage cannot be promoted into itself", "give the new stage another name")
    sweep.stage(to)  # refuses a name that cannot be a folder
    model = families.find_config(info.family, definition if info.family_in_source else None)
    has_rule = isinstance(following, Stage) and (following.refine is not None or following.next is not None)
    has_rule = has_rule and to == named and request.rules is None
    keeps_source = info.family_in_source or has_rule
    return plan.Origin(
        family=info.family,
        config=model,
        family_in_source=info.family_in_source,
        has_rule=has_rule,
        source=info.source if keeps_source else None,
        source_sha256=info.source_sha256 if keeps_source else None,
        keep=following.keep if isinstance(following, Stage) and to == named else None,
    ), to


def _keep(engine: Engine, to: str, declared: str | None, parent: StageInfo, request: Request) -> str | None:
    """The new stage's rule of which checkpoints to keep; a stage that is there already keeps its own."""
    if request.keep is not None:
        return str(retention.parse(request.keep))
    there = runs.stage_infos(engine)
    return declared or (parent.keep if to not in there else None)


def _refuse_foreign(engine: Engine, to: str, origin: plan.Origin) -> None:
    """A stage keeps the definition that made it: its family's code and its rule are there."""
    there = runs.stage_infos(engine).get(to)
    if there is None:
        return
    if (there.source, there.has_rule) != (origin.source, origin.has_rule):
        by = there.source or "an earlier promote"
        raise InputError(f"--to {to}: the stage exists and was made by {by}", "give the new stage another name")


def _children(
    chosen: Sequence[Ranked], rule: Stage | None, model: type[Config], request: Request
) -> tuple[list[plan.Entry], int]:
    """Every distinct child with the union of its parents' seeds, and with all of them as parents.

    They start from the weights that their parents started from. The second value is how many configs the rule made
    before equal ones became one.
    """
    changes = plan.parse_changes(request.changes, model)
    family: dict[tuple[str, str | None], tuple[dict[str, Any], list[Ranked]]] = {}
    made = 0
    for group in chosen:
        for child in sweep.refined(rule, dict(group.config)):
            made += 1
            values = plan.changed(child, changes)
            key = json.dumps(values, sort_keys=True, default=repr), start_key(group.start_from)
            _, parents = family.setdefault(key, (values, []))
            parents += [group] if group not in parents else []
    entries = []
    for values, parents in family.values():
        descent = tuple(line for group in parents for line in _descent(group))
        # a seed that the rule or --set states is meant; else the parents' seeds
        start = parents[0].start_from
        entries += [plan.Entry({**seeds, **values}, descent, start_from=start) for seeds in _seeds(parents, request)]
    return entries, made


def _descent(group: Ranked) -> list[tuple[int, str, str]]:
    detail = json.dumps({"place": group.place, "mean": group.mean, "n": group.n}, sort_keys=True)
    return [(run, "promote", detail) for run in group.runs]


def _seeds(parents: Sequence[Ranked], request: Request) -> list[Mapping[str, Any]]:
    if request.seeds is not None:
        return [{"seed": seed} for seed in range(request.seeds)]
    found: list[Mapping[str, Any]] = []
    for group in parents:
        found += [seeds for seeds in group.seeds if seeds not in found]
    return found
