"""Which runs, and which groups of them, are the best: what examine shows, and what promote takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from rnnq import runs
from rnnq.errors import InputError
from rnnq.runs import StageInfo

Row = dict[str, Any]


@dataclass(frozen=True)
class Ranked:
    """A group in the order of its mean. `std` is the sample standard deviation (n - 1) over its seeds."""

    place: int | None  # from 1; None for a group that lacks seeds, and so is not ranked
    key: str  # the group_key of its runs
    label: str
    mean: float
    std: float | None
    n: int
    of: int  # runs that the group has
    runs: tuple[int, ...]  # those that count
    values: tuple[float, ...] = field(repr=False)  # of these runs
    config: Mapping[str, Any] = field(repr=False)  # without its seed fields
    seeds: tuple[Mapping[str, Any], ...] = field(repr=False)  # the seed fields of each of these runs
    start_from: Mapping[str, Any] | None = field(default=None, repr=False)  # whose weights its runs started from


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


def best_first(rows: Sequence[Row], info: StageInfo, metric: Mapping[str, Any]) -> list[Row]:
    """The finished runs, best first; ties by id, those without the metric last."""
    sign = -1 if metric["better"] == "max" else 1

    def place(row: Row) -> tuple[bool, float, int]:
        value = runs.value_of(row, metric["name"], info.primary)
        return value is None, sign * (value or 0.0), row["id"]

    return sorted((row for row in rows if row["state"] == "done"), key=place)


def rank(
    rows: Sequence[Row], chosen: set[int], metric: Mapping[str, Any], info: StageInfo, allow_missing: bool
) -> tuple[list[Ranked], list[str]]:
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
    return [replace(group, place=place) for place, group in enumerate(ranked, start=1)], left_out


def with_lacking(rows: Sequence[Row], chosen: set[int], metric: Mapping[str, Any], info: StageInfo) -> list[Ranked]:
    """The groups as `rank` has them, then those that lack seeds, without a place, by the mean of what they have."""
    ranked, left_out = rank(rows, chosen, metric, info, allow_missing=False)
    if not left_out:
        return ranked
    complete = {group.key for group in ranked}
    every, _ = rank(rows, chosen, metric, info, allow_missing=True)
    return ranked + [replace(group, place=None) for group in every if group.key not in complete]


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
    values = tuple(value for _, value in counted)
    first = counted[0][0]
    return Ranked(
        place=None,
        key=first["group_key"],
        label=first["label"],
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        of=len(members),
        runs=tuple(row["id"] for row, _ in counted),
        values=values,
        config={name: value for name, value in first["config"].items() if name not in info.seed_fields},
        seeds=tuple({name: row["config"][name] for name in info.seed_fields} for row, _ in counted),
        start_from=first["start_from"],
    )
