"""The files of a study: which there are on disk, which of them a row names, and which nobody will ever name.

What is compared with the disk is looked at in an order that stays true while workers write: first the disk, then the
rows. A file goes only after the row that named it, and a row names only a file that is there.
"""

from __future__ import annotations

import json
import marshal
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, bindparam, text

from rnnq import db, walk

Watch = Callable[[str, int, int], None]  # what is being done, how much of it is, and of how much (0: nobody knows)
ROOMS = ("checkpoints", "logs")  # folders of the study's root, each with one that is named by the study's id
MANY = 20_000  # runs, above which a process of its own looks at the disk
CHUNK = 5000  # runs that one query asks for by their ids


class File(NamedTuple):
    """A file as a row names it."""

    run: int
    path: str
    bytes: int
    sha256: str
    counts: bool  # its run is of those that are looked at


def of_stage(stage: str | None) -> str:
    """A condition on `runs`: of a complete intake and, where there is one, of the stage that is bound as :stage."""
    some = "" if stage is None else " AND runs.stage = :stage"
    return f"runs.intake IN (SELECT id FROM intakes WHERE complete){some}"


# where the best checkpoint is the last one, both columns hold the same
_FILES = """SELECT id, {seen} AS counts, checkpoint, checkpoint_prev, nullif(checkpoint_best, checkpoint)
            FROM runs WHERE coalesce(checkpoint, checkpoint_prev, checkpoint_best) IS NOT NULL {some}"""
# most artifacts are what the run's row names, too: these are left out
_ARTIFACTS = """SELECT run_id, path, bytes, sha256, {seen} AS counts
                FROM artifacts JOIN runs ON runs.id = artifacts.run_id
                WHERE replace(coalesce(checkpoint, ''), path, '') = coalesce(checkpoint, '')
                AND replace(coalesce(checkpoint_best, ''), path, '') = coalesce(checkpoint_best, '') {some}"""
# as the queue writes it; read so, it takes a quarter of the time of JSON
_SAVED = re.compile(r'\{"bytes":(\d+),"path":"([^"\\]*)","sha256":"([^"\\]*)","step":\d+\}')


def _saved(words: str) -> tuple[str, int, str]:
    """Path, bytes and sha256 of a file as a row names it. Raises ValueError, KeyError, TypeError."""
    match = _SAVED.fullmatch(words)
    if match is not None:
        return match[2], int(match[1]), match[3]
    one = json.loads(words)
    return one["path"], one["bytes"], one["sha256"]


def named(connection: Connection, stage: str | None = None, ids: Iterable[int] | None = None) -> dict[str, File]:
    """Every file that a row names, or that those of some runs do, by its path. Of other stages, too: see `counts`.

    Raises ValueError for a row that is not as the queue writes it.
    """
    found: dict[str, File] = {}
    for run, counts, *saved in _rows(connection, _FILES, stage, ids):
        for words in saved:
            if words is not None:
                one = _saved(words)
                found[one[0]] = File(run, *one, bool(counts))
    for run, path, size, sha256, counts in _rows(connection, _ARTIFACTS, stage, ids):
        found.setdefault(path, File(run, path, size, sha256, bool(counts)))
    return found


def _rows(connection: Connection, sql: str, stage: str | None, ids: Iterable[int] | None) -> Iterator[Sequence[Any]]:
    values = {"stage": stage} if stage else {}
    if ids is None:
        yield from connection.execute(text(sql.format(seen=of_stage(stage), some="")), values)
        return
    statement = text(sql.format(seen=of_stage(stage), some="AND runs.id IN :ids"))
    statement = statement.bindparams(bindparam("ids", expanding=True))
    for chunk in _chunks(ids):
        yield from connection.execute(statement, values | {"ids": chunk})


def _chunks(ids: Iterable[int]) -> Iterator[list[int]]:
    ordered = sorted(set(ids))
    for start in range(0, len(ordered), CHUNK):
        yield ordered[start : start + CHUNK]


def on_disk(root: Path, study: str, watch: Watch) -> dict[str, int]:
    """Every file of the study below its folder: path and bytes. Links are not followed."""
    return walk.files(str(root), _folders(study), lambda looked: watch("looking at files", looked, 0))


def _folders(study: str) -> list[str]:
    return [f"{room}/{study}" for room in ROOMS]


@contextmanager
def looking(engine: Engine) -> Iterator[Callable[[Watch], dict[str, int]]]:
    """`on_disk`, which of very many runs looks already while something else is done. Call it once."""
    study, _, root = db.study(engine)
    with db.reading(engine) as connection:
        many = connection.execute(text("SELECT count(*) FROM runs")).scalar_one() > MANY
    if not many:
        yield lambda watch: on_disk(root, study, watch)
        return
    # alone and bare, it has begun to look before this process has read its first row
    words = [sys.executable, "-I", "-S", walk.__file__, str(root), *_folders(study)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:

        def found(watch: Watch) -> dict[str, int]:
            watch("looking at files", 0, 0)
            told, _ = process.communicate()
            return on_disk(root, study, watch) if process.returncode else marshal.loads(told)

        try:
            yield found
        finally:
            process.kill()


def let_go(connection: Connection) -> dict[int, str]:
    """The runs of which `rnnq gc` took checkpoints, and the rule that did not keep them."""
    found: dict[int, str] = {}
    for row in connection.execute(text("SELECT detail FROM changes WHERE verb = 'gc' ORDER BY id")):
        detail = json.loads(row.detail)
        found |= dict.fromkeys(detail.get("runs", ()), detail.get("rule", ""))
    return found


class Latest(NamedTuple):
    """Where a run stands."""

    attempt: int
    state: str
    stage: str


def latest(connection: Connection, ids: Iterable[int]) -> dict[int, Latest]:
    """Where runs stand, those of incomplete intakes too; the ids of runs that do not exist are left out."""
    sql = text("SELECT id, attempt, state, stage FROM runs WHERE id IN :ids").bindparams(
        bindparam("ids", expanding=True)
    )
    rows = (row for chunk in _chunks(ids) for row in connection.execute(sql, {"ids": chunk}))
    return {row.id: Latest(row.attempt, row.state, row.stage) for row in rows}


_PLACE = re.compile(r"(?:checkpoints/[^/]+/[^/]+|logs/[^/]+)/(\d{1,18})/\.?a(\d{1,18})[-.].*", re.DOTALL)


def without_row(engine: Engine, root: Path, paths: Sequence[str]) -> list[str]:
    """The files that no row names, of those that none named when it was read; without the logs of attempts, and without
    what a worker may be about to enter: files of a running run's attempt.

    A file that is told here will never be named: an attempt's number is given once, and only its owner could.
    """
    places = {path: _PLACE.fullmatch(path) for path in paths}
    ids = {int(place[1]) for place in places.values() if place}
    with db.reading(engine) as connection:
        entered = named(connection, None, ids)
        stand = latest(connection, ids)
    return [path for path, place in places.items() if path not in entered and _is_left(root, path, place, stand)]


def _is_left(root: Path, path: str, place: re.Match[str] | None, stand: Mapping[int, Latest]) -> bool:
    if place is not None and int(place[1]) in stand:
        run, attempt = stand[int(place[1])], int(place[2])
        if attempt <= run.attempt if path.startswith("logs/") else (attempt == run.attempt and run.state == "running"):
            return False
    return os.path.lexists(f"{root}/{path}")
