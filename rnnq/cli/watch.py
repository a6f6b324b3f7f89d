"""rnnq status --watch: the study while it works. A live view on a terminal, lines into a pipe, or JSON lines.

Each look is a few short read transactions; nothing is held between two of them. When the database goes away the last
look stays, with a word of how long it is old, and the view goes on as soon as the database answers again.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.text import Text

from rnnq.cli import fit, output
from rnnq.cli.fit import Column
from rnnq.cli.options import Format
from rnnq.cli.status import (
    chosen_stages,
    eta_words,
    idle_words,
    interval_words,
    loss_words,
    members_words,
    packs,
    rate_words,
    state_of,
)
from rnnq.errors import RnnqError

if TYPE_CHECKING:
    from rich.live import Live
    from sqlalchemy import Engine

    from rnnq.status import StageStatus

WINDOW = 20.0  # seconds over which the speed of a run is taken
LATELY = 5  # runs that have ended last
SLICE = 1.0  # seconds after which a pipe is asked whether anyone still reads


def follow(db: str, stage: str | None, every: float, until_done: bool, format: Format) -> None:
    """Look until someone asks to leave or, `until_done`, nothing is open. Raises what the first look raises."""
    eyes = Eyes(db, stage)
    eyes.look()  # a wrong name is an error now, and trouble of the database later
    with Ears() as ears, _face(format, ears, db) as face:
        _follow(eyes, ears, face, every, until_done)


def _follow(eyes: Eyes, ears: Ears, face: Face, every: float, until_done: bool) -> None:
    while True:
        began = time.monotonic()
        look = eyes.patient_look()
        face.show(look)
        if until_done and look.trouble is None and not any(found.open for found in look.stages):
            return
        # looking at a very large study shall not keep a core busy
        if not ears.wait(max(every, 2 * (time.monotonic() - began)), face):
            return


# ---------------------------------------------------------------------------------------------------------- looks


@dataclass(frozen=True)
class Look:
    """What one look has found; with `trouble` it is an older one, or empty."""

    at: float  # seconds since 1970, by this machine's clock
    stages: Sequence[StageStatus] = ()
    workers: Sequence[Mapping[str, Any]] = ()
    failures: Sequence[Mapping[str, Any]] = ()
    lately: Sequence[Mapping[str, Any]] = ()
    trouble: str | None = None
    since: float | None = None  # when the trouble began


class Eyes:
    """Looks at a database that may go away and come back, as another file even."""

    def __init__(self, db: str, stage: str | None) -> None:
        self.db, self.stage = db, stage
        self._engine: Engine | None = None
        self._file: tuple[int, int] | None = None  # a database may also be put in the place of another
        self._last = Look(time.time())
        self._speeds = Speeds()

    def patient_look(self) -> Look:
        """What there is now; or the last look, and why there is no newer one."""
        try:
            self._last = self.look()
        except RnnqError as error:
            self._forget()
            if self._last.since is None:
                self._last = replace(self._last, since=time.time())
            self._last = replace(self._last, trouble=" ".join(error.message.split()))
        return self._last

    def look(self) -> Look:
        """What there is now. Raises RnnqError."""
        from rnnq import status as overview

        engine = self._open()
        stages = chosen_stages(engine, self.stage)
        workers = overview.workers(engine, self.stage)
        self._speeds.improve(workers, time.monotonic())
        failures, lately = overview.failures(engine, self.stage), overview.lately(engine, self.stage, LATELY)
        return Look(time.time(), stages, workers, failures, lately)

    def _open(self) -> Engine:
        from rnnq import db as database

        try:
            found = None if database.is_server(self.db) else database.path_of(self.db).stat()
            identity = (found.st_dev, found.st_ino) if found else (0, 0)
        except OSError:
            identity = None  # opening it says why; what is open would still answer, from a file that nobody else sees
        if self._engine is None or identity != self._file:
            self._forget()
            self._engine = database.open(self.db)
            self._file = identity
        return self._engine

    def _forget(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None


class Speeds:
    """Steps a second between looks: nearer to now than the mean of a whole attempt."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], deque[tuple[float, int]]] = {}

    def improve(self, workers: Sequence[dict[str, Any]], now: float) -> None:
        """Put the speed of the last WINDOW seconds, and the end that follows from it, into the rows of workers."""
        rows = {(row["run"], row["attempt"]): row for row in workers if row["run"] is not None}
        self._seen = {key: self._seen.get(key, deque()) for key in rows}
        for key, row in rows.items():
            seen = self._seen[key]
            if not seen or row["step"] != seen[-1][1]:  # steps arrive in jumps: only their arrival tells a speed
                seen.append((now, row["step"]))
            while len(seen) > 2 and seen[1][0] < seen[-1][0] - WINDOW:
                seen.popleft()
            (first, start), (last, step) = seen[0], seen[-1]
            span = max(last - first, now - last)  # one that has stood still for longer is no longer as quick
            if step > start and last - first >= WINDOW / 4:
                row["steps_per_s"] = (step - start) / span
                if row["budget"] is not None:
                    row["run_eta_s"] = max(row["budget"] - row["step"], 0) / row["steps_per_s"]


