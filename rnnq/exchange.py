"""Out and in: runs, groups and curves to CSV or Parquet; results from elsewhere as finished runs of a stage."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Literal

from sqlalchemy import Engine

from rnnq import config, definitions, families, plan, queue, runs, sweep
from rnnq.config import Config
from rnnq.errors import InputError, RnnqError, nearest
from rnnq.plan import Entry, Origin
from rnnq.queue import NewStage
from rnnq.runs import StageInfo

if TYPE_CHECKING:
    from pandas import DataFrame

ENDINGS = (".csv", ".parquet")
ROWS = 2000  # of a frame that are written at once, so that a reader who leaves early is noticed soon
SHOWN = 25  # problems of a file that are listed
PREFIX = "config."  # before the name of a config field in an export
NO_FIELD = "the family has no such field"

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ out


@dataclass(frozen=True)
class Export:
    """What is to be written: how many runs there are, and frames, each with how many of them it ends."""

    runs: int
    pieces: Iterator[tuple[int, DataFrame]]


def export(
    engine: Engine,
    what: Literal["runs", "groups", "curves"],
    stage: str | None = None,
    filter: str | None = None,
    metrics: Sequence[str] = (),
) -> Export:
    """Read what is to be written. Raises InputError for a stage, a filter or metrics that there are not."""
    from rnnq import study  # pandas takes half a second, and an import has no use for it

    selection = study.select(engine, stage, filter)
    if what == "curves":
        return Export(selection.total, study.curves_of(engine, selection, metrics))
    table = (study.runs_of if what == "runs" else study.groups_of)(engine, selection, metrics)
    return Export(selection.total, _pieces(table, selection.total))


def _pieces(table: DataFrame, total: int) -> Iterator[tuple[int, DataFrame]]:
    yield 0, table[:0]
    for start in range(0, len(table), ROWS):
        piece = table[start : start + ROWS]
        yield total * len(piece) // len(table), piece


def write_csv(frames: Iterable[DataFrame], to: IO[str]) -> int:
    """Write frames with equal columns as CSV; returns how many rows.

    Exact: a float has as many digits as bring back its very bits, and what is null is an empty cell.
    """
    rows = 0
    for number, frame in enumerate(frames):
        frame.to_csv(to, index=False, header=number == 0, lineterminator="\n")
        rows += len(frame)
    return rows


def write_file(frames: Iterable[DataFrame], path: Path, force: bool = False) -> int:
    """Write frames into a CSV or Parquet file, aside and then renamed; returns how many rows.

    Raises InputError for a name with another ending, a file that exists (unless `force`) or cannot be made, and
    RnnqError when the disk fails later. Whatever ends it, nothing half-written is left behind.
    """
    check_target(path, force)
    as_text = path.suffix.lower() == ".csv"
    path = path.resolve()  # through a link: what it leads to is replaced, not the link
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        return _write_aside(frames, path, aside, as_text)
    except OSError as error:
        raise RnnqError(f"{path} could not be written: {error.strerror}", "nothing is left of it") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _write_aside(frames: Iterable[DataFrame], path: Path, aside: Path, as_text: bool) -> int:
    try:
        file: IO[Any] = aside.open("w", encoding="utf-8", newline="") if as_text else aside.open("wb")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}", "may this user write there?") from error
    with file:
        rows = write_csv(frames, file) if as_text else _write_parquet(frames, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return rows


def check_target(path: Path, force: bool = False) -> None:
    """Refuse a file that cannot or must not be written, before anything is read. Raises InputError."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(
            f"--out {path}: the ending says neither CSV nor Parquet",
            "FILE.csv or FILE.parquet; without --out, CSV goes to standard output",
        )
    if path.suffix.lower() == ".parquet":
        _pyarrow()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise InputError(f"--out {path}: {what}", "--out names a file in a folder that is there")
    if path.exists() and not force:
        raise InputError(f"--out {path}: the file exists", "--force overwrites it")


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet needs the package pyarrow", "pip install 'rnnq[parquet]'") from error
    return pyarrow  # type: ignore[no-any-return]


def _write_parquet(frames: Iterable[DataFrame], to: IO[bytes]) -> int:
    """Columns are 64-bit integers, doubles, booleans or text, with null for what is missing."""
    arrow = _pyarrow()
    rows, writer = 0, None
    try:
        for frame in frames:
            schema = writer.schema if writer else arrow.schema([(n, _type(arrow, frame[n].dtype)) for n in frame])
            writer = writer or arrow.parquet.ParquetWriter(to, schema)
            columns = [_arrow_column(arrow, frame[part.name], part.type) for part in schema]
            if len(frame):
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))
            rows += len(frame)
    finally:
        if writer:
            writer.close()
    return rows


