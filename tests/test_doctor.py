"""The doctor: what he proves from the rows, each finding made wrong on purpose; the backup; strangers' databases."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from rnnq import db, doctor, queue, runs, stored
from rnnq.errors import DatabaseError, InputError, LeaseLost
from tests.conftest import Cli, claim_one, new_stage
from tests.processes import Study, pseudo_text

CONTENT = b"as if it were a checkpoint"
DEFINITION = """
import rnnq
stage = rnnq.stage("s", "dynamics", rnnq.grid(seed=[0]), base=dict(
    corpus="text", state_size=4, window=32, batch_size=4, log_every=10, eval_every=50, steps=60))
"""


def path_of(engine: Engine) -> Path:
    return Path(engine.url.database or "")


def write(engine: Engine, sql: str, *values: Any) -> None:
    """Change the database behind rnnq's back, and past its rules; on a server within them."""
    if db.file_of(engine) is None:
        with db.transaction(engine) as connection:
            connection.exec_driver_sql(sql)
        return
    with closing(sqlite3.connect(path_of(engine))) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(sql, values)
        connection.commit()


def examined(engine: Engine, stage: str | None = None, deep: bool = False) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(engine, stage, deep)}


def levels(found: Mapping[str, doctor.Finding], level: str) -> set[str]:
    return {finding.name for finding in found.values() if finding.level == level}


