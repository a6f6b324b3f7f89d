"""The rules of what a stage keeps: read, said, refused, and what they mean for one run."""

from __future__ import annotations

import pytest

from rnnq import plan, retention, sweep
from rnnq.errors import InputError
from rnnq.retention import Rule, keeps, parse

BOTH, LAST, BEST, NONE = ({"last", "best"}, {"last"}, {"best"}, set())

RULES = {
    "last and best": (BOTH, None, None),
    "last": (LAST, None, None),
    "best": (BEST, None, None),
    "none": (NONE, None, None),
    "best of top 10": (BEST, "10", NONE),
    "best of top 10%": (BEST, "10%", NONE),
    "last of top 2.5%, best for losers": (LAST, "2.5%", BEST),
    "none for losers": (BOTH, None, NONE),
    "best for losers": (BOTH, None, BEST),
    "last and best for losers": (BOTH, None, BOTH),
    "best, last for losers": (BEST, None, LAST),
    "last and best of top 3, none for losers": (BOTH, "3", NONE),
    "  BEST  of Top 10% ,none  for losers ": (BEST, "10%", NONE),
    "best and last": (BOTH, None, None),
}


@pytest.mark.parametrize("words", RULES)
def test_a_rule_is_read_and_said_so_that_it_is_read_the_same_again(words: str) -> None:
    rule = parse(words)
    winners, top, losers = RULES[words]
    assert rule == Rule(frozenset(winners), top, None if losers is None else frozenset(losers))
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    "words",
    ["", "  ", "worst", "best of top", "best of top 0", "best of top 0%", "best of top 101%", "best of top -3",
     "best of top 2.5", "best of top 1/2", "best of top ten", "best,", ", best for losers", "best none for losers",
     "best, none", "none for winners", "of top 10", "best of top 10, none of losers", "last and last",
     "best\n; DROP TABLE runs"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_a_hint(words: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(words)
    assert refused.value.hint


def test_a_misspelt_rule_is_told_the_nearest_right_one() -> None:
    with pytest.raises(InputError) as refused:
        parse("bset of top 10%")
    assert "did you mean best of top 10%" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("rule", "loses", "last", "best", "kept"),
    [
        ("last and best", False, "l", "b", {"l", "b"}),
        ("last", False, "l", "b", {"l"}),
        ("best", False, "l", "b", {"b"}),
        ("best", False, "l", None, {"l"}),  # a family that keeps no best
        ("best", False, "l", "l", {"l"}),  # the last is the best
        ("last", False, None, "b", {"b"}),  # the last went by an earlier rule
        ("none", False, "l", "b", set()),
        ("best of top 10%", True, "l", "b", set()),
        ("best of top 10%", False, "l", "b", {"b"}),
        ("best, last for losers", True, "l", "b", {"l"}),
        ("last", True, "l", "b", {"l"}),  # says nothing of losers
        ("none", False, None, None, set()),
    ],
)
def test_what_stays_of_a_run(rule: str, loses: bool, last: str | None, best: str | None, kept: set[str]) -> None:
    assert keeps(parse(rule), loses, last, best) == kept


def test_a_stage_without_a_rule_keeps_last_and_best_and_of_losers_the_best() -> None:
    assert str(retention.rule_of(None)) == "last and best, best for losers"
    assert str(retention.rule_of("best of top 3")) == "best of top 3, none for losers"


def test_a_rule_that_only_a_newer_version_can_read_lets_nothing_go() -> None:
    assert keeps(retention.rule_of("weekly"), True, "l", "b") == {"l", "b"}


def test_a_definition_with_several_wrong_rules_lists_them_all() -> None:
    with pytest.raises(InputError) as refused:
        sweep.stage("s 1", "dynamics", [{}], keep="bets")
    assert any("name of a stage" in problem for problem in refused.value.problems)
    assert any(
        "keep=: 'bets' is no rule" in problem and "did you mean best" in problem for problem in refused.value.problems
    )
    with pytest.raises(InputError, match="keep= takes words, not 3"):
        sweep.stage("s", "dynamics", [{}], keep=3)  # type: ignore[arg-type]


def test_a_definition_s_rule_becomes_that_of_the_stage(tmp_path: object) -> None:
    made = sweep.stage("s", "dynamics", [{}], keep="best  OF top 10%")
    assert made.keep == "best of top 10%, none for losers"
    assert plan._origin(made, "x.py", "0").keep == made.keep
