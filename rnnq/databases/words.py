"""What SQLite and PostgreSQL say differently, as parts of statements. Imports nothing that is slow to load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

Bind = Callable[[object], str]  # binds a value; returns its mark

# the database's time in seconds since 1970. Written as SQLite says it, wherever it stands in a statement; as one is
# sent to PostgreSQL, this is replaced by POSTGRES_NOW. unixepoch('subsec') is silently NULL before SQLite 3.42
NOW = "(julianday('now') - 2440587.5) * 86400.0"
POSTGRES_NOW = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


# For runs of a range of ids. The index has the priority before the id, so each priority that waits is dived for by
# itself: there are few, and the runs of other ranges are never walked over. {} is what `words("without")` says.
LEVELS = """WITH RECURSIVE levels(intake, stage, priority) AS (
        SELECT intakes.id, intakes.stage, (
            SELECT top.priority FROM runs AS top
            WHERE top.state = 'pending' AND top.intake = intakes.id AND top.stage = intakes.stage
            ORDER BY top.priority DESC, top.id LIMIT 1)
        FROM intakes JOIN stages ON stages.name = intakes.stage
        WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
        AND stages.name NOT IN {}
        UNION ALL
        SELECT levels.intake, levels.stage, (
            SELECT next.priority FROM runs AS next
            WHERE next.state = 'pending' AND next.intake = levels.intake AND next.stage = levels.stage
            AND next.priority < levels.priority
            ORDER BY next.priority DESC, next.id LIMIT 1)
        FROM levels WHERE levels.priority IS NOT NULL)"""
IN_RANGE = """inner_run.state = 'pending' AND inner_run.intake = levels.intake
        AND inner_run.stage = levels.stage AND inner_run.priority = levels.priority
        AND inner_run.id BETWEEN :first AND :last ORDER BY inner_run.id"""


class SQLite:
    """The words of SQLite."""

    name = "sqlite"
    locked = ""  # after a SELECT: the rows are ours until the end. Here a writer is alone
    locked_free = ""  # the same, without the rows that another transaction has

    # For each unpaused stage the head of its own queue, then the best of those heads: every look is one dive into a
    # partial index, so the cost does not grow with the table, nor with paused, delayed, running or finished rows.
    without_rowid = " WITHOUT ROWID"  # after a CREATE TABLE with a primary key: the rows lie in its order
    point_again = ""

    claim_with = ""
    rivals: Sequence[Mapping[str, int]] = ({},)
    claimable = """
    SELECT head.id FROM intakes
    JOIN stages ON stages.name = intakes.stage
    JOIN runs AS head ON head.id IN (
        SELECT inner_run.id FROM runs AS inner_run
        WHERE inner_run.state = 'pending' AND inner_run.intake = intakes.id AND inner_run.stage = intakes.stage
        ORDER BY inner_run.priority DESC, inner_run.id LIMIT :limit)
    WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
    AND stages.name NOT IN (SELECT value FROM json_each(:without))
    ORDER BY head.priority DESC, head.id LIMIT :limit"""
    claimable_within = f"""{LEVELS.format("(SELECT value FROM json_each(:without))")}
    SELECT head.id FROM levels JOIN runs AS head ON head.id IN (
        SELECT inner_run.id FROM runs AS inner_run WHERE {IN_RANGE} LIMIT :limit)
    ORDER BY head.priority DESC, head.id LIMIT :limit"""
    claim_with_within = ""

    def listed(self, name: str) -> str:
        """The whole numbers of a parameter that holds them as JSON, for IN: there may be very many."""
        return f"(SELECT value FROM json_each(:{name}))"

    def words(self, name: str) -> str:
        """The texts of a parameter that holds them as JSON, for IN."""
        return self.listed(name)

    def step_of(self, column: str) -> str:
        """The step of a checkpoint, from the JSON of its column."""
        return f"json_extract({column}, '$.step')"

    def contains(self, column: str, part: str) -> str:
        """Whether a text has another one in it; false for null."""
        return f"coalesce(instr({column}, {part}) > 0, 0)"

    def field(self, column: str, keys: Sequence[str], kind: str, bind: Bind) -> str:
        """A value inside a JSON column: bool, int, float, or anything else as text; null where it is missing."""
        # JSON text is ASCII, and SQLite before 3.45 compares keys as they are written there
        path = "$" + "".join("." + json.dumps(key) for key in keys)
        # a plain path is written out, so that an index on the expression serves; any other is bound
        shown = f"'{path}'" if all(map(_is_plain, keys)) else bind(path)
        return f"json_extract({column}, {shown})"

    def matches(self, term: str, pattern: str, bind: Bind) -> str:
        """Whether a text matches a glob pattern."""
        return f"{term} GLOB {bind(pattern)}"

    def aggregate(self, function: str, term: str) -> str:
        """mean, median, std, min, max or n over the numbers that are not null."""
        return f"{_AGGREGATES.get(function, function)}({term})"


class PostgreSQL:
    """The words of PostgreSQL."""

    name = "postgresql"
    locked = " FOR UPDATE"
    locked_free = " FOR UPDATE SKIP LOCKED"
    without_rowid = ""
    point_again = " ON CONFLICT (run_id, metric_id, step) DO UPDATE SET value = excluded.value"

    # The same dives as on SQLite, but what they bring is only looked at: the rows are locked in the order of claims,
    # without those that a rival has, and a row is tested once more as it is locked. MATERIALIZED: inside of IN the
    # planner may run a SELECT ... LIMIT once for each row, and then takes more rows than the limit. The stages and the
    # intakes are locked for share, so that a pause or a delete waits for this claim, and the next claim for it; before
    # the runs, as those do: whoever has locked runs waits for nothing else.
    claim_with = """WITH heads AS MATERIALIZED (
        SELECT head.id, head.priority, intakes.id AS intake FROM intakes
        JOIN stages ON stages.name = intakes.stage
        CROSS JOIN LATERAL (
            SELECT inner_run.id, inner_run.priority FROM runs AS inner_run
            WHERE inner_run.state = 'pending' AND inner_run.intake = intakes.id AND inner_run.stage = intakes.stage
            ORDER BY inner_run.priority DESC, inner_run.id LIMIT :limit + :rivals) AS head
        WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
        AND stages.name NOT IN (SELECT json_array_elements_text(CAST(:without AS json)))
        ORDER BY head.priority DESC, head.id LIMIT :limit + :rivals),
    held AS MATERIALIZED (
        SELECT intakes.id FROM stages JOIN intakes ON intakes.stage = stages.name
        WHERE intakes.id IN (SELECT intake FROM heads) AND intakes.complete AND NOT stages.paused
        ORDER BY intakes.id FOR SHARE OF stages, intakes),
    picked AS MATERIALIZED (
        SELECT runs.id FROM heads JOIN held ON held.id = heads.intake JOIN runs ON runs.id = heads.id
        WHERE runs.state = 'pending'
        ORDER BY heads.priority DESC, heads.id LIMIT :limit FOR UPDATE OF runs SKIP LOCKED)"""
    claimable = claimable_within = "SELECT id FROM picked"
    claim_with_within = f"""{LEVELS.format("(SELECT json_array_elements_text(CAST(:without AS json)))")},
    heads AS MATERIALIZED (
        SELECT head.id, head.priority, levels.intake AS intake FROM levels
        CROSS JOIN LATERAL (
            SELECT inner_run.id, inner_run.priority FROM runs AS inner_run
            WHERE {IN_RANGE} LIMIT :limit + :rivals) AS head
        ORDER BY head.priority DESC, head.id LIMIT :limit + :rivals),
    {claim_with[claim_with.index("held AS") :]}"""
    rivals: Sequence[Mapping[str, int]] = ({"rivals": 64}, {"rivals": 5000})  # that may hold the heads of the queues

    def listed(self, name: str) -> str:
        """As SQLite.listed."""
        return f"(SELECT CAST(json_array_elements_text(CAST(:{name} AS json)) AS bigint))"

    def words(self, name: str) -> str:
        """As SQLite.words."""
        return f"(SELECT json_array_elements_text(CAST(:{name} AS json)))"

    def step_of(self, column: str) -> str:
        """As SQLite.step_of."""
        return f"CAST(CAST({column} AS json) ->> 'step' AS bigint)"

    def contains(self, column: str, part: str) -> str:
        """As SQLite.contains."""
        return f"coalesce(strpos({column}, {part}) > 0, false)"

    def field(self, column: str, keys: Sequence[str], kind: str, bind: Bind) -> str:
        """As SQLite.field. A value of another type than the field's is null: a cast of it would be an error."""
        steps = [f"'{key}'" if _is_plain(key) else bind(key) for key in keys]
        place = "".join(f" -> {step}" for step in steps[:-1])
        value, shown = (f"(CAST({column} AS json){place} {arrow} {steps[-1]})" for arrow in ("->", "->>"))
        if kind == "bool":
            return f"(CASE json_typeof({value}) WHEN 'boolean' THEN CAST({shown} AS boolean) END)"
        if kind in ("int", "float"):
            # whole numbers exactly, as a seed may have 64 bits
            number = "numeric" if kind == "int" else "double precision"
            return f"(CASE json_typeof({value}) WHEN 'number' THEN CAST({shown} AS {number}) END)"
        return shown

    def matches(self, term: str, pattern: str, bind: Bind) -> str:
        """As SQLite.matches."""
        return f"{term} ~ {bind(as_regex(pattern))}"

    def aggregate(self, function: str, term: str) -> str:
        """As SQLite.aggregate."""
        if function == "median":
            return f"percentile_cont(0.5) WITHIN GROUP (ORDER BY {term})"
        return f"{'stddev_samp' if function == 'std' else _AGGREGATES.get(function, function)}({term})"


