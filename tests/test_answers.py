"""Answers: intervals against tables and SciPy, verdicts at their bounds, and what is said where nothing was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from sqlalchemy import Engine

import rnnq
from rnnq import answers, queue
from rnnq.answers import Answered
from rnnq.cli import answers as command
from rnnq.cli.options import Format
from rnnq.errors import InputError
from rnnq.gates import Gate, Parents
from rnnq.questions import Question
from tests.conftest import Cli, claim_one, new_stage
from tests.studies import ACCURACY, FIELDS, LOSS, new_run
from tests.test_cli import write
from tests.test_graph import STUDY

# ----------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_difference_is_welchs() -> None:
    ours, theirs = [0.84, 0.86, 0.81, 0.85], [0.90, 0.70, 0.82]
    wanted = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert answers.welch(ours, theirs)[1:] == pytest.approx((wanted.low, wanted.high))


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.84, 0.86, 0.81, 0.85]
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert answers.student(values)[1:] == pytest.approx((wanted.low, wanted.high))


def test_values_that_are_all_equal_have_an_interval_without_width() -> None:
    assert answers.welch([1.0, 1.0], [0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    estimate, low, high = answers.welch([1.0, 1.0], [0.4, 0.6])
    assert low < estimate < high


# ------------------------------------------------------------------------------------------------------ verdicts


def add(engine: Engine, name: str, accuracies: list[float], n: int | None = None, **changes: Any) -> None:
    """A stage of n runs, of which so many are done."""
    runs = [new_run(seed, name, seed) for seed in range(n or len(accuracies))]
    queue.init(engine, [new_stage(name=name, runs=runs, **{"fields": FIELDS, "metrics": [LOSS, ACCURACY]} | changes)])
    for value in accuracies:
        queue.finish(engine, claim_one(engine), 10, {"loss": 1.0, "accuracy": value}, "loss", [])
    for _ in range(len(runs) - len(accuracies)):
        claim_one(engine)  # so that the next stage's runs are claimed next


STAGE = answers.Stage(FIELDS, [LOSS, ACCURACY])


def answer(engine: Engine, of: Any = "a", **options: Any) -> Answered:
    asked = rnnq.question("H", "?", of=of, **{"by": "accuracy"} | options)
    [found] = answers.answer(engine, [asked], dict.fromkeys(("a", "b", "c"), STAGE))
    return found


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [
        (0.0, 0.05, "yes"),
        (0.1, 0.05, "no"),
        (-0.1, 0.05, "no"),
        (0.05, 0.05, "not decided"),
        (0.0, 0.001, "not decided"),
    ],
)
def test_means_match_when_their_difference_lies_inside_the_margin(
    engine: Engine, shift: float, margin: float, verdict: str
) -> None:
    values = [0.80, 0.81, 0.79]
    add(engine, "a", [value + shift for value in values])
    add(engine, "b", values)
    found = answer(engine, against="b", margin=margin)
    assert found.verdict == verdict
    [part] = found.parts
    assert part.estimate == pytest.approx(shift)
    assert part.how == "Welch"


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [(0.1, 0.0, "yes"), (0.1, 0.05, "yes"), (0.1, 0.1, "not decided"), (0.0, 0.0, "not decided"), (-0.1, 0.0, "no")],
)
def test_better_is_the_whole_interval_beyond_the_margin(
    engine: Engine, shift: float, margin: float, verdict: str
) -> None:
    values = [0.80, 0.81, 0.79]
    add(engine, "a", [value + shift for value in values])
    add(engine, "b", values)
    assert answer(engine, against="b", claim="better", margin=margin).verdict == verdict


def test_where_low_is_good_better_is_lower(engine: Engine) -> None:
    falls = [LOSS, {**ACCURACY, "better": "min"}]
    add(engine, "a", [0.5, 0.51, 0.49], metrics=falls)
    add(engine, "b", [0.80, 0.81, 0.79], metrics=falls)
    asked = rnnq.question("H", "?", of=["a", "b"], against=["b", "a"], by="accuracy", claim="better")
    stages = dict.fromkeys(("a", "b"), answers.Stage(FIELDS, falls))
    [found] = answers.answer(engine, [asked], stages)
    assert [part.verdict for part in found.parts] == ["yes", "no"]
    assert found.verdict == "no"


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [({"at_least": 0.7}, "yes"), ({"at_least": 0.8}, "not decided"), ({"at_least": 0.9}, "no"),
     ({"at_most": 0.9}, "yes"), ({"at_most": 0.8}, "not decided"), ({"at_most": 0.7}, "no")],
)  # fmt: skip
def test_a_bound_is_held_by_the_whole_interval_of_the_mean(
    engine: Engine, bound: dict[str, float], verdict: str
) -> None:
    add(engine, "a", [0.80, 0.81, 0.79])
    assert answer(engine, **bound).verdict == verdict


@pytest.mark.both
def test_pairs_of_seeds_decide_what_their_spread_would_hide(engine: Engine) -> None:
    add(engine, "a", [0.61, 0.71, 0.81])
    add(engine, "b", [0.60, 0.70, 0.80])
    assert answer(engine, against="b", claim="better").verdict == "not decided"
    paired = answer(engine, against="b", claim="better", paired=True)
    assert (paired.verdict, paired.parts[0].how) == ("yes", "paired by seed, 3 pairs")


def test_without_the_same_seeds_nothing_is_paired_and_the_answer_says_so(engine: Engine) -> None:
    add(engine, "a", [0.61, 0.71, 0.81])
    add(engine, "b", [0.60, 0.70], n=3)
    [part] = answer(engine, against="b", claim="better", paired=True).parts
    assert part.how == "Welch: not paired, as the sides have other seeds"
    assert (part.against is not None) and (part.against.n, part.against.of, part.against.open) == (2, 3, 1)


def test_one_run_a_side_decides_nothing(engine: Engine) -> None:
    add(engine, "a", [0.9], n=2)
    add(engine, "b", [0.5, 0.5])
    found = answer(engine, against="b", claim="better")
    assert found.verdict == "not decided"
    assert found.parts[0].why == "too few runs are done, an interval needs 2 on each side: a has 1 of 2"


def test_a_part_that_was_skipped_is_not_run_with_the_reason_of_its_gate(engine: Engine) -> None:
    add(engine, "a", [0.5, 0.6])
    gate = Gate((Parents("a", when="mean(accuracy) > 0.9"),)).to_json()
    behind = [queue.NewRun(**{**vars(new_run(seed, "b", seed)), "gate": gate}) for seed in range(2)]
    queue.init(engine, [new_stage(name="b", runs=behind, fields=FIELDS, metrics=[LOSS, ACCURACY])])
    found = answer(engine, of="b", at_least=0.9)
    assert (found.verdict, found.parts[0].why) == (
        "not run",
        "b was skipped: mean(accuracy) > 0.9 does not hold of a: mean(accuracy) = 0.55 (n = 2)",
    )
    both = answer(engine, of=["a", "b"], at_least=0.9)
    assert [part.verdict for part in both.parts] == ["not decided", "not run"]
    assert both.verdict == "not decided"


def test_a_stage_that_is_not_queued_yet_is_not_run(engine: Engine) -> None:
    found = answer(engine, of="c", at_least=0.9)
    assert (found.verdict, found.parts[0].why) == ("not run", "c: it is not in the database")


def test_only_the_runs_that_a_filter_selects_count(engine: Engine) -> None:
    add(engine, "a", [0.5, 0.6, 0.9, 0.9])
    [part] = answer(engine, of=rnnq.runs_of("a", "seed >= 2"), at_least=0.9).parts
    assert (part.verdict, part.of.n, part.of.words) == ("yes", 2, "a where seed >= 2")


# ------------------------------------------------------------------------------------------------ checked at load


def refused(*questions: Question) -> list[str]:
    with pytest.raises(InputError) as error:
        answers.refuse(questions, {"aaa": STAGE, "bbb": answers.Stage({}, [{**ACCURACY, "better": "min"}])})
    return error.value.problems


def test_unknown_stages_metrics_and_fields_are_all_said_at_once() -> None:
    first = rnnq.question("H1", "?", of="aab", at_least=1)
    second = rnnq.question("H2", "?", of=rnnq.runs_of("aaa", "widht = 3"), against="aaa", by="acuracy", margin=1)
    third = rnnq.question("H3", "?", of="aaa", against="bbb", by="accuracy", margin=1)
    said = "\n".join(refused(first, second, third))
    assert "question H1: aab is no stage (did you mean aaa?)" in said
    assert "question H2: stage aaa has no metric acuracy (did you mean accuracy?)" in said
    assert "question H2: aaa: " in said
    assert "width" in said
    assert "question H3: aaa and bbb are told apart by accuracy (max) and accuracy (min)" in said


def test_init_refuses_a_question_about_what_there_is_not(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path, STUDY.replace("against=bad", 'against="bda"'))
    done = cli("init", file, code=2)
    assert "question H1: bda is no stage (did you mean bad?)" in done.stderr
    assert not (tmp_path / "experiments.db").exists()


def test_questions_come_from_the_recorded_definition_only_while_it_is_the_same(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rnnq import definitions, plan

    file = tmp_path / write(tmp_path, STUDY)
    queue.init(engine, plan.from_definitions([definitions.load(file)], tmp_path / "defs"))
    address = str(tmp_path / "experiments.db")
    command.answer([], address, tmp_path / "defs", Format.table)
    said = capsys.readouterr().out
    assert said.startswith("H1: not decided. Do both match?\n")
    assert "acc of good (n = 0 of 3, 3 not yet ended) against bad (n = 0 of 3, 3 not yet ended)" in said

    queue.rename(engine, "good", "better")
    command.answer([], address, tmp_path / "defs", Format.csv)  # it still asks for `good`
    assert "H1,Do both match?,not decided" in capsys.readouterr().out

    file.write_text(file.read_text() + "\n# another word\n")
    with pytest.raises(InputError, match="has changed since the stage was made"):
        command.answer([], address, tmp_path / "defs", Format.table)
