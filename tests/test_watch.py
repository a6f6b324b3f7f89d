"""`rnnq status` on narrow and wide screens, its live view on a real terminal beside real workers, `rnnq workers`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from rnnq import db, queue
from rnnq.cli import fit, watch
from rnnq.cli.fit import Column
from rnnq.cli.status import eta_words
from rnnq.cli.watch import Look
from rnnq.status import StageStatus
from tests.conftest import ROOT, Cli, claim_one, new_stage
from tests.processes import PATIENCE, Study, pseudo_text

SHOW, HIDE, SCREEN, BACK = "\x1b[?25h", "\x1b[?25l", "\x1b[?1049h", "\x1b[?1049l"

# takes the terminal on its standard input as its own, so that Ctrl-C and Ctrl-Z reach it
PROGRAM = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "rnnq", *sys.argv[1:]])
"""

STUDY = """
import rnnq

class Config(rnnq.Config):
    x: int = 0
    steps: int = 3

@rnnq.family(Config)
def toy(config):
    for step in range(config.steps):
        if config.x == 2:
            raise ValueError("as asked")
        yield {"loss": 1.0}

stage = rnnq.stage("toys", toy, rnnq.grid(x=[1, 2, 3]))
"""

SMALL = """
import rnnq
stage = rnnq.stage("small", "dynamics", rnnq.grid(seed=[0, 1]), base=dict(
    corpus="text", state_size=16, window=64, batch_size=8, steps=400, log_every=1, eval_every=100))
"""