def _type(arrow: ModuleType, dtype: Any) -> Any:
    known = {"i": arrow.int64(), "f": arrow.float64(), "b": arrow.bool_()}
    return known.get(dtype.kind, arrow.string())


def _arrow_column(arrow: ModuleType, column: Any, kind: Any) -> Any:
    values = [None if gap else value for value, gap in zip(column.tolist(), column.isna().tolist(), strict=True)]
    if kind == arrow.string():
        values = [value if value is None or isinstance(value, str) else str(value) for value in values]
    return arrow.array(values, type=kind)


# ----------------------------------------------------------------------------------------- in: what a file holds


@dataclass(frozen=True)
class Sheet:
    """A table from a file. Cells of a CSV are text; those of Parquet have types."""

    path: Path
    place: str  # "line" in a CSV, "row" in Parquet
    columns: list[str]
    rows: list[tuple[int, list[Any]]]  # where each begins, counted from 1, and its cells
    problems: list[str] = field(default_factory=list)


def read(path: Path) -> Sheet:
    """A CSV or Parquet file. Raises InputError for one that cannot be read as such; ragged lines are in `problems`."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path}: the ending says neither CSV nor Parquet", "save the table as FILE.csv, with commas")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        beside = [file.name for ending in ENDINGS for file in path.parent.glob(f"*{ending}")]
        raise InputError(f"{path} does not exist", nearest(path.name, beside) if beside else None) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"{path} is empty")
    sheet = _of_parquet(path) if path.suffix.lower() == ".parquet" else _of_csv(path, _text(path, content))
    twice = sorted({name for name in sheet.columns if sheet.columns.count(name) > 1})
    problems = [f"{sheet.place} 1: two columns are called {name!r}" for name in twice]
    return replace(sheet, problems=problems + sheet.problems)


def _text(path: Path, content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16 text", "save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte {content[error.start]:#04x} is not UTF-8"
        raise InputError(f"{path}, line {line}: {what}", "save it as UTF-8") from error


def _of_csv(path: Path, text: str) -> Sheet:
    records = _records(path, text)
    _, header = next(records)
    if len(header) == 1:
        other = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in header[0]), None)
        if other:
            raise InputError(
                f"{path} is separated by {other}, not by commas", "save it with commas, and with points in numbers"
            )
    rows, problems = [], []
    for line, cells in records:
        if cells == header:
            problems.append(f"line {line}: the header stands there again")
        elif len(cells) != len(header):
            problems.append(f"line {line}: {len(cells)} cells, the header has {len(header)}")
        else:
            rows.append((line, cells))
    if not rows and not problems:
        raise InputError(f"{path} has a header and no rows")
    return Sheet(path, "line", [name.strip() for name in header], rows, problems)


def _records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each begins in; blank lines are none."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: {error}", "is a quotation mark missing there?") from error
        if any(cell.strip() for cell in cells):
            yield line, cells


def _of_parquet(path: Path) -> Sheet:
    arrow = _pyarrow()
    try:
        table = arrow.parquet.ParquetFile(path).read()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    rows = [(number, list(cells)) for number, cells in enumerate(zip(*columns, strict=True), start=1)]
    if not rows:
        raise InputError(f"{path} has no rows")
    return Sheet(path, "row", list(table.column_names), rows)


# ------------------------------------------------------------------------------------- in: what its columns mean


@dataclass(frozen=True)
class Request:
    """What a user asks of `import`."""

    path: Path
    stage: str
    family: str  # a name, or FILE.py:name
    loss: str = "loss"  # the column of the family's primary metric
    metrics: Sequence[str] = ()  # "COLUMN", "COLUMN=NAME", "COLUMN=NAME:max"
    fields: Sequence[str] = ()  # "COLUMN=FIELD"
    ignore: Sequence[str] = ()
    defs: Path = Path("defs")


@dataclass
class Meaning:
    """What each column of a file is: by its number, a config field or a metric."""

    loss: int | None = None
    fields: dict[int, str] = field(default_factory=dict)
    metrics: dict[int, str] = field(default_factory=dict)
    new_metrics: list[dict[str, Any]] = field(default_factory=list)  # those that the family does not declare
    state: int | None = None  # only in an export of ours, as the next two
    fingerprint: int | None = None
    start_from: int | None = None
    problems: list[str] = field(default_factory=list)


def meaning(sheet: Sheet, model: type[Config], request: Request) -> Meaning:
    """What the columns of a file are. A file with `config.` columns is an export: its other columns are known."""
    found = Meaning()
    left = {name: number for number, name in enumerate(sheet.columns)}
    for name in request.ignore:
        _take(left, sheet, name, "--ignore", found)
    found.loss = _take(left, sheet, request.loss, "--loss", found)
    for words in request.metrics:
        _named_metric(words, left, sheet, model, found)
    for words in request.fields:
        _named_field(words, left, sheet, model, found)
    _rest(left, sheet, model, found)
    return found


def _take(left: dict[str, int], sheet: Sheet, name: str, option: str, found: Meaning) -> int | None:
    """The number of a column that an option names, each only once."""
    number = left.pop(name, None)
    if number is None:
        why = "it has two meanings" if name in sheet.columns else nearest(name, sheet.columns)
        found.problems.append(f"{option} {name}: {_where(sheet, name)} ({why})")
    return number


def _where(sheet: Sheet, name: str) -> str:
    return "the column is named twice" if name in sheet.columns else f"{sheet.path} has no such column"


def _named_metric(words: str, left: dict[str, int], sheet: Sheet, model: type[Config], found: Meaning) -> None:
    column, _, name = words.rpartition("=") if "=" in words and words not in sheet.columns else (words, "", words)
    name, _, better = name.partition(":")
    number = _take(left, sheet, column, "--metric", found)
    known = {metric.name for metric in model.metrics}
    if name == model.primary().name or name in found.metrics.values():
        found.problems.append(f"--metric {words}: {name} has a column already")
    elif name not in known and better not in ("min", "max"):
        hint = nearest(name, known)
        found.problems.append(
            f"--metric {words}: the family has no metric {name} ({hint}); "
            f"for a new one say which is good: {column}={name}:min, or :max"
        )
    elif number is not None:
        found.metrics[number] = name
        if name not in known:
            found.new_metrics.append({"name": name, "unit": "", "better": better, "primary": False})


def _named_field(words: str, left: dict[str, int], sheet: Sheet, model: type[Config], found: Meaning) -> None:
    column, equals, name = words.rpartition("=")
    types = config.field_types(model)
    if not equals or not column:
        found.problems.append(f"--field {words}: not of the form COLUMN=FIELD")
    elif name not in types:
        found.problems.append(f"--field {words}: {model.__name__} has no field {name} ({nearest(name, types)})")
    else:
        number = _take(left, sheet, column, "--field", found)
        if number is not None:
            _add_field(number, name, sheet, found)


def _add_field(number: int, name: str, sheet: Sheet, found: Meaning) -> None:
    other = next((sheet.columns[n] for n, taken in found.fields.items() if taken == name), None)
    if other is not None:
        found.problems.append(f"columns {other} and {sheet.columns[number]} both are the field {name}")
    found.fields[number] = name


def _rest(left: Mapping[str, int], sheet: Sheet, model: type[Config], found: Meaning) -> None:
    """The columns that no option names: fields of the config, and in an export what it writes beside them."""
    types, metrics = config.field_types(model), {metric.name for metric in model.metrics}
    ours = any(name.startswith(PREFIX) for name in sheet.columns)
    for name, number in left.items():
        bare = name.removeprefix(PREFIX)
        if bare in types and (bare != name or not ours):
            _add_field(number, bare, sheet, found)
        elif ours and bare == name:
            _beside(name, number, found)
        else:
            found.problems.append(_unknown(name, bare, types, metrics, sheet))


def _beside(name: str, number: int, found: Meaning) -> None:
    """A column of an export that is no field."""
    from rnnq import study

    if name == "state":
        found.state = number
    elif name == "fingerprint":
        found.fingerprint = number
    elif name == "start_from":
        found.start_from = number
    elif name not in (*study.HEAD, *study.TAIL, "loss"):
        found.metrics[number] = name.removeprefix(study.METRIC)


def _unknown(name: str, bare: str, types: Collection[str], metrics: Collection[str], sheet: Sheet) -> str:
    if name in metrics:
        return f"{sheet.place} 1, column {name}: no field, but a metric: --metric {name}"
    close = nearest(bare, types)
    perhaps = f" ({close})" if close.startswith("did you") else ""  # else all of them, which the hint says once
    return f"{sheet.place} 1, column {name or 'without a name'}: {NO_FIELD}{perhaps}"


# ------------------------------------------------------------------------------------------ in: what a cell holds

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_TRUTH = dict.fromkeys(("true", "yes", "on", "1", "1.0"), True) | dict.fromkeys(
    ("false", "no", "off", "0", "0.0"), False
)


def value(cell: Any, kind: str) -> Any:
    """What a cell that is not empty means as a config field of a type. Raises ValueError in words."""
    if not isinstance(cell, str):
        return _typed(cell, kind)
    if kind == "str":
        return cell
    word = cell.strip()
    if word.lower() == "null":
        return None
    if kind == "json":
        return _json(word)
    if kind == "bool":
        if word.lower() not in _TRUTH:
            raise ValueError(f"{cell!r} is neither true nor false")
        return _TRUTH[word.lower()]
    return _number(cell, word, kind)


def _number(cell: str, word: str, kind: str) -> int | float:
    if not _NUMBER.fullmatch(word):
        raise ValueError(f"{cell!r} is no number" + (" (a comma stands in it)" if "," in word else ""))
    if re.fullmatch(r"[+-]?\d{1,4000}", word):
        return int(word) if kind == "int" else float(word)
    number = float(word)
    if kind == "int":
        if not number.is_integer():
            raise ValueError(f"{cell!r} is no whole number")
        return int(number)
    return number


def _json(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word  # the config says what it thinks of it


def _typed(cell: Any, kind: str) -> Any:
    """A cell that has a type: a column with gaps may have turned 3 into 3.0, and true into 1.0."""
    if isinstance(cell, float) and kind in ("int", "bool") and cell.is_integer():
        cell = int(cell)
    if kind == "bool" and not isinstance(cell, bool) and cell in (0, 1):
        return bool(cell)
    return cell


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def measured(cell: Any) -> float:
    """A metric's cell as a number, maybe not a finite one. Raises ValueError in words."""
    if isinstance(cell, str):
        word = cell.strip()
        if _NOT_FINITE.fullmatch(word):
            return float(word)
        return float(_number(cell, word, "float"))
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise ValueError(f"{cell!r} is no number")
    return float(cell)


