"""Large intakes beside a beating worker, and intakes that are cut short: nobody sees half of one."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from rnnq import db, queue, runs, status
from tests.conftest import PROVENANCE, new_stage
from tests.processes import Study

MANY = 200_000


def new_study(folder: Path, lease: float = 1.0) -> Study:
    study = Study(folder, lease)
    study.make()
    return study


@pytest.mark.parametrize("at", ["middle", "last"])
def test_an_init_that_is_killed_leaves_nothing_to_see_and_the_next_one_has_all(tmp_path, at):
    n = 20_000
    chunks = n // queue.CHUNK
    with new_study(tmp_path) as study:
        # one commit to open the intake, one for each chunk, one that completes it
        commit = random.randrange(3, chunks) if at == "middle" else chunks + 2
        killed = study.drive("init", n=n, at=commit, do="kill")
        killed.end(-signal.SIGKILL)
        assert killed.told("trapped")[0]["writes"] == commit
        [hidden] = study.rows("SELECT count(*) AS n FROM runs")
        assert hidden["n"] == (commit - 2) * queue.CHUNK

        assert nothing_to_see(study)

        init_all(study, n)


def nothing_to_see(study: Study) -> bool:
    queue.register(study.engine, "looker", "cpu", {})
    assert queue.claim(study.engine, "looker", PROVENANCE) == []
    assert not queue.has_open(study.engine)
    assert status.stages(study.engine) == []
    assert runs.find(study.engine) == []
    assert runs.stage_infos(study.engine) == {}
    assert "run" not in study.rnnq("ls", "--format", "csv").replace("no runs", "")
    study.rnnq("show", "1", code=2)
    study.rnnq("worker")  # it has nothing to do, and leaves
    return True


def init_all(study: Study, n: int) -> None:
    """Init and init again: exactly n runs, then nothing more."""
    first = study.drive("init", n=n)
    first.end()
    assert (first.told("added")[0]["added"], first.told("added")[0]["present"]) == (n, 0)
    [counted] = status.stages(study.engine)
    assert counted.counts == {"pending": n}
    assert study.rows("SELECT count(*) AS n, count(DISTINCT fingerprint) AS f FROM runs") == [{"n": n, "f": n}]
    assert study.rows("SELECT count(*) AS n FROM intakes") == [{"n": 1}]
    again = study.drive("init", n=n)
    again.end()
    assert (again.told("added")[0]["added"], again.told("added")[0]["present"]) == (0, n)
    assert study.rows("SELECT count(*) AS n FROM runs") == [{"n": n}]


def test_an_init_waits_for_one_that_lives_and_both_are_right(tmp_path):
    with new_study(tmp_path, lease=60) as study:
        first = study.drive("init", n=6000, at=3, do="wait")
        first.expect("trapped")  # it holds the write lock in the middle of its rows
        second = study.drive("init", n=8000)
        second.expect("ready")
        first.go_on()
        first.end()
        second.end()
        assert (first.told("added")[0]["added"], second.told("added")[0]["added"]) == (6000, 2000)
        assert study.rows("SELECT count(*) AS n FROM runs") == [{"n": 8000}]


@pytest.mark.parametrize("write", [2, 3], ids=["among its rows", "before its last transaction"])
def test_an_init_that_was_stopped_and_taken_for_dead_adds_nothing_and_says_so(tmp_path, write):
    with new_study(tmp_path, lease=0.4) as study:
        stale = study.drive("init", n=4000, at=write, do="stop", after=True)
        stale.expect("stopped")
        other = study.drive("init", n=1000)
        other.end()
        assert other.told("added")[0]["added"] == 1000

        stale.send(signal.SIGCONT)
        stale.end(1)

        assert "took it for dead; nothing was added" in stale.told("refused")[0]["message"]
        assert study.rows("SELECT count(*) AS n FROM runs") == [{"n": 1000}]
        assert status.stages(study.engine)[0].counts == {"pending": 1000}


def test_a_worker_beats_on_while_two_hundred_thousand_rows_come_in(tmp_path):
    with new_study(tmp_path, lease=1) as study:
        queue.init(study.engine, [new_stage(1, "beats")])
        beater = study.drive("beat", every=0.05)
        beater.expect("beating")
        killed = study.drive("init", n=MANY, at=MANY // queue.CHUNK // 2, do="kill")
        killed.end(-signal.SIGKILL)
        assert status.stages(study.engine)[0].total == 1
        init = study.drive("init", n=MANY)
        init.end()
        beater.go_on()
        beater.end()

        [beaten], [added] = beater.told("beaten"), init.told("added")
        print(
            f"{MANY:,} rows in {added['seconds']:.1f} s after one that was killed midway;"
            f" {beaten['n']} beats, the slowest {beaten['slowest']:.3f} s, the mean {beaten['mean']:.4f} s"
        )
        assert beaten["slowest"] < 1.0
        assert added["added"] == MANY
        with db.reading(study.engine) as connection:
            count = connection.exec_driver_sql("SELECT count(DISTINCT fingerprint) FROM runs WHERE stage = 's'")
            assert count.scalar_one() == MANY
