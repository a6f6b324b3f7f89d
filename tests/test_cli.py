"""The command line as its users meet it: what it prints, and what bad input gets."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import textwrap
from pathlib import Path

import pytest

from tests.conftest import Cli

STUDY = """
    import rnnq

    class ToyConfig(rnnq.Config):
        metrics = (rnnq.Metric("loss", "nats", primary=True), rnnq.Metric("acc", "", "max"))
        x: int = 0
        steps: int = 3
        fails: bool = False

    @rnnq.family(ToyConfig)
    def toy(config):
        for step in range(config.steps):
            if config.fails:
                raise ValueError("as asked")
            yield {"loss": config.x + 1 / (1 + step), "acc": 0.5}

    stage = rnnq.stage("toys", toy, rnnq.grid(x=[1, 2, 3]))
"""


def write(folder: Path, text: str = STUDY, name: str = "toy.py") -> str:
    """A definition file below defs/."""
    (folder / "defs").mkdir(exist_ok=True)
    (folder / "defs" / name).write_text(textwrap.dedent(text))
    return f"defs/{name}"


def dynamics(**fields: object) -> str:
    """A definition of one dynamics stage."""
    return f"import rnnq\nstage = rnnq.stage('d', 'dynamics', rnnq.grid(**{fields!r}))\n"


# ------------------------------------------------------------------------------------------------- init, status


def test_init_says_what_it_added_and_again_adds_nothing(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path)
    first = cli("init", file, "--format", "json")
    assert json.loads(first.stdout) == {"stages": [{"stage": "toys", "added": 3, "present": 0}]}
    assert "created experiments.db" in first.stderr
    again = cli("init", file, "--format", "json")
    assert json.loads(again.stdout) == {"stages": [{"stage": "toys", "added": 0, "present": 3}]}


def test_init_names_runs_that_are_no_longer_in_the_definition(cli: Cli, tmp_path: Path) -> None:
    cli("init", write(tmp_path))
    done = cli("init", write(tmp_path, STUDY.replace("[1, 2, 3]", "[2, 3, 4]")))
    assert "1 run no longer in the definition: run 1 (x=1)" in done.stderr
    assert len(json.loads(cli("ls", "--format", "json").stdout)) == 4


def test_a_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("init", write(tmp_path), "--dry-run", "--format", "json")
    assert json.loads(done.stdout)["stages"][0]["added"] == 3
    assert not (tmp_path / "experiments.db").exists()


def test_a_study_runs_from_init_to_show(cli: Cli, tmp_path: Path) -> None:
    cli("init", write(tmp_path, STUDY.replace("x=[1, 2, 3]", "x=[1, 2], fails=[False, True]")))
    worked = cli("worker", "--device", "cpu", code=1)
    assert "FAILED (bug): ValueError: as asked" in worked.stderr

    found = json.loads(cli("status", "--format", "json").stdout)
    assert found["stages"][0]["counts"] == {"done": 2, "failed": 2}
    assert found["failures"][0]["cause"] == "bug"
    assert found["stages"][0]["eta_s"] == 0
    shown = cli("status")
    assert "toys" in shown.stdout
    assert "as asked" in shown.stdout

    rows = list(csv.DictReader(io.StringIO(cli("ls", "--filter", "state = done", "--format", "csv").stdout)))
    assert [row["label"] for row in rows] == ["x=1", "x=2"]

    run = cli("show", "1").stdout
    assert "done, step 3 of 3, attempt 1" in run
    assert "█" in run
    failed = json.loads(cli("ls", "--filter", "state = failed", "--format", "json").stdout)[0]["id"]
    assert 'raise ValueError("as asked")' in cli("show", str(failed)).stdout


def test_the_database_may_be_named_by_option_or_environment(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path)
    cli("init", file, "--db", "one.db")
    cli("init", file, RNNQ_DB="two.db")
    cli("init", file, "--db", f"sqlite:///{tmp_path}/three.db")
    assert all((tmp_path / f"{name}.db").exists() for name in ("one", "two", "three"))
    assert "toys" in cli("status", "--db", "two.db").stdout


def test_python_dash_m_is_the_same_program_and_lists_every_command(cli: Cli) -> None:
    shown = cli("--help").stdout
    for command in ("init", "worker", "status", "ls", "show", "examine", "promote", "db"):
        assert command in shown


def test_output_that_is_cut_off_by_its_reader_is_no_error(cli: Cli, tmp_path: Path) -> None:
    import subprocess
    import sys

    cli("init", write(tmp_path, STUDY.replace("[1, 2, 3]", "range(3000)")))
    program = subprocess.Popen(
        [sys.executable, "-m", "rnnq", "ls"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.readline()
    program.stdout.close()
    said = program.stderr.read()
    program.stderr.close()
    assert program.wait() == 0
    assert "Traceback" not in said


# ---------------------------------------------------------------------------------------------------- bad input


def refused(cli: Cli, *words: str) -> str:
    """What a command says when it refuses the user's input."""
    done = cli(*words, code=2)
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr.partition("hint: the whole trace:")[0]
    return done.stderr