# ------------------------------------------------------------------------------------------------ in: its lines


@dataclass(frozen=True)
class Import:
    """An import that is worked out, and not yet written."""

    stage: NewStage
    without_loss: int  # runs whose loss is not finite
    left_out: int  # lines of an export that are of runs which have not finished


@dataclass
class _Problems:
    """What is wrong with the lines of a file. What many lines share is said once."""

    sheet: Sheet
    found: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (column, sentence) -> lines

    def add(self, line: int, column: str | None, sentence: str) -> None:
        self.found.setdefault((f", column {column}" if column is not None else "", sentence), []).append(line)

    def lines(self) -> list[str]:
        """In the order of the file."""
        ordered = sorted(self.found.items(), key=lambda item: item[1][0])
        return [f"{self._where(lines)}{column}: {sentence}" for (column, sentence), lines in ordered]

    def _where(self, lines: Sequence[int]) -> str:
        if len(lines) == 1:
            return f"{self.sheet.place} {lines[0]}"
        if len(lines) == len(self.sheet.rows):
            return f"all {len(lines)} {self.sheet.place}s"
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        return f"{self.sheet.place}s {', '.join(map(str, lines[:5]))}{more}"


def prepare(engine: Engine | None, request: Request, progress: plan.Progress = iter) -> Import:
    """Work out an import; nothing is written. Without an engine the database is yet to be made.

    Raises InputError with everything that is wrong with the file, and with what is there already.
    """
    _, origin, sheet = _all(lambda: _check_name(request.stage), lambda: _origin(request), lambda: read(request.path))
    known = meaning(sheet, origin.config, request)
    problems = _Problems(sheet)
    made = _Maker(sheet, known, origin, problems)
    entries = [entry for row in progress(sheet.rows) if (entry := made.entry(*row)) is not None]
    there, about_stage = _stage_there(engine, request.stage, origin)
    if there is not None and engine is not None:
        _compare(engine, there, made, problems)
        origin = _kept(origin, there)
    wrong = [*sheet.problems, *known.problems, *about_stage, *problems.lines()]
    if wrong:
        raise InputError(_shortened(wrong), _hint(known, made))
    if not entries:
        raise InputError(f"{sheet.path} has no finished runs: {made.left_out} of other states")
    stage = plan.new_stage(request.stage, origin, entries)
    stage = replace(stage, metrics=[*stage.metrics, *known.new_metrics])
    return Import(stage, made.without_loss, made.left_out)


