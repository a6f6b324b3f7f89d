"""Questions as a definition states them: what is refused before anything is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rnnq
from rnnq import definitions
from rnnq.errors import InputError
from rnnq.questions import Part, Question
from rnnq.sweep import Runs
from tests.test_cli import write


def ask(**options: Any) -> Question:
    return rnnq.question("H1", "Is it so?", **options)


def test_a_question_names_stages_or_some_of_their_runs() -> None:
    of = rnnq.runs_of("a", "width = 64")
    asked = ask(of=of, against=rnnq.stage("b", "f", [{}]), by="acc", margin=0.02)
    assert asked == Question("H1", "Is it so?", (Part(of, Runs("b")),), "acc", "match", 0.02)


def test_several_stages_are_several_parts_each_with_its_own_or_with_one_to_compare_with() -> None:
    assert ask(of=["a", "b"], at_least=0.95).parts == (Part(Runs("a")), Part(Runs("b")))
    assert ask(of=["a", "b"], against="c", margin=1).parts == (Part(Runs("a"), Runs("c")), Part(Runs("b"), Runs("c")))
    pairs = ask(of=["a", "b"], against=["c", "d"], claim="better").parts
    assert pairs == (Part(Runs("a"), Runs("c")), Part(Runs("b"), Runs("d")))


def test_a_bound_is_a_claim_of_its_own() -> None:
    assert (ask(of="a", at_most=2).claim, ask(of="a", at_most=2).margin) == ("at most", 2.0)
    assert (ask(of="a", at_least=0).claim, ask(of="a", at_least=0).margin) == ("at least", 0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"of": "a"}, "lacks what it compares with"),
        ({"of": "a", "against": "b"}, "two means are never equal"),
        ({"of": "a", "against": "b", "margin": 0}, "two means are never equal"),
        ({"of": "a", "against": "b", "margin": -1}, "margin= takes a number, at least 0, not -1"),
        ({"of": "a", "against": "b", "margin": True}, "margin= takes a number"),
        ({"of": "a", "against": "b", "claim": "equal", "margin": 1}, "claim= is one of match, better; not 'equal'"),
        ({"of": "a", "against": "b", "at_least": 1}, "has against= and a bound"),
        ({"of": "a", "at_least": 1, "at_most": 2}, "at_least= and at_most= are two questions"),
        ({"of": "a", "at_least": float("nan")}, "at_least= takes a number"),
        ({"of": "a", "at_least": 1, "margin": 0.1}, "claim= and margin= go with against="),
        ({"of": "a", "at_least": 1, "paired": True}, "paired= is True or False, and goes with against="),
        ({"of": [], "at_least": 1}, "of= is empty"),
        ({"of": ["a", "b"], "against": "b", "margin": 1}, "compares b with itself"),
        ({"of": 3, "at_least": 1}, "of= takes stages, or rnnq.runs_of(...), not 3"),
        ({"of": "no/name", "at_least": 1}, "of=: 'no/name' cannot be the name of a stage"),
        ({"of": ["a", "b", "c"], "against": ["a", "b"], "margin": 1}, "of= names 3, and against= 2"),
        ({"of": rnnq.runs_of("a", when="mean(x) > 1"), "at_least": 1}, "which are for after="),
        ({"of": "a", "at_least": 1, "by": ""}, "by= takes the name of a metric, not ''"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        ask(**options)
    assert says in error.value.message


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        rnnq.question("", "x", of=3, against="b", claim="equal", paired=1)  # type: ignore[arg-type]
    assert len(error.value.problems) == 4


STAGE = 'import rnnq\na = rnnq.stage("a", "dynamics", rnnq.grid(steps=10))\n'


def test_a_definition_has_its_questions_in_order_also_those_in_a_list(tmp_path: Path) -> None:
    text = STAGE + 'asked = [rnnq.question(f"H{i}", "?", of=a, at_most=i) for i in range(2)]\n'
    text += 'more = rnnq.question("H2", "?", of=a, at_most=1)\nsame = more\n'
    found = definitions.load(tmp_path / write(tmp_path, text))
    assert [question.name for question in found.questions] == ["H0", "H1", "H2"]


def test_two_questions_of_one_name_are_refused(tmp_path: Path) -> None:
    text = STAGE + 'asked = [rnnq.question("H1", "?", of=a, at_most=i) for i in range(2)]\n'
    with pytest.raises(InputError, match="2 questions are named H1"):
        definitions.load(tmp_path / write(tmp_path, text))
