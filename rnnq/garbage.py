"""What may go from the disk: files that no row names, and checkpoints that a stage's rule does not keep.

`look` says what, `collect` does it. Rows first, then files: what is interrupted leaves a file that no row names, never
a row that names a file that is gone. Only runs that are done let anything go. Nothing behind a link is deleted, and
nothing that is not named as rnnq names its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db, host, queue, ranking, retention, runs, stored
from rnnq.errors import DatabaseError, InputError
from rnnq.queue import Leaving
from rnnq.retention import Rule
from rnnq.runs import StageInfo
from rnnq.stored import Watch

CHUNK = 500  # runs whose rows are changed in one transaction, so that nobody's heartbeat waits
OLD = 3600.0  # seconds since the last write of a temporary file, after which nobody writes it any more
LAST, BEST, OPEN, SNAPSHOTS = "last", "best", "of runs not done", "snapshots"
UNNAMED, TEMPORARY, LOGS = "without a row", "temporary", "logs without a run"

_OURS = re.compile(
    r"""(?:checkpoints/(?P<study>[^/]+)/(?P<stage>[^/]+)/(?P<run>\d{1,18})/
           (?:a(?P<attempt>\d{1,18})-s\d+(?:-\w+)?\.pt|(?P<aside>\.a(?P<by>\d{1,18})-s\d+(?:-\w+)?\.pt\.\d+\.tmp))
        |logs/[^/]+/(?P<printed>\d{1,18})/a\d+\.txt)""",
    re.VERBOSE,
)


@dataclass
class Share:
    """Files of a stage and a kind: how many go, with how many bytes, and what stays."""

    stage: str
    kind: str
    files: int = 0
    bytes: int = 0
    stay: int = 0
    stay_bytes: int = 0


@dataclass
class Found:
    """What would go, and what would not."""

    rules: dict[str, Rule] = field(default_factory=dict)  # of the stages that were looked at
    shares: dict[tuple[str, str], Share] = field(default_factory=dict)
    leaving: dict[str, list[Leaving]] = field(default_factory=dict)  # by stage
    unnamed: dict[str, int] = field(default_factory=dict)  # path -> bytes
    left: Counter[str] = field(default_factory=Counter)  # why files that look like garbage are left alone -> how many
    unjudged: dict[str, int] = field(default_factory=dict)  # stage -> groups that lack seeds, and so lose to nobody

    def count(self, stage: str, kind: str, goes: bool, size: int) -> None:
        """Enter a file."""
        share = self.shares.get((stage, kind))
        if share is None:
            share = self.shares[stage, kind] = Share(stage, kind)
        if goes:
            share.files += 1
            share.bytes += size
        else:
            share.stay += 1
            share.stay_bytes += size

    @property
    def files(self) -> int:
        """How many go."""
        return sum(share.files for share in self.shares.values())

    @property
    def bytes(self) -> int:
        """What they come to."""
        return sum(share.bytes for share in self.shares.values())


@dataclass
class Gone:
    """What went."""

    files: int = 0
    bytes: int = 0
    kept: int = 0  # runs that changed meanwhile, and so keep what they have


@dataclass(frozen=True)
class Home:
    """The study's folders as they really are. Their parents may be links, which a person has set; nothing below is."""

    study: str
    rooms: Mapping[str, str]  # checkpoints, logs -> folder
    plain: set[str] = field(default_factory=set)  # folders that were found to be no links

    def place(self, path: str) -> str | None:
        """Where a path of the database or of the disk lies; None when it leads elsewhere or to anything but a file."""
        room, study, *folders, name = path.split("/")
        if room not in self.rooms or study != self.study or ".." in folders or name == "..":
            return None
        place = self.rooms[room]
        for folder in ("", *folders):
            place = f"{place}/{folder}" if folder else place
            if not self._is_plain(place):
                return None
        return f"{place}/{name}" if _is(stat.S_ISREG, f"{place}/{name}") else None

    def _is_plain(self, folder: str) -> bool:
        if folder not in self.plain and _is(stat.S_ISDIR, folder):
            self.plain.add(folder)
        return folder in self.plain


def _is(kind: Callable[[int], bool], place: str) -> bool:
    """Whether there is a file, or a folder, at a place, and no link to one."""
    try:
        return kind(os.lstat(place).st_mode)  # words, not Paths: there may be very many
    except OSError:
        return False


def home(engine: Engine) -> Home:
    """Where the files of a study are."""
    study, _, root = db.study(engine)
    return Home(study, {room: f"{(root / room).resolve()}/{study}" for room in stored.ROOMS})


# ------------------------------------------------------------------------------------------------------ looking