def saved(engine: Engine, claim: queue.Claim, step: int) -> dict[str, Any]:
    """A file on disk, and what a row says of it."""
    study, _, root = db.study(engine)
    path = f"checkpoints/{study}/{claim.stage}/{claim.run}/a{claim.attempt}-s{step}.pt"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(CONTENT)
    return {"path": path, "step": step, "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}


def begin(engine: Engine, step: int = 0, worker: str = "w", now: float | None = None) -> queue.Claim:
    """Claim the next run, and start it at a step."""
    claim = claim_one(engine, worker, now)
    queue.restore(engine, claim, queue.Start(step, (), {}, True))
    return claim


def done(engine: Engine, step: int = 10, first: int = 0) -> queue.Claim:
    """A run that is trained to its end, with a last and a best checkpoint."""
    claim = begin(engine, first)
    file = saved(engine, claim, step)
    queue.finish(engine, claim, step, {"loss": 1.0}, "loss", [("loss", step, 1.0)], file, file)
    return claim


@pytest.fixture
def two(engine: Engine) -> Engine:
    """A study with a run that is done and one that is pending."""
    queue.init(engine, [new_stage(2)])
    done(engine)
    return engine


# ---------------------------------------------------------------------------------------------- replaying attempts


def test_a_healthy_study_has_nothing_wrong(two: Engine) -> None:
    found = examined(two, deep=True)
    assert levels(found, "ok") == set(found)
    assert found["runs"].numbers == {"total": 2, "pending": 1, "done": 1}
    assert found["attempts"].numbers["per_run"] == {1: 1}
    assert found["checkpoints"].numbers["named"] == 1
    assert "journal" in found


def test_a_process_of_its_own_that_looks_at_the_disk_finds_the_same(
    two: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = begin(two)
    (path_of(two).parent / saved(two, claim, 5)["path"]).rename(path_of(two).parent / "elsewhere")
    saved(two, claim, 7)
    queue.release(two, claim)

    def looked() -> dict[str, Any]:
        found = examined(two)
        return {name: (found[name].says, found[name].numbers) for name in ("checkpoints", "files")}

    here = looked()
    monkeypatch.setattr(stored, "MANY", 0)
    assert looked() == here
    monkeypatch.setattr(sys, "executable", "/bin/false")  # a process that cannot be started well
    assert looked() == here
    assert here["files"][1]["n"] == 1


def test_the_findings_of_an_empty_study_are_all_ok(engine: Engine) -> None:
    found = examined(engine, deep=True)
    assert levels(found, "ok") == set(found)


def test_a_run_that_was_lost_and_done_nevertheless_is_counted_with_the_steps_done_twice(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    first = begin(engine, now=1000.0)
    queue.record(engine, first, 4, (), saved(engine, first, 4))
    queue.record(engine, first, 9)
    queue.reap(engine, now=1090.0)  # 9 steps in 90 s, by this attempt's own speed 5 of them in 50
    done(engine, 10, first=4)

    found = examined(engine)
    assert found["leases"].numbers == {"attempts": 1, "runs": 1, "done_nevertheless": 1}
    assert found["repeats"].numbers == {
        "steps": 5,
        "seconds": pytest.approx(50.0),
        "of_steps": 15,
        "by_end": {"lost": {"attempts": 1, "steps": 5, "seconds": pytest.approx(50.0)}},
    }
    assert "is refused" in str(found["leases"].hint)
    assert found["refused"].numbers["writes"] == 0
    assert not levels(found, "problem") - {"checkpoints"}
    assert found["ends"].numbers["ended"] == [
        {"ended": "done", "cause": None, "n": 1},
        {"ended": "lost", "cause": "lost", "n": 1},
    ]


@pytest.mark.both
def test_late_writes_that_were_refused_are_told_for_each_run(engine: Engine) -> None:
    queue.init(engine, [new_stage(3), new_stage(1, name="other")])
    late = [begin(engine, now=1000.0) for _ in range(3)]
    queue.reap(engine, now=2000.0)
    with pytest.raises(LeaseLost):
        queue.record(engine, late[0], 5, [("loss", 5, 1.0)])
    for claim in late[:2]:
        with pytest.raises(LeaseLost):
            queue.finish(engine, claim, 10, {"loss": 1.0}, "loss")
    with pytest.raises(LeaseLost):
        queue.release(engine, late[1])

    found = examined(engine)["refused"]
    assert found.level == "note"
    assert "4 late writes to 2 runs rejected: 2 finish, 1 record, 1 release" in found.says
    assert found.numbers["by_run"] == {1: 2, 2: 2}
    assert examined(engine, "other")["refused"].numbers["writes"] == 0
    assert examined(engine, "s")["refused"].numbers["writes"] == 4
    assert {run["state"] for run in runs.find(engine, "s")} == {"pending"}


def test_that_a_refusal_cannot_be_put_on_record_changes_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "REFUSED", 0.05)
    queue.init(engine, [new_stage(1)])
    late = begin(engine, now=1000.0)
    queue.reap(engine, now=2000.0)
    write(engine, "DROP TABLE changes")
    with pytest.raises(LeaseLost):
        queue.record(engine, late, 5)


def test_a_worker_that_woke_up_late_is_on_record(tmp_path: Path) -> None:
    with Study(tmp_path, lease=1.0) as study:
        (tmp_path / "text").write_bytes(pseudo_text(20_000))
        study.rnnq("init", study.define(DEFINITION))
        sleeper = study.worker({"at": "written", "do": "stop", "step": 40}, every=20, runs=1)
        sleeper.expect("stopped")
        study.worker(every=20).end()
        sleeper.send(signal.SIGCONT)
        told = sleeper.expect("lost")
        sleeper.end()
        [row] = study.rows("SELECT detail, command_line FROM changes WHERE verb = 'refused'")
        assert json.loads(row["detail"])["run"] == told["run"]
        assert json.loads(row["detail"])["what"] == "record"
        assert "1 late write to 1 run rejected" in " ".join(study.rnnq("doctor").split())


def test_an_attempt_that_never_began_to_train_hides_no_repeated_steps(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    first = begin(engine, now=1000.0)
    queue.record(engine, first, 6)
    queue.reap(engine, now=1070.0)
    claim_one(engine, now=1100.0)  # lost before it opened a checkpoint
    queue.reap(engine, now=1200.0)
    done(engine)

    assert examined(engine)["repeats"].numbers["steps"] == 6


def test_an_extended_run_is_no_run_that_was_done_twice(two: Engine) -> None:
    assert queue.extend(two, {1: 20}) == [1]
    done(two, 20, first=10)

    found = examined(two)
    assert found["doubles"].level == "ok"
    assert found["attempts"].numbers["per_run"] == {2: 1}


def test_a_run_that_was_done_twice_is_found(two: Engine) -> None:
    write(two, "UPDATE runs SET state = 'pending', ended_at = NULL WHERE id = 1")
    done(two)

    found = examined(two)["doubles"]
    assert found.level == "problem"
    assert found.numbers["runs"] == [1]


def test_an_extension_excuses_only_what_comes_after_it(two: Engine) -> None:
    write(two, "UPDATE runs SET state = 'pending', ended_at = NULL WHERE id = 1")
    done(two)
    assert queue.extend(two, {1: 20}) == [1]
    done(two, 20, first=10)

    found = examined(two)["doubles"]
    assert (found.numbers["n"], found.numbers["runs"]) == (1, [1])


def test_a_run_that_was_trained_again_although_done_is_found_even_if_that_was_lost(two: Engine) -> None:
    write(two, "UPDATE runs SET state = 'pending', ended_at = NULL WHERE id = 1")
    begin(two)

    found = examined(two)["doubles"]
    assert found.level == "problem"
    assert (found.numbers["n"], found.numbers["runs_trained_after_done"]) == (0, [1])


@pytest.mark.both
def test_attempts_that_overlap_are_found_also_when_another_lies_between(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    for moment in (1000.0, 2000.0):
        begin(engine, now=moment)
        queue.reap(engine, now=moment + 100)
    queue.release(engine, begin(engine))
    assert examined(engine)["overlaps"].level == "ok"

    write(engine, "UPDATE attempts SET ended_at = 5000 WHERE attempt = 1")
    write(engine, "UPDATE attempts SET started_at = 1500, ended_at = 1500 WHERE attempt = 2")
    write(engine, "UPDATE attempts SET started_at = 4000, ended_at = 6000 WHERE attempt = 3")
    found = examined(engine)["overlaps"]
    assert found.level == "problem"
    assert found.numbers == {"n": 1, "runs": [1], "longest_s": 1000.0}
    write(engine, "UPDATE attempts SET ended = NULL, ended_at = NULL WHERE attempt != 2")
    assert examined(engine)["overlaps"].numbers == {"n": 1, "runs": [1], "longest_s": None}


@pytest.mark.parametrize(
    ("what", "sql"),
    [
        ("numbered", "UPDATE attempts SET attempt = 2 WHERE run_id = 1"),
        ("numbered", "UPDATE runs SET attempt = 2 WHERE id = 1"),
        ("without an end", "UPDATE attempts SET ended = NULL, ended_at = NULL WHERE run_id = 1"),
        ("did not end done", "UPDATE attempts SET ended = 'failed' WHERE run_id = 1"),
    ],
)
def test_a_run_that_is_not_where_its_last_attempt_left_it_is_found(two: Engine, what: str, sql: str) -> None:
    write(two, sql)
    found = examined(two)["order"]
    assert found.level == "problem"
    assert [ids["runs"] for name, ids in found.numbers.items() if what in name] == [[1]]


@pytest.mark.parametrize(
    ("what", "sql"),
    [
        ("a state that is none", "UPDATE runs SET state = 'asleep' WHERE id = 2"),
        ("without a lease", "UPDATE runs SET state = 'running' WHERE id = 2"),
        ("without a lease", "UPDATE runs SET lease_until = 1 WHERE id = 2"),
        ("without a worker", "UPDATE runs SET worker = 'w' WHERE id = 2"),
        ("without a time", "UPDATE runs SET ended_at = 1 WHERE id = 2"),
        ("asked to stop", "UPDATE runs SET wish = 'cancel' WHERE id = 2"),
        ("without a summary", "UPDATE runs SET state = 'done', ended_at = 1 WHERE id = 2"),
        ("without an attempt", "UPDATE runs SET attempt = 1 WHERE id = 2"),
    ],
)
def test_a_row_that_breaks_a_rule_is_found(two: Engine, what: str, sql: str) -> None:
    assert examined(two)["invariants"].level == "ok"
    write(two, sql)
    found = examined(two)["invariants"]
    assert found.level == "problem"
    [ids] = [ids for name, ids in found.numbers.items() if what in name]
    assert ids == {"n": 1, "runs": [2]}


@pytest.mark.both
def test_points_after_the_last_checkpoint_of_a_pending_run_are_counted(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    claim = begin(engine)
    queue.record(engine, claim, 4, [("loss", 2, 1.0), ("loss", 4, 1.0)], saved(engine, claim, 4))
    queue.record(engine, claim, 8, [("loss", 6, 1.0), ("acc", 6, 1.0), ("loss", 8, 1.0)])
    queue.release(engine, claim)
    assert examined(engine)["points"].numbers == {"points": 3, "runs": 1}


@pytest.mark.both
def test_only_the_runs_of_the_stage_that_is_named_count(two: Engine) -> None:
    queue.init(two, [new_stage(3, name="other")])
    write(two, "UPDATE attempts SET attempt = 2 WHERE run_id = 1")
    other = examined(two, "other")
    assert other["runs"].numbers == {"total": 3, "pending": 3}
    assert other["order"].level == "ok"
    assert examined(two, "s")["order"].level == "problem"
    with pytest.raises(InputError, match="there is no stage 'others'"):
        doctor.examine(two, "others")


def test_runs_of_an_init_that_has_not_ended_are_nobodys(two: Engine) -> None:
    write(two, "UPDATE intakes SET complete = 0, beat_at = 1, pid_start = NULL")
    found = examined(two)
    assert found["runs"].numbers["total"] == 0
    assert found["intakes"].level == "note"
    assert (found["intakes"].numbers["inits"], found["intakes"].numbers["rows"]) == (["s"], 2)
    write(two, "UPDATE intakes SET removing = 1")
    assert examined(two)["intakes"].numbers["deletes"] == ["s"]


# --------------------------------------------------------------------------------------------------------- files


def test_a_checkpoint_that_is_missing_or_of_another_size_or_elsewhere_is_found(two: Engine) -> None:
    [path] = path_of(two).parent.glob("checkpoints/*/s/1/a1-s10.pt")
    path.write_bytes(CONTENT + b"!")
    found = examined(two)["checkpoints"]
    assert (found.level, found.numbers["wrong"]) == ("problem", {"of another size": 1})
    path.unlink()
    assert examined(two)["checkpoints"].numbers["wrong"] == {"missing": 1}
    for stranger in ("../../etc/passwd", "/etc/passwd"):
        write(two, "DELETE FROM artifacts")
        write(two, "UPDATE runs SET checkpoint = json_set(checkpoint, '$.path', ?), checkpoint_best = NULL", stranger)
        wrong = examined(two, deep=True)["checkpoints"]
        assert wrong.numbers["wrong"] == {"outside of the study's folder": 1}


def test_a_checkpoint_with_other_bytes_is_found_by_a_deep_look_alone(two: Engine) -> None:
    [path] = path_of(two).parent.glob("checkpoints/*/s/1/a1-s10.pt")
    path.write_bytes(CONTENT[::-1])
    assert examined(two)["checkpoints"].level == "ok"
    found = examined(two, deep=True)["checkpoints"]
    assert (found.level, found.numbers["wrong"]) == ("problem", {"with other bytes": 1})


def test_files_that_no_row_names_are_counted_but_not_logs_and_what_is_being_written(two: Engine) -> None:
    claim = begin(two)  # run 2, attempt 1
    study, _, root = db.study(two)
    mine, logs = root / "checkpoints" / study / "s", root / "logs" / study
    nobodys = [mine / "1/a1-s5.pt", mine / "2/a2-s5.pt", mine / "7/a1-s1.pt", mine / "stray", logs / "2/a2.txt"]
    expected = [mine / "2/a1-s3.pt", mine / "2/.a1-s4.pt.77.tmp", logs / "1/a1.txt", logs / "2/a1.txt"]
    for path in (*nobodys, *expected):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")

    found = examined(two)["files"]
    assert (found.level, found.numbers["bytes"]) == ("note", 25)
    assert {root / path for path in found.numbers["files"]} == set(nobodys)
    queue.release(two, claim)
    assert examined(two)["files"].numbers["n"] == 7  # nobody writes the two any more


def test_a_row_with_a_checkpoint_that_cannot_be_read_hides_no_other_finding(two: Engine) -> None:
    write(two, "UPDATE runs SET checkpoint = 'rubbish'")
    found = examined(two)
    assert found["files"].level == "problem"
    assert "could not be looked at" in found["files"].says
    assert found["disk"].level == "ok"


# ----------------------------------------------------------------------------------- the database, its place, clock


def test_damage_is_found(two: Engine) -> None:
    write(two, "DELETE FROM metrics")
    found = examined(two)["integrity"]
    assert (found.level, found.numbers["damages"]) == ("problem", 1)


@pytest.mark.both
def test_clocks_that_were_set_back_are_found(two: Engine) -> None:
    assert examined(two)["clock"].level == "ok"
    begin(two)
    write(two, "UPDATE workers SET beat_at = beat_at + 100")
    write(two, "UPDATE runs SET lease_until = lease_until + 100 WHERE state = 'running'")
    write(two, "UPDATE attempts SET started_at = started_at + 100")
    numbers = examined(two)["clock"].numbers
    assert (numbers["beats"], numbers["leases"], numbers["begins"], numbers["backwards"]) == (1, 1, 2, 1)
    assert abs(numbers["difference_s"]) < 1


def test_a_database_without_its_write_ahead_log_is_a_problem(two: Engine) -> None:
    two.dispose()
    write(two, "PRAGMA journal_mode = DELETE")
    assert examined(two)["journal"].level == "problem"


MOUNTS = r"""sysfs /sys sysfs rw 0 0
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/sdb1 /home/me/local\040disk xfs rw 0 0
//nas/data /mnt/my\040data cifs rw 0 0
auto.data /data autofs rw 0 0
tank /data lustre rw 0 0
me@host: /home/me/far fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/srv/x.db", None),
        ("/home/me/x.db", "nfs4"),
        ("/homes/x.db", None),
        ("/home/me/local disk/x.db", None),
        ("/mnt/my data/x.db", "cifs"),
        ("/data/x.db", "lustre"),
        ("/home/me/far/x.db", "fuse.sshfs"),
        ("/home/me/far/../x.db", "nfs4"),
    ],
)
def test_a_network_file_system_is_known_by_the_longest_mount(path: str, found: str | None) -> None:
    assert db.on_network(Path(path), MOUNTS) == found


def test_the_file_system_of_this_host_is_known() -> None:
    assert db.file_system(Path("/proc/self")) == "proc"
    assert db.file_system(Path("/x"), "") is None
    warning, hint = db.network_warning(Path("x.db"), "nfs4")
    assert "x.db lies on a network file system (nfs4)" in warning
    assert "local disk" in hint


# -------------------------------------------------------------------------------------------- workers at work, backup

STUDY = """
    import rnnq
    stage = rnnq.stage("d", "dynamics", rnnq.grid(seed=list(range({n}))),
                       base=dict(corpus="corpus.bin", state_size=8, batch_size=2, window=8, steps=200, log_every=10,
                                 eval_every=100))
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    """Runs of the built-in family, and a lease of a second."""
    with Study(tmp_path / "study", lease=1.0) as made:
        (made.folder / "corpus.bin").write_bytes(pseudo_text(20_000))
        made.make()
        yield made


def init(study: Study, n: int) -> None:
    study.rnnq("init", study.define(textwrap.dedent(STUDY.format(n=n))))


def test_a_worker_that_is_killed_leaves_notes_and_no_problem(study: Study) -> None:
    init(study, 1)
    killed = study.worker({"at": "saved", "do": "kill", "step": 100}, every=50)
    killed.end(-9)
    found = examined(study.engine, deep=True)
    assert levels(found, "problem") == set()
    assert (found["workers"].numbers["gone"], found["workers"].numbers["held"]) == (1, 1)

    study.worker(every=50).end()
    found = examined(study.engine, deep=True)
    assert levels(found, "problem") == set()
    assert found["leases"].numbers == {"attempts": 1, "runs": 1, "done_nevertheless": 1}
    assert found["workers"].level == "ok"
    assert found["runs"].numbers == {"total": 1, "done": 1}


def test_the_doctor_finds_no_problem_while_workers_are_at_work(study: Study) -> None:
    init(study, 3)
    workers = [study.worker(every=5) for _ in range(2)]
    for worker in workers:
        worker.expect("saved")
    looks = 0
    while any(worker.lives for worker in workers):
        assert levels(examined(study.engine, deep=True), "problem") == set()
        looks += 1
    for worker in workers:
        worker.end()
    assert looks > 1


def test_a_backup_is_whole_while_workers_write(study: Study) -> None:
    init(study, 6)
    workers = [study.worker(every=10) for _ in range(2)]
    workers[0].expect("done")
    before = {run for run, state in study.states().items() if state == "done"}
    assert before
    said = study.rnnq("db", "backup", "copy.db")
    assert "no damage found" in said
    assert "no damage found" in study.rnnq("db", "check", "--db", "copy.db")
    with closing(sqlite3.connect(study.folder / "copy.db")) as copy:
        kept = dict(copy.execute("SELECT id, state FROM runs"))
    assert len(kept) == 6
    assert before <= {run for run, state in kept.items() if state == "done"}
    for worker in workers:
        worker.end()
    assert not [path for path in study.folder.iterdir() if "copy" in path.name and path.name != "copy.db"]


def test_nobody_waits_for_a_backup_and_no_write_makes_it_begin_anew(engine: Engine, tmp_path: Path) -> None:
    queue.init(engine, [new_stage(4000)])
    with closing(sqlite3.connect(path_of(engine), timeout=0)) as other:
        left = []

        def write_between(done: int, pages: int) -> None:
            other.execute("BEGIN IMMEDIATE")  # refused at once, were the lock not free
            other.execute("UPDATE runs SET note = ? WHERE id = 1", (f"page {done}",))
            other.commit()
            left.append(pages - done)
            assert len(left) < 500, "it begins anew"

        db.backup(engine, tmp_path / "copy.db", write_between, step=20)
    assert len(left) > 5
    assert left == sorted(left, reverse=True)
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT note FROM runs WHERE id = 1").fetchone() == (None,)
        assert copy.execute("SELECT count(*) FROM runs").fetchone() == (4000,)


def test_a_backup_has_a_name_of_its_own_and_overwrites_nothing(cli: Cli, tmp_path: Path, two: Engine) -> None:
    said = cli("db", "backup").stdout.strip()
    assert Path(said).name.startswith("experiments.db.backup-2")
    assert (tmp_path / said).exists()
    (tmp_path / "taken").write_text("precious")
    refused = cli("db", "backup", "taken", code=2)
    assert "taken is there already" in refused.stderr
    assert (tmp_path / "taken").read_text() == "precious"
    assert "cannot be written" in cli("db", "backup", "no/such/folder/x.db", code=2).stderr
    assert "there is no database" in cli("db", "backup", "--db", "other.db", code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == []


def test_a_backup_with_damage_is_not_kept(two: Engine, tmp_path: Path) -> None:
    write(two, "DELETE FROM metrics")
    with pytest.raises(DatabaseError, match="was not kept"):
        db.backup(two, tmp_path / "copy.db")
    assert not [path for path in tmp_path.iterdir() if "copy" in path.name]


# -------------------------------------------------------------------------------------------- as a user meets it


def test_the_doctor_says_what_he_found_and_exits_with_1_when_there_is_a_problem(cli: Cli, two: Engine) -> None:
    healthy = cli("doctor")
    assert "ok       runs: 2 runs: 1 pending, 1 done" in healthy.stdout
    assert "0 problems" in healthy.stderr
    write(two, "UPDATE attempts SET ended = 'failed' WHERE run_id = 1")
    sick = cli("doctor", "--format", "json", code=1)
    found = json.loads(sick.stdout)
    assert found["problems"] == 1
    assert [one["name"] for one in found["findings"] if one["level"] == "problem"] == ["order"]
    assert "there is no stage 'nope'" in cli("doctor", "--stage", "nope", code=2).stderr
    assert len(cli("doctor", "--format", "csv", code=1).stdout.splitlines()) == len(found["findings"]) + 1


EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\x00\r\x7fx"


@contextmanager
def terminal(folder: Path, *words: str) -> Iterator[bytes]:
    """What `rnnq ...` sends to a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rnnq", *words], cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:
            pass  # the other end is closed

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(60)
    reader.join(60)
    os.close(ours)
    yield b"".join(parts)


@pytest.fixture
def stranger(two: Engine, tmp_path: Path) -> Path:
    """A folder with a database whose texts were not cleaned when they were written."""
    begin(two)
    write(two, "UPDATE runs SET label = label || ?1, note = ?1, message = ?1, cause = ?1, source = ?1", EVIL)
    write(two, "UPDATE runs SET config = json_object(?1, ?1), summary = json_object(?1, ?1)", EVIL)
    write(
        two, "UPDATE attempts SET message = ?1, traceback = ?1, device = ?1, command_line = ?1, git_commit = ?1", EVIL
    )
    write(two, "UPDATE workers SET device = ?1, message = ?1, host = ?1, beat_at = 1", EVIL)
    write(two, "UPDATE runs SET state = 'failed', ended_at = 2 WHERE id = 1")
    write(two, "INSERT INTO tags VALUES (1, ?1)", EVIL)
    write(two, "INSERT INTO metrics (name) VALUES (?1)", EVIL)
    write(two, "INSERT INTO point SELECT 1, id, 1, 1.0 FROM metrics WHERE name = ?1", EVIL)
    for table, column in (("runs", "worker"), ("attempts", "worker"), ("workers", "id")):
        write(two, f"UPDATE {table} SET {column} = {column} || ?1 WHERE {column} IS NOT NULL", EVIL)
    for table, column in (("runs", "stage"), ("intakes", "stage"), ("stages", "name")):
        write(two, f"UPDATE {table} SET {column} = {column} || ?1", EVIL)
    stopped = "UPDATE workers SET state = 'left', left_at = unixepoch() + 60, message = 'stopped itself: ' || ?1"
    write(two, f"{stopped} WHERE id = (SELECT min(id) FROM workers)", EVIL)
    write(two, "UPDATE stages SET defined_as = ?1, source = ?1, family = ?1", EVIL)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    ["ls", "ls --format json", "ls --format csv", "show 1", "show 2", "status", "status --format json", "stages",
     "workers", "workers --all", "doctor", "logs 1", "diff 1 2", "show 99", "status --stage x",
     "retry 1 --dry-run"],
)  # fmt: skip
def test_a_strangers_database_shows_its_text_without_control_codes(stranger: Path, words: str) -> None:
    with terminal(stranger, *words.split()) as shown:
        said = shown.decode()
    assert said.strip()
    said = said.replace("\r\n", "\n")  # the terminal ends its lines so
    kept = "\n\t\r" if words == "logs 1" else "\n\t"  # the bars that runs print may stay
    assert not [sign for sign in said if (sign < " " and sign not in kept) or "\x7f" <= sign <= "\x9f"], said
    if words not in ("show 99", "logs 1"):
        assert "\\x1b" in said or "\\u001b" in said


def test_no_code_can_be_put_together_from_what_is_left_of_others() -> None:
    from rnnq.cli.logs import _harmless

    assert "\x1b" not in _harmless("\x1b[\x072J \x1b[\x1b[2J2J \x1b\x1b[2J end \x1b")
    assert _harmless("\x1b[31mred\x1b[0m\n") == "\x1b[31mred\x1b[0m\n"
