"""What a study shall answer: questions about the runs of its stages, stated before these are trained. Pure.

rnnq.question("H1", "Does the small LSTM match the transformer?", of="lstm", against="transformer", margin=0.02)
rnnq.question("H4", "Does it scale?", of=["lstm_5s8a", "lstm_8s8a"], by="val_score", at_least=0.95)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rnnq.errors import InputError
from rnnq.sweep import Runs, Stage, runs_of

CLAIMS = ("match", "better")

_Of = str | Stage | Runs


@dataclass(frozen=True)
class Part:
    """One comparison of a question: the means of two sets of runs, or one against a number."""

    of: Runs
    against: Runs | None = None


@dataclass(frozen=True)
class Question:
    """A question with the rule by which it is answered. Made by `question`, which checks it."""

    name: str
    text: str
    parts: tuple[Part, ...]
    by: str | None  # the metric; None: the primary one
    claim: str  # match, better; at least, at most: of a mean and `margin`
    margin: float
    paired: bool = False


def question(
    name: str,
    text: str,
    *,
    of: _Of | Iterable[_Of],
    against: _Of | Iterable[_Of] | None = None,
    by: str | None = None,
    claim: str | None = None,
    margin: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    paired: bool = False,
) -> Question:
    """State a question that the runs of one stage, or of two, shall answer. Bind it to a name of the module.

    of, against     stages, or `rnnq.runs_of(...)`; several of them make a question of several parts
    by              the metric; default: the primary one
    claim           "match" (default): the means differ by less than `margin`; "better": that of `of` is better by
                    more than `margin` (default 0)
    at_least        instead of `against`: the mean is at least so much
    at_most         or at most
    paired          compare seed by seed, where both sides have the same seeds: right where a seed makes the two alike
                    (the same data, say, or weights that the one took over from the other)

    Decided by the 95 % interval of the difference, or of the mean; see `rnnq plan --answers`.
    """
    problems = _wrong_words(name, text, by)
    parts, wrong = _parts(of, against)
    bounds = {"at least": at_least, "at most": at_most}
    given = {words: value for words, value in bounds.items() if value is not None}
    wrong += _wrong_bounds(given) if given else _wrong_claim(claim, margin)
    wrong += _wrong_sides(against, given, claim, margin)
    if not isinstance(paired, bool) or (paired and against is None):
        wrong.append("paired= is True or False, and goes with against=")
    shown = name if isinstance(name, str) else repr(name)
    problems += [f"question {shown}: {problem}" for problem in wrong]
    if problems:
        raise InputError(problems, f"for example: {__doc__.splitlines()[2].strip()}")
    if given:
        [(claim, margin)] = given.items()
    return Question(name, text, parts, by, claim or "match", float(margin or 0.0), paired)


def _parts(of: Any, against: Any) -> tuple[tuple[Part, ...], list[str]]:
    ours, wrong = _sides("of", of)
    theirs, also = _sides("against", against) if against is not None else ([], [])
    wrong += also
    if wrong:
        return (), wrong
    if len(theirs) > 1 and len(theirs) != len(ours):
        return (), [f"of= names {len(ours)}, and against= {len(theirs)}: give as many, or one against= for all"]
    if not theirs:
        return tuple(Part(one) for one in ours), []
    theirs *= len(ours) if len(theirs) == 1 else 1
    same = [f"compares {one.stage} with itself" for one, other in zip(ours, theirs, strict=True) if one == other]
    return tuple(Part(one, other) for one, other in zip(ours, theirs, strict=True)), same


def _sides(what: str, value: Any) -> tuple[list[Runs], list[str]]:
    items = [value] if isinstance(value, (str, Stage, Runs)) else value
    wants = f"{what}= takes stages, or rnnq.runs_of(...)"
    if not isinstance(items, Iterable):
        return [], [f"{wants}, not {value!r}"]
    found: list[Runs] = []
    problems: list[str] = []
    for item in items:
        if not isinstance(item, (str, Stage, Runs)):
            problems.append(f"{wants}, not {item!r}")
            continue
        try:
            found.append(item if isinstance(item, Runs) else runs_of(item))
        except InputError as error:
            problems += [f"{what}=: {problem}" for problem in error.problems]
    if any(one.when is not None or one.same_seed for one in found):
        problems.append(f"{what}=: rnnq.runs_of(...) has when= or same_seed=, which are for after=")
    return found, problems or ([] if found else [f"{what}= is empty"])


def _wrong_words(name: Any, text: Any, by: Any) -> list[str]:
    problems = [
        f"a question has words as its {what}, not {value!r}"
        for what, value in (("name", name), ("text", text))
        if not (isinstance(value, str) and value.strip())
    ]
    if by is not None and not (isinstance(by, str) and by.strip()):
        problems.append(f"question {name}: by= takes the name of a metric, not {by!r}")
    return problems


def _wrong_bounds(given: dict[str, Any]) -> list[str]:
    if len(given) > 1:
        return ["at_least= and at_most= are two questions"]
    return [f"{words.replace(' ', '_')}= takes a number, not {v!r}" for words, v in given.items() if not _is_number(v)]


def _wrong_claim(claim: Any, margin: Any) -> list[str]:
    problems = [] if claim is None or claim in CLAIMS else [f"claim= is one of match, better; not {claim!r}"]
    if margin is not None and not (_is_number(margin) and margin >= 0):
        problems.append(f"margin= takes a number, at least 0, not {margin!r}")
    elif claim in (None, "match") and not margin:
        problems.append("two means are never equal: margin= says how far they may lie apart, above 0")
    return problems


def _wrong_sides(against: Any, given: dict[str, Any], claim: Any, margin: Any) -> list[str]:
    if against is None and not given:
        return ["lacks what it compares with: against=, at_least= or at_most="]
    if against is not None and given:
        return ["has against= and a bound: two questions"]
    if given and (claim is not None or margin is not None):
        return ["claim= and margin= go with against="]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
