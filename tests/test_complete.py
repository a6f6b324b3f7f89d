"""What the shell offers when Tab is pressed, asked as a shell asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

from rnnq import db, queue
from rnnq.cli import complete
from tests.conftest import claim_one, new_runs, new_stage

RNNQ = Path(sys.executable).parent / "rnnq"  # `python -m rnnq` is not what a shell knows as rnnq


def ask(folder: Path, shell: str, line: str, **environment: str) -> str:
    """What is offered where a line ends; nothing may ever be said on stderr."""
    words = line.split(" ")
    given = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    given |= {"_RNNQ_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [RNNQ], cwd=folder, env={**os.environ, **given, **environment}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def offered(folder: Path, line: str, **environment: str) -> list[str]:
    """The words that bash is offered. A filter with spaces is one word, as bash takes it."""
    return ask(folder, "bash", line, **environment).split("\n")[:-1]


def filtered(folder: Path, text: str, **line: str) -> list[str]:
    """What a filter may go on with, where the rest of the line says this; in this process, as it is much asked."""
    told: Any = SimpleNamespace(params={"db": str(folder / "experiments.db"), **line})
    found = [str(offer) for offer in complete.filters(told, text)]
    assert all(offer.startswith(text) for offer in found)
    return [offer.removeprefix(text) for offer in found]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    """Stages first (60 runs) and second (2), the last with a label that a shell might obey."""
    folder = tmp_path_factory.mktemp("study")
    db.upgrade(str(folder / "experiments.db"))
    engine = db.open(str(folder / "experiments.db"))
    queue.init(engine, [new_stage(60, "first", fields={"seed": "int", "lr": "float", "use_gate": "bool"})])
    metrics = [
        {"name": "loss", "unit": "nats", "better": "min", "primary": True},
        {"name": "val_acc", "unit": "", "better": "max", "primary": False},
    ]
    odd = [replace(run, label='$(touch hacked) `touch hacked` [b] "x:\n') for run in new_runs(2)]
    queue.init(engine, [new_stage(0, "second", runs=odd, metrics=metrics)])
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss")
    yield folder, engine
    engine.dispose()


@pytest.fixture(scope="module")
def folder(study: tuple[Path, Engine]) -> Path:
    return study[0]


def test_commands_are_offered_until_one_is_whole(folder: Path) -> None:
    assert offered(folder, "rnnq worker") == ["worker", "workers"]
    assert offered(folder, "rnnq db u") == ["upgrade"]
    assert {"init", "diff", "db"} < set(offered(folder, "rnnq "))


def test_stages_are_offered_by_option_and_by_argument(folder: Path) -> None:
    assert offered(folder, "rnnq ls --stage ") == ["first", "second"]
    assert offered(folder, "rnnq pause s") == ["second"]


def test_the_newest_runs_are_offered_first_and_at_most_fifty(folder: Path) -> None:
    assert offered(folder, "rnnq show ") == [str(run) for run in range(62, 12, -1)]
    assert offered(folder, "rnnq show 5") == ["59", "58", "57", "56", "55", "54", "53", "52", "51", "50", "5"]
    assert offered(folder, "rnnq show x") == [""]
    assert offered(folder, "rnnq cancel 61 6") == ["62", "60", "6"]


def test_runs_of_an_unfinished_init_are_not_offered(tmp_path: Path) -> None:
    db.upgrade(str(tmp_path / "experiments.db"))
    engine = db.open(str(tmp_path / "experiments.db"))
    queue.init(engine, [new_stage(1)])
    queue._insert_runs(engine, queue._open_intakes(engine, [new_stage(0, "t")]), new_stage(3, "t"))
    engine.dispose()
    assert offered(tmp_path, "rnnq show ") == ["1"]
    assert offered(tmp_path, "rnnq ls --stage ") == ["s"]


def test_a_run_is_described_by_stage_label_and_state(folder: Path) -> None:
    assert "1\tfirst run0, done" in ask(folder, "fish", "rnnq show 1").splitlines()
    assert '"1":"first run0, done"' in ask(folder, "zsh", "rnnq show 1")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_label_that_a_shell_would_obey_is_offered_without_its_signs(folder: Path, shell: str) -> None:
    found = [line for line in ask(folder, shell, "rnnq show 6").splitlines() if "62" in line]
    assert len(found) == 1
    assert "touch hacked" in found[0]
    described = found[0].partition("second ")[2]
    assert not set("$`[\\;&|<>(*") & set(described.removesuffix("))'"))


def test_metrics_are_those_of_the_stage_that_the_line_names(folder: Path) -> None:
    assert offered(folder, "rnnq examine --by ") == ["loss", "val_acc"]
    assert offered(folder, "rnnq examine --stage first --by ") == ["loss"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("state=", {"waiting", "pending", "running", "done", "failed", "cancelled", "skipped"}),
        ("state != ", {"waiting", "pending", "running", "done", "failed", "cancelled", "skipped"}),
        ("state in (done, f", {"ailed"}),
        ("state not in (c", {"ancelled"}),
        ("use_gate=", {"true", "false"}),
        ("loss<2 and use_g", {"ate", "ate="}),
        ("loss<2 ", {"and", "or"}),
        ("lr ", {"and", "or", "in", "not in"}),
        ("state in (done) a", {"nd"}),
        ("lab", {"el=", "el~"}),
        ("not (steps_", {"done=", "done<", "done>"}),
        ("label = 'a ", set()),
        ("lr<", set()),
        ("val_acc@", set()),
        ("ta", {"g=", "g~"}),
    ],
)
def test_the_last_word_of_a_filter_is_completed(folder: Path, text: str, words: set[str]) -> None:
    assert set(filtered(folder, text)) == words


def test_bash_hands_over_a_filter_with_spaces_as_one_word(folder: Path) -> None:
    words = ["rnnq", "ls", "--filter", '"loss<2 and use_g']
    given = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": "3", "_RNNQ_COMPLETE": "complete_bash"}
    done = subprocess.run([RNNQ], cwd=folder, env={**os.environ, **given}, capture_output=True, text=True)
    assert done.stdout == "loss<2 and use_gate\nloss<2 and use_gate=\n"


def test_a_filter_begins_with_a_column_a_field_a_metric_or_not(folder: Path) -> None:
    assert {"state", "lr", "use_gate", "val_acc", "not"} <= set(filtered(folder, ""))
    assert "val_acc" not in filtered(folder, "", stage="first")


def test_devices_are_offered(folder: Path) -> None:
    assert offered(folder, "rnnq worker --device ")[:2] == ["auto", "cpu"]
    assert offered(folder, "rnnq sample 1 --device c")[0] == "cpu"


def test_the_database_is_that_of_the_line_or_of_the_environment(folder: Path, tmp_path: Path) -> None:
    where = str(folder / "experiments.db")
    assert offered(tmp_path, f"rnnq ls --db {where} --stage ") == ["first", "second"]
    assert offered(tmp_path, "rnnq ls --stage ", RNNQ_DB=where) == ["first", "second"]


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "rnnq show "),
        ("zsh", "rnnq ls --stage "),
        ("fish", "rnnq examine --by "),
        ("bash", 'rnnq ls --filter "lo'),
    ],
)
def test_without_a_usable_database_nothing_is_offered_and_nothing_said(tmp_path: Path, shell: str, line: str) -> None:
    ask(tmp_path, shell, line)
    (tmp_path / "experiments.db").write_text("no database, but long enough to be taken for one")
    assert ask(tmp_path, shell, line).strip() in ("", "_files")
    assert [path.name for path in tmp_path.iterdir()] == ["experiments.db"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_itself_completes_what_it_is_told(folder: Path) -> None:
    program = f"""
        PATH={RNNQ.parent}:$PATH
        eval "$(_RNNQ_COMPLETE=source_bash rnnq)"
        COMP_WORDS=(rnnq pause fi) COMP_CWORD=2
        _rnnq_completion rnnq
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("first\n", "")


def test_tab_is_answered_at_once(folder: Path) -> None:
    """Within 1.6 times the time of importing what it is made of; the best of several, taken in turn."""
    baseline, answered = [], []
    for _ in range(6):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import typer, rich, sqlalchemy"], check=True)
        baseline.append(time.perf_counter() - began)
        began = time.perf_counter()
        ask(folder, "bash", "rnnq show ")
        answered.append(time.perf_counter() - began)
    assert min(answered) < 1.6 * min(baseline), (answered, baseline)