def look(engine: Engine, stage: str | None = None, keep: str | None = None, watch: Watch | None = None) -> Found:
    """What would go, of a stage or of all. With `keep`, as if that were the stage's rule.

    Raises InputError; DatabaseError when a row does not say clearly which files it names.
    """
    if keep is not None and stage is None:
        raise InputError("--keep is a rule of one stage", "--stage names it")
    rule = None if keep is None else retention.parse(keep)
    infos = runs.stage_infos(engine) if stage is None else {stage: runs.stage_info(engine, stage)}
    found, where = Found(), home(engine)
    _, _, root = db.study(engine)
    disk = stored.on_disk(root, where.study, watch or (lambda what, done, total: None))
    try:
        with db.reading(engine) as connection:
            named = stored.named(connection)
        for name, info in infos.items():
            found.rules[name] = rule or retention.rule_of(info.keep)
            _look_at_stage(engine, info, found, disk, where)
        _look_at_unnamed(engine, stage, found, disk, [path for path in disk if path not in named], where)
    except (ValueError, KeyError, TypeError) as error:
        why = f"a row names a file in words that are not rnnq's ({type(error).__name__}: {error}); nothing was deleted"
        raise DatabaseError(why, "`rnnq doctor` looks for damage") from error
    return found


_RUNS = f"""SELECT id, attempt, state, group_key, ended_at, checkpoint, checkpoint_prev, checkpoint_best,
                   {queue.NEEDED} AS needed
            FROM runs WHERE {stored.of_stage("")} AND coalesce(checkpoint, checkpoint_prev, checkpoint_best) IS NOT NULL
            ORDER BY id"""


_SNAPSHOTS = f"""SELECT path FROM artifacts JOIN runs ON runs.id = artifacts.run_id
                 WHERE kind = 'snapshot' AND {stored.of_stage("")} ORDER BY artifacts.id"""


def _look_at_stage(engine: Engine, info: StageInfo, found: Found, disk: Mapping[str, int], where: Home) -> None:
    rule = found.rules[info.name]
    with db.reading(engine) as connection:
        rows = connection.execute(text(_RUNS), {"stage": info.name}).all()
        lost_at, taken = _promoted(connection, info.name)
        snapshots = connection.execute(text(_SNAPSHOTS), {"stage": info.name}).scalars().all()
    losing = _losing_groups(engine, info, rule, found) if rule.top else frozenset[str]()
    for row in rows:
        last, best = _path(row.checkpoint), _path(row.checkpoint_best)
        if row.state != "done":
            for path in {last, best, _path(row.checkpoint_prev)}:
                if path is not None:
                    found.count(info.name, OPEN, False, disk.get(path, 0))
            continue
        loses = row.group_key in losing if rule.top else row.ended_at <= lost_at and row.id not in taken
        _judge(row, last, best, loses, info.name, found, disk, where)
    for path in snapshots:
        found.count(info.name, SNAPSHOTS, False, disk.get(path, 0))  # asked for by the config: no rule takes them


def _path(saved: str | None) -> str | None:
    return None if saved is None else str(json.loads(saved)["path"])


def _judge(
    row: Any,
    last: str | None,
    best: str | None,
    loses: bool,
    stage: str,
    found: Found,
    disk: Mapping[str, int],
    where: Home,
) -> None:
    """What goes of a finished run."""
    kinds = ({last: LAST} if last else {}) | ({best: BEST} if best and best != last else {})
    going = kinds.keys() - retention.keeps(found.rules[stage], loses, last, best)
    if going and row.needed:
        found.left["needed by runs that go on from them"] += len(going)
        going = set()
    foreign = [path for path in going if not _is_own(path, row.id, where) or _leads_away(path, where)]
    if foreign:
        found.left["links, or not the run's own"] += len(foreign)
        going = set()
    for path, kind in kinds.items():
        found.count(stage, kind, path in going, disk.get(path, 0))
    if going:
        columns = tuple(name for name, path in (("checkpoint", last), ("checkpoint_best", best)) if path in going)
        size = sum(disk.get(path, 0) for path in going)
        found.leaving.setdefault(stage, []).append(Leaving(row.id, row.attempt, columns, tuple(sorted(going)), size))


def _is_own(path: str, run: int, where: Home) -> bool:
    """A row may come from anywhere, and name another run's file."""
    match = _OURS.fullmatch(path)
    return (
        match is not None and match["attempt"] is not None and (match["study"], match["run"]) == (where.study, str(run))
    )


def _leads_away(path: str, where: Home) -> bool:
    """Whether there is something, but a link or behind one; what is not there at all may be named no longer."""
    room, _, rest = path.split("/", 2)
    return where.place(path) is None and os.path.lexists(f"{where.rooms[room]}/{rest}")


def _promoted(connection: Connection, stage: str) -> tuple[float, set[int]]:
    """When the stage was promoted last, and the runs that were ever taken. Before any time, if it never was."""
    sql = """SELECT parent, max(young.created_at) AS at FROM lineage
             JOIN runs AS old ON old.id = lineage.parent JOIN runs AS young ON young.id = lineage.child
             JOIN intakes ON intakes.id = young.intake AND intakes.complete
             WHERE lineage.kind = 'promote' AND old.stage = :stage GROUP BY parent"""
    rows = connection.execute(text(sql), {"stage": stage}).all()
    return max((float(row.at) for row in rows), default=float("-inf")), {row.parent for row in rows}


