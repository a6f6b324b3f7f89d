"""What a run prints is kept with its attempt, whoever prints it, and the worker's own lines stay on the terminal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnnq import db, logs
from tests.processes import Study

DEFINITION = """
import logging, os, subprocess, sys, warnings
import rnnq

class Config(rnnq.Config):
    how: str

@rnnq.family(Config)
def talk(config):
    if config.how == "all":
        print("from python, naïve")
        print("to stderr", file=sys.stderr)
        os.write(1, b"from below\\n")
        subprocess.run(["echo", "from a child"])
        warnings.warn("beware")
        logging.basicConfig(level="INFO", force=True)
        logging.info("logged")
        sys.stdout.write("no newline at the end")
    if config.how == "fail":
        print("before it failed")
        raise ValueError("out of luck")
    if config.how == "binary":
        sys.stdout.buffer.write(b"\\xff\\x1b[2Jx\\n")
    if config.how == "after":
        logging.info("logged by the next")
    if config.how == "close":
        sys.stdout.close()
        sys.stderr.close()
    if config.how == "wait":
        print("waiting")
        while not os.path.exists("go"):
            yield {"loss": 1.0}
        print("went on")
    yield {"loss": 1.0}

stage = rnnq.stage("talks", talk, rnnq.grid(how=HOW))
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, lease=1.0) as study:
        yield study


def init(study: Study, *how: str) -> None:
    study.rnnq("init", study.define(DEFINITION.replace("HOW", repr(list(how)))))


def files(study: Study) -> list[str]:
    return sorted(str(path.relative_to(study.folder)) for path in (study.folder / "logs").rglob("*") if path.is_file())


def test_whatever_a_run_prints_is_in_its_log_and_not_on_the_terminal(study: Study) -> None:
    init(study, "all", "after")
    worker = study.start("rnnq", "worker")
    worker.end()

    said = study.rnnq("logs", "1")
    for words in ("from python, naïve", "to stderr", "from below", "from a child", "UserWarning: beware", "INFO:root:"):
        assert words in said
        assert words not in worker.output
    assert said.startswith("==> run 1, attempt 1: done on cpu <==\n")
    assert said.endswith("no newline at the end")
    assert "run 1 talks: how=all: done, loss 1.0000" in worker.output
    # a handler that was set up in one run writes into the log of the next
    assert "logged by the next" in study.rnnq("logs", "2")


def test_the_last_words_before_a_failure_are_kept_though_no_line_ended(study: Study) -> None:
    init(study, "fail")
    (study.folder / "defs" / "study.py").write_text(
        (study.folder / "defs" / "study.py").read_text().replace('print("before it failed")', 'print("last", end=" ")')
    )
    study.rnnq("init", "defs/study.py")
    worker = study.start("rnnq", "worker")
    worker.end(1)
    assert "last Traceback" in study.rnnq("logs", "1") or "last \nTraceback" in study.rnnq("logs", "1")
    assert "last " not in worker.output


def test_without_logs_the_terminal_has_it(study: Study) -> None:
    init(study, "all")
    worker = study.start("rnnq", "worker", "--no-logs")
    worker.end()
    assert "from python, naïve" in worker.output
    assert files(study) == []
    assert "run 1 has printed nothing" in study.rnnq("logs", "1")


def test_a_failed_run_shows_what_it_printed_and_then_its_whole_trace(study: Study) -> None:
    init(study, "fail")
    study.rnnq("worker", code=1)
    said = study.rnnq("logs", "1")
    assert "before it failed\nTraceback (most recent call last):\n" in said
    assert said.endswith("ValueError: out of luck\n")


def test_a_run_that_prints_nothing_or_closes_its_streams_leaves_no_file_and_the_worker_speaks_on(study: Study) -> None:
    init(study, "nothing", "close", "nothing2")
    worker = study.start("rnnq", "worker")
    worker.end()
    assert worker.output.count("done, loss") == 3
    assert files(study) == []


def test_each_attempt_has_its_own_log(study: Study) -> None:
    init(study, "fail")
    study.rnnq("worker", code=1)
    study.rnnq("retry", "1")
    study.rnnq("worker", code=1)
    study_id = db.study(study.engine)[0]
    assert files(study) == [f"logs/{study_id}/1/a1.txt", f"logs/{study_id}/1/a2.txt"]
    said = study.rnnq("logs", "1")
    assert said.index("attempt 1: failed") < said.index("attempt 2: failed")
    assert "attempt 1" not in study.rnnq("logs", "1", "--attempt", "2")


def test_following_a_run_ends_with_the_run(study: Study) -> None:
    init(study, "wait")
    reader = study.start("rnnq", "logs", "1", "--follow")  # before it has begun
    worker = study.start("rnnq", "worker")
    while "waiting" not in reader.output:
        assert reader.lives
        assert worker.lives
        time.sleep(0.02)  # a look now and then: the processes want the cores
    assert "went on" not in reader.output
    (study.folder / "go").touch()
    reader.end()
    worker.end()
    assert reader.output.count("waiting\n") == 1
    assert "went on\n" in reader.output
    assert reader.output.endswith("run 1 is done\n")


def test_following_stops_cleanly_at_ctrl_c(study: Study) -> None:
    init(study, "wait")
    reader = study.start("rnnq", "logs", "1", "--follow")
    worker = study.start("rnnq", "worker")
    while "waiting" not in reader.output:
        assert reader.lives
        time.sleep(0.02)  # a look now and then: the processes want the cores
    reader.send(signal.SIGINT)
    reader.end(130)
    assert "Traceback" not in reader.output
    (study.folder / "go").touch()
    worker.end()


def test_bytes_that_are_no_text_are_kept_and_shown_as_well_as_can_be(study: Study) -> None:
    init(study, "binary")
    study.rnnq("worker")
    [name] = files(study)
    assert (study.folder / name).read_bytes() == b"\xff\x1b[2Jx\n"
    assert "�" in study.rnnq("logs", "1")


def test_a_log_that_cannot_be_written_fails_no_run(study: Study) -> None:
    init(study, "all")
    (study.folder / "logs").write_text("a file where a folder should be")
    worker = study.start("rnnq", "worker")
    worker.end()
    assert "from python" in worker.output
    assert study.states() == {1: "done"}


def test_the_streams_lead_back_where_they_led(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with logs.kept(tmp_path, "study", [(1, 1)]):
        print("inside")
        os.write(2, b"inside, too\n")
    print("outside")
    os.write(2, b"outside, too\n")
    assert logs.path(tmp_path, "study", 1, 1).read_text() == "inside\ninside, too\n"
    assert capfd.readouterr() == ("outside\n", "outside, too\n")
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_log_is_read_from_where_the_last_look_ended(tmp_path: Path) -> None:
    place = tmp_path / "log"
    assert logs.read(place) == ("", 0)
    place.write_text("one\n")
    words, end = logs.read(place)
    assert words == "one\n"
    place.write_text("one\ntwo\n")
    assert logs.read(place, end) == ("two\n", 8)
    letter = "ü".encode()
    place.write_bytes(letter[:1])  # half of it is there yet
    assert logs.read(place) == ("", 0)
    place.write_bytes(letter)
    assert logs.read(place) == ("ü", 2)
