"""What the finished runs answer to the questions of a study: differences of means, their intervals, and a verdict.

The interval holds the true difference in 95 of 100 studies (Welch's, which lets the two sides spread as they like;
Student's over the differences where seeds are paired). "match" asks that it lies inside the margin on both sides, which
is stricter than two one-sided tests at 5 %, whose interval is one of 90 %.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine

from rnnq import gates, query, runs
from rnnq.errors import InputError, nearest
from rnnq.questions import Part, Question
from rnnq.sweep import Runs

LEVEL = 0.95
YES, NO, UNDECIDED, NOT_RUN = "yes", "no", "not decided", "not run"

Row = dict[str, Any]
Interval = tuple[float, float, float]  # estimate, low, high


@dataclass(frozen=True)
class Side:
    """The runs of one side: the values of those that are done."""

    words: str
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]  # of these
    of: int  # runs that there are
    states: Mapping[str, int]
    reasons: tuple[str, ...] = ()  # why runs were skipped

    @property
    def n(self) -> int:
        """Runs that count."""
        return len(self.values)

    @property
    def open(self) -> int:
        """Runs that have not ended."""
        return sum(self.states.get(state, 0) for state in query.OPEN)

    def as_row(self) -> Row:
        """For JSON."""
        mean = statistics.fmean(self.values) if self.values else None
        std = statistics.stdev(self.values) if self.n > 1 else None
        return {"runs": self.words, "mean": mean, "std": std, "n": self.n, "of": self.of, "states": dict(self.states)}


@dataclass(frozen=True)
class Answer:
    """What one part of a question comes to."""

    verdict: str  # yes, no, not decided, not run
    why: str
    by: str
    of: Side
    against: Side | None
    estimate: float | None = None  # the difference, of minus against; or the mean
    low: float | None = None
    high: float | None = None
    how: str = ""  # Welch, paired by seed, Student

    def as_row(self) -> Row:
        """For JSON and CSV."""
        sides = {"of": self.of.as_row(), "against": self.against.as_row() if self.against else None}
        return {**asdict(self), **sides}


@dataclass(frozen=True)
class Answered:
    """A question, the rule by which it is answered, and what its parts come to."""

    question: Question
    rule: str
    parts: tuple[Answer, ...]

    @property
    def verdict(self) -> str:
        """Of all parts: yes where all say so, no where one does."""
        found = {part.verdict for part in self.parts}
        if len(found) == 1:
            return found.pop()
        return NO if NO in found else UNDECIDED

    def as_row(self) -> Row:
        """For JSON."""
        asked = {"question": self.question.name, "text": self.question.text, "verdict": self.verdict}
        return {**asked, "rule": self.rule, "parts": [part.as_row() for part in self.parts]}


# --------------------------------------------------------------------------------------------------------- checked


@dataclass(frozen=True)
class Stage:
    """What a question may ask a stage for."""

    fields: Mapping[str, str]  # as it stores them, with aliases
    metrics: Sequence[Mapping[str, Any]]

    def metric(self, name: str | None) -> Mapping[str, Any] | None:
        """A metric by name; without one, or as `loss`, the primary one. None where there is none."""
        named = {str(metric["name"]): metric for metric in self.metrics}
        primary = next((metric for metric in self.metrics if metric["primary"]), None)
        return primary if name is None else named.get(name) or (primary if name == "loss" else None)


def refuse(questions: Sequence[Question], stages: Mapping[str, Stage]) -> None:
    """Raises InputError for questions that name stages, metrics or fields that there are not: all at once."""
    problems = [
        f"question {question.name}: {problem}"
        for question in questions
        for problem in dict.fromkeys(_problems(question, stages))
    ]
    if problems:
        raise InputError(problems, "of= and against= name stages of the same file, or of the database")


def _problems(question: Question, stages: Mapping[str, Stage]) -> list[str]:
    found = []
    for part in question.parts:
        for side in (part.of, part.against):
            if side is not None:
                found += _wrong_side(side, question.by, stages)
        found += _wrong_direction(question, part, stages)
    return found


def _wrong_side(side: Runs, by: str | None, stages: Mapping[str, Stage]) -> list[str]:
    stage = stages.get(side.stage)
    if stage is None:
        hint = f" ({nearest(side.stage, stages)})" if stages else ""
        return [f"{side.stage} is no stage{hint}"]
    found = []
    if stage.metric(by) is None:
        names = [str(metric["name"]) for metric in stage.metrics]
        found.append(f"stage {side.stage} has no metric {by or 'that is primary'} ({nearest(by or '', names)})")
    if side.where is not None:
        try:
            query.compile(side.where, gates.scope(stage.fields, stage.metrics))
        except InputError as error:
            hint = f" ({error.hint})" if error.hint else ""
            found += [f"{side.stage}: {problem}{hint}" for problem in error.problems]
    return found


def _wrong_direction(question: Question, part: Part, stages: Mapping[str, Stage]) -> list[str]:
    if part.against is None or part.of.stage not in stages or part.against.stage not in stages:
        return []
    ours, theirs = (stages[side.stage].metric(question.by) for side in (part.of, part.against))
    if ours is None or theirs is None or (ours["name"], ours["better"]) == (theirs["name"], theirs["better"]):
        return []
    said = [f"{metric['name']} ({metric['better']})" for metric in (ours, theirs)]
    return [f"{part.of.stage} and {part.against.stage} are told apart by {said[0]} and {said[1]}: by= names one metric"]


# -------------------------------------------------------------------------------------------------------- answered


def answer(engine: Engine, questions: Sequence[Question], stages: Mapping[str, Stage]) -> list[Answered]:
    """What the runs that are done say to each question. Stages that are not in the database have not been run."""
    infos = runs.stage_infos(engine)
    infos = {info.defined_as: info for info in infos.values() if info.defined_as} | infos  # renamed since
    found = []
    for question in questions:
        parts = []
        for part in question.parts:
            metric = stages[part.of.stage].metric(question.by)
            assert metric is not None  # see `refuse`
            sides = [_side(engine, infos, one, str(metric["name"])) for one in (part.of, part.against) if one]
            parts.append(_answer(question, metric, sides[0], sides[1] if len(sides) > 1 else None))
        found.append(Answered(question, rule_of(question), tuple(parts)))
    return found


def _side(engine: Engine, infos: Mapping[str, runs.StageInfo], of: Runs, metric: str) -> Side:
    words = of.stage + (f" where {of.where}" if of.where else "")
    info = infos.get(of.stage)
    if info is None:
        return Side(words, (), (), 0, {}, ("it is not in the database",))
    rows = runs.find(engine, info.name, of.where)
    done = [(row, runs.value_of(row, metric, info.primary)) for row in rows if row["state"] == "done"]
    counted = [(row["seed"], value) for row, value in done if value is not None]
    states = Counter(row["state"] for row in rows)
    reasons = dict.fromkeys(row["message"] or "" for row in rows if row["state"] == "skipped")
    values, seeds = tuple(value for _, value in counted), tuple(seed for seed, _ in counted)
    return Side(words, values, seeds, len(rows), states, tuple(reasons))


def rule_of(question: Question) -> str:
    """How a question is decided, in words."""
    interval, margin = f"{LEVEL * 100:g} % interval", f"{question.margin:g}"
    if question.claim == "match":
        return f"yes if the {interval} of the difference lies inside ±{margin}, no if it lies beyond"
    if question.claim == "better":
        by = f" by more than {margin}" if question.margin else ""
        return f"yes if the whole {interval} of the difference says better{by}, no if none of it does"
    return f"yes if the whole {interval} of the mean is {question.claim} {margin}, no if none of it is"


def _answer(question: Question, metric: Mapping[str, Any], of: Side, against: Side | None) -> Answer:
    by = str(metric["name"])
    sides = [of] if against is None else [of, against]
    missing = [side for side in sides if not side.n]
    if any(not side.open and set(side.states) <= {"skipped"} for side in missing):
        return Answer(NOT_RUN, "; ".join(_why_none(side) for side in missing), by, of, against)
    if any(side.n < 2 for side in sides):
        few = ", ".join(f"{side.words} has {side.n} of {side.of}" for side in sides if side.n < 2)
        return Answer(UNDECIDED, f"too few runs are done, an interval needs 2 on each side: {few}", by, of, against)
    estimate, low, high, how = _interval(of, against, question.paired)
    verdict, why = _verdict(question, metric["better"] == "max", low, high)
    return Answer(verdict, why, by, of, against, estimate, low, high, how)


def _why_none(side: Side) -> str:
    if side.states.get("skipped"):
        return f"{side.words} was skipped: {'; '.join(side.reasons)}"
    return f"{side.words}: {side.reasons[0] if side.reasons else 'no run of it is done'}"


def _interval(of: Side, against: Side | None, paired: bool) -> tuple[float, float, float, str]:
    if against is None:
        return *student(of.values), "Student's t"
    if not paired:
        return *welch(of.values, against.values), "Welch"
    ours, theirs = _by_seed(of), _by_seed(against)
    if ours.keys() != theirs.keys() or None in ours:
        return *welch(of.values, against.values), "Welch: not paired, as the sides have other seeds"
    if len(ours) < 2:
        return *welch(of.values, against.values), "Welch: not paired, as there is one seed"
    return *student([ours[seed] - theirs[seed] for seed in ours]), f"paired by seed, {len(ours)} pairs"


def _by_seed(side: Side) -> dict[int | None, float]:
    """The mean of each seed: a side may have several configs."""
    found: dict[int | None, list[float]] = {}
    for seed, value in zip(side.seeds, side.values, strict=True):
        found.setdefault(seed, []).append(value)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _verdict(question: Question, high_is_good: bool, low: float, high: float) -> tuple[str, str]:
    margin = question.margin
    if question.claim == "match":
        if -margin < low and high < margin:
            return YES, f"the interval lies inside ±{margin:g}"
        if low > margin or high < -margin:
            return NO, f"the whole interval lies beyond ±{margin:g}"
        return UNDECIDED, f"the interval reaches over the margin of ±{margin:g}"
    if question.claim == "better":
        worst, best = (low, high) if high_is_good else (-high, -low)
        holds, fails = worst > margin, best <= margin
        words = f"says better{f' by more than {margin:g}' if margin else ''}"
    else:
        sign = 1 if question.claim == "at least" else -1
        worst, best = sorted((sign * low, sign * high))
        holds, fails = worst >= sign * margin, best < sign * margin
        words = f"is {question.claim} {margin:g}"
    if holds or fails:
        return (YES, f"the whole interval {words}") if holds else (NO, f"none of the interval {words}")
    return UNDECIDED, f"the interval reaches over {margin:g}"


def student(values: Sequence[float]) -> Interval:
    """The mean and its interval by Student's t. Needs two values."""
    mean = statistics.fmean(values)
    return _around(mean, statistics.variance(values) / len(values), len(values) - 1)


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The difference of two means, first minus second, and its interval (Welch 1947). Needs two values of each."""
    a, b = (statistics.variance(values) / len(values) for values in (ours, theirs))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    spread = a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1)
    return _around(difference, a + b, (a + b) ** 2 / spread if spread else 1.0)


def _around(estimate: float, variance: float, free: float) -> Interval:
    from scipy.special import stdtrit  # scipy.stats would take a second to load

    half = float(stdtrit(free, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return estimate, estimate - half, estimate + half