class Terminal:
    """A program on a terminal of its own: what it draws, the keys it gets, and how the terminal is left."""

    def __init__(self, folder: Path, *words: str, size: tuple[int, int] = (24, 80), **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, size)
        self.modes = termios.tcgetattr(theirs)
        given = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
        for name in ("LINES", "COLUMNS", *(() if "NO_COLOR" in environment else ("NO_COLOR",))):
            given.pop(name, None)
        program = [sys.executable, "-c", PROGRAM, *words]
        self.process = subprocess.Popen(program, cwd=folder, env=given, stdin=theirs, stdout=theirs, stderr=theirs)
        self._theirs = theirs  # kept open: so we can ask how the terminal was left
        self.text = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], seconds)
        if ready:
            self.text += os.read(self._ours, 65536).decode(errors="replace")
        return bool(ready)

    def expect(self, wanted: str) -> None:
        """Wait until it has drawn that since the last `forget`."""
        end = time.monotonic() + PATIENCE
        while not re.search(wanted, self.text):
            assert time.monotonic() < end, f"no {wanted!r} in {self.text[-4000:]}"
            if not self._read(0.2):
                assert self.process.poll() is None, f"it ended before {wanted!r}: {self.text[-4000:]}"

    def forget(self) -> None:
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self._ours, (rows, columns))

    def end(self) -> int:
        """Wait for the end, read all, and prove that the terminal is as it was."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.text[-4000:]}"
            self._read(0.1)
        while self._read(0):
            pass
        assert termios.tcgetattr(self._theirs) == self.modes
        assert self.text.rfind(SHOW) > self.text.rfind(HIDE)
        assert self.text.rfind(BACK) > self.text.rfind(SCREEN)
        assert "Traceback" not in self.text
        return self.process.wait()

    @property
    def frame(self) -> list[str]:
        """The lines of the last whole picture, without styles."""
        before, ended, _ = self.text.partition(BACK)
        drawn = before.split("\x1b[H")
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn[-1 if ended or len(drawn) < 3 else -2])
        return plain.replace("\r", "").split("\n")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    """Two small runs of `dynamics`."""
    with Study(tmp_path) as made:
        (tmp_path / "text").write_bytes(pseudo_text(50_000))
        made.rnnq("init", made.define(SMALL))
        yield made


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[Study]:
    """Three short runs, one of which fails."""
    with Study(tmp_path) as made:
        made.rnnq("init", made.define(STUDY))
        yield made


# ------------------------------------------------------------------------------------------------ the live view


def test_the_live_view_follows_a_worker_and_q_gives_the_terminal_back(study: Study) -> None:
    with Terminal(study.folder, "status", "--watch", "--every", "0.2") as terminal:
        terminal.expect(r"small .*0/2")
        worker = study.worker({"at": "saved", "step": 100, "do": "wait"}, every=100)
        worker.expect("trapped")
        terminal.expect(r"100/400 +\d\.\d{4} .* small: ")
        worker.go_on()
        worker.end()
        terminal.expect(r"small +█+ +2/2")
        terminal.expect(r"2 +done +loss \d\.\d{4}")
        terminal.type("q")

        assert terminal.end() == 0
        assert "small: 2 of 2 done" in terminal.text.rpartition(BACK)[2]  # what stays


@pytest.mark.parametrize("how", ["ctrl-c", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_signals_give_the_terminal_back(toys: Study, how: str) -> None:
    with Terminal(toys.folder, "status", "--watch", "--every", "60") as terminal:
        terminal.expect("toys")
        if how == "ctrl-c":
            terminal.type("\x03")
        else:
            terminal.process.send_signal(signal.Signals[how])
        assert terminal.end() == 0


def test_until_done_it_leaves_by_itself_and_with_0_although_a_run_failed(toys: Study) -> None:
    with Terminal(toys.folder, "status", "--watch", "--every", "0.2", "--until-done") as terminal:
        terminal.expect("toys")
        toys.worker().end(None)
        assert terminal.end() == 0
        assert "toys: 2 of 3 done, 1 failed" in terminal.text.rpartition(BACK)[2]
    assert "FAILED" in "\n".join(terminal.frame)
    assert "bug: ValueError: as asked" in "\n".join(terminal.frame)


def test_a_database_that_goes_away_for_a_while_is_waited_for(toys: Study) -> None:
    toys.forget()
    away = toys.folder / "away"
    away.mkdir()
    with Terminal(toys.folder, "status", "--watch", "--every", "0.2") as terminal:
        terminal.expect("0/3")
        files = list(toys.folder.glob("experiments.db*"))
        for file in files:
            file.rename(away / file.name)
        terminal.expect(r"the database does not answer since \d\d:\d\d:\d\d")
        terminal.expect("0/3")  # the last look stays
        assert not (toys.folder / "experiments.db").exists()
        for file in files:
            (away / file.name).rename(file)
        terminal.forget()
        toys.worker().end(None)
        terminal.expect("2/3")
        assert "does not answer" not in "\n".join(terminal.frame)
        terminal.type("q")
        assert terminal.end() == 0


def test_ctrl_z_gives_the_terminal_back_for_as_long_as_it_sleeps(toys: Study) -> None:
    with Terminal(toys.folder, "status", "--watch", "--every", "60") as terminal:
        terminal.expect("toys")
        terminal.type("\x1a")
        assert os.WIFSTOPPED(os.waitpid(terminal.process.pid, os.WUNTRACED)[1])
        terminal.expect(re.escape(BACK))
        terminal.forget()
        terminal.process.send_signal(signal.SIGCONT)
        terminal.expect("toys")
        terminal.type("q")
        assert terminal.end() == 0


def test_hundreds_of_workers_and_stages_fit_on_any_screen(tmp_path: Path, engine: Engine) -> None:
    queue.init(engine, [new_stage(3, f"a-stage-with-a-long-name-{i}") for i in range(20)])
    for i in range(40):
        claim = claim_one(engine, f"gpu-host-{i}-{i:04x}")
        queue.record(engine, claim, 4, [("loss", 4, 1.25)])
    for _ in range(7):
        queue.fail(engine, claim_one(engine, "w"), "bug", "KeyError: 'a rather long message, of more than one line'\nx")
    engine.dispose()
    for rows, columns in ((24, 80), (30, 40), (10, 20), (3, 10)):
        frame = a_frame(tmp_path, rows, columns)
        assert len(frame) <= rows
        assert all(len(line) <= columns for line in frame)
        if columns >= 40:
            shown = "\n".join(line.rstrip() for line in frame)
            assert re.search(r"… and \d+ more workers", shown)
            assert re.search(r"… and \d+ more stages", shown)
            assert re.search(r"\d +4/10 +1\.2500", shown)
            assert "FAILED" in shown


def a_frame(folder: Path, rows: int, columns: int) -> list[str]:
    """A whole picture of the live view on a terminal of that size."""
    with Terminal(folder, "status", "--watch", "--every", "0.1", size=(rows, columns)) as terminal:
        terminal.expect("(?s)\x1b\\[H.*\x1b\\[H.*\x1b\\[H")
        frame = terminal.frame
        terminal.type("q")
        assert terminal.end() == 0
    return frame


def test_a_terminal_that_changes_its_size_is_drawn_anew_at_once(toys: Study) -> None:
    with Terminal(toys.folder, "status", "--watch", "--every", "600") as terminal:
        terminal.expect("pend")
        terminal.forget()
        terminal.resize(24, 24)
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.expect("toys")
        assert all(len(line) <= 24 for line in terminal.frame)
        terminal.type("q")
        terminal.process.wait(PATIENCE)


def test_nothing_is_told_by_colour_alone_and_nothing_is_grey(toys: Study) -> None:
    toys.worker().end(None)
    with Terminal(toys.folder, "status", "--watch", NO_COLOR="1") as terminal:
        terminal.expect("FAILED")
        terminal.type("q")
        assert terminal.end() == 0
    with Terminal(toys.folder, "status", "--watch") as coloured:
        coloured.expect("FAILED")
        coloured.type("q")
        assert coloured.end() == 0
    styles = set(re.findall(r"\x1b\[([0-9;]*)m", terminal.text + coloured.text))
    assert styles <= {"0", "", "1"}  # bold, and no more


def test_a_dumb_terminal_gets_lines_without_codes(toys: Study) -> None:
    with Terminal(toys.folder, "status", "--watch", "--every", "0.2", "--until-done", TERM="dumb") as terminal:
        terminal.expect("toys: 0 of 3 done, 3 pending")
        toys.worker().end(None)
        terminal.process.wait(PATIENCE)
        terminal.expect("\ntoys: 2 of 3 done, 1 failed")
    assert "\x1b" not in terminal.text


# ---------------------------------------------------------------------------------------------- lines and documents


@contextlib.contextmanager
def piped(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-m", "rnnq", "status", "--watch", "--every", "0.2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_into_a_pipe_goes_a_line_for_each_change_and_the_end(toys: Study) -> None:
    with piped(toys.folder, "--until-done") as program:
        assert program.stdout is not None and program.stderr is not None
        first = program.stdout.readline()
        assert re.fullmatch(r"\d\d:\d\d:\d\d toys: 0 of 3 done, 3 pending; ETA unknown\n", first)
        toys.worker().end(None)
        rest = program.stdout.read().splitlines()
        assert program.wait() == 0
        assert rest[-1] == "toys: 2 of 3 done, 1 failed"
        assert program.stderr.read() == ""


def test_what_has_not_changed_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    lines = watch.Lines()
    for eta_s in (7800.0, 7799.0):
        lines.show(Look(0.0, [stage(eta_s=eta_s)]))
    gone = Look(0.0, [stage()], trouble="the disk is gone", since=5.0)
    for look in (gone, gone, Look(9.0, [stage(paused=True)])):
        lines.show(look)

    said = capsys.readouterr()

    assert len(said.out.splitlines()) == 2
    assert "s (paused): " in said.out.splitlines()[1]
    assert [line.split(" ", 1)[1][:20] for line in said.err.splitlines()] == [
        "database does not an",
        "the database answers",
    ]


def test_a_database_that_is_put_in_the_place_of_another_is_looked_at(tmp_path: Path, engine: Engine) -> None:
    db.upgrade(str(tmp_path / "other.db"))
    other = db.open(str(tmp_path / "other.db"))
    queue.init(other, [new_stage(2, "new")])
    queue.init(engine, [new_stage(1, "old")])
    for each in (engine, other):
        each.dispose()
    eyes = watch.Eyes(str(tmp_path / "experiments.db"), None)
    assert [found.stage for found in eyes.look().stages] == ["old"]

    (tmp_path / "other.db").replace(tmp_path / "experiments.db")

    assert [found.stage for found in eyes.patient_look().stages] == ["new"]


@pytest.mark.parametrize("format", ["table", "json"])
def test_it_ends_when_its_reader_has_gone(toys: Study, format: str) -> None:
    with piped(toys.folder, "--format", format) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(PATIENCE) == 0
        assert program.stderr.read() == ""


def test_as_json_each_look_is_a_document_on_a_line(toys: Study) -> None:
    with piped(toys.folder, "--format", "json", "--until-done") as program:
        assert program.stdout is not None
        first = json.loads(program.stdout.readline())
        assert first["stages"][0]["counts"] == {"pending": 3}
        file = toys.folder / "experiments.db"
        toys.forget()
        file.rename(toys.folder / "x.db")
        while "error" not in (look := json.loads(program.stdout.readline())):
            pass
        assert "experiments.db" in look["error"] and look["since"] <= look["at"] + 60
        (toys.folder / "x.db").rename(file)
        toys.worker().end(None)
        looks = [json.loads(line) for line in program.stdout]
        assert program.wait() == 0
    assert looks[-1]["stages"][0]["counts"] == {"done": 2, "failed": 1}
    assert {"at", "stages", "workers", "failures", "lately"} == set(looks[-1])
    assert [one["run"] for one in looks[-1]["lately"]] == [3, 2, 1]


def test_a_signal_ends_the_lines_with_how_things_stand(toys: Study) -> None:
    with piped(toys.folder) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.send_signal(signal.SIGTERM)
        assert program.stdout.read() == "toys: 0 of 3 done, 3 pending; ETA unknown\n"
        assert program.wait() == 0


def test_what_was_started_to_outlive_its_terminal_does(toys: Study) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; a child inherits it
    try:
        with piped(toys.folder, "--until-done") as program:
            assert program.stdout is not None
            program.stdout.readline()
            program.send_signal(signal.SIGHUP)
            toys.worker().end(None)
            assert program.stdout.read().endswith("toys: 2 of 3 done, 1 failed\n")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--every", "2"), "goes with --watch"),
        (("--until-done",), "goes with --watch"),
        (("--watch", "--every", "0"), "not from 0.1"),
        (("--watch", "--every", "nan"), "not from 0.1"),
        (("--watch", "--format", "csv"), "no CSV"),
        (("--watch", "--stage", "toyz"), "did you mean toys"),
        (("--watch", "--db", "none.db"), "there is no database"),
    ],
)
def test_what_cannot_be_watched_is_refused(toys: Study, cli: Cli, words: tuple[str, ...], says: str) -> None:
    done = cli("status", *words, code=2)
    assert says in done.stderr
    assert done.stdout == ""


# -------------------------------------------------------------------------------------------------- one look, cut


ROWS = [{"a": "aaaa", "b": "b" * 30, "c": 7, "d": None}, {"a": "a", "b": "b", "c": 12345, "d": ""}]
COLUMNS = [Column("a", "a", 0), Column("b", "b", 1, least=10), Column("c", "c", 2, right=True), Column("d", "d", 0)]


def lines(width: int | None) -> list[str]:
    return [line.plain for line in fit.table(ROWS, COLUMNS, width)]


def test_a_column_is_cut_then_left_out_by_its_rank_and_an_empty_one_is_never_there() -> None:
    assert lines(None) == [f"a     b{' ' * 29}      c", f"aaaa  {'b' * 30}      7", f"a     b{' ' * 29}  12345"]
    assert lines(30)[1] == "aaaa  bbbbbbbbbbbbbbbb…      7"
    assert lines(22)[1] == "aaaa  bbbbbbbbbbbbbbb…"
    assert lines(15)[1] == "aaaa"
    assert lines(3)[1] == "aa…"
    assert all(len(line) <= width for width in range(1, 60) for line in lines(width))


def test_wide_characters_and_line_breaks_keep_to_their_cells() -> None:
    rows = [{"a": "表" * 9, "b": "two\nlines"}]
    [_, line] = fit.table(rows, [Column("a", "a", 0, least=6), Column("b", "b", 0)], 17)
    assert line.cell_len <= 17 and line.plain.endswith("two lines")
    assert fit.cut("worker-12-abcd", 8, from_the_left=True) == "…12-abcd"


def test_what_fits_in_no_table_is_told_in_paragraphs() -> None:
    assert fit.paragraphs(ROWS[:1], COLUMNS, 20) == ["aaaa", f"  b {'b' * 16}", f"  {'b' * 14},", "  c 7"]


def stage(**changes: Any) -> StageStatus:
    known = StageStatus("s", False, {"pending": 2, "done": 1}, 3.25, 7800.0, 6900.0, 9600.0, "2 runs left")
    return replace(known, **changes)


def test_an_eta_comes_with_its_interval_or_says_that_there_is_none() -> None:
    assert eta_words(stage()) == "2 h 10 min (1 h 55 min to 2 h 40 min)"
    assert eta_words(stage(eta_low_s=None, eta_high_s=None)) == "2 h 10 min (no interval yet)"
    assert eta_words(stage(eta_low_s=7790.0, eta_high_s=7810.0)) == "2 h 10 min (2 h 09 min to 2 h 10 min)"
    assert eta_words(stage(eta_low_s=7800.0, eta_high_s=7801.0)) == "2 h 10 min"
    assert eta_words(stage(eta_s=None)) == "unknown"
    assert eta_words(stage(eta_s=None, paused=True)) == "paused"
    assert eta_words(stage(eta_s=0.0)) == ""
    assert watch.stage_line(stage(paused=True, eta_s=None)) == "s (paused): 1 of 3 done, 2 pending; 3.2 runs/h"


@pytest.mark.parametrize("height", range(1, 60))
def test_sections_share_the_height_and_never_take_more(height: int) -> None:
    for wanted in ([0, 0, 0], [1, 0, 0], [3, 400, 5], [50, 1, 5], [50, 400, 5]):
        rooms = watch.share(height, wanted)
        assert sum(rooms) + 2 * sum(room > 0 for room in rooms) <= height
        assert all(room <= want for room, want in zip(rooms, wanted, strict=True))


def test_workers_come_first_where_there_is_little_room() -> None:
    assert watch.share(22, [1, 2, 5]) == [1, 2, 5]
    assert watch.share(6, [1, 9, 5]) == [0, 4, 0]
    assert watch.share(22, [50, 400, 5]) == [4, 9, 3]


def test_the_speed_of_a_run_is_that_of_the_last_looks() -> None:
    speeds = watch.Speeds()

    def look(step: int, now: float) -> dict[str, Any]:
        row = {"run": 1, "attempt": 1, "step": step, "budget": 1000, "steps_per_s": 1.0, "run_eta_s": 9.0}
        speeds.improve([row], now)
        return row

    assert look(100, 0)["steps_per_s"] == 1.0  # one look tells nothing
    assert look(200, 1)["steps_per_s"] == 1.0
    fast = look(700, 6)
    assert (fast["steps_per_s"], fast["run_eta_s"]) == (pytest.approx(100), pytest.approx(3))
    for now in range(7, 60):
        slow = look(700 + now, now)
    assert slow["steps_per_s"] == pytest.approx(1, rel=0.1)
    assert look(759, 1059)["steps_per_s"] < 0.1  # it stands still


def test_a_look_that_is_old_says_since_when() -> None:
    old = Look(0.0, [stage()], trouble="the disk is gone", since=5.0)
    [_, second, *_] = watch.view(old, 80, 24)
    assert second.plain.startswith("the database does not answer since ")
    assert second.plain.endswith(": the disk is gone")


# --------------------------------------------------------------------------------------- the one-shot commands


def test_status_and_workers_fit_on_narrow_terminals_and_leave_nothing_out(study: Study) -> None:
    worker = study.worker({"at": "saved", "step": 100, "do": "wait"}, every=100)
    worker.expect("trapped")
    study.write("UPDATE stages SET paused = 1")
    parts = ["small (paused)", "paused: no run of it is claimed", "live", "step 100 of 400", "pending", "running"]
    for columns in (160, 80, 40):
        told = on_terminal(study.folder, columns, "status")
        assert [part for part in parts if part not in told] == []
    assert "bound to" not in on_terminal(study.folder, 40, "workers")  # it is not
    worker.go_on()
    worker.end()


def on_terminal(folder: Path, columns: int, *words: str) -> str:
    """What a command prints on a terminal so wide, on one line; proves that it folds nothing."""
    with Terminal(folder, *words, size=(50, columns)) as terminal:
        terminal.process.wait(PATIENCE)
        terminal.expect("(?s)beat.* ago")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).replace("\r", "")
    assert all(len(line) <= columns for line in plain.split("\n") if "lost in the last hour" not in line)
    return " ".join(plain.split())


def test_workers_tells_who_works_on_what_and_all_of_them_afterwards(study: Study) -> None:
    worker = study.worker({"at": "saved", "step": 100, "do": "wait"}, every=100, stage="small", runs=1)
    worker.expect("trapped")
    [row] = json.loads(study.rnnq("workers", "--format", "json").partition("]\n")[0] + "]")
    assert (row["state"], row["run"], row["stage"], row["scope"], row["step"]) == ("live", 1, "small", "small", 100)
    assert row["pid"] == worker.pid and row["loss"] > 0

    study.write("UPDATE workers SET wish = 'drain'")
    assert "leaving" in study.rnnq("workers")
    assert "leaving" in study.rnnq("status")
    worker.go_on()
    worker.end()

    assert "0 workers, live or lost in the last hour" in study.rnnq("workers")
    [row] = json.loads(study.rnnq("workers", "--all", "--format", "json").partition("]\n")[0] + "]")
    assert (row["state"], row["done"], row["failed"], row["lost"], row["run"]) == ("left", 1, 0, 0, None)
    assert "small" in study.rnnq("workers", "--all").partition("1 worker")[0]  # what it was bound to


def test_a_worker_whose_process_is_gone_is_shown_as_gone(study: Study) -> None:
    study.worker({"at": "saved", "step": 100, "do": "kill"}, every=100).end(-signal.SIGKILL)
    shown = study.rnnq("workers", "--format", "csv").splitlines()
    assert shown[0].startswith("worker,host,pid,device,state,run,stage,label,scope,since,beat_s_ago,message")
    assert ",cpu,gone,1,small," in shown[1]


def test_csv_has_the_numbers_of_a_stage(toys: Study) -> None:
    toys.worker().end(None)
    head, row = toys.rnnq("status", "--format", "csv").splitlines()
    found = dict(zip(head.split(","), row.split(","), strict=True))
    assert (found["stage"], found["done"], found["failed"], found["total"], found["eta_s"]) == (
        "toys",
        "2",
        "1",
        "3",
        "0.0",
    )


def test_a_look_at_one_stage_shows_only_that(cli: Cli, tmp_path: Path, engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a"), new_stage(2, "b")])
    done = cli("status", "--stage", "b")
    assert "b " in done.stdout and "a " not in done.stdout.replace("stage ", "").replace("ETA ", "")


def test_the_watch_loads_nothing_that_trains(toys: Study) -> None:
    code = (
        "import sys\nsys.argv = ['rnnq', 'status', '--watch', '--until-done', '--format', 'json']\n"
        "import runpy\n"
        "try: runpy.run_module('rnnq', run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    )
    toys.write("UPDATE runs SET state = 'cancelled', ended_at = 1")
    done = subprocess.run([sys.executable, "-c", code], cwd=toys.folder, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
