"""A study whose workers are killed, stopped and asked to leave at random moments, beside a twin that nobody disturbs.

    python benchmarks/chaos.py --workers 16 --runs 2000 --kills 1000

It makes a study of many short runs in a temporary folder, starts real `rnnq worker` processes and one that reads the
status all the time, and while they train it sends SIGKILL, SIGSTOP (past the lease, then SIGCONT) and SIGTERM to
random ones; new workers take the places of the dead. At the end every run must be done exactly once, and its points,
its final and its best checkpoint must equal those of the twin to the bit. It prints figures, and exits with 1 when
anything is wrong.

Equal bits alone would not show that a stale worker was kept out, as it would write the very same. So triggers in the
database (WATCHDOGS) note every write that only a worker without the run could have made.

Processes are forked from one that has torch loaded and has never opened a database: SQLite's locks do not survive a
fork, and starting a Python with torch takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

# what a worker imports when it needs it, too: a fork is to have it all
import alembic.command  # noqa: F401
import numpy.random  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
import torch
import torch.utils.serialization.config
from sqlalchemy import Engine, text

import rnnq.cli
import rnnq.cli.work
import rnnq.desk
import rnnq.runs
import rnnq.worker
from rnnq import checkpoint, db, status

STEPS, EVERY = 120, 20  # steps of a run, and between two of its checkpoints: five on the way, and the last

DEFINITION = f"""
import torch

import rnnq
from rnnq.families.base import State


class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric = "val_loss"
    steps: int = {STEPS}
    log_every: int = 5
    eval_every: int = 40
    lr: float = 0.01