Words = SQLite | PostgreSQL
OF = {words.name: words for words in (SQLite(), PostgreSQL())}  # by the name of SQLAlchemy's dialect
_AGGREGATES = {"mean": "avg", "n": "count"}  # the others have the same name everywhere


def _is_plain(key: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_.]+", key) is not None


# ----------------------------------------------------------------------------------- SQLite's patterns elsewhere

_NEVER = "(?!)"


def as_regex(pattern: str) -> str:
    """The regular expression of PostgreSQL that matches what SQLite's GLOB does: * ? and sets, [a-z] and [^a-z]."""
    found, at = "", 0
    while at < len(pattern):
        one = pattern[at]
        at += 1
        if one == "[":
            one_of, at = _set(pattern, at)
            found += one_of
        else:
            found += {"*": ".*", "?": "."}.get(one) or _escaped(one)
    return f"^(?:{found})$"


def _escaped(one: str) -> str:
    return one if one.isalnum() or one in " _" else f"\\{one}"


def _set(pattern: str, at: int) -> tuple[str, int]:
    """What a set of signs is that begins here, and where it ends. One that is never closed matches nothing."""
    inverted = pattern[at : at + 1] == "^"
    at += inverted
    end = pattern.find("]", at + 1)  # a ] that comes first is one of the set
    if end < 0:
        return _NEVER, len(pattern)
    inside, members = pattern[at:end], []
    while inside:
        first, last = inside[0], inside[0]
        if len(inside) > 2 and inside[1] == "-":
            last = inside[2]
        inside = inside[3:] if len(inside) > 2 and inside[1] == "-" else inside[1:]
        # of z-a there is the z alone; to PostgreSQL it is an error
        members.append(_escaped(first) if first >= last else f"{_escaped(first)}-{_escaped(last)}")
    return f"[{'^' if inverted else ''}{''.join(members)}]", end + 1