def _all(*makes: Callable[[], Any]) -> list[Any]:
    """What each makes; what is wrong with any of them is said at once."""
    problems, hints, found = [], [], []
    for make in makes:
        try:
            found.append(make())
        except InputError as error:
            problems += error.problems
            hints += [error.hint] if error.hint else []
    if problems:
        raise InputError(problems, "; ".join(hints) or None)
    return found


def _check_name(stage: str) -> None:
    try:
        sweep.stage(stage)  # refuses a name that cannot be a folder
    except InputError as error:
        raise InputError(error.problems, "--stage NAME") from error


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN
    return problems if more <= 0 else [*problems[:SHOWN], f"... and {more} more"]


def _hint(known: Meaning, made: _Maker) -> str | None:
    if any(NO_FIELD in problem for problem in known.problems):
        options = "--field COLUMN=FIELD says which field it is, --metric COLUMN=NAME which metric, --ignore drops it"
        return f"{options}; the fields: {', '.join(made.types)}"
    return next(iter(made.hints), None)


def _origin(request: Request) -> Origin:
    """The family, and where its code is. Raises InputError."""
    file, name = request.family, ""
    if not file.endswith(".py"):
        file, _, name = request.family.rpartition(":")
    if not file.endswith(".py"):
        return Origin(request.family, families.find_config(request.family), False, False, None, None)
    definition = definitions.load(file)
    own = sorted({families.name_of(family) for family in definition.families()})
    if name not in own:
        hint = f"--family {file}:{own[0]}" if own else "a family is one of its own where a stage of the file uses it"
        raise InputError(f"{file} has no family {name!r}; its own: {', '.join(own) or 'none'}", hint)
    rule = definition.rule(request.stage)
    has_rule = rule is not None and (rule.refine is not None or rule.next is not None)
    source = definitions.relative_source(definition.path, request.defs)
    model = families.find_config(name, definition)
    return Origin(name, model, True, has_rule, source, definition.sha256)


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    """Set a field; one whose name has dots is nested."""
    *parents, last = name.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    fields[last] = value


