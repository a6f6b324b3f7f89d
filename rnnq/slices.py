"""The share of a study that one of several workers takes when they do not share the queue: a range of its runs.

A scope's N runs stand in the order of their ids, which is that of the definition. Worker I of T takes those at the
places [I k, min(I k + k, N)) with k = ceil(N / T), whatever their states: together all, none twice. Past the end a
slice is empty. All of it is reckoned once, when a worker starts; what is added later belongs to no slice until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, text

from rnnq import db
from rnnq.errors import InputError

_ALL = """FROM intakes JOIN runs ON runs.intake = intakes.id AND runs.stage = intakes.stage
          WHERE intakes.complete AND (:stage IS NULL OR intakes.stage = :stage)"""
SLURM = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Slice:
    """Which slice, of how many, and the runs in it: how many, of how many, and the first and the last id."""

    number: int
    slices: int
    runs: int
    total: int
    within: tuple[int, int] | None  # None: it is empty

    def words(self) -> str:
        """Such as: slice 3 of 0 to 7, runs 12 to 15 (4 of 30)."""
        which = f"slice {self.number} of 0 to {self.slices - 1}"
        if self.within is None:
            return f"{which} is empty: there are {self.total} runs"
        return f"{which}: runs {self.within[0]} to {self.within[1]} ({self.runs} of {self.total})"


def places(total: int, number: int, slices: int) -> range:
    """The places of a slice among so many runs."""
    size = -(-total // slices)
    return range(min(total, number * size), min(total, number * size + size))


def asked(
    number: int | None, slices: int | None, from_array: bool, environment: Mapping[str, str]
) -> tuple[int, int] | None:
    """Which slice of how many is asked for, or None: the queue is shared.

    What is not given is read from SLURM's array, whose first task is 0 here whatever its id. Raises InputError.
    """
    if number is None and slices is None and not from_array:
        return None
    if number is None or slices is None:
        place, count = _array(environment)
        number = place if number is None else number
        slices = count if slices is None else slices
    _refuse(number, slices)
    return number, slices


def _refuse(number: int, slices: int) -> None:
    problems = []
    if slices < 1:
        problems.append(f"--total-jobs {slices}: there is one slice at least")
    if number < 0:
        problems.append(f"--job-id {number}: the first slice is 0")
    elif slices >= 1 and number >= slices:
        problems.append(f"--job-id {number}: of {slices} slices the last is {slices - 1}")
    if problems:
        raise InputError(problems, "--job-id counts from 0 to --total-jobs - 1; a SLURM array's first task is 0")


def _array(environment: Mapping[str, str]) -> tuple[int, int]:
    """The place of this task in SLURM's array, from 0 on, and how many there are. Raises InputError."""
    if not environment.get(f"{SLURM}ID"):
        hint = "--job-id 0 --total-jobs 4; with neither of them, nor --slice, all workers share the queue"
        raise InputError(f"which slice of how many is not said, and this is no SLURM array: {SLURM}ID is not set", hint)
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    given = {name: environment[SLURM + name] for name in names if environment.get(SLURM + name)}
    wrong = [f"{SLURM}{name}={value!r} is no whole number" for name, value in given.items() if not value.isdecimal()]
    if wrong:
        raise InputError(wrong, "--job-id and --total-jobs say it without SLURM")
    values = {name: int(value) for name, value in given.items()}
    first, step = values.get("MIN", 0), max(1, values.get("STEP", 1))
    last = (values.get("MAX", values["ID"]) - first) // step
    return (values["ID"] - first) // step, values.get("COUNT", last + 1)


def find(engine: Engine, stage: str | None, number: int, slices: int) -> Slice:
    """A slice of the runs of a stage, or of all stages."""
    with db.reading(engine) as connection:
        total = int(connection.execute(text(f"SELECT count(*) {_ALL}"), {"stage": stage}).scalar_one())
        taken = places(total, number, slices)
        if not taken:
            return Slice(number, slices, 0, total, None)
        sql = f"SELECT runs.id {_ALL} ORDER BY runs.id LIMIT 1 OFFSET :place"
        ends = [
            int(connection.execute(text(sql), {"stage": stage, "place": place}).scalar_one())
            for place in (taken[0], taken[-1])
        ]
    return Slice(number, slices, len(taken), total, (ends[0], ends[1]))


def listed(engine: Engine, stage: str | None, within: tuple[int, int] | None) -> list[dict[str, Any]]:
    """The runs of a slice: run, stage, label, state."""
    if within is None:
        return []
    sql = f"""SELECT runs.id AS run, runs.stage, runs.label, runs.state {_ALL}
              AND runs.id BETWEEN :first AND :last ORDER BY runs.id"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"stage": stage, "first": within[0], "last": within[1]})
        return [dict(row._mapping) for row in rows]