def test_everything_wrong_in_a_definition_is_listed_at_once(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path, dynamics(state_siz=[3], n_layers=[0, 1], lr=[-1.0], corpus=["nowhere.txt"]), "bad.py")
    said = refused(cli, "init", file)
    assert "state_siz (did you mean state_size" in said
    assert "n_layers=0: input should be greater than or equal to 1" in said
    assert "lr=-1.0" in said
    assert not (tmp_path / "experiments.db").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import nowhere_at_all", "nowhere_at_all"),
        ("x = (", "bad.py"),
        ("x = 1", "stage"),
        ("import rnnq\nstage = rnnq.stage('a', 'dynamics', rnnq.grid(n_layers=[1]).where(lambda c: False))", "empty"),
        ("import rnnq\nstage = rnnq.stage('a', 'dynamcs', rnnq.grid(n_layers=[1]))", "dynamics"),
        (dynamics(use_new_state=[False], use_old_state=[False]), "neither state"),
    ],
)
def test_a_bad_definition_is_refused_and_the_database_untouched(cli: Cli, tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(cli, "init", write(tmp_path, text, "bad.py"))
    assert not (tmp_path / "experiments.db").exists()


def test_one_bad_file_of_two_keeps_both_out(cli: Cli, tmp_path: Path) -> None:
    refused(cli, "init", write(tmp_path), write(tmp_path, dynamics(nn=[1]), "bad.py"))
    assert not (tmp_path / "experiments.db").exists()


def test_a_corpus_that_cannot_serve_is_refused_at_init(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"x" * 1000)
    assert "missing.txt" in refused(cli, "init", write(tmp_path, dynamics(corpus=["missing.txt"])))
    assert "empty" in refused(cli, "init", write(tmp_path, dynamics(corpus=["empty.txt"])))
    said = refused(cli, "init", write(tmp_path, dynamics(corpus=["short.txt"], window=[100])))
    assert "too few for window=100" in said
    assert "at least 2,0" in said
    assert not (tmp_path / "experiments.db").exists()


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("los<1.9", 0, "los"),
        ("loss<", 5, ""),
        ("loss<'a'", 5, ""),
        ("(loss<1", 0, "never closed"),
        ("state=dine", 6, "done"),
    ],
)
def test_a_bad_filter_gets_a_caret_under_its_place(cli: Cli, tmp_path: Path, text: str, place: int, says: str) -> None:
    cli("init", write(tmp_path))
    said = refused(cli, "ls", "--filter", text)
    lines = said.splitlines()
    at = next(i for i, line in enumerate(lines) if "filter: " in line)
    start = lines[at].index(text)
    caret = lines[at + 1].index("^")
    assert abs(caret - start - place) <= 1
    assert says in said


def test_databases_that_cannot_be_used_are_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path)
    assert "there is no database" in refused(cli, "status")
    assert "does not exist" in refused(cli, "init", file, "--db", "nowhere/x.db")
    (tmp_path / "text.db").write_text("not a database at all, but long enough")
    assert "is not a database" in refused(cli, "status", "--db", "text.db")
    assert "is not a database" in refused(cli, "init", file, "--db", "text.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    assert "not one of rnnq" in refused(cli, "init", file, "--db", "other.db")
    cli("init", file, "--db", "newer.db")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "has schema 9999" in refused(cli, "status", "--db", "newer.db")
    assert "has schema 9999" in refused(cli, "init", file, "--db", "newer.db")
    assert "folder" in refused(cli, "status", "--db", ".")
    assert "postgresql" in refused(cli, "status", "--db", "mysql://x/y")


def test_what_does_not_exist_is_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    cli("init", write(tmp_path))
    assert "there is no run 99" in refused(cli, "show", "99")
    assert "did you mean toys" in refused(cli, "status", "--stage", "toyz")
    assert "did you mean toys" in refused(cli, "ls", "--stage", "toyz")
    assert "did you mean toys" in refused(cli, "worker", "--stage", "toyz")
    assert "no stage has finished runs" in refused(cli, "examine")
    assert "no stage has finished runs" in refused(cli, "promote", "--top", "1")


def test_a_gpu_that_is_not_there_is_refused_before_any_row_is_claimed(cli: Cli, tmp_path: Path) -> None:
    cli("init", write(tmp_path))
    said = refused(cli, "worker", "--gpu", "97")
    assert "there is no GPU 97" in said
    assert "--device cpu" in said
    refused(cli, "worker", "--device", "tpu:0")
    refused(cli, "worker", "--device", "cpu", "--gpu", "0")
    refused(cli, "worker", "--drain", "--wait")
    refused(cli, "worker", "--checkpoint-every", "1.5")
    assert all(row["attempt"] == 0 for row in json.loads(cli("ls", "--format", "json").stdout))


def test_unknown_commands_and_options_are_refused_with_a_hint(cli: Cli) -> None:
    assert "hint: " in refused(cli, "statu")
    assert "hint: " in refused(cli, "status", "--nope")
    assert "hint: " in refused(cli, "init")


def test_db_check_and_upgrade_say_what_they_found(cli: Cli, tmp_path: Path) -> None:
    cli("init", write(tmp_path))
    assert "no damage found" in cli("db", "check").stdout
    assert "already" in cli("db", "upgrade").stdout
    with sqlite3.connect(tmp_path / "experiments.db") as broken:
        broken.execute("PRAGMA foreign_keys = OFF")
        broken.execute("INSERT INTO lineage VALUES (98, 99, 'promote', NULL)")
    assert "lineage" in cli("db", "check", code=1).stdout
    assert "there is no database" in refused(cli, "db", "upgrade", "--db", "none.db")