def _losing_groups(engine: Engine, info: StageInfo, rule: Rule, found: Found) -> frozenset[str]:
    """The groups that rank below the top.

    The top is a share of all groups, of those with open runs, too: so what loses now would lose at the end as well. A
    group that lacks seeds has no place, and loses to nobody.
    """
    sql = f"SELECT id, state, group_key, label, loss FROM runs WHERE {stored.of_stage(info.name)} ORDER BY id"
    with db.reading(engine) as connection:
        found_rows = connection.execute(text(sql), {"stage": info.name}).all()
    # for the order alone neither configs nor what they start from need be read
    rows = [{**row._mapping, "config": {}, "start_from": None} for row in found_rows]
    done = {row["id"] for row in rows if row["state"] == "done"}
    info = replace(info, seed_fields=[])
    ranked, left_out = ranking.rank(rows, done, info.metric(info.primary), info, allow_missing=False)
    if left_out:
        found.unjudged[info.name] = len(left_out)
    assert rule.top is not None
    top = ranking.top_count(rule.top, len(runs.groups(rows)))
    return frozenset(group.key for group in ranked[top:])


def _look_at_unnamed(
    engine: Engine, stage: str | None, found: Found, disk: Mapping[str, int], paths: Sequence[str], where: Home
) -> None:
    """Files that no row names, nor ever will."""
    _, _, root = db.study(engine)
    matches = {path: _OURS.fullmatch(path) for path in stored.without_row(engine, root, paths)}
    ids = {int(match["run"] or match["printed"]) for match in matches.values() if match}
    with db.reading(engine) as connection:
        stand = stored.latest(connection, ids)
        at_work = _writers(connection, [match for match in matches.values() if match and match["aside"]])
    for path, match in matches.items():
        run = int(match["run"] or match["printed"]) if match else 0
        of = stand[run].stage if run in stand else match["stage"] or "" if match else ""
        if stage is not None and of != stage:
            continue
        if match is None:
            found.left["not named as rnnq names its files"] += 1
        elif where.place(path) is None:
            found.left["links, or not the run's own"] += 1
        elif match["printed"] and run in stand:
            found.left["logs of a later attempt than the run's last"] += 1
        elif match["printed"]:
            _enter(found, path, of, LOGS, disk, True)
        elif match["aside"]:
            by = (run, int(match["by"]))
            _enter(found, path, of, TEMPORARY, disk, not at_work.get(by, True) or _is_old(where, path))
        else:
            _enter(found, path, of, UNNAMED, disk, True)


def _enter(found: Found, path: str, stage: str, kind: str, disk: Mapping[str, int], goes: bool) -> None:
    found.count(stage, kind, goes, disk[path])
    if goes:
        found.unnamed[path] = disk[path]


def _writers(connection: Connection, asides: Iterable[re.Match[str]]) -> dict[tuple[int, int], bool]:
    """Whether the worker of an attempt may still live. One whose temporary file is taken away would take the disk for
    broken, and leave.
    """
    sql = text("""SELECT workers.state, workers.host, workers.pid, workers.pid_start FROM attempts
                  JOIN workers ON workers.id = attempts.worker WHERE run_id = :run AND attempt = :attempt""")
    found = {}
    for run, attempt in {(int(match["run"]), int(match["by"])) for match in asides}:
        row = connection.execute(sql, {"run": run, "attempt": attempt}).one_or_none()
        if row is not None:
            found[run, attempt] = row.state != "left" and not host.is_gone(row.host, row.pid, row.pid_start)
    return found


def _is_old(where: Home, path: str) -> bool:
    place = where.place(path)
    return place is not None and time.time() - Path(place).lstat().st_mtime > OLD


# --------------------------------------------------------------------------------------------------- collecting


def collect(engine: Engine, found: Found, watch: Watch | None = None) -> Gone:
    """Let go of what was found: the rows first, then their files, by parts. What went is logged in `changes`."""
    gone, where = Gone(), home(engine)
    told = watch or (lambda what, done, total: None)
    for stage, leaving in found.leaving.items():
        detail = {"stage": stage, "rule": str(found.rules[stage])}
        for part in _parts(leaving):
            done = queue.let_go(engine, part, detail)
            gone.kept += len(part) - len(done)
            for one in done:
                _remove(where, one.paths, gone)
            told("deleting files", gone.files, found.files)
    before = gone.files, gone.bytes
    try:
        for path in found.unnamed:
            _remove(where, (path,), gone)
            told("deleting files", gone.files, found.files)
    finally:
        if gone.files > before[0]:
            queue.swept(engine, gone.files - before[0], gone.bytes - before[1])
    return gone


def _parts(leaving: Sequence[Leaving]) -> Iterator[Sequence[Leaving]]:
    for start in range(0, len(leaving), CHUNK):
        if start:
            time.sleep(0.02)  # leave a gap in which a waiting heartbeat finds the lock free
        yield leaving[start : start + CHUNK]


def _remove(where: Home, paths: Iterable[str], gone: Gone) -> None:
    for path in paths:
        place = where.place(path)  # once more: somebody may have put a link there meanwhile
        if place is None:
            continue
        with contextlib.suppress(OSError):  # what stays is garbage, not an error
            size = Path(place).lstat().st_size
            Path(place).unlink()
            gone.files += 1
            gone.bytes += size
