"""Which checkpoints of its finished runs a stage keeps: a rule in a few words, read and said.

    last and best                    of every finished run
    best                             the best alone, or the last of a run that keeps no best
    best of top 10%, none for losers the best of the best tenth of the groups, and nothing of the others
    last and best, best for losers   what a stage without a rule does once it was promoted

Losers are, with `of top`, the groups that rank below; else the runs that were finished when the stage was promoted and
were not taken. Without `of top` and without a word on losers nobody loses. `rnnq gc` alone applies a rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rnnq.errors import InputError, nearest

WHAT = {
    "last and best": frozenset({"last", "best"}),
    "best and last": frozenset({"last", "best"}),
    "last": frozenset({"last"}),
    "best": frozenset({"best"}),
    "none": frozenset[str](),
}
EXAMPLES = (
    "last and best", "last", "best", "none", "best of top 10%", "best of top 10", "last and best of top 10%",
    "best of top 10%, last for losers", "none for losers", "best for losers", "last for losers",
)  # fmt: skip
HINT = '"last and best", "best", "best of top 10%", "last and best of top 10, best for losers", "none for losers"'
_WHAT = "|".join(WHAT)
_RULE = re.compile(
    rf"(?:(?P<what>{_WHAT})(?: of top (?P<top>\S+?))?)?(?P<comma> ?, ?)?(?:(?P<losers>{_WHAT}) for losers)?"
)


@dataclass(frozen=True)
class Rule:
    """What is kept: last, best, both, or nothing."""

    keeps: frozenset[str] = WHAT["last and best"]
    top: str | None = None  # 10, or 10% of the groups: the others are losers
    losers: frozenset[str] | None = None  # what losers keep; None: nobody loses

    def __str__(self) -> str:
        words = _said(self.keeps) + (f" of top {self.top}" if self.top else "")
        return words + (f", {_said(self.losers)} for losers" if self.losers is not None else "")


DEFAULT = Rule(losers=WHAT["best"])


def _said(keeps: frozenset[str]) -> str:
    return next(words for words, meaning in WHAT.items() if meaning == keeps)


def parse(words: str) -> Rule:
    """A rule as a person writes it. Raises InputError, with the nearest right one as a hint."""
    plain = " ".join(words.lower().split())
    found = _RULE.fullmatch(plain)
    both = found is not None and found["what"] is not None and found["losers"] is not None
    if not plain or found is None or both != (found["comma"] is not None):
        raise InputError(f"{words!r} is no rule of what to keep", _near(plain))
    if found["top"] is not None:
        _refuse_share(words, found["top"])
    losers = WHAT[found["losers"]] if found["losers"] else frozenset[str]() if found["top"] else None
    return Rule(WHAT[found["what"] or "last and best"], found["top"], losers)


def _near(words: str) -> str:
    hint = nearest(words, EXAMPLES)
    return hint if hint.startswith("did you mean") else f"for example {HINT}"


def _refuse_share(words: str, top: str) -> None:
    """Raises InputError for a number of groups, or a share of them, that is none."""
    is_share = re.fullmatch(r"\d{1,3}(\.\d{1,6})?%", top) is not None and 0 < Fraction(top[:-1]) <= 100
    if not is_share and re.fullmatch(r"[1-9]\d{0,8}", top) is None:
        raise InputError(f"{words!r}: {top} is neither a number of groups nor a share of them", "top 10, or top 10%")


def rule_of(kept: str | None) -> Rule:
    """The rule of a stage as its row has it. One that another version wrote, and this one cannot read, keeps all."""
    if kept is None:
        return DEFAULT
    try:
        return parse(kept)
    except InputError:
        return Rule()


def keeps(rule: Rule, loses: bool, last: str | None, best: str | None) -> set[str]:
    """Which of the two files of a finished run stay, by their paths.

    Where what is wanted is not there, as the best of a family that keeps none, the other stays in its place.
    """
    wanted = rule.losers if loses and rule.losers is not None else rule.keeps
    there = {what: path for what, path in (("last", last), ("best", best)) if path is not None}
    return {there[what] for what in wanted & there.keys()} or (set(there.values()) if wanted else set())