# ---------------------------------------------------------------------------------------- who asks us to leave


class Face(Protocol):
    """How looks are shown."""

    def show(self, look: Look) -> None:
        """Show a look."""

    def again(self) -> None:
        """Show the last one once more, as the terminal's size has changed."""

    def sleep(self) -> None:
        """Give the terminal back as it was, be stopped, and take it again when we go on."""


class Ears:
    """Keys and signals: q, Ctrl-C, SIGTERM and a reader that has gone ask to leave. A second Ctrl-C leaves at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP)

    def __init__(self) -> None:
        self._heard: set[int] = set()
        self._before: dict[int, Any] = {}
        self._wake, self._waker = os.pipe()
        self._keys: int | None = None

    def __enter__(self) -> Ears:
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._waker)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in self._heard:
            raise KeyboardInterrupt  # a look that does not come back
        self._heard.add(number)
        with contextlib.suppress(OSError):
            os.write(self._waker, b"!")

    def listen_to(self, keys: int | None) -> None:
        """Hear the keys that come from this file."""
        self._keys = keys

    def wait(self, seconds: float, face: Face) -> bool:
        """Wait for the next look; False when somebody has asked to leave."""
        end = time.monotonic() + seconds
        while True:
            if self._heard & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} or _reader_has_gone():
                return False
            if signal.SIGTSTP in self._heard:
                self._heard.discard(signal.SIGTSTP)
                face.sleep()
            if signal.SIGWINCH in self._heard:
                self._heard.discard(signal.SIGWINCH)
                face.again()
            left = end - time.monotonic()
            if left <= 0:
                return True
            files = [self._wake] if self._keys is None else [self._wake, self._keys]
            ready, _, _ = select.select(files, [], [], min(left, SLICE))
            if self._wake in ready:
                os.read(self._wake, 4096)
            if self._keys in ready and self._asked_by_key():
                return False

    def _asked_by_key(self) -> bool:
        assert self._keys is not None
        try:
            typed = os.read(self._keys, 1024)
        except OSError:
            typed = b""
        if not typed:
            self._keys = None  # nobody types any more
        return any(key in typed for key in (b"q", b"Q", b"\x04"))


def _reader_has_gone() -> bool:
    """Whether nobody reads any more what we would write; of a pipe one is only told by writing, or by asking."""
    asked = select.poll()
    try:
        asked.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(found & (select.POLLERR | select.POLLHUP) for _, found in asked.poll(0))


# ---------------------------------------------------------------------------------------------------------- faces


def _face(format: Format, ears: Ears, db: str) -> Any:
    if format is Format.json:
        return contextlib.nullcontext(JsonLines())
    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return _to_the_end(Lines())
    return _on_screen(console, ears, db)


class JsonLines:
    """A JSON document on a line for each look."""

    def show(self, look: Look) -> None:
        """Print it."""
        import json

        row: dict[str, Any] = {"at": look.at}
        if look.trouble is not None:
            row |= {"error": look.trouble, "since": look.since}
        else:
            row |= {"stages": [asdict(found) for found in look.stages], "workers": look.workers}
            row |= {"failures": look.failures, "lately": look.lately}
        output.say(json.dumps(row, ensure_ascii=False, default=str))
        sys.stdout.flush()

    def again(self) -> None:
        """Nothing depends on a size."""

    def sleep(self) -> None:
        """Be stopped."""
        os.kill(os.getpid(), signal.SIGSTOP)


class Lines:
    """A line for each stage whose counts have changed since the last look; at the end one for each stage."""

    def __init__(self) -> None:
        self._told: dict[str, Mapping[str, int]] = {}
        self._last: Look | None = None
        self._trouble: str | None = None

    def show(self, look: Look) -> None:
        """Print what is new."""
        self._last = look
        if look.trouble != self._trouble:
            output.remark(_trouble(look) if look.trouble else f"{_clock(look.at)} the database answers again")
            self._trouble = look.trouble
        for found in look.stages:
            state = {**found.counts, "paused": int(found.paused)}
            if self._told.get(found.stage) != state:
                output.say(f"{_clock(look.at)} {stage_line(found)}")
                self._told[found.stage] = state
        sys.stdout.flush()

    def end(self) -> None:
        """Print how each stage stands."""
        for found in self._last.stages if self._last else ():
            output.say(stage_line(found))
        sys.stdout.flush()

    def again(self) -> None:
        """Nothing depends on a size."""

    def sleep(self) -> None:
        """Be stopped."""
        os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def _to_the_end(lines: Lines) -> Iterator[Lines]:
    yield lines
    lines.end()


def stage_line(found: StageStatus) -> str:
    """A stage in one line: "demo: 18 of 32 done, 2 running, 12 pending; 144 runs/h; ETA 5 min 00 s"."""
    counts = [f"{n:,} {state}" for state, n in found.counts.items() if state != "done"]
    parts = [", ".join([f"{found.counts.get('done', 0):,} of {found.total:,} done", *counts])]
    parts += [f"{rate_words(found)} runs/h"] if found.open and rate_words(found) else []
    parts += [f"ETA {eta_words(found)}"] if eta_words(found) and not found.paused else []
    return f"{found.stage}{' (paused)' if found.paused else ''}: {'; '.join(parts)}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _trouble(look: Look) -> str:
    return f"the database does not answer since {_clock(look.since or look.at)}: {look.trouble}"


class Screen:
    """The live view. It has the whole terminal, and gives it back as it was."""

    def __init__(self, console: Console, keys: int | None, db: str) -> None:
        self._console, self._keys, self._db = console, keys, db
        self._modes: list[Any] | None = None
        self._live: Live | None = None
        self._last: Look | None = None

    def take(self) -> None:
        """Take the terminal: keys come at once and unseen, the cursor is hidden."""
        from rich.live import Live

        if self._keys is not None:
            import termios
            import tty

            self._modes = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys, termios.TCSANOW)
        self._live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()
        self.again()

    def give_back(self) -> None:
        """Put the terminal back; one that has gone is no error."""
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._live.stop()
        self._live = None
        if self._modes is not None:
            import termios

            assert self._keys is not None
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._modes)
            self._modes = None

    def show(self, look: Look) -> None:
        """Draw it."""
        self._last = look
        self.again()

    def again(self) -> None:
        """Draw the last look for the size that the terminal has now."""
        if self._live is None or self._last is None:
            return
        width, height = self._console.size
        lines = view(self._last, width, height, self._db)
        with contextlib.suppress(OSError):  # a terminal that has gone says so by SIGHUP
            self._live.update(Group(*lines), refresh=True)

    def sleep(self) -> None:
        """Ctrl-Z."""
        self.give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.take()

    def end(self) -> None:
        """What stays on the terminal."""
        with contextlib.suppress(OSError):
            for found in self._last.stages if self._last else ():
                output.say(stage_line(found))
            sys.stdout.flush()


@contextlib.contextmanager
def _on_screen(console: Console, ears: Ears, db: str) -> Iterator[Screen]:
    keys = _keyboard()
    ears.listen_to(keys)
    screen = Screen(console, keys, db)
    try:
        screen.take()
        yield screen
    finally:
        screen.give_back()
    screen.end()


def _keyboard() -> int | None:
    """Standard input, if it is a terminal that is ours: in the background the system would stop us for asking."""
    try:
        keys = sys.stdin.fileno()
        return keys if os.isatty(keys) and os.tcgetpgrp(keys) == os.getpgrp() else None
    except (OSError, ValueError, AttributeError):
        return None


# -------------------------------------------------------------------------------------------------- the live view


STAGE = [
    Column("stage", "stage", 0, least=8),
    Column("bar", "", 6),
    Column("done", "done", 0, right=True),
    Column("running", "run", 3, right=True),
    Column("pending", "pend", 5, right=True),
    Column("waiting", "wait", 7, right=True),
    Column("failed", "failed", 2, right=True),
    Column("eta", "ETA", 1),
    Column("between", "80 % interval", 4),
]
WORKER = [
    Column("worker", "worker", 4, least=8, from_the_left=True),
    Column("device", "device", 9),
    Column("state", "state", 1),
    Column("run", "run", 0, right=True),
    Column("step", "step", 0, right=True),
    Column("loss", "loss", 1, right=True),
    Column("speed", "steps/s", 5, right=True),
    Column("eta", "ETA", 2, right=True),
    Column("beat", "beat", 7, right=True),
    Column("label", "stage: label", 6, least=10),
]
ENDED = [
    Column("run", "run", 0, right=True),
    Column("state", "ended", 0),
    Column("result", "with", 1, least=11),
    Column("ago", "ago", 2, right=True),
    Column("label", "stage: label", 3, least=10),
]


def view(look: Look, width: int, height: int, db: str = "") -> list[Text]:
    """A look as lines that fit: each section with as many rows as there is room for, and how many more there are."""
    head = [_head(look, width, db)]
    if look.trouble is not None:
        head.append(Text(fit.cut(_trouble(look), width), "bold"))
    sections = [
        (_stage_rows(look), STAGE, "stage"),
        (_worker_rows(look), WORKER, "worker"),
        (_ended_rows(look), ENDED, ""),
    ]
    rooms = share(height - len(head), [len(rows) for rows, _, _ in sections])
    lines = head
    for (rows, columns, noun), room in zip(sections, rooms, strict=True):
        if room:
            lines += [Text(""), *_section(rows, columns, noun, room, width)]
    return lines


def _head(look: Look, width: int, db: str) -> Text:
    live = len({row["worker"] for row in look.workers if row["state"] == "live"})
    parts = [_clock(look.at), output.count(live, "worker"), "q quits", db]
    if not look.stages:
        parts.insert(1, "no stage yet")
    return Text(fit.cut("  ".join(parts), width), "bold")


def share(height: int, wanted: Sequence[int]) -> list[int]:
    """How many rows each section of stages, workers and ended runs gets; a section costs two lines besides its rows.

    First a few for each, in the order of what a watcher needs most; then all that is left, workers first.
    """
    rooms = [0] * len(wanted)
    first, order = (4, 4, 3), (1, 0, 2)
    left = height
    for least in (first, wanted):
        for i in order:
            opening = 0 if rooms[i] else 2
            more = min(wanted[i], least[i]) - rooms[i]
            given = min(more, left - opening)
            if given > 0:
                rooms[i] += given
                left -= given + opening
    return rooms


def _section(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], noun: str, room: int, width: int
) -> list[Text]:
    hidden = len(rows) - room
    if hidden <= 0 or not noun:  # of the runs that ended only the last ones are shown anyway
        return fit.table(rows[:room], columns, width)
    lines = fit.table(rows[: room - 1], columns, width) if room > 1 else []
    return [*lines, Text(f"… and {output.count(len(rows) - max(room - 1, 0), f'more {noun}')}")]


def _stage_rows(look: Look) -> list[dict[str, Any]]:
    # where there is no room for all, those at which something happens
    stages = sorted(look.stages, key=lambda found: not found.open)
    return [_stage_row(found) for found in stages]


def _stage_row(found: StageStatus) -> dict[str, Any]:
    counts = {state: f"{n:,}" for state, n in found.counts.items()}
    done = found.counts.get("done", 0)
    filled = int(12 * done / found.total) if found.total else 0
    return {
        **counts,
        "stage": f"{found.stage} (paused)" if found.paused else found.stage,
        "bar": "█" * filled + "·" * (12 - filled),
        "done": f"{done:,}/{found.total:,}",
        "eta": output.duration(found.eta_s) if found.eta_s else eta_words(found),
        "between": interval_words(found),
    }


def _worker_rows(look: Look) -> list[dict[str, Any]]:
    plain = all(state_of(row) == "live" for row in look.workers)
    return [_pack_row(pack, plain) for pack in packs(look.workers)]


def _pack_row(pack: Sequence[Mapping[str, Any]], plain: bool) -> dict[str, Any]:
    """A worker with one run, or with the runs of a pack: the slowest step, the lowest loss, all speeds together."""
    rows = [_worker_row(row, plain) for row in pack]
    if len(pack) == 1:
        return rows[0]
    slowest = min(range(len(pack)), key=lambda k: int(pack[k]["step"]))
    lowest = min(range(len(pack)), key=lambda k: math.inf if pack[k]["loss"] is None else float(pack[k]["loss"]))
    speeds = [row["steps_per_s"] for row in pack if row["steps_per_s"] is not None]
    ends = [row["run_eta_s"] for row in pack if row["run_eta_s"] is not None]
    return {
        **rows[slowest],
        "run": members_words(pack),
        "loss": rows[lowest]["loss"],
        "speed": f"{sum(speeds):,.0f}" if speeds else "",
        "eta": output.duration(max(ends, default=None)),
    }


def _worker_row(row: Mapping[str, Any], plain: bool) -> dict[str, Any]:
    shown = {"worker": row["worker"], "device": row["device"], "beat": f"{max(row['beat_s_ago'], 0):.0f} s"}
    state = state_of(row)
    shown |= {"state": "" if plain else state, "style": "bold" if state in ("silent", "gone", "lost") else ""}
    if row["run"] is None:
        return {**shown, "label": idle_words(row), "run": "–"}
    share = f"/{row['budget']:,}" if row["budget"] else ""
    speed = row["steps_per_s"]
    return {
        **shown,
        "run": row["run"],
        "step": f"{row['step']:,}{share}",
        "loss": loss_words(row),
        "speed": "" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
        "eta": output.duration(row["run_eta_s"]),
        "label": f"{row['stage']}: {row['label']}",
    }


def _ended_rows(look: Look) -> list[dict[str, Any]]:
    return [_ended_row(row) for row in look.lately]


def _ended_row(row: Mapping[str, Any]) -> dict[str, Any]:
    failed = row["state"] == "failed"
    message = (row["message"] or "").partition("\n")[0]
    why = ": ".join(part for part in (row["cause"], message) if part)
    return {
        "run": row["run"],
        "state": "FAILED" if failed else "done",
        "result": why if failed else f"loss {output.cell(row['loss'])}" if row["loss"] is not None else "",
        "ago": output.duration(max(row["s_ago"], 0)),
        "label": f"{row['stage']}: {row['label']}",
        "style": "bold" if failed else "",
    }