class Walk(rnnq.Family):
    '''A carried state, and noise from the global random numbers: whatever is resumed badly shows.'''

    Config = Config
    name = "walk"

    def init(self, configs):
        chance = [torch.Generator().manual_seed(config.seed) for config in configs]
        w = torch.stack([torch.randn(4, 4, generator=g) for g in chance])
        return State({{"w": w}}, {{"h": torch.zeros(len(configs), 8, 4)}})

    def batch(self, configs, steps):
        seeds = [1_000_003 * config.seed + step for config, step in zip(configs, steps)]
        return torch.stack([torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def loss(self, state, data):
        h = torch.tanh(torch.bmm(data + state.carried["h"], state.params["w"]))
        return (h + 0.1 * torch.randn_like(h) - data).square().mean((1, 2)), {{"h": h.detach()}}

    def evaluate(self, state, configs, split):
        return [{{f"{{split}}_loss": float((w + torch.rand(())).square().mean())}} for w in state.params["w"]]


stage = rnnq.stage("chaos", Walk, rnnq.grid(seed=range(RUNS)))
"""

# the same for packs: in these nobody draws from the global numbers, which members would share
PACKED = (
    ("    lr: float = 0.01\n", "    lr: float = 0.01\n\n    def pack_key(self):\n        return 'all'\n"),
    ("h + 0.1 * torch.randn_like(h)", "h"),
    ("(w + torch.rand(()))", "w"),
)

# Each notes a write that must not happen: of a worker whose run has another owner, or after the end.
WATCHDOGS = """
CREATE TABLE chaos (what TEXT NOT NULL, run_id INTEGER NOT NULL, detail TEXT);
CREATE TRIGGER chaos_checkpoint AFTER UPDATE OF checkpoint ON runs
WHEN NEW.checkpoint IS NOT OLD.checkpoint
     AND coalesce(instr(json_extract(NEW.checkpoint, '$.path'), '/a' || NEW.attempt || '-s'), 0) = 0
BEGIN INSERT INTO chaos VALUES ('a checkpoint of another attempt', NEW.id, NEW.checkpoint); END;
CREATE TRIGGER chaos_steps AFTER UPDATE OF steps_done ON runs
WHEN NEW.attempt = OLD.attempt AND OLD.state = 'running' AND NEW.state IN ('running', 'done')
     AND NEW.steps_done < OLD.steps_done
BEGIN INSERT INTO chaos VALUES ('a step back inside an attempt', NEW.id, NEW.steps_done); END;
CREATE TRIGGER chaos_back AFTER UPDATE OF checkpoint ON runs
WHEN json_extract(NEW.checkpoint, '$.step') <= json_extract(OLD.checkpoint, '$.step')
BEGIN INSERT INTO chaos VALUES ('a checkpoint that is no newer', NEW.id, NEW.checkpoint); END;
CREATE TRIGGER chaos_start AFTER UPDATE OF step_from ON attempts
WHEN NEW.step_from != coalesce((SELECT json_extract(checkpoint, '$.step') FROM runs WHERE id = NEW.run_id), 0)
BEGIN INSERT INTO chaos VALUES ('a start elsewhere than at the last checkpoint', NEW.run_id, NEW.step_from); END;
CREATE TRIGGER chaos_done AFTER UPDATE ON runs WHEN OLD.state = 'done'
BEGIN INSERT INTO chaos VALUES ('a write to a run that was done', NEW.id, NEW.state); END;
CREATE TRIGGER chaos_ended AFTER UPDATE OF ended ON attempts WHEN OLD.ended IS NOT NULL
BEGIN INSERT INTO chaos VALUES ('a second end of an attempt', NEW.run_id, OLD.ended || ', then ' || NEW.ended); END;
CREATE TRIGGER chaos_point AFTER INSERT ON point
WHEN NEW.step > (SELECT steps_done FROM runs WHERE id = NEW.run_id)
BEGIN INSERT INTO chaos VALUES ('a point past its run''s step', NEW.run_id, NEW.step); END;
CREATE TRIGGER chaos_rewritten AFTER UPDATE ON point
BEGIN INSERT INTO chaos VALUES ('a point was rewritten', NEW.run_id, NEW.step); END
"""


@dataclass(frozen=True)
class Plan:
    """What is done to the study."""

    workers: int
    runs: int
    kills: int
    stops: int
    terms: int
    lease: float  # seconds
    seconds: float  # after which it is given up
    seed: int
    pack: int = 1  # runs that a worker trains together


@dataclass
class Result:
    """What came of it: figures, and everything that is wrong."""

    figures: dict[str, int | float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- forked processes


class Spawner:
    """A child that forks all others; it alone signals and waits for them, so that no signal meets a stranger's pid."""

    def __init__(self) -> None:
        self._ours, theirs = Pipe()
        gc.collect()
        gc.freeze()  # else each child's first collection copies all of torch
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._ours.close()
            _serve(theirs)
        theirs.close()

    def start(self, folder: Path, *words: str, **environment: str) -> int:
        """A process that does what the words say in that folder; returns its pid."""
        return int(self._ask("start", str(folder), words, environment))

    def send(self, pid: int, number: int) -> bool:
        """Whether the signal met a process that had not ended."""
        return bool(self._ask("send", pid, number))

    def ended(self) -> dict[int, int]:
        """Exit codes of those that have ended since it was asked last; negative: a signal."""
        found: dict[int, int] = self._ask("ended")
        return found

    def run(self, folder: Path, *words: str, **environment: str) -> dict[int, int]:
        """A process to its end. Returns the exit codes of others that ended meanwhile."""
        pid = self.start(folder, *words, **environment)
        others: dict[int, int] = {}
        while pid not in others:
            time.sleep(0.005)  # the spawner answers when it is asked; the cores belong to the workers
            others |= self.ended()
        if others.pop(pid) != 0:
            raise RuntimeError(f"{' '.join(words)} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
        return others

    def close(self) -> None:
        """Kill whatever still lives."""
        self._ours.close()
        os.waitpid(self.pid, 0)

    def _ask(self, *what: Any) -> Any:
        self._ours.send(what)
        return self._ours.recv()


def _serve(asked: Connection) -> NoReturn:
    """Fork, signal and wait, as asked, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the twin's numerics must be the same
    living: set[int] = set()
    codes: dict[int, int] = {}
    while True:
        try:
            verb, *rest = asked.recv()
        except (EOFError, OSError):
            break
        while living:
            pid, found = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            living.discard(pid)
            codes[pid] = os.waitstatus_to_exitcode(found)
        if verb == "start":
            pid = os.fork()
            if pid == 0:
                asked.close()
                _become(*rest)
            living.add(pid)
            asked.send(pid)
        elif verb == "send":
            pid, number = rest
            if pid in living:
                os.kill(pid, number)
            asked.send(pid in living)
        else:
            asked.send(codes)
            codes = {}
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _become(folder: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """The forked process: `rnnq ...`, or the reader."""
    code: Any = 0
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(environment)
        sys.argv = list(words)
        for chance in (db._jitter, rnnq.worker._jitter, rnnq.desk._jitter):
            chance.seed()  # else all would wait for the same times, which processes of their own do not
        if words[0] == "reader":
            read_status()
        else:
            rnnq.cli.main()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # an interpreter that takes torch apart before it ends needs 0.3 s


def read_status() -> None:
    """What `rnnq status` shows, again and again until SIGTERM; the seconds that each look took go into reads.txt."""
    engine = db.open("experiments.db")
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    with Path("reads.txt").open("w") as reads:
        while not asked:
            began = time.perf_counter()
            status.stages(engine)
            status.workers(engine)
            status.failures(engine)
            status.lately(engine)
            reads.write(f"{time.perf_counter() - began}\n")
            time.sleep(0.05)  # as a person's screen, not as fast as it can


# --------------------------------------------------------------------------------------------------------- the study


def make(spawner: Spawner, folder: Path, runs: int, lease: float, pack: int) -> None:
    """A study of so many runs; its database has watchdogs."""
    (folder / "defs").mkdir(parents=True)
    (folder / "defs" / "chaos.py").write_text(_definition(runs, pack))
    spawner.run(folder, "rnnq", "init", "defs/chaos.py", RNNQ_LEASE_S=str(lease))
    engine = db.open(str(folder / "experiments.db"))
    with db.transaction(engine) as connection:
        for statement in re.split(r";\s*(?=CREATE)", WATCHDOGS):
            connection.execute(text(statement))
    engine.dispose()


def _definition(runs: int, pack: int) -> str:
    words = DEFINITION.replace("RUNS", str(runs))
    for old, new in PACKED if pack > 1 else ():
        words = words.replace(old, new)
    return words


WORKER = ("rnnq", "worker", "--device", "cpu", "--no-bar", "--checkpoint-every", str(EVERY))


class Chaos:
    """Workers of a study, and what is done to them."""

    def __init__(self, spawner: Spawner, folder: Path, plan: Plan) -> None:
        self.spawner, self.folder, self.plan = spawner, folder, plan
        self.engine = db.open(str(folder / "experiments.db"))
        self.chance = random.Random(plan.seed)
        self.living: dict[int, float | None] = {}  # pid -> when a stopped one goes on
        self.done = {"kills": 0, "stops": 0, "terms": 0}
        self.retried = self.started = 0
        self.problems: list[str] = []

    def run(self) -> None:
        """Train until nothing is left, and disturb it as planned: the more is done, the more has happened."""
        deadline = time.monotonic() + self.plan.seconds
        reader = self.spawner.start(self.folder, "reader")
        while True:
            counts = self._counts()
            if not counts.keys() & {"pending", "running", "waiting"} and not self._retry():
                break
            if time.monotonic() > deadline:
                self.problems.append(f"given up after {self.plan.seconds:g} s: {counts}")
                break
            self._fill()
            self._disturb(min(1.0, (counts.get("done", 0) + self.plan.workers) / (0.95 * self.plan.runs)))
            time.sleep(min(0.1, self.chance.expovariate(100)))  # so that a kill may fall at any moment
            self._wake()
            self._bury(self.spawner.ended(), reader)
        self._wind_up(reader)

    def _counts(self) -> dict[str, int]:
        with db.reading(self.engine) as connection:
            rows = connection.execute(text("SELECT state, count(*) AS n FROM runs GROUP BY state")).all()
        return {row.state: row.n for row in rows}

    def _retry(self) -> bool:
        """Put back runs that were lost three times in a row before their next checkpoint: so many kills may do that."""
        with db.reading(self.engine) as connection:
            sql = "SELECT id FROM runs WHERE state = 'failed' AND cause = 'lost'"
            failed = [str(run) for run in connection.execute(text(sql)).scalars()]
        if failed:
            self.retried += len(failed)
            self._bury(self.spawner.run(self.folder, "rnnq", "retry", *failed), None)
        return bool(failed)

    def _fill(self) -> None:
        """Start workers in the places of those that ended or were stopped; one a tick, as forks cost."""
        if sum(until is None for until in self.living.values()) < self.plan.workers:
            self.living[self.spawner.start(self.folder, *WORKER, "--pack", str(self.plan.pack))] = None
            self.started += 1

    def _disturb(self, share: float) -> None:
        awake = [pid for pid, until in self.living.items() if until is None]
        asleep = len(self.living) - len(awake)
        if self._is_due("kills", share):
            # one that sleeps, too, but seldom: it is to wake up and find that its run has gone on
            whom = awake if awake and self.chance.random() < 0.9 else list(self.living)
            self._send("kills", self.chance.choice(whom), signal.SIGKILL)
        if awake and asleep < max(1, self.plan.workers // 4) and self._is_due("stops", share):
            pid = self.chance.choice(awake)
            if self._send("stops", pid, signal.SIGSTOP):
                self.living[pid] = time.monotonic() + self.plan.lease * self.chance.uniform(1, 5)
        if awake and self._is_due("terms", share):
            self._send("terms", self.chance.choice(awake), signal.SIGTERM)

    def _is_due(self, what: str, share: float) -> bool:
        return bool(self.living) and self.done[what] < math.ceil(getattr(self.plan, what) * share)

    def _send(self, what: str, pid: int, number: int) -> bool:
        met = self.spawner.send(pid, number)
        self.done[what] += met
        return met

    def _wake(self, all_of_them: bool = False) -> None:
        for pid, until in self.living.items():
            if until is not None and (all_of_them or time.monotonic() >= until):
                self.spawner.send(pid, signal.SIGCONT)
                self.living[pid] = None

    def _bury(self, codes: Mapping[int, int], reader: int | None) -> None:
        for pid, code in codes.items():
            if pid == reader or code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
                self.problems.append(f"process {pid} ended with code {code}: see output.txt")
            self.living.pop(pid, None)

    def _wind_up(self, reader: int) -> None:
        """Let the workers leave by themselves, those that were stopped too."""
        self._wake(all_of_them=True)
        deadline = time.monotonic() + 120
        while self.living and time.monotonic() < deadline:
            time.sleep(0.02)  # between two looks, until the deadline
            self._bury(self.spawner.ended(), reader)
        if self.living:
            self.problems.append(f"{len(self.living)} workers did not leave")
        self.spawner.send(reader, signal.SIGTERM)
        while not (ended := self.spawner.ended()):
            time.sleep(0.01)  # between two looks: it ends at its signal
        if ended.get(reader) != 0:
            self.problems.append(f"the reader of the status failed: {ended}; see output.txt")
        self.engine.dispose()


def train_twin(spawner: Spawner, folder: Path, runs: int, pack: int) -> None:
    """The same runs, undisturbed, each alone."""
    make(spawner, folder, runs, lease=60, pack=pack)
    workers = {spawner.start(folder, *WORKER, "--pack", "off") for _ in range(os.cpu_count() or 1)}
    while workers:
        time.sleep(0.05)  # between two looks: they leave by themselves
        for pid, code in spawner.ended().items():
            workers.discard(pid)
            if code:
                raise RuntimeError(f"a worker of the twin ended with {code}: see {folder / 'output.txt'}")


# --------------------------------------------------------------------------------------------------------- the judge

# Each finds what must not be there: run, and what is wrong with it.
RULES = {
    "runs are not done": "SELECT id, state || ' ' || coalesce(message, '') FROM runs WHERE state != 'done'",
    "runs were done more or less than once": """
        SELECT runs.id, count(attempts.attempt) AS n FROM runs LEFT JOIN attempts ON run_id = runs.id AND ended = 'done'
        GROUP BY runs.id HAVING n != 1""",
    "runs went on after the attempt that was done": """
        SELECT id, runs.attempt FROM runs JOIN attempts ON run_id = id AND ended = 'done'
        WHERE attempts.attempt != runs.attempt""",
    "attempts never ended": "SELECT run_id, attempt FROM attempts WHERE ended IS NULL",
    "attempts began before the one before had ended": """
        SELECT one.run_id, one.attempt FROM attempts AS one JOIN attempts AS next
        ON next.run_id = one.run_id AND next.attempt = one.attempt + 1 WHERE next.started_at < one.ended_at""",
    "attempts were not exact": "SELECT run_id, attempt FROM attempts WHERE NOT exact",
    "writes were made by a worker that did not hold the run": "SELECT run_id, what || ': ' || detail FROM chaos",
    "final checkpoints are not of the last attempt": """
        SELECT id, checkpoint FROM runs
        WHERE instr(json_extract(checkpoint, '$.path'), '/a' || attempt || '-s') = 0""",
}


def judge(folder: Path, twin: Path) -> Result:
    """Everything that is wrong with a study when it is over."""
    result = Result()
    ours, theirs = db.open(str(folder / "experiments.db")), db.open(str(twin / "experiments.db"))
    for what, sql in RULES.items():
        with db.reading(ours) as connection:
            rows = connection.execute(text(sql)).all()
        if rows:
            detail = " ".join(str(rows[0][1]).split())[:200]
            result.problems.append(f"{len(rows)} {what}: run {rows[0][0]}, {detail}")
    result.problems += db.check(ours)
    _compare(result, "points", points(ours), points(theirs))
    files = [checkpoints(engine, result.problems) for engine in (ours, theirs)]
    _compare(result, "checkpoints", *files)
    result.figures |= _attempts(ours)
    ours.dispose()
    theirs.dispose()
    return result


def _compare(result: Result, what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    other = [run for run in found.keys() | expected.keys() if found.get(run) != expected.get(run)]
    if other:
        result.problems.append(f"{len(other)} runs have other {what} than their twins, the first is {min(other)}")
    result.figures[f"{what} compared"] = sum(map(len, expected.values()))


def points(engine: Engine) -> dict[str, list[tuple[str, int, str]]]:
    """The points of each run by its fingerprint, values to the bit."""
    sql = """SELECT fingerprint, metrics.name, step, value FROM point JOIN runs ON runs.id = run_id
             JOIN metrics ON metrics.id = metric_id ORDER BY run_id, metrics.name, step"""
    found: dict[str, list[tuple[str, int, str]]] = {}
    with db.reading(engine) as connection:
        for row in connection.execute(text(sql)):
            found.setdefault(row.fingerprint, []).append((row.name, row.step, row.value.hex()))
    return found


def checkpoints(engine: Engine, problems: list[str]) -> dict[str, list[str]]:
    """A hash of what the final and the best checkpoint of each run hold, opened as a worker opens them."""
    study, _, root = db.study(engine)
    sql = "SELECT id, stage, fingerprint, checkpoint, checkpoint_best FROM runs WHERE state = 'done' ORDER BY id"
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql)).all()
    found: dict[str, list[str]] = {}
    for row in rows:
        owner = checkpoint.Owner(study, row.stage, row.id, row.fingerprint)
        found[row.fingerprint] = []
        for kept in (row.checkpoint, row.checkpoint_best):
            try:
                state = checkpoint.load(root, checkpoint.Saved(**json.loads(kept or "{}")), owner)
                found[row.fingerprint].append(digest(state))
            except Exception as error:
                problems.append(f"a checkpoint of run {row.id} cannot be opened: {error}")
    return found


def digest(state: Any) -> str:
    """One hash of a tree of dicts, lists, tensors and plain values, to the bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                found.update(f"<{name}>".encode())
                add(value[name])
        elif isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            found.update(f"{value!r};".encode())

    add(state)
    return found.hexdigest()


def _attempts(engine: Engine) -> dict[str, int | float]:
    """How the attempts ended."""
    sql = """SELECT count(*) AS attempts, sum(ended = 'lost') AS lost,
                    coalesce(sum(ended = 'lost' AND message LIKE '%its process is gone'), 0) AS killed,
                    coalesce(sum(ended = 'lost' AND message LIKE '%no heartbeat%'), 0) AS stopped,
                    sum(ended = 'released') AS released, sum(ended = 'done') AS done FROM attempts"""
    packed = """SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM attempts GROUP BY worker, started_at) AS p
                WHERE n > 1"""
    lost = "SELECT count(*) FROM runs WHERE state != 'done'"
    twice = "SELECT count(*) FROM (SELECT 1 FROM attempts WHERE ended = 'done' GROUP BY run_id HAVING count(*) > 1)"
    with db.reading(engine) as connection:
        row = connection.execute(text(sql)).one()
        return {
            "attempts": row.attempts,
            "... that began in a pack": connection.execute(text(packed)).scalar_one(),
            "attempts lost": row.lost,
            "... to a worker that was killed": row.killed,
            "... to one that was silent past its lease": row.stopped,
            "attempts given back": row.released,
            "attempts done": row.done,
            "runs done twice": connection.execute(text(twice)).scalar_one(),
            "runs not done": connection.execute(text(lost)).scalar_one(),
        }


# ------------------------------------------------------------------------------------------------------- the command


def chaos(spawner: Spawner, folder: Path, plan: Plan) -> Result:
    """Make both studies in a folder, disturb one of them, and judge it."""
    began = time.monotonic()
    make(spawner, folder / "study", plan.runs, plan.lease, plan.pack)
    study = Chaos(spawner, folder / "study", plan)
    study.run()
    took = time.monotonic() - began
    train_twin(spawner, folder / "twin", plan.runs, plan.pack)
    result = judge(folder / "study", folder / "twin")
    output = (folder / "study" / "output.txt").read_text(errors="replace")
    reads = [float(line) for line in (folder / "study" / "reads.txt").read_text().split()]
    first = {"workers started": study.started, **study.done}
    last = {
        "stale workers that were turned away": len(
            re.findall(r": lost: run \d+ attempt \d+ is no longer ours", output)
        ),
        "runs put back after three losses in a row": study.retried,
        "status reads": len(reads),
        "median status read, s": round(statistics.median(reads), 4) if reads else math.nan,
        "slowest status read, s": round(max(reads, default=math.nan), 3),
        "wall time, s": round(took, 1),
    }
    problems = [*study.problems, *result.problems]
    for what in ("kills", "stops", "terms"):
        if study.done[what] < getattr(plan, what):
            problems.append(f"only {study.done[what]} of {getattr(plan, what)} {what}: the study was over")
    return Result({**first, **result.figures, **last}, problems)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=16, help="workers side by side")
    parser.add_argument("--runs", type=int, default=2000, help="runs of the study")
    parser.add_argument("--kills", type=int, default=1000, help="SIGKILLs")
    parser.add_argument("--stops", type=int, help="SIGSTOPs, for one lease to five (default: a tenth of the kills)")
    parser.add_argument("--terms", type=int, help="SIGTERMs (default: a twentieth of the kills)")
    parser.add_argument("--lease", type=float, default=1.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=7200.0, help="give up after so long")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of who is killed, and when")
    parser.add_argument("--pack", type=int, default=1, help="runs that a worker trains together (1: each alone)")
    parser.add_argument("--keep", type=Path, help="make the studies in this folder, and leave them there")
    parser.add_argument("--json", action="store_true", help="print figures and problems as JSON")
    return parser.parse_args(words)


def main() -> int:
    """Do it, print the figures, and say what is wrong."""
    asked = parse()
    stops = asked.kills // 10 if asked.stops is None else asked.stops
    terms = asked.kills // 20 if asked.terms is None else asked.terms
    more = asked.lease, asked.seconds, asked.seed, asked.pack
    plan = Plan(asked.workers, asked.runs, asked.kills, stops, terms, *more)
    spawner = Spawner()
    try:
        with contextlib.ExitStack() as stack:
            folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            result = chaos(spawner, folder.resolve(), plan)
    finally:
        spawner.close()
    if asked.json:
        print(
            json.dumps(
                {"seed": plan.seed, "pack": plan.pack, "figures": result.figures, "problems": result.problems}, indent=2
            )
        )
    else:
        print(f"--seed {plan.seed}")
        for name, value in result.figures.items():
            print(f"{name:<44}{value:>12,}")
        for problem in result.problems:
            print(f"WRONG: {problem}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
