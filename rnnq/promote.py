"""The best of a stage become the next stage: rank groups, take the top, grow them by the definition's rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from rnnq import config, families, plan, runs, sweep
from rnnq.config import Config
from rnnq.errors import InputError
from rnnq.query import OPEN
from rnnq.queue import NewStage
from rnnq.runs import StageInfo
from rnnq.sweep import Definition, Stage

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
    defs: Path = Path("defs")


@dataclass(frozen=True)
class Ranked:
    """A group in the order of its mean. `std` is the sample standard deviation over its seeds."""

    place: int
    label: str
    mean: float
    std: float | None
    n: int
    of: int  # runs that the group has
    runs: tuple[int, ...]
    config: Mapping[str, Any] = field(repr=False)  # without its seed fields
    seeds: tuple[Mapping[str, Any], ...] = field(repr=False)  # the seed fields of each of its runs


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


def top_count(top: str, n: int) -> int:
    """How many of n groups `--top` means: N, or p % as floor(p · n / 100) in exact arithmetic, at least 1.

    Raises InputError for anything else.
    """
    wrong = InputError(f"--top {top}: neither a number of configs nor a share of them", "--top 10, or --top 10%")
    try:
        share = Fraction(top.removesuffix("%").strip())
    except (ValueError, ZeroDivisionError):
        raise wrong from None
    if top.endswith("%"):
        if not 0 < share <= 100:
            raise InputError(f"--top {top}: a share lies above 0% and up to 100%", "--top 10%")
        return max(1, math.floor(share * n / 100))
    if share.denominator != 1 or share < 1 or "/" in top:
        raise wrong
    return min(int(share), n)


# ------------------------------------------------------------------------------------------------------- ranking


def rank(rows: Sequence[Row], chosen: set[int], metric: Mapping[str, Any], info: StageInfo, allow_missing: bool) -> (
    tuple[list[Ranked], list[str]]
):  # fmt: skip
    """Groups by the mean of a metric over their finished runs, best first; ties go to the lower id.

    A group with failed or missing seeds is left out, and named in the second value, unless `allow_missing`: the
    mean of those that remain would flatter it.
    """
    ranked, left_out = [], []
    for members in runs.groups(rows).values():
        valued = [(row, runs.value_of(row, metric["name"], info.primary)) for row in members if row["id"] in chosen]
        counted = [(row, value) for row, value in valued if value is not None and row["state"] == "done"]
        if not counted and all(row["state"] == "done" and row["id"] not in chosen for row in members):
            continue  # what the filter leaves out whole is no news
        if not counted or (len(counted) < len(members) and not allow_missing):
            left_out.append(_why_left_out(members, len(counted), metric["name"], valued))
            continue
        ranked.append(_ranked(members, counted, info))
    sign = 1 if metric["better"] == "min" else -1
    ranked.sort(key=lambda group: (sign * group.mean, group.runs[0]))
    return [_placed(group, place) for place, group in enumerate(ranked, start=1)], left_out


def _why_left_out(members: Sequence[Row], n: int, metric: str, valued: Sequence[tuple[Row, float | None]]) -> str:
    states: dict[str, int] = {}
    for row in members:
        if row["state"] != "done":
            states[row["state"]] = states.get(row["state"], 0) + 1
    lacking = sum(value is None and row["state"] == "done" for row, value in valued)
    reasons = [f"{count} {state}" for state, count in states.items()] + (
        [f"{lacking} without {metric}"] if lacking else []
    )
    rest = ", ".join(reasons) or "the filter leaves out the rest"
    return f"{members[0]['label']}: {n} of {len(members)} seeds ({rest})"


def _ranked(members: Sequence[Row], counted: Sequence[tuple[Row, float]], info: StageInfo) -> Ranked:
    values = [value for _, value in counted]
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    first = counted[0][0]
    return Ranked(
        place=0,
        label=first["label"],
        mean=mean,
        std=math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None,
        n=len(values),
        of=len(members),
        runs=tuple(row["id"] for row, _ in counted),
        config={name: value for name, value in first["config"].items() if name not in info.seed_fields},
        seeds=tuple({name: row["config"][name] for name in info.seed_fields} for row, _ in counted),
    )


def _placed(group: Ranked, place: int) -> Ranked:
    return Ranked(**{**vars(group), "place": place})


# ------------------------------------------------------------------------------------------------- the next stage


def prepare(engine: Engine, request: Request) -> Promotion:
    """Work out a promotion; nothing is written. Raises InputError with everything that is wrong."""
    info = runs.stage_info(engine, request.stage)
    metric = info.metric(request.by or info.primary)
    top_count(request.top, 1)  # a bad --top is refused before anything is read
    rows = runs.find(engine, request.stage)
    _refuse_open(rows, request)
    chosen_ids = {row["id"] for row in runs.find(engine, request.stage, request.filter, "done")}
    ranked, left_out = rank(rows, chosen_ids, metric, info, request.allow_missing)
    if not ranked:
        raise InputError(_nothing(request, left_out), "`rnnq examine` shows what there is")
    chosen = ranked[: top_count(request.top, len(ranked))]

    definition = _definition(info, request)
    rule = _rule(definition, request)
    origin, to = _origin(info, definition, rule, request)
    entries, made = _children(chosen, rule, origin.config, request)
    _refuse_foreign(engine, to, origin)
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
        return sweep.load_source(info.source, info.source_sha256, request.defs)
    return None


def _rule(definition: Definition | None, request: Request) -> Stage | None:
    """What grows the winners: the rule of `--rules`, else that of the definition. None: they stay as they are."""
    if request.rules is None:
        return definition.rule(request.stage) if definition else None
    rules = sweep.load(request.rules)
    own = rules.rule(request.stage)
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
    ), to


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

    The second value is how many configs the rule made before equal ones became one.
    """
    changes = parse_changes(request.changes, model)
    family: dict[str, tuple[dict[str, Any], list[Ranked]]] = {}
    made = 0
    for group in chosen:
        for child in sweep.refined(rule, dict(group.config)):
            made += 1
            values = {**child, **changes}
            _, parents = family.setdefault(json.dumps(values, sort_keys=True, default=repr), (values, []))
            parents += [group] if group not in parents else []
    entries = []
    for values, parents in family.values():
        descent = tuple(line for group in parents for line in _descent(group))
        # a seed that the rule or --set states is meant; else the parents' seeds
        entries += [plan.Entry({**seeds, **values}, descent) for seeds in _seeds(parents, request)]
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


def parse_changes(changes: Sequence[str], model: type[Config]) -> dict[str, Any]:
    """ "steps=50000" as a field and its value: JSON where it is JSON, else a word. Raises InputError."""
    types = config.field_types(model)
    found: dict[str, Any] = {}
    problems = []
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            problems.append(f"--set {change}: not of the form key=value")
            continue
        found[name.strip()] = text if types.get(name.strip()) == "str" else _value(text)
    if problems:
        raise InputError(problems, "--set steps=50000")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