class _Maker:
    """Makes entries of a file's lines, and notes what is wrong with them."""

    def __init__(self, sheet: Sheet, known: Meaning, origin: Origin, problems: _Problems) -> None:
        self.sheet, self.known, self.origin, self.problems = sheet, known, origin, problems
        self.types = config.field_types(origin.config)
        self.primary = origin.config.primary().name
        self.without_loss = self.left_out = 0
        self.found: dict[str, tuple[int, Mapping[str, float]]] = {}  # fingerprint -> its line and its metrics
        self.hints: dict[str, None] = {}

    def entry(self, line: int, cells: Sequence[Any]) -> Entry | None:
        """A line as a finished run; None when something is wrong with it, or it is of an unfinished one."""
        if self.known.state is not None and cells[self.known.state] != "done":
            self.left_out += 1
            return None
        values, complete = self._values(line, cells)
        summary = self._summary(line, cells)
        made = self._checked(line, values)
        if made is None or not complete or self.known.problems:  # else more lines would be equal than are
            return None
        start = self._start(line, cells)
        key = config.fingerprint(self.origin.family, made, config.start_key(start))
        values, key = self._as_exported(cells, values, key, start)
        if not self._is_new(line, cells, key, summary):
            return None
        self.without_loss += not math.isfinite(summary.get(self.primary, 0.0))
        message = f"imported from {self.sheet.path}, {self.sheet.place} {line}"
        return Entry(values, summary=summary, message=queue.clean_text(message), start_from=start)

    def _start(self, line: int, cells: Sequence[Any]) -> dict[str, Any] | None:
        """The run whose weights an exported one started from: a part of its identity."""
        number = self.known.start_from
        if number is None or _is_empty(cells[number]):
            return None
        try:
            found = json.loads(cells[number])
        except (TypeError, ValueError):
            found = None
        if not (isinstance(found, dict) and isinstance(found.get("stage"), str)):
            self.problems.add(line, "start_from", f"{cells[number]!r} says of no stage that a run started from it")
            return None
        return found

    def _values(self, line: int, cells: Sequence[Any]) -> tuple[dict[str, Any], bool]:
        """The config's fields, nested ones in dicts, and whether all could be read. An empty cell means the default."""
        found: dict[str, Any] = {}
        complete = True
        for number, name in self.known.fields.items():
            if _is_empty(cells[number]):
                continue
            try:
                _put(found, name, value(cells[number], self.types[name]))
            except ValueError as error:
                self.problems.add(line, self.sheet.columns[number], str(error))
                complete = False
        return found, complete

    def _summary(self, line: int, cells: Sequence[Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        wanted = {self.known.loss: self.primary, **self.known.metrics} if self.known.loss is not None else {}
        for number, name in wanted.items():
            assert number is not None
            column = self.sheet.columns[number]
            if not _is_empty(cells[number]):
                try:
                    found[name] = measured(cells[number])
                except ValueError as error:
                    self.problems.add(line, column, str(error))
            elif number == self.known.loss and self.known.state is not None:
                found[name] = math.nan  # an export leaves the cell of a loss that was not finite empty
            elif number == self.known.loss:
                self.problems.add(line, column, "the loss is missing; nan says that there is none")
        return found

    def _checked(self, line: int, values: Mapping[str, Any]) -> Config | None:
        columns = {name: self.sheet.columns[number] for number, name in self.known.fields.items()}
        made, sentences = config.check(self.origin.config, values)
        for sentence in sentences:
            self.problems.add(line, columns.get(sentence.partition("=")[0]), sentence)
        return made

    def _as_exported(
        self, cells: Sequence[Any], values: dict[str, Any], key: str, start: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], str]:
        """The config that was exported: where its fingerprint says so, an empty cell is no default but a null."""
        expected = cells[self.known.fingerprint] if self.known.fingerprint is not None else key
        if key == expected:
            return values, key
        with_nulls = json.loads(json.dumps(values))
        for number, name in self.known.fields.items():
            if _is_empty(cells[number]):
                _put(with_nulls, name, None)
        made, _ = config.check(self.origin.config, with_nulls)
        other = config.fingerprint(self.origin.family, made, config.start_key(start)) if made is not None else key
        return (with_nulls, other) if other == expected else (values, key)

    def _is_new(self, line: int, cells: Sequence[Any], key: str, summary: Mapping[str, float]) -> bool:
        """Whether no line before has the config of this fingerprint, and it is the one that was exported."""
        if self.known.fingerprint is not None and cells[self.known.fingerprint] != key:
            sentence = "the family makes another config of it than the one that was exported"
            self.problems.add(line, "fingerprint", sentence)
            why = "its version or a default has changed since, or the file has"
            self.hints[f"{why}; --ignore fingerprint takes it as it is now"] = None
        if key in self.found:
            self.problems.add(line, None, f"the same config as {self.sheet.place} {self.found[key][0]}")
            self.hints["a column that tells them apart may be the seed: --field COLUMN=seed"] = None
            return False
        self.found[key] = (line, summary)
        return True


# ------------------------------------------------------------------------------- in: what the database has already


def _stage_there(engine: Engine | None, stage: str, origin: Origin) -> tuple[StageInfo | None, list[str]]:
    """The stage, where it exists already, and what speaks against adding to it."""
    info = runs.stage_infos(engine).get(stage) if engine is not None else None
    if info is None:
        return None, []
    if info.family != origin.family:
        return None, [f"stage {stage} exists with family {info.family}, not {origin.family}: give another --stage"]
    if info.family_in_source != origin.family_in_source or (origin.family_in_source and info.source != origin.source):
        by = info.source if info.family_in_source else "the installed family"
        return None, [f"stage {stage} exists with family {info.family} of {by}: give another --stage"]
    return info, []


def _kept(origin: Origin, there: StageInfo) -> Origin:
    """A stage keeps the definition that made it, and its rule."""
    if origin.family_in_source:
        return origin
    return replace(origin, has_rule=there.has_rule, source=there.source, source_sha256=there.source_sha256)


def _compare(engine: Engine, there: StageInfo, made: _Maker, problems: _Problems) -> None:
    """Note lines whose config the stage has already, unfinished or with other results."""
    for row in runs.find(engine, there.name):
        line, summary = made.found.get(row["fingerprint"], (0, {}))
        if line and row["state"] != "done":
            problems.add(line, None, f"run {row['id']} of stage {there.name} has this config and is {row['state']}")
            made.hints["give another --stage"] = None
            continue
        for name, number in summary.items():
            was, now = (row["summary"] or {}).get(name), queue.clean(number, name, [])
            if was != now:
                problems.add(line, None, f"run {row['id']} has {name}={was}, the file {now}")
                made.hints["results of a run do not change; give another --stage"] = None
